"""Contact sheets: images with their patches framed, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from anchorpatch.errors import SettingsError
from anchorpatch.figures.canvas import BLACK, fitted, font
from anchorpatch.figures.frames import COLORS, frame
from anchorpatch.storage import write_atomically

__all__ = ["TRUTH", "Tile", "contact_sheet", "save_png"]

#: Colour of the dashed frame of the true box.
TRUTH: Final = (255, 255, 255)

_PAPER: Final = (250, 250, 250)
_ZOOM: Final = 1.5
_GAP: Final = 12
_CAPTION: Final = 22


@dataclass(frozen=True)
class Tile:
    """One image of a sheet.

    Attributes:
        pixels: uint8 (H, W, 3).
        scale: side theta of the patches in pixels.
        corners: top-left (y, x) of the patches, the strongest first (k, 2).
        caption: one short line.
        box: x0, y0, x1, y1 of the true object, where it is known.
    """

    pixels: NDArray[np.uint8]
    scale: int
    corners: ArrayLike
    caption: str = ""
    box: tuple[int, int, int, int] | None = None


def contact_sheet(tiles: Sequence[Tile], columns: int = 3, title: str = "") -> Image.Image:
    """Draw images in rows: the strongest patch with a bold frame, the others with thin ones.

    Args:
        tiles: images of one size.
        columns: images in a row.
        title: one line above all.

    Raises:
        SettingsError: no tile, or no column.
    """
    if not tiles or columns < 1:
        raise SettingsError(
            f"a contact sheet needs a tile and a column, got {len(tiles)} and {columns}"
        )
    drawn = [_draw(tile) for tile in tiles]
    width = max(image.width for image in drawn) + _GAP
    height = max(image.height for image in drawn) + _CAPTION + _GAP
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    top = _GAP + (_CAPTION + _GAP if title else 0)
    sheet = Image.new("RGB", (columns * width + _GAP, top + rows * height), _PAPER)
    draw, face = ImageDraw.Draw(sheet), font()
    face.draw(draw, _GAP, _GAP, fitted(title, sheet.width - 2 * _GAP, face), BLACK)
    for i, (tile, image) in enumerate(zip(tiles, drawn, strict=True)):
        x, y = _GAP + i % columns * width, top + i // columns * height
        face.draw(draw, x, y, fitted(tile.caption, image.width, face), BLACK)
        sheet.paste(image, (x, y + _CAPTION))
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        StorageError: the disk refused.
    """
    write_atomically(path, lambda file: image.save(file, "PNG"))


def _draw(tile: Tile) -> Image.Image:
    source = Image.fromarray(tile.pixels)
    size = (round(source.width * _ZOOM), round(source.height * _ZOOM))
    image = source.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    corners = np.asarray(tile.corners).reshape(-1, 2).tolist()
    # The strongest last, on top of the others.
    for rank, (y, x) in reversed(list(enumerate(corners))):
        box = (x, y, x + tile.scale, y + tile.scale)
        # A bold frame has a dark seam.
        frame(draw, _zoomed(box), COLORS[tile.scale], 2 if rank else 5, 0 if rank else 1)
    if tile.box is not None:
        _dashed(draw, tile.box)
    return image


def _zoomed(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = (round(v * _ZOOM) for v in box)
    return x0, y0, x1, y1


def _dashed(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], dash: int = 6) -> None:
    x0, y0, right, bottom = _zoomed(box)
    x1, y1 = right - 1, bottom - 1
    for k, x in enumerate(range(x0, x1 + 1, dash)):
        for y in (y0, y1):
            ends = (x, y, min(x + dash - 1, x1), y)
            draw.line(ends, fill=BLACK if k % 2 else TRUTH, width=2)
    for k, y in enumerate(range(y0, y1 + 1, dash)):
        for x in (x0, x1):
            ends = (x, y, x, min(y + dash - 1, y1))
            draw.line(ends, fill=BLACK if k % 2 else TRUTH, width=2)
