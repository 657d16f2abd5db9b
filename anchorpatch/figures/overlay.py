"""Pictures of patches: boxes on the image they are from, and the patches side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from anchorpatch.figures.frames import enlarged, frame

__all__ = ["draw_boxes", "patch_figure", "patch_sheet", "rank_color"]

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


def draw_boxes(
    pixels: NDArray[np.uint8],
    corners: NDArray[Any],
    theta: int,
    *,
    zoom: int = 1,
    width: int = 1,
) -> Image.Image:
    """Frame patches in their image; the strongest, which come first, lie on top.

    The frame is the outermost ``width`` pixels of the patch itself.

    Args:
        pixels: uint8 (H, W, 3).
        corners: top-left (y, x) of each patch in pixels (k, 2), the strongest first.
        theta: side of the patches in pixels.
        zoom: enlarge the picture so many times.
        width: of the frames, in pixels of the enlarged picture.
    """
    picture = enlarged(pixels, zoom)
    draw = ImageDraw.Draw(picture)
    boxes = [(x * zoom, y * zoom) for y, x in np.asarray(corners).tolist()]
    side = theta * zoom
    for rank in reversed(range(len(boxes))):
        x, y = boxes[rank]
        frame(draw, (x, y, x + side, y + side), rank_color(rank, len(boxes)), width)
    return picture


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
        draw.text((x, y), f"{rank + 1}:  {float(scores[rank]):.3g}", _TEXT, _font())
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
    """Show the patches of an image beside the image, where it is at hand.

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
        parts.append(draw_boxes(image, corners, patches.shape[1], zoom=zoom, width=_FRAME))
    parts.append(patch_sheet(patches, scores, zoom=zoom))
    top = _GAP + (_LINE + _GAP if caption else 0)
    needed = round(_font().getlength(caption)) + 2 * _GAP
    width = max(needed, sum(part.width for part in parts) + _GAP * (len(parts) + 1))
    height = max(part.height for part in parts) + top + _GAP
    figure = Image.new("RGB", (width, height), _BACKGROUND)
    ImageDraw.Draw(figure).text((_GAP, _GAP), caption, _TEXT, _font())
    x = _GAP
    for part in parts:
        figure.paste(part, (x, top))
        x += part.width + _GAP
    return figure


def _font() -> Any:
    return ImageFont.load_default(14)
