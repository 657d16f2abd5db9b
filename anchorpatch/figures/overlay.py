"""Pictures of patches: frames on the image they are from, and the patches side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from math import ceil
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from anchorpatch.figures.canvas import font, rounded
from anchorpatch.figures.frames import draw_frames, enlarged, number

__all__ = ["patch_figure", "patch_sheet", "rank_color"]

_BACKGROUND: Final = (255, 255, 255)
_TEXT: Final = (32, 32, 32)
_GAP: Final = 6
_LINE: Final = 18
_FRAME: Final = 2

#: Side that a sheet of patches aims at, in pixels: that of the crop, twice enlarged.
_SHEET_HEIGHT: Final = 448


def rank_color(rank: int, count: int) -> tuple[int, int, int]:
    """Return the colour of a patch, from yellow for the strongest to blue for the weakest.

    Example:
        >>> rank_color(0, 5), rank_color(4, 5)
        ((255, 229, 0), (31, 31, 255))
    """
    share = rank / max(1, count - 1)
    # Through red and purple: apart from each other, and from most of what photographs show.
    hue = (0.15 - 0.48333 * share) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 1.0 - 0.12 * share, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def patch_sheet(
    patches: NDArray[np.uint8], scores: Sequence[float] | NDArray[Any], *, zoom: int = 1
) -> Image.Image:
    """Lay patches out in rows, the strongest first, each with its rank and score.

    Args:
        patches: uint8 (k, theta, theta, 3).
        scores: activation of each (k,).
        zoom: enlarge the patches so many times.
    """
    count, theta = len(patches), patches.shape[1]
    side = theta * zoom + 2 * _FRAME
    cell = (side + _GAP, side + _LINE + _GAP)
    rows = max(1, min(count, round(_SHEET_HEIGHT / cell[1])))
    columns = max(1, -(-count // rows))
    sheet = Image.new("RGB", (columns * cell[0] - _GAP, rows * cell[1] - _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for rank in range(count):
        x, y = rank % columns * cell[0], rank // columns * cell[1]
        font().draw(draw, x, y, f"{rank + 1}:  {rounded(float(scores[rank]))}", _TEXT)
        y += _LINE
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=rank_color(rank, count))
        sheet.paste(enlarged(patches[rank], zoom), (x + _FRAME, y + _FRAME))
    return sheet


def patch_figure(
    patches: NDArray[np.uint8],
    corners: NDArray[Any],
    scores: Sequence[float] | NDArray[Any],
    *,
    image: NDArray[np.uint8] | None = None,
    caption: str = "",
    zoom: int = 2,
) -> Image.Image:
    """Show the patches of an image, numbered, beside the image with their frames, if at hand.

    Args:
        patches: uint8 (k, theta, theta, 3), the strongest first.
        corners: top-left (y, x) of each in the image, in pixels (k, 2).
        scores: activation of each (k,).
        image: uint8 (H, W, 3).
        caption: one line above.
        zoom: enlarge everything so many times.
    """
    parts = []
    if image is not None:
        colors = [rank_color(rank, len(corners)) for rank in range(len(corners))]
        marks = [number(rank + 1, color) for rank, color in enumerate(colors)]
        side = patches.shape[1]
        parts.append(draw_frames(image, corners, side, colors, marks, zoom=zoom, width=_FRAME))
    parts.append(patch_sheet(patches, scores, zoom=zoom))
    top = _GAP + (_LINE + _GAP if caption else 0)
    needed = ceil(font().width(caption)) + 2 * _GAP
    width = max(needed, sum(part.width for part in parts) + _GAP * (len(parts) + 1))
    height = max(part.height for part in parts) + top + _GAP
    figure = Image.new("RGB", (width, height), _BACKGROUND)
    font().draw(ImageDraw.Draw(figure), _GAP, _GAP, caption, _TEXT)
    x = _GAP
    for part in parts:
        figure.paste(part, (x, top))
        x += part.width + _GAP
    return figure
