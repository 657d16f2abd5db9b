from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from anchorpatch.errors import SettingsError
from anchorpatch.figures.attention import (
    AttentionConfig,
    AttentionExample,
    AttentionExamples,
    attention_figure,
    find_attention,
    map_extent,
)
from anchorpatch.figures.examples import Example
from anchorpatch.jobs.crops import CropSource
from anchorpatch.jobs.localizer import Localizer, load_anchornet
from anchorpatch.networks import Normalization
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.settings import PRESETS, SCALES

CPU = torch.device("cpu")

NAMES = ("dog/07.JPEG", "cat/11.JPEG", "dog/00.JPEG")

GRIDS = (21, 17, 15)


@pytest.fixture(scope="module")
def loaded(weights: Path) -> Weights:
    return load_weights(weights)


@pytest.fixture(scope="module")
def source(image_folder: Path) -> CropSource:
    return CropSource.of_folder(image_folder, "val")


@pytest.fixture(scope="module")
def found(source: CropSource, loaded: Weights) -> AttentionExamples:
    return find_attention(source, loaded, AttentionConfig(images=NAMES, count=1, device="cpu"))


def full(loaded: Weights, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """F of each branch as the network was trained, nothing folded."""
    with torch.inference_mode():
        return load_anchornet(loaded).full(Normalization(loaded.meta, CPU)(pixels))


def test_maps_are_those_of_the_whole_network(source: CropSource, loaded: Weights):
    """More images than a chunk has, and several classes each, in an order of their own."""
    pixels = source.read(list(range(11, 29))).pixels
    classes = torch.tensor([[i % 2, 1 - i % 2, 1] for i in range(18)])
    with Localizer(loaded, PRESETS["figure"], CPU) as localizer:
        maps = localizer.maps(pixels, classes)
        decided = localizer.submit(pixels).result()
    assert maps.probabilities.shape == (18, 3, 2)
    assert np.array_equal(maps.probabilities.argmax(2), decided.branch_class)
    np.testing.assert_allclose(maps.probabilities.max(2), decided.branch_prob, rtol=1e-6)
    every = torch.arange(18)[:, None]
    for j, whole in enumerate(full(loaded, pixels)):
        expected = whole[every, classes].numpy()
        assert maps.heatmaps[j].shape == (18, 3, GRIDS[j], GRIDS[j])
        largest = np.abs(expected).max((1, 2, 3), keepdims=True)
        # Rounding of the features grows through an exponential.
        assert (np.abs(maps.heatmaps[j] - expected) <= 1e-3 * largest).all()
        np.testing.assert_array_equal(maps.heatmaps[j][1::2, 0], maps.heatmaps[j][1::2, 2])


@pytest.mark.parametrize("weighted_mean", [True, False])
def test_attention_averages_one_and_is_the_networks(
    source: CropSource, loaded: Weights, weighted_mean: bool
):
    """The network's S sums to 1 or to H * W, as its weights say."""
    loaded = replace(loaded, meta=replace(loaded.meta, weighted_mean=weighted_mean))
    pixels = source.read([3, 30]).pixels
    with Localizer(loaded, PRESETS["figure"], CPU) as localizer:
        maps = localizer.maps(pixels, torch.zeros(2, 1, dtype=torch.int64))
    net = load_anchornet(loaded)
    with torch.inference_mode():
        _, features = net.localize(Normalization(loaded.meta, CPU)(pixels))
    for side, s, network in zip(GRIDS, maps.attention, features.attention, strict=True):
        assert s.shape == (2, side, side)
        assert (s >= 0).all()
        np.testing.assert_allclose(s.mean((1, 2)), 1, rtol=1e-4)
        expected = network[:, 0].numpy()
        total = side * side if weighted_mean else 1
        np.testing.assert_allclose(expected.sum((1, 2)), total, rtol=1e-4)
        share = expected / expected.sum((1, 2), keepdims=True) * side * side
        assert (np.abs(s - share) <= 1e-3 * share.max((1, 2), keepdims=True)).all()


def test_named_images_are_shown_in_their_order(found: AttentionExamples, image_folder: Path):
    assert tuple(example.image.path for example in found.examples) == NAMES
    assert (len(found.survey), found.survey.unreadable) == (3, 0)
    assert found.to_json()["source"] == str(image_folder / "val")


def test_heatmaps_are_those_of_the_decided_class(found: AttentionExamples, loaded: Weights):
    pixels = torch.from_numpy(np.stack([example.image.pixels for example in found.examples]))
    whole = full(loaded, pixels)
    for i, example in enumerate(found.examples):
        c = loaded.meta.classes.index(example.image.predicted)
        j = SCALES.index(example.image.scale)
        assert example.branch_class[j] == example.image.predicted
        assert example.branch_prob[j] == pytest.approx(example.image.probability)
        assert example.branch_prob[j] == max(
            p
            for p, name in zip(example.branch_prob, example.branch_class, strict=True)
            if name == example.image.predicted
        )
        for k in range(3):
            expected = whole[k][i, c].numpy()
            assert example.heatmaps[k].shape == expected.shape
            error = np.abs(example.heatmaps[k] - expected).max()
            assert error <= 1e-3 * np.abs(expected).max()


def test_the_strongest_patch_lies_at_the_largest_value_of_its_heatmap(found: AttentionExamples):
    for example in found.examples:
        j = SCALES.index(example.image.scale)
        branch = example.to_json()["branches"][j]
        assert [8 * at for at in branch["heatmap_at"]] == example.image.corners[0].tolist()
        assert branch["heatmap_max"] == pytest.approx(float(example.image.scores[0]), rel=1e-5)


def test_chosen_images_are_spread_over_scales(source: CropSource, loaded: Weights):
    config = AttentionConfig(seed=1, limit=16, count=2, device="cpu")
    found = find_attention(source, loaded, config)
    assert len(found.survey) == 16
    assert len(found.examples) == 2
    assert len({example.image.scale for example in found.examples}) == 2


def test_no_image_at_all_is_refused():
    with pytest.raises(SettingsError, match="count: expected at least one image, got 0"):
        AttentionConfig(count=0)


SIDES = {63: 21, 95: 17, 111: 15}

#: The location (h, w) of each branch that has all the weight, away from any symmetry.
PLACES = {63: (3, 17), 95: (14, 2), 111: (9, 12)}


def one_hot(scale: int, value: float, other: float) -> NDArray[np.float32]:
    values = np.full((SIDES[scale], SIDES[scale]), other, np.float32)
    values[PLACES[scale]] = value
    return values


def make_result(*scales: int, predicted: str = "cat", other: float = 0.5) -> AttentionExamples:
    """A row for each chosen scale."""
    examples = tuple(
        AttentionExample(
            Example(
                *(f"cat/{scale}.JPEG", "cat", predicted, 0.5, scale),
                np.array([[8, 16]], np.int16),
                np.array([1], np.float32),
                np.array([[16.0, 8.0, 79.0, 71.0]]),
                np.full((224, 224, 3), 128, np.uint8),
            ),
            ("cat", "dog", "cat"),
            (0.5, 0.3, 0.4),
            tuple(one_hot(s, SIDES[s] ** 2, other) for s in SCALES),
            tuple(one_hot(s, 3, 0) for s in SCALES),
        )
        for scale in scales
    )
    config = AttentionConfig(count=len(scales))
    return AttentionExamples(config, None, examples)  # type: ignore[arg-type]


def rendered(figure: Figure) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return np.asarray(Image.open(buffer).convert("RGB"))


def at(figure: Figure, pixels: NDArray[np.uint8], panel: int, y: float, x: float) -> list[int]:
    """The color of the rendered figure at a point of a panel's image, in pixels of the crop."""
    figure.set_dpi(100)
    column, row = figure.axes[panel].transData.transform((x, y))
    return pixels[int(len(pixels) - row), int(column)].tolist()


def alike(a: list[int], b: list[int]) -> bool:
    """Equal but for the rounding of blended colors."""
    return bool(np.abs(np.subtract(a, b)).max() <= 2)


def center(scale: int, h: int, w: int) -> tuple[float, float]:
    return 8 * h + scale / 2, 8 * w + scale / 2


@pytest.mark.parametrize("scale", SCALES)
def test_a_location_is_a_cell_around_the_center_of_what_it_sees(scale: int):
    side = SIDES[scale]
    left, right, bottom, top = map_extent(side, side, scale)
    assert ((right - left) / side, (bottom - top) / side) == (8, 8)
    assert (top + 4, left + 4) == center(scale, 0, 0)
    assert (bottom - 4, right - 4) == center(scale, side - 1, side - 1)
    # The last patch ends on the last multiple of 8 px that the crop has room for.
    assert 224 - 8 < right - 4 + scale / 2 <= 224


def test_a_map_that_is_not_square_keeps_its_sides():
    assert map_extent(2, 5, 95) == (43.5, 83.5, 59.5, 43.5)


@pytest.mark.parametrize(("kind", "scale"), [(kind, scale) for kind in (0, 3) for scale in SCALES])
def test_the_brightest_cell_is_painted_where_its_patch_is_centerd(kind: int, scale: int):
    figure = attention_figure(make_result(63))
    pixels = rendered(figure)
    panel = 1 + kind + SCALES.index(scale)
    h, w = PLACES[scale]
    y, x = center(scale, h, w)
    peak = at(figure, pixels, panel, y, x)
    # The whole cell has one color, and no place outside of it has.
    for dy, dx in [(-3, -3), (-3, 3), (3, -3), (3, 3)]:
        assert alike(at(figure, pixels, panel, y + dy, x + dx), peak)
    rest = at(figure, pixels, panel, *center(scale, h - 1, w - 1))
    assert np.abs(np.subtract(peak, rest)).max() > 60
    for dy, dx in [(-5, 0), (5, 0), (0, -5), (0, 5)]:
        assert alike(at(figure, pixels, panel, y + dy, x + dx), rest)
    # Mirrored or transposed it would lie here.
    last = SIDES[scale] - 1
    for place in [(w, h), (last - h, w), (h, last - w)]:
        assert alike(at(figure, pixels, panel, *center(scale, *place)), rest)
    # Around the map the gray image is bare.
    edge = map_extent(SIDES[scale], SIDES[scale], scale)[0]
    assert np.abs(np.subtract(at(figure, pixels, panel, edge - 3, 112), 128)).max() <= 1
    assert alike(at(figure, pixels, panel, edge + 3, 112), rest)


def test_a_weight_of_nothing_can_be_drawn():
    """Attention that is 0 all but everywhere, as float32 rounds a peaked one."""
    figure = attention_figure(make_result(63, other=0))
    pixels = rendered(figure)
    peak = at(figure, pixels, 1, *center(63, *PLACES[63]))
    assert peak != at(figure, pixels, 1, *center(63, 10, 10))


def test_titles_name_the_scales():
    figure = attention_figure(make_result(63, 111))
    assert [axes.get_title() for axes in figure.axes[:7]] == [
        *("", "attention S, 63 px", "attention S, 95 px", "attention S, 111 px"),
        *("heatmap M, 63 px", "heatmap M, 95 px", "heatmap M, 111 px"),
    ]


def test_the_chosen_branch_is_framed_in_its_row():
    chosen = (95, 63, 111)
    figure = attention_figure(make_result(*chosen))
    for row, scale in enumerate(chosen):
        panels = figure.axes[7 * row : 7 * row + 7]
        widths = [{spine.get_linewidth() for spine in p.spines.values()} for p in panels[1:]]
        assert widths == [{2.5 if s == scale else 0.5} for s in SCALES * 2]
    assert panels[1].get_xlabel() == "cat 50%"
    assert panels[2].get_xlabel() == "dog 30%"


def test_a_wrong_decision_is_named():
    right, wrong = (attention_figure(make_result(63, predicted=p)).axes[0] for p in ("cat", "a$b"))
    assert right.get_xlabel() == "cat"
    assert wrong.get_xlabel() == "cat\npredicted a\\$b"


@pytest.mark.parametrize("name", ["German short-haired pointer, " * 3, "m" * 60, "lilw$_{" * 9])
def test_long_names_stay_below_their_panel(name: str):
    figure = attention_figure(make_result(*SCALES, predicted=name))
    figure.set_dpi(100)
    figure.canvas.draw()
    for axis in figure.axes[::7][:3]:
        written = axis.xaxis.label.get_window_extent()
        assert written.width > 100
        assert written.width <= axis.get_window_extent().width + 1
