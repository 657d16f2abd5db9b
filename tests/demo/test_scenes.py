from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anchorpatch.demo import scenes
from anchorpatch.demo.scenes import (
    CLASSES,
    SIDE,
    SIZES,
    Box,
    draw_scene,
)
from anchorpatch.errors import SettingsError
from anchorpatch.settings import CROP


def test_ten_classes_share_each_cue_between_two() -> None:
    assert len(set(CLASSES)) == 10
    assert list(CLASSES) == sorted(CLASSES)
    cues = Counter(cue for name in CLASSES for cue in name.split("_"))
    assert set(cues.values()) == {2}
    assert len(cues) == 10


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), class_index=st.integers(0, 9), size=st.sampled_from(list(SIZES)))
def test_the_object_lies_in_the_crop_with_its_size(seed: int, class_index: int, size: str) -> None:
    _, target = scenes._begin(seed, class_index, size)
    box = target.bounds
    crop = box.in_crop()
    assert min(crop) >= 0
    assert max(crop) <= CROP
    low, high = SIZES[size]
    longest = max(box.x1 - box.x0, box.y1 - box.y0)
    assert low <= longest <= high + 2  # rounded outwards to whole pixels
    # The textured disc, which the class needs, lies within the outline's box.
    x, y = target.center
    assert box.x0 < x < box.x1
    assert box.y0 < y < box.y1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), class_index=st.integers(0, 9), size=st.sampled_from(list(SIZES)))
def test_the_box_frames_the_painted_object(seed: int, class_index: int, size: str) -> None:
    # The same object on black: what is painted fills the box but for the rim's half width.
    rng, target = scenes._begin(seed, class_index, size)
    side = SIDE * scenes._SUPERSAMPLE
    canvas = Image.new("RGB", (side, side))
    scenes._paint(rng, canvas, target)
    painted = np.asarray(canvas.reduce(scenes._SUPERSAMPLE)).any(2)
    ys, xs = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    seen = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
    tolerance = 2 + 0.035 * target.diameter
    assert np.abs(np.subtract(seen, target.bounds)).max() <= tolerance


def test_distractors_are_single_cues_apart_from_the_object() -> None:
    found = 0
    for seed in range(200):
        class_index = seed % 10
        rng, target = scenes._begin(seed, class_index, "medium")
        for other in scenes._place_distractors(rng, class_index, target):
            found += 1
            assert (other.outline is None) != (other.texture is None)
            assert other.texture != target.texture
            assert np.hypot(*np.subtract(other.center, target.center)) > 0.25 * target.diameter
    assert found > 50


def test_the_same_arguments_draw_the_same_picture() -> None:
    first, box = draw_scene([3, 1, 4], 2, "small")
    again, same_box = draw_scene([3, 1, 4], 2, "small")
    assert first.shape == (SIDE, SIDE, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert box == same_box
    other, _ = draw_scene([3, 1, 5], 2, "small")
    assert (first != other).mean() > 0.9


def test_unknown_class_or_size_is_refused() -> None:
    with pytest.raises(SettingsError, match="class_index: expected 0 to 9, got 10"):
        draw_scene(0, 10, "small")
    with pytest.raises(SettingsError, match="expected one of small, medium, large, got 'tiny'"):
        draw_scene(0, 0, "tiny")


def test_colors_do_not_tell_the_class() -> None:
    # Mean color of the object, by class: the spread between classes is that of chance.
    means = []
    for class_index in range(10):
        pixels = []
        for seed in range(12):
            image, box = draw_scene([seed, class_index], class_index, "medium")
            pixels.append(image[box.y0 : box.y1, box.x0 : box.x1].mean((0, 1)))
        means.append((np.mean(pixels, 0), np.std(pixels, 0) / np.sqrt(12)))
    mean = np.array([m for m, _ in means])
    error = np.array([e for _, e in means])
    assert (np.abs(mean - mean.mean(0)) / error).mean() < 2


def test_boxes_map_to_the_validation_crop() -> None:
    # A white square in the box: the same square at `in_crop` after the center crop.
    box = Box(60, 40, 100, 90)
    image = np.zeros((SIDE, SIDE), np.uint8)
    image[box.y0 : box.y1, box.x0 : box.x1] = 255
    margin = (SIDE - CROP) // 2
    crop = image[margin : margin + CROP, margin : margin + CROP]
    x0, y0, x1, y1 = box.in_crop()
    assert crop[y0:y1, x0:x1].min() == 255
    assert crop.astype(int).sum() == image.astype(int).sum()
