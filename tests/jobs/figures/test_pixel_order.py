from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch.jobs.figures.pixel_order import (
    arrival,
    mask_of_area,
    patch_ranks,
    pixel_positions,
    squares_from_centre,
)
from anchorpatch.lsp import grid_size
from anchorpatch.settings import STRIDE
from tests.lsp_oracle import algorithm_1


def slow_order(heatmap: np.ndarray, theta: int, threshold: float | None) -> list[tuple[int, int]]:
    """Patches by activation; first those that Algorithm 1, line by line, accepts."""
    places = [(h, w) for h in range(heatmap.shape[0]) for w in range(heatmap.shape[1])]
    by_activation = sorted(places, key=lambda p: -heatmap[p])
    if threshold is None:
        return by_activation
    found = algorithm_1(heatmap.tolist(), theta, len(places), threshold, 1.0)
    accepted = [(y // STRIDE, x // STRIDE) for (y, x), _ in found]
    return accepted + [place for place in by_activation if place not in set(accepted)]


def slow_arrival(order: list[tuple[int, int]], theta: int, side: int) -> np.ndarray:
    """Walk the patches, and give each pixel that is new its time."""
    times = np.full((side, side), float(len(order)))
    seen = np.zeros((side, side), bool)
    for rank, (h, w) in enumerate(order):
        for y in range(h * STRIDE, h * STRIDE + theta):
            for x in range(w * STRIDE, w * STRIDE + theta):
                if not seen[y, x]:
                    seen[y, x] = True
                    away = max(
                        abs(y - h * STRIDE - (theta - 1) / 2), abs(x - w * STRIDE - (theta - 1) / 2)
                    )
                    times[y, x] = rank + away / (theta / 2)
    return times


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    theta=st.sampled_from([9, 20, 33]),
    side=st.integers(33, 60),
    threshold=st.sampled_from([None, 0.0, 0.3, 0.8, 1.0]),
    levels=st.sampled_from([2, 1000]),
)
def test_ranks_and_arrivals_are_those_of_a_walk_over_the_patches(
    seed: int, theta: int, side: int, threshold: float | None, levels: int
):
    h, w = grid_size(side, side, theta)
    rng = np.random.default_rng(seed)
    heatmaps = rng.integers(0, levels, (3, h, w)).astype(np.float32)
    rank = patch_ranks(torch.from_numpy(heatmaps), theta, threshold)
    times = arrival(rank, theta, side)
    for i in range(3):
        order = slow_order(heatmaps[i], theta, threshold)
        assert [tuple(p) for p in np.argwhere(rank[i].numpy() >= 0)] == sorted(order)
        assert all(rank[i][place] == k for k, place in enumerate(order))
        assert times[i].numpy() == pytest.approx(slow_arrival(order, theta, side), abs=1e-4)


def test_every_area_is_met_to_the_pixel_and_grows_by_inclusion():
    rank = patch_ranks(torch.rand(2, 21, 21, generator=torch.manual_seed(0)), 63, 0.3)
    positions = pixel_positions(arrival(rank, 63, 224))
    before = torch.zeros(2, 224, 224, dtype=torch.bool)
    for area in (0.05, 0.1, 0.5, 0.9, 1.0):
        mask = mask_of_area(positions, area)
        assert mask.flatten(1).sum(1).tolist() == [round(area * 224 * 224)] * 2
        assert (mask | before).equal(mask)
        before = mask


def test_the_first_patch_comes_whole_and_from_its_centre():
    heatmap = torch.zeros(1, 21, 21)
    heatmap[0, 4, 7] = 1
    positions = pixel_positions(arrival(patch_ranks(heatmap, 63, 0.3), 63, 224))
    whole = mask_of_area(positions, 63 * 63 / 224**2)[0]
    expected = torch.zeros(224, 224, dtype=torch.bool)
    expected[32 : 32 + 63, 56 : 56 + 63] = True
    assert whole.equal(expected)
    assert positions[0, 32 + 31, 56 + 31] == 0
    inner = mask_of_area(positions, 21 * 21 / 224**2)[0]
    assert inner[32 + 21 : 32 + 42, 56 + 21 : 56 + 42].all()


def test_squares_grow_from_the_middle():
    mask = mask_of_area(pixel_positions(squares_from_centre(10)[None]), 0.36)[0]
    assert mask[2:8, 2:8].all()
    assert mask.sum() == 36
