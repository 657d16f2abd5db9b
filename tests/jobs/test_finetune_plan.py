from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch.jobs.finetune import Plan, Request
from anchorpatch.runtime.distributed import World
from anchorpatch.training.config import LoopConfig

COUNTS = st.dictionaries(st.sampled_from((63, 95, 111)), st.integers(1, 60), min_size=1)


def make_plan(counts: dict[int, int], world: World, steps: int | None = None, **loop: Any) -> Plan:
    config = LoopConfig(**{"folder": Path(), "epochs": 3, "batch_size": 16, **loop})

    def draw(rng: np.random.Generator) -> dict[int, np.ndarray]:
        return {scale: rng.permutation(n) for scale, n in counts.items()}

    return Plan(draw, counts, config, world, steps)


def flat(requests: list[Request]) -> list[tuple]:
    return [(r.key, r.scale, r.rows.tolist(), r.share) for r in requests]


@settings(max_examples=40)
@given(COUNTS, st.integers(1, 4), st.integers(1, 3))
def test_processes_share_the_steps(counts: dict[int, int], size: int, accumulate: int):
    plans = [make_plan(counts, World(rank, size), accumulate=accumulate) for rank in range(size)]
    ranks = [list(plan.pieces(0, 0)) for plan in plans]
    steps, epochs = plans[0].steps_per_epoch, plans[0].config.epochs
    assert [len(requests) for requests in ranks] == [steps * epochs * accumulate] * size
    visited: list[Counter] = [Counter() for _ in range(epochs)]
    for step in range(steps * epochs):
        part = slice(step * accumulate, (step + 1) * accumulate)
        pieces = [request for requests in ranks for request in requests[part]]
        assert len({request.scale for request in pieces}) == 1
        assert len({request.key for request in pieces}) == len(pieces)
        assert abs(sum(request.share for request in pieces) - 1) < 1e-9
        for request in pieces:
            if request.share:
                seen = {(request.scale, row) for row in request.rows.tolist()}
                visited[request.visit].update(seen)
    assert all(set(found.values()) == {1} for found in visited)
    assert [len(found) for found in visited] == [sum(counts.values())] * epochs


@settings(max_examples=40)
@given(COUNTS, st.integers(0, 50), st.sampled_from([None, 5]))
def test_a_plan_goes_on_where_it_stopped(counts: dict[int, int], done: int, steps: int | None):
    plan = make_plan(counts, World(), steps)
    whole = list(plan.pieces(0, 0))
    done = min(done, len(whole) - 1)
    rest = list(plan.pieces(*divmod(done, plan.steps_per_epoch)))
    assert flat(rest) == flat(whole[done:])


def test_epochs_that_are_no_passes():
    plan = make_plan({224: 40}, World(), steps=5, batch_size=10)
    assert (plan.steps_per_pass, plan.rows_per_epoch) == (4, 50)
    requests = list(plan.pieces(0, 0))
    assert [request.visit for request in requests] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 3
    for visit in (0, 1, 2):
        rows = [row for r in requests if r.visit == visit for row in r.rows.tolist()]
        assert sorted(rows) == list(range(40))


def test_order_follows_from_the_seed():
    plans = [make_plan({63: 50}, World(), seed=seed) for seed in (0, 0, 1)]
    first = [flat(list(islice(plan.pieces(0, 0), 3))) for plan in plans]
    assert first[0] == first[1]
    assert [row for *_, row, _ in first[0]] != [row for *_, row, _ in first[2]]
