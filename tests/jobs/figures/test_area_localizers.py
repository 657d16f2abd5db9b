from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anchorpatch.jobs.crops import Crops, ImageSource
from anchorpatch.jobs.figures.area_localizers import (
    See,
    anchornet_localizers,
    centre,
    chance,
    edges,
    peer,
    sobel_energy,
)
from anchorpatch.jobs.figures.pixel_order import mask_of_area, pixel_positions
from anchorpatch.jobs.localizer import load_anchornet, normalize
from anchorpatch.models.bagnet import BagNet
from anchorpatch.models.saccader import Saccader
from anchorpatch.networks import Network
from anchorpatch.runtime.checkpoint import WeightsMeta, load_weights
from anchorpatch.settings import SCALES
from tests.jobs.figures.test_pixel_order import slow_arrival, slow_order

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def crops(image_folder: Path) -> Crops:
    source = ImageSource.of_folder(image_folder, "val")
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
    mean, std = (torch.tensor(x) for x in (loaded.meta.mean, loaded.meta.std))
    with torch.inference_mode():
        full = net.full(normalize(crops.pixels, mean, std))
    localizers = anchornet_localizers(0.3)
    assert list(localizers) == ["anchornet", "branch63", "branch95", "branch111"]
    for i in range(len(crops.rows)):
        j = int(seen.decision.branch[i])
        gamma = int(seen.decision.predicted[i])
        heatmap = full[j][i, gamma]
        expected = slow_mask(heatmap, SCALES[j], 0.3, 0.2)
        assert first(localizers["anchornet"], seen, 0.2)[i].equal(expected)
        for k, scale in enumerate(SCALES):
            own = full[k][i].mean((1, 2)).argmax()
            expected = slow_mask(full[k][i, own], scale, 0.3, 0.2)
            assert first(localizers[f"branch{scale}"], seen, 0.2)[i].equal(expected)


def test_edges_are_found_where_they_are(weights: Path):
    pixels = torch.full((1, 224, 224, 3), 128, dtype=torch.uint8)
    pixels[0, 150:180, 20:50] = torch.randint(
        0, 256, (30, 30, 3), generator=torch.manual_seed(0), dtype=torch.uint8
    )
    seen = See(load_weights(weights), CPU)(np.array([0]), pixels)
    mask = first(edges(0.3), seen, 0.25)[0]
    assert mask[150:180, 20:50].all()


def test_sobel_energy_is_the_one_worked_out_by_hand():
    pixels = torch.zeros(1, 4, 5, 3, dtype=torch.uint8)
    pixels[0, :, 3:] = 30  # one vertical edge between columns 2 and 3
    energy = sobel_energy(pixels)[0]
    assert energy.tolist() == [[0, 0, (4 * 30.0) ** 2, (4 * 30.0) ** 2, 0]] * 4


def test_chance_depends_on_seed_and_row_and_not_on_the_batch(weights: Path, crops: Crops):
    see = See(load_weights(weights), CPU)
    together = chance(1, 0.3)(see(crops.rows, crops.pixels))
    alone = chance(1, 0.3)(see(crops.rows[2:3], crops.pixels[2:3]))
    assert together[2].equal(alone[0])
    other = chance(2, 0.3)(see(crops.rows, crops.pixels))
    assert not any(a.equal(b) for a, b in zip(together, other, strict=True))


def test_the_centre_is_a_square_in_the_middle(weights: Path, crops: Crops):
    seen = See(load_weights(weights), CPU)(crops.rows, crops.pixels)
    mask = first(centre, seen, 0.25)
    assert mask[:, 56:168, 56:168].all()
    assert mask[0].sum() == 112 * 112


def network(module: torch.nn.Module, name: str) -> Network:
    return Network(module.eval(), WeightsMeta(name, ("a", "b", "c")), "test")


def test_a_bagnet_goes_by_the_logits_of_its_class(weights: Path, crops: Crops):
    torch.manual_seed(0)
    net = network(BagNet(33, 3, width=2), "bagnet33")
    seen = See(load_weights(weights), CPU)(crops.rows, crops.pixels)
    mean, std = (torch.tensor(x) for x in (net.meta.mean, net.meta.std))
    with torch.inference_mode():
        logits = net.module.logit_map(normalize(crops.pixels, mean, std))
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
    mean, std = (torch.tensor(x) for x in (net.meta.mean, net.meta.std))
    with torch.inference_mode():
        places = net.module.glimpses(normalize(crops.pixels, mean, std), 1).places
    mask = first(peer(net, CPU), seen, 77 * 77 / 224**2)
    for i, (place,) in enumerate(places.tolist()):
        y, x = 8 * (place // 19), 8 * (place % 19)
        assert mask[i, y : y + 77, x : x + 77].all()
