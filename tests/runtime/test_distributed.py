from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anchorpatch.errors import SettingsError
from anchorpatch.runtime.distributed import World, any_rank, process_group, sum_ranks

CPU = torch.device("cpu")


@given(n=st.integers(0, 200), size=st.integers(1, 9))
def test_every_item_is_exactly_one_process_s(n: int, size: int):
    shares = [list(World(rank, size).share(n)) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(CPU) as world:
        assert world == World(0, 1)
        assert world.is_main
        world.wait()
        assert sum_ranks(torch.tensor([2.0])).tolist() == [2.0]
        assert any_rank(15, CPU) == 15


@pytest.mark.parametrize("rank", [None, "-1", "2"])
def test_ranks_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, rank: str | None):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with (
        pytest.raises(SettingsError, match="start several processes with torchrun"),
        process_group(CPU),
    ):
        pass
