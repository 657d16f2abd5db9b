from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch.jobs.crops import Crops
from anchorpatch.jobs.localizer import Localized
from anchorpatch.jobs.looks import (
    LookCosts,
    Looks,
    confidence,
    joined,
    look_until_sure,
    score_localized,
    score_looks,
)
from anchorpatch.jobs.patch_scores import Distributions
from anchorpatch.settings import CONFIDENCES, SCALES
from anchorpatch.shards import ShardReader
from tests.jobs.patch_shards import Drawn, Spelled, classes_of, meta_of, write_shards

CPU = torch.device("cpu")
COSTS = LookCosts({63: 1.0, 95: 2.0, 111: 3.0}, anchornet=10.0, glance=0.5)

#: Three images, of 3, 1 and 2 looks; the second and the third get right at the last.
TABLE = Looks(
    scale=np.array([63, 95, 111], np.uint8),
    counts=np.array([3, 1, 2]),
    confidence=np.array([[0.5, 0.9, 0.8], [0.2, 0, 0], [0.6, 1.0, 0]]),
    place=np.array([[0, 0, 6], [2, 0, 0], [1, 0, 0]], np.int32),
    predicted=np.zeros((3, 3), np.int32),
)


def test_stops_and_costs_worked_out_by_hand():
    assert TABLE.stops(0.0).tolist() == [1, 1, 1]
    assert TABLE.stops(0.55).tolist() == [2, 1, 1]
    assert TABLE.stops(0.7).tolist() == [2, 1, 2]
    assert TABLE.stops(0.95).tolist() == [3, 1, 2]
    assert TABLE.stops(1.0).tolist() == [3, 1, 2]
    assert TABLE.fixed({63: 2, 95: 5, 111: 1}).tolist() == [2, 1, 1]
    network, every = TABLE.spent(COSTS)
    assert network.tolist() == [[1, 2, 3], [2, 4, 6], [3, 6, 9]]
    assert (every - network == 10).all()
    # The glance is at the whole image, before AnchorNet.
    glance = Looks(**{**vars(TABLE), "glance": True})
    network, every = glance.spent(COSTS)
    assert network.tolist() == [[0.5, 1.5, 2.5], [0.5, 2.5, 4.5], [0.5, 3.5, 6.5]]
    assert (every - network).tolist() == [[0, 10, 10]] * 3


def test_thresholds_for_budgets_worked_out_by_hand():
    # First looks cost 1, 2 and 3, so 12 with AnchorNet's. The first image goes on at 0.5 for 1
    # and at 0.9 for 1 more, the third at 0.6 for 3.
    for budget, threshold, met in (
        (11.9, 0.0, 12.0),  # too little
        (12.0, 0.5, 12.0),
        (12.5, 0.6, 12.0 + 1 / 3),
        (13.4, 0.9, 12.0 + 4 / 3),
        (99.0, 1.0, 12.0 + 5 / 3),
    ):
        found = TABLE.threshold_for(COSTS, budget)
        assert found == pytest.approx((threshold, met)), budget


def test_a_confidence_that_rounds_to_1_does_not_stop_at_1():
    sure = np.array([[1.0, 1.0], [0.3, 0.4]])
    looks = Looks(np.array([63, 63]), np.array([2, 2]), sure, *[np.zeros((2, 2), np.int32)] * 2)
    assert looks.stops(1.0).tolist() == [2, 2]
    assert looks.stops(0.999).tolist() == [1, 2]
    assert looks.threshold_for(COSTS, 99.0) == (1.0, 12.0)
    # Right below 1 the first stops, and the other goes on.
    assert looks.threshold_for(COSTS, 11.6) == (np.nextafter(1, 0), 11.5)
    assert looks.threshold_for(COSTS, 11.4) == (0.3, 11.0)


@st.composite
def tables(draw: st.DrawFn) -> Looks:
    n, width = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = rng.integers(1, width + 1, n)
    counts[0] = width
    # Of few values, so that there are ties.
    sure = rng.integers(0, 11, (n, width)) / 10 * (np.arange(width) < counts[:, None])
    place = rng.integers(0, 8, (n, width)).astype(np.int32)
    scale = rng.choice(SCALES, n).astype(np.uint8)
    return Looks(scale, counts, sure, place, place, draw(st.booleans()))


def mean_cost(looks: Looks, threshold: float) -> float:
    """In plain Python, image by image."""
    total = 0.0
    for i, n in enumerate(looks.counts.tolist()):
        for k in range(n):
            of_patch = k or not looks.glance
            total += COSTS.patch[int(looks.scale[i])] if of_patch else COSTS.glance
            total += COSTS.anchornet if k == looks.glance else 0
            if threshold < 1 and looks.confidence[i, k] >= threshold:
                break
    return total / len(looks.counts)


@settings(max_examples=60, deadline=None)
@given(tables(), st.floats(0, 40))
def test_thresholds_are_the_best_within_a_budget(looks: Looks, budget: float):
    assert (looks.stops(0.0) == 1).all()
    assert (looks.stops(1.0) == looks.counts).all()
    threshold, met = looks.threshold_for(COSTS, budget)
    assert met == pytest.approx(mean_cost(looks, threshold))
    assert met <= budget + 1e-9 or threshold == 0.0
    _, every = looks.spent(COSTS)
    taken = looks.stops(threshold)
    assert met == pytest.approx(every[np.arange(len(taken)), taken - 1].mean())
    more = [t for t in np.arange(0, 1.01, 0.05) if mean_cost(looks, t) > met + 1e-9]
    assert all(mean_cost(looks, t) > budget for t in more) or met > budget


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_confidence_is_from_0_to_1(classes: int):
    means = torch.rand(50, classes, dtype=torch.float64).mul(30).softmax(1)
    means = torch.cat((means, torch.full((1, classes), 1 / classes), torch.eye(classes)))
    for measure in CONFIDENCES:
        found = confidence(means, measure)
        assert found.shape == (len(means),)
        assert float(found.min()) >= 0
        assert float(found[-1]) == 1
        assert float(found.max()) <= 1


# --- looks at shards and at images, against plain Python ----------------------------------


def spelled(classes: int) -> dict[int, Distributions]:
    run = Distributions(Spelled(classes), CPU, meta_of(classes_of(classes)), amp=False)
    return dict.fromkeys(SCALES, run)


def softmax(reds: list[int]) -> list[float]:
    powers = [math.exp(v / 10) for v in reds]
    return [p / sum(powers) for p in powers]


def expected(parts: list[list[float]], label: int) -> list[tuple[float, int, int]]:
    """Confidence, place of the label and class after each look."""
    looks = []
    for k in range(1, len(parts) + 1):
        mean = [sum(column) / k for column in zip(*parts[:k], strict=True)]
        order = sorted(range(len(mean)), key=lambda c: (-mean[c], c))
        looks.append((max(mean), order.index(label), order[0]))
    return looks


def check(looks: Looks, row: int, parts: list[list[float]], label: int) -> None:
    wanted = expected(parts, label)
    assert looks.counts[row] == len(wanted)
    for k, (sure, place, predicted) in enumerate(wanted):
        assert looks.confidence[row, k] == pytest.approx(sure, rel=1e-5)
        assert (looks.place[row, k], looks.predicted[row, k]) == (place, predicted)


def drawn(n: int, classes: int, seed: int) -> list[Drawn]:
    rng = random.Random(seed)
    return [
        Drawn(
            rng.choice(SCALES),
            rng.randrange(classes),
            [rng.sample(range(0, 250, 3), classes) for _ in range(rng.randint(1, 6))],
        )
        for _ in range(n)
    ]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_looks_at_shards_equal_plain_python(size: int, seed: int, glance: bool):
    images = drawn(7, 5, seed)
    firsts = torch.rand(7, 5, dtype=torch.float64, generator=torch.manual_seed(seed)).softmax(1)
    with tempfile.TemporaryDirectory() as root:
        reader = ShardReader(write_shards(Path(root) / "val", images, classes_of(5)))
        rows = np.concatenate([np.flatnonzero(reader.scale == scale) for scale in SCALES])
        looks, alone = score_looks(
            spelled(5),
            reader,
            rows,
            rows,
            batch_size=size,
            measure="max",
            glances=torch.split(firsts[torch.from_numpy(rows)], 2) if glance else None,
        )
    for place, row in enumerate(rows.tolist()):
        parts = [softmax(patch) for patch in images[row].logits]
        check(alone, place, parts, images[row].label)
        first = [firsts[row].tolist()] if glance else []
        check(looks, place, [*first, *parts], images[row].label)
    assert looks.glance == glance


def localized(images: list[Drawn]) -> tuple[Crops, Localized]:
    """Images in memory whose patches spell their logits."""
    n, most = len(images), max(len(image.logits) for image in images)
    pixels = torch.zeros(n, 224, 224, 3, dtype=torch.uint8)
    corners, counts = np.zeros((n, most, 2), np.int16), [len(image.logits) for image in images]
    for i, image in enumerate(images):
        for k, reds in enumerate(image.logits):
            pixels[i, k, : len(reds), 0] = torch.tensor(reds, dtype=torch.uint8)
            corners[i, k] = k, 0
    none = np.zeros((n, 3))
    scale = np.array([image.scale for image in images], np.uint8)
    found = Localized(none, none, none[:, 0], scale, np.array(counts), corners, none)
    labels = np.array([image.label for image in images])
    return Crops(np.arange(n), pixels, labels, np.full((n, 2), 224)), found


@pytest.mark.parametrize("glance", [False, True])
@pytest.mark.parametrize("measure", CONFIDENCES)
def test_what_really_stops_decides_as_the_table(glance: bool, measure: str):
    images = drawn(40, 4, seed=3)
    firsts = torch.rand(40, 4, dtype=torch.float64, generator=torch.manual_seed(1)).softmax(1)
    batches = [localized(images[:25]), localized(images[25:])]
    begun = iter((firsts[:25], firsts[25:]))
    look = (lambda pixels: next(begun)) if glance else None
    looks = joined(score_localized(spelled(4), batches, batch_size=7, measure=measure, glance=look))
    if measure == "max":
        for i, image in enumerate(images):
            parts = [softmax(patch) for patch in image.logits]
            check(looks, i, [*([firsts[i].tolist()] if glance else []), *parts], image.label)
    crops, found = localized(images)
    seen: list[int] = []
    runs = spelled(4)
    counted = {
        scale: lambda pixels, run=run: (seen.append(len(pixels)), run(pixels))[1]
        for scale, run in runs.items()
    }
    for each in counted.values():
        each.meta = runs[63].meta
    for threshold in (0.0, 0.4, 0.7, 0.95, 1.0):
        taken = looks.stops(threshold)
        if glance:
            # Those that the glance has decided are not looked at again.
            going = np.flatnonzero(taken > 1) if threshold < 1 else np.arange(40)
        else:
            going = np.arange(40)
        if not len(going):
            continue
        part = Localized(*(array[going] for array in found))
        seen.clear()
        means, patches = look_until_sure(
            counted,
            part,
            crops.pixels[torch.from_numpy(going)],
            5,
            threshold,
            measure,
            firsts[torch.from_numpy(going)] if glance else None,
        )
        assert (patches + glance == taken[going]).all()
        assert sum(seen) == patches.sum()  # the others are not computed
        assert means.argmax(1).tolist() == looks.predicted[going, taken[going] - 1].tolist()
