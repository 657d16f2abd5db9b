from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anchorpatch.errors import StorageError
from anchorpatch.figures.canvas import save_picture
from anchorpatch.figures.frames import (
    COLORS,
    MARK,
    TRUTH,
    Tile,
    badge,
    contact_sheet,
    draw_frames,
    number,
    patch_figure,
    patch_sheet,
    rank_color,
)


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


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_a_thin_image_keeps_a_pixel(shape: tuple[int, int]) -> None:
    image, none = np.zeros((*shape, 3), np.uint8), np.zeros((0, 4))
    assert draw_frames(image, none, [], zoom=0.1).size == tuple(
        max(1, n // 10) for n in shape[::-1]
    )


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


def make_tile(scale: int = 63, **changes: object) -> Tile:
    values: dict = dict(
        pixels=np.full((224, 224, 3), 128, np.uint8), scale=scale, corners=[(40, 80), (100, 120)]
    )
    return Tile(**{**values, **changes})


def sheet(*tiles: Tile) -> Image.Image:
    return contact_sheet(tiles, 3, "Patches")


def colors(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(color) for color in np.asarray(image).reshape(-1, 3).tolist()}


@pytest.mark.parametrize("scale", sorted(COLORS))
def test_the_strongest_patch_has_the_bold_frame(scale: int) -> None:
    pixels = np.asarray(sheet(make_tile(scale)))
    framed = (pixels == COLORS[scale]).all(2)
    left, top = 12, 12 + 34 + 22  # margin, title, caption

    def on_left_edge(y: int, x: int) -> int:
        row = top + round((y + scale / 2 + 3) * 1.5)
        start = left + round(x * 1.5)
        return int(framed[row, start : start + 8].sum())

    assert on_left_edge(40, 80) == 5
    assert on_left_edge(100, 120) == 2
    assert not framed[:, :left].any()


def test_the_true_box_is_dashed() -> None:
    image = (12, 68, 12 + 336, 68 + 336)  # the paper around it is white as well
    with_box = sheet(make_tile(box=(20, 30, 90, 70)))
    assert TRUTH in colors(with_box.crop(image))
    assert TRUTH not in colors(sheet(make_tile()).crop(image))
    line = np.asarray(with_box)[68 + 45 : 68 + 47, 12 + 30 : 12 + 134]
    assert 0.3 < (line == TRUTH).all(2).mean() < 0.7


def test_tiles_stand_in_rows_below_the_title() -> None:
    one = sheet(make_tile())
    assert sheet(*[make_tile()] * 2).size == (2 * (one.width - 12) + 12, one.height)
    four = sheet(*[make_tile()] * 4)
    assert four.width == 3 * (one.width - 12) + 12
    assert four.height == 2 * one.height - 12 - 34
    assert (0, 0, 0) in colors(one.crop((0, 0, one.width, 34)))


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    drawn = sheet(make_tile())
    save_picture(drawn, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(drawn))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError):
        save_picture(drawn, tmp_path / "file" / "sheet.png")
