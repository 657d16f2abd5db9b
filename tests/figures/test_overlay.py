from __future__ import annotations

import numpy as np
import pytest

from anchorpatch.figures.overlay import draw_boxes, patch_figure, patch_sheet, rank_color


@pytest.mark.parametrize("zoom", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2])
def test_a_box_is_the_outermost_pixels_of_its_patch(zoom: int, width: int) -> None:
    image = np.full((224, 224, 3), 128, np.uint8)
    y, x, theta = 40, 96, 63
    drawn = np.asarray(draw_boxes(image, np.array([(y, x)]), theta, zoom=zoom, width=width))
    assert drawn.shape == (224 * zoom, 224 * zoom, 3)
    expected = np.full_like(drawn, 128)
    top, left, side = y * zoom, x * zoom, theta * zoom
    expected[top : top + side, left : left + side] = rank_color(0, 1)
    inner = slice(top + width, top + side - width), slice(left + width, left + side - width)
    expected[inner] = 128
    np.testing.assert_array_equal(drawn, expected)


def test_patches_in_the_corners_of_the_image_are_framed_whole() -> None:
    corners = np.array([(0, 0), (0, 113), (113, 0), (113, 113)])
    drawn = np.asarray(draw_boxes(np.zeros((224, 224, 3), np.uint8), corners, 111))
    for rank, (y, x) in enumerate(corners):
        frame = drawn[y : y + 111, x : x + 111]
        color = rank_color(rank, 4)
        for edge in (frame[0], frame[-1], frame[:, 0], frame[:, -1]):
            assert (edge == color).all()


def test_the_strongest_lies_on_top() -> None:
    corners = np.array([(8, 8), (8, 8), (8, 8)])
    drawn = np.asarray(draw_boxes(np.zeros((224, 224, 3), np.uint8), corners, 63))
    assert tuple(drawn[8, 8]) == rank_color(0, 3)


def test_drawing_leaves_the_pixels_alone() -> None:
    image = np.zeros((224, 224, 3), np.uint8)
    draw_boxes(image, np.array([(0, 0)]), 63)
    assert not image.any()


@pytest.mark.parametrize(("theta", "count"), [(63, 24), (95, 10), (111, 8), (63, 1)])
def test_a_sheet_holds_every_patch_once(theta: int, count: int) -> None:
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (count, theta, theta, 3), dtype=np.uint8)
    sheet = np.asarray(patch_sheet(patches, np.linspace(9, 1, count)))
    windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], theta, axis=1)
    places = []
    for patch in patches:
        rows, columns = np.nonzero((windows == patch[0, :, 0]).all(-1))
        assert len(rows) == 1
        y, x = int(rows[0]), int(columns[0])
        np.testing.assert_array_equal(sheet[y : y + theta, x : x + theta], patch)
        places.append((y, x))
    assert places == sorted(places)  # row by row, the strongest first


def test_colors_tell_ranks_apart() -> None:
    assert len({rank_color(rank, 24) for rank in range(24)}) == 24
    assert rank_color(0, 1) == rank_color(0, 24)


def test_a_figure_shows_image_and_patches_side_by_side() -> None:
    image = np.full((224, 224, 3), 77, np.uint8)
    patches = np.full((2, 95, 95, 3), 77, np.uint8)
    corners = np.array([(0, 8), (64, 64)])
    beside = patch_figure(patches, corners, [2.0, 1.0], image=image, caption="a/b.jpg")
    alone = patch_figure(patches, corners, [2.0, 1.0], caption="a/b.jpg")
    bare = patch_figure(patches, corners, [2.0, 1.0])
    assert beside.width - 448 - 6 == patch_sheet(patches, [2.0, 1.0], zoom=2).width + 12
    assert beside.width > alone.width
    assert alone.height > bare.height
    long = patch_figure(patches, corners, [2.0, 1.0], caption="a long name " * 40)
    assert long.width > 2000
