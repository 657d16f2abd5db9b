from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch.figures.localizers import (
    PLAIN,
    See,
    arrival,
    chance,
    mask_of_area,
    patch_ranks,
    peer,
    pixel_positions,
    sobel_energy,
    squares_from_center,
)
from anchorpatch.jobs.crops import Crops, CropSource
from anchorpatch.jobs.localizer import load_anchornet
from anchorpatch.lsp import grid_size
from anchorpatch.models.bagnet import BagNet
from anchorpatch.models.saccader import Saccader
from anchorpatch.networks import Network, Normalization
from anchorpatch.runtime.checkpoint import WeightsMeta, load_weights
from anchorpatch.settings import SCALES, STRIDE
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


def test_the_first_patch_comes_whole_and_from_its_center():
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
    mask = mask_of_area(pixel_positions(squares_from_center(10)[None]), 0.36)[0]
    assert mask[2:8, 2:8].all()
    assert mask.sum() == 36


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def crops(image_folder: Path) -> Crops:
    source = CropSource.of_folder(image_folder, "val")
    (batch,) = source.batches([3, 11, 27, 35], 8)
    return batch


def first(localize, seen, area: float) -> torch.Tensor:
    return mask_of_area(pixel_positions(localize(seen)), area)


def slow_mask(heatmap: torch.Tensor, scale: int, threshold: float | None, area: float):
    order = slow_order(heatmap.numpy(), scale, threshold)
    times = torch.from_numpy(slow_arrival(order[:12], scale, 224))
    place = times.flatten().argsort(stable=True).argsort(stable=True)
    return (place < round(area * 224**2)).view(224, 224)


def test_anchornet_takes_the_patches_of_the_whole_f(weights: Path, crops: Crops):
    loaded = load_weights(weights)
    seen = See(loaded, CPU)(crops.rows, crops.pixels)
    net = load_anchornet(loaded)
    with torch.inference_mode():
        full = net.full(Normalization(loaded.meta, CPU)(crops.pixels))
    for i in range(len(crops.rows)):
        j = int(seen.decision.branch[i])
        gamma = int(seen.decision.predicted[i])
        heatmap = full[j][i, gamma]
        expected = slow_mask(heatmap, SCALES[j], 0.3, 0.2)
        assert first(PLAIN["anchornet"], seen, 0.2)[i].equal(expected)
        for k, scale in enumerate(SCALES):
            own = full[k][i].mean((1, 2)).argmax()
            expected = slow_mask(full[k][i, own], scale, 0.3, 0.2)
            assert first(PLAIN[f"branch{scale}"], seen, 0.2)[i].equal(expected)


def test_edges_are_found_where_they_are(weights: Path):
    pixels = torch.full((1, 224, 224, 3), 128, dtype=torch.uint8)
    pixels[0, 150:180, 20:50] = torch.randint(
        0, 256, (30, 30, 3), generator=torch.manual_seed(0), dtype=torch.uint8
    )
    seen = See(load_weights(weights), CPU)(np.array([0]), pixels)
    mask = first(PLAIN["sobel"], seen, 0.25)[0]
    assert mask[150:180, 20:50].all()


def test_sobel_energy_is_the_one_worked_out_by_hand():
    pixels = torch.zeros(1, 4, 5, 3, dtype=torch.uint8)
    pixels[0, :, 3:] = 30  # one vertical edge between columns 2 and 3
    energy = sobel_energy(pixels)[0]
    assert energy.tolist() == [[0, 0, (4 * 30.0) ** 2, (4 * 30.0) ** 2, 0]] * 4


def test_chance_depends_on_seed_and_row_and_not_on_the_batch(weights: Path, crops: Crops):
    see = See(load_weights(weights), CPU)
    together = chance(1, see(crops.rows, crops.pixels))
    alone = chance(1, see(crops.rows[2:3], crops.pixels[2:3]))
    assert together[2].equal(alone[0])
    other = chance(2, see(crops.rows, crops.pixels))
    assert not any(a.equal(b) for a, b in zip(together, other, strict=True))


def test_the_center_is_a_square_in_the_middle(weights: Path, crops: Crops):
    seen = See(load_weights(weights), CPU)(crops.rows, crops.pixels)
    mask = first(PLAIN["center"], seen, 0.25)
    assert mask[:, 56:168, 56:168].all()
    assert mask[0].sum() == 112 * 112


def network(module: torch.nn.Module, name: str) -> Network:
    return Network(module.eval(), WeightsMeta(name, ("a", "b", "c")), "test")


def test_a_bagnet_goes_by_the_logits_of_its_class(weights: Path, crops: Crops):
    torch.manual_seed(0)
    net = network(BagNet(33, 3, width=2), "bagnet33")
    seen = See(load_weights(weights), CPU)(crops.rows, crops.pixels)
    with torch.inference_mode():
        logits = net.module.logit_map(Normalization(net.meta, CPU)(crops.pixels))
    mask = first(peer(net, CPU), seen, 0.15)
    for i in range(len(crops.rows)):
        best = logits[i].mean((1, 2)).argmax()
        order = slow_order(logits[i, best].numpy(), 33, None)
        times = torch.from_numpy(slow_arrival(order, 33, 224))
        place = times.flatten().argsort(stable=True).argsort(stable=True).view(224, 224)
        assert mask[i].equal(place < round(0.15 * 224**2))


def test_saccader_takes_its_glimpses_in_their_order(weights: Path, crops: Crops):
    torch.manual_seed(0)
    net = network(Saccader(3, width=2), "saccader")
    seen = See(load_weights(weights), CPU)(crops.rows, crops.pixels)
    with torch.inference_mode():
        maps = net.module.maps(Normalization(net.meta, CPU)(crops.pixels))
        places = net.module.look(maps, 1).places
    mask = first(peer(net, CPU), seen, 77 * 77 / 224**2)
    for i, (place,) in enumerate(places.tolist()):
        y, x = 8 * (place // 19), 8 * (place % 19)
        assert mask[i, y : y + 77, x : x + 77].all()
