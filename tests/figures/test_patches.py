from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from anchorpatch.classes import ClassNames
from anchorpatch.figures.examples import Example
from anchorpatch.figures.frames import (
    COLORS,
    MARK,
    badge,
    draw_frames,
    localized_picture,
    number,
    squares,
)
from anchorpatch.figures.patches import (
    PatchesConfig,
    PatchExamples,
    find_patches,
    patches_figure,
)
from anchorpatch.jobs.crops import CropSource
from anchorpatch.jobs.extract import run
from anchorpatch.jobs.extract_plan import ExtractConfig
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.settings import SCALES
from anchorpatch.shards.reader import ShardReader

#: Of the frames, in pixels; one more inside is dark.
WIDTH = 2


@pytest.fixture(scope="module")
def reader(
    image_folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> ShardReader:
    out = tmp_path_factory.mktemp("shards")
    options = dict(preset="figure", store_images=True, workers=0, device="cpu")
    run(ExtractConfig(image_folder, "val", weights, out, **options))
    return ShardReader(out / "val")


@pytest.fixture(scope="module")
def found(image_folder: Path, weights: Path, reader: ShardReader) -> PatchExamples:
    """Every image of the folder."""
    config = PatchesConfig(seed=3, per_scale=40, device="cpu")
    source = CropSource.of_folder(image_folder, "val")
    return find_patches(source, load_weights(weights), config)


@pytest.fixture(scope="module")
def stored(reader: ShardReader) -> dict[str, int]:
    """Rows of the shards by path."""
    return {path.decode(): row for row, path in enumerate(reader.path.tolist())}


def examples_of(found: PatchExamples) -> list[Example]:
    return [example for of_scale in found.examples.values() for example in of_scale]


def edge(y: int, x: int, side: int, outer: int, inner: int) -> NDArray[np.bool_]:
    """The pixels of a box at (y, x) between ``outer`` and ``inner`` pixels from its edge."""
    mask = np.zeros((224, 224), bool)
    mask[y + outer : y + side - outer, x + outer : x + side - outer] = True
    mask[y + inner : y + side - inner, x + inner : x + side - inner] = False
    return mask


def test_the_figure_has_the_stored_patches_to_the_bit(
    found: PatchExamples, reader: ShardReader, stored: dict[str, int]
):
    assert sorted(example.path for example in examples_of(found)) == sorted(stored)
    assert len(found.survey) == sum(found.survey.by_scale.values()) == len(reader)
    assert len([scale for scale in SCALES if found.survey.by_scale[scale]]) > 1
    for scale, of_scale in found.examples.items():
        assert len(of_scale) == found.survey.by_scale[scale]
        for example in of_scale:
            row = stored[example.path]
            patches = reader.image_patches(row)
            assert example.scale == scale == patches.scale
            assert np.array_equal(example.corners, patches.corners)
            assert np.array_equal(example.scores, patches.scores)
            rows = reader.first[row] + np.arange(len(example.scores))
            assert np.array_equal(example.boxes, reader.source_box(scale, rows))
            assert np.array_equal(example.pixels, reader.image(row))


def test_shards_give_the_same_figure_as_their_images(
    found: PatchExamples, reader: ShardReader, weights: Path
):
    again = find_patches(CropSource.of_shards(reader), load_weights(weights), found.config)
    ours, theirs = found.to_json()["images"], again.to_json()["images"]
    assert ours == theirs


def test_each_frame_is_the_edge_of_the_stored_patch(
    found: PatchExamples, reader: ShardReader, stored: dict[str, int]
):
    """One patch at a time: nothing overlaps, every pixel of the picture is accounted for."""
    drawn = 0
    for example in examples_of(found):
        theta, color = example.scale, COLORS[example.scale]
        patches = reader.image_patches(stored[example.path])
        for corner, patch in zip(patches.corners.tolist(), patches.pixels, strict=True):
            y, x = corner
            picture = np.asarray(localized_picture(example.pixels, np.array([corner]), theta))
            image = picture[:224, :224]
            assert (image[edge(y, x, theta, 0, WIDTH)] == color).all()
            assert (image[edge(y, x, theta, WIDTH, WIDTH + 1)] == 0).all()
            free = np.ones((224, 224), bool)
            free[y : y + theta, x : x + theta] = False
            inside = slice(WIDTH + 1, theta - WIDTH - 1)
            free[y : y + theta, x : x + theta][inside, inside] = True
            top, left = y + WIDTH + 1, x + WIDTH + 1
            free[top : top + MARK, left : left + MARK] = False  # the number
            assert np.array_equal(image[free], example.pixels[free])
            # The frame outside, the patch as it is stored: nothing of it is hidden.
            cut = picture[: theta + 2 * WIDTH, 224 + 2 * WIDTH + MARK :]
            assert cut.shape == (theta + 2 * WIDTH, theta + 2 * WIDTH, 3)
            assert np.array_equal(cut[WIDTH:-WIDTH, WIDTH:-WIDTH], patch)
            assert (cut[[0, 1, -1, -2]] == color).all()
            assert (cut[:, [0, 1, -1, -2]] == color).all()
            drawn += 1
    assert drawn > len(reader)


def test_the_strongest_patch_lies_on_top_and_cut_outs_read_in_rows(found: PatchExamples):
    several = [example for example in examples_of(found) if len(example.corners) > 1]
    assert several
    for example in several:
        theta, corners = example.scale, example.corners.tolist()
        picture = np.asarray(localized_picture(example.pixels, example.corners, theta))
        y, x = corners[0]
        assert (picture[:224, :224][edge(y, x, theta, 0, WIDTH)] == COLORS[theta]).all()
        columns = math.ceil(len(corners) / {63: 3, 95: 2, 111: 2}[theta])
        for rank, (y, x) in enumerate(corners):
            top = WIDTH + rank // columns * (theta + 3 * WIDTH)
            left = 224 + 3 * WIDTH + MARK + rank % columns * (theta + 4 * WIDTH + MARK)
            cut = picture[top : top + theta, left : left + theta]
            assert np.array_equal(cut, example.pixels[y : y + theta, x : x + theta])
            # The number of the frame stands beside the patch.
            label = picture[top - WIDTH :, left - WIDTH - MARK : left - WIDTH][:MARK]
            assert np.array_equal(label, badge(number(rank + 1, COLORS[theta])))


@pytest.mark.parametrize(("theta", "step"), [(63, 24), (63, 8), (95, 16), (111, 8)])
def test_every_frame_has_its_number_however_many_cross(theta: int, step: int):
    """Each mark in a color of its own, whole: no other mark hides a part of it."""
    places = range(0, 224 - theta + 1, step)
    corners = np.array([(y, x) for y in places for x in places])[:20]
    colors = [(10 * i, 255 - 10 * i, 7) for i in range(len(corners))]
    marks = [Image.new("RGBA", (MARK, MARK), color) for color in colors]
    gray = np.full((224, 224, 3), 128, np.uint8)
    frames = squares(corners, theta)
    drawn = np.asarray(draw_frames(gray, frames, [(0, 0, 255)] * len(corners), marks))
    for (y, x), color in zip(corners.tolist(), colors, strict=True):
        of_mark = (drawn == color).all(2)
        assert of_mark.sum() == MARK**2
        assert of_mark[y : y + theta, x : x + theta].sum() == MARK**2


def test_numbers_of_three_digits_stay_in_their_box():
    color = COLORS[63]
    pixels = np.asarray(badge(number(188, color)))
    assert (pixels[:, [0, -1]] == color).all()
    assert not (pixels == color).all()


def test_long_names_keep_their_probability(found: PatchExamples):
    """Shortened in the middle: of the names, nothing else changes."""
    name = "German short-haired pointer, of all of them"
    examples = {s: e[:1] for s, e in found.examples.items()}

    def page(predicted: str, probability: float) -> NDArray[np.uint8]:
        changed = {
            s: tuple(replace(x, predicted=predicted, probability=probability) for x in e)
            for s, e in examples.items()
        }
        return np.asarray(patches_figure(replace(found, examples=changed)))

    long, longer = page(name * 2, 0.5), page(name * 9, 0.5)
    assert np.array_equal(long, longer)
    assert not np.array_equal(long, page(name * 2, 0.75))


def test_a_zoomed_frame_lies_on_the_zoomed_patch():
    pixels = np.full((224, 224, 3), 128, np.uint8)
    color = COLORS[63]
    image = np.asarray(draw_frames(pixels, squares([[8, 160]], 63), [color], zoom=3))
    ys, xs = np.nonzero((image == color).all(2))
    assert image.shape == (672, 672, 3)
    assert (ys.min(), ys.max() + 1) == (3 * 8, 3 * (8 + 63))
    assert (xs.min(), xs.max() + 1) == (3 * 160, 3 * (160 + 63))


def test_frames_at_one_place_lie_within_each_other():
    pixels = np.full((224, 224, 3), 128, np.uint8)
    colors = [COLORS[63], COLORS[95]]
    image = np.asarray(draw_frames(pixels, squares([[16, 32]] * 2, 63), colors))
    assert (image[edge(16, 32, 63, 0, WIDTH)] == colors[0]).all()
    inner = WIDTH + 1
    assert (image[edge(16, 32, 63, inner, inner + WIDTH)] == colors[1]).all()


def test_the_page_shows_every_crop_with_its_frames(found: PatchExamples):
    page = np.asarray(patches_figure(found))
    windows = {
        page[y : y + 224, x : x + 224].tobytes()
        for y, x in _corners_of_crops(page, [e.pixels for e in examples_of(found)])
    }
    for e in examples_of(found):
        picture = np.asarray(localized_picture(e.pixels, e.corners, e.scale))[:224, :224]
        assert picture.tobytes() in windows


def _corners_of_crops(
    page: NDArray[np.uint8], crops: list[NDArray[np.uint8]]
) -> list[tuple[int, int]]:
    """Places of the page whose pixels are those of a crop's unframed lower right corner."""
    packed = (page.astype(np.uint32) * (1, 256, 65536)).sum(2)
    places = []
    for crop in crops:
        last = (crop[-1, -4:].astype(np.uint32) * (1, 256, 65536)).sum(1)
        hit = np.ones(packed[:, 3:].shape, bool)
        for k in range(4):
            hit &= packed[:, k : k + hit.shape[1]] == last[k]
        places += [(int(y) - 223, int(x) - 220) for y, x in np.argwhere(hit)]
    return [(y, x) for y, x in places if y >= 0 and x >= 0]


def test_classes_are_shown_by_their_names(found: PatchExamples):
    config = replace(found.config, class_names=ClassNames({"cat": "Felis catus"}))
    named = replace(found, config=config)
    assert named.to_json()["class_names"] == {"cat": "Felis catus"}
    assert found.to_json() == {**named.to_json(), "class_names": {}}
    shown = {row[1] for row in named.rows()}
    assert shown == {"Felis catus (cat)", "dog"}
    one, other = (np.asarray(patches_figure(result)) for result in (found, named))
    assert one.shape == other.shape
    assert not np.array_equal(one, other)
