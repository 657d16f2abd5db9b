from __future__ import annotations

import numpy as np
import pytest

from anchorpatch.figures.frames import MARK, badge, number
from anchorpatch.figures.overlay import patch_figure, patch_sheet, rank_color


def test_patches_in_the_corners_of_the_image_are_framed_whole() -> None:
    corners = np.array([(0, 0), (0, 113), (113, 0), (113, 113)])
    patches = np.zeros((4, 111, 111, 3), np.uint8)
    image = np.zeros((224, 224, 3), np.uint8)
    figure = np.asarray(patch_figure(patches, corners, [4, 3, 2, 1], image=image, zoom=1))
    drawn = figure[6:230, 6:230]
    for rank, (y, x) in enumerate(corners):
        frame = drawn[y : y + 111, x : x + 111]
        color = rank_color(rank, 4)
        for edge in (frame[0], frame[1], frame[-1], frame[:, 0], frame[:, -1]):
            assert (edge == color).all()
        # The number of the patch, in the frame's corner.
        label = frame[3 : 3 + MARK, 3 : 3 + MARK]
        assert np.array_equal(label, badge(number(rank + 1, color)))
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
