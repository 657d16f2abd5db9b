from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anchorpatch.errors import SettingsError, StorageError
from anchorpatch.figures.frames import COLORS
from anchorpatch.figures.sheet import TRUTH, Tile, contact_sheet, save_png


def make_tile(scale: int = 63, **changes: object) -> Tile:
    values: dict = dict(
        pixels=np.full((224, 224, 3), 128, np.uint8), scale=scale, corners=[(40, 80), (100, 120)]
    )
    return Tile(**{**values, **changes})


def colors(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(color) for color in np.asarray(image).reshape(-1, 3).tolist()}


@pytest.mark.parametrize("scale", sorted(COLORS))
def test_the_strongest_patch_has_the_bold_frame(scale: int) -> None:
    pixels = np.asarray(contact_sheet([make_tile(scale)]))
    framed = (pixels == COLORS[scale]).all(2)
    left, top = 12, 12 + 22  # margin, caption

    def on_left_edge(y: int, x: int) -> int:
        row = top + round((y + scale / 2 + 3) * 1.5)
        start = left + round(x * 1.5)
        return int(framed[row, start : start + 8].sum())

    assert on_left_edge(40, 80) == 5
    assert on_left_edge(100, 120) == 2
    assert not framed[:, :left].any()


def test_the_true_box_is_dashed() -> None:
    with_box = contact_sheet([make_tile(box=(20, 30, 90, 70))])
    assert TRUTH in colors(with_box)
    assert TRUTH not in colors(contact_sheet([make_tile()]))
    line = np.asarray(with_box)[34 + 45 : 34 + 47, 12 + 30 : 12 + 134]
    assert 0.3 < (line == TRUTH).all(2).mean() < 0.7


def test_tiles_stand_in_rows_below_the_title() -> None:
    one = contact_sheet([make_tile()])
    assert contact_sheet([make_tile()] * 2, columns=3).size == (
        2 * (one.width - 12) + 12,
        one.height,
    )
    four = contact_sheet([make_tile()] * 4, columns=3)
    assert four.width == 3 * (one.width - 12) + 12
    assert four.height == 2 * one.height - 12
    titled = contact_sheet([make_tile(caption="disc")], title="Patches")
    assert titled.height == one.height + 34
    assert (0, 0, 0) in colors(titled.crop((0, 0, titled.width, 34)))


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs a tile and a column, got 0 and 3"):
        contact_sheet([])


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    sheet = contact_sheet([make_tile()])
    save_png(sheet, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(sheet))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError):
        save_png(sheet, tmp_path / "file" / "sheet.png")
