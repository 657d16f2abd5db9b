"""Frames around patches, and marks that tell them apart without colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from anchorpatch.figures.canvas import BLACK, PAPER, Color, font

__all__ = [
    "COLORS",
    "MARK",
    "Box",
    "Mark",
    "badge",
    "cross",
    "draw_frames",
    "enlarged",
    "frame",
    "framed",
    "number",
    "tick",
]

#: Left, top, right, bottom in pixels; right and bottom lie outside.
Box = tuple[int, int, int, int]

#: Draws a mark with its top left corner at (x, y).
Mark = Callable[[ImageDraw.ImageDraw, int, int], None]

#: Colour of the frames by scale: three of Okabe and Ito's, apart for the colour-blind too.
COLORS: Final = {63: (86, 180, 233), 95: (240, 228, 66), 111: (213, 94, 0)}

#: Side of a mark in pixels.
MARK: Final = 15


def enlarged(pixels: NDArray[np.uint8], zoom: int) -> Image.Image:
    """Return a picture so many times as large."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    size = (picture.width * zoom, picture.height * zoom)
    return picture if zoom == 1 else picture.resize(size, Image.Resampling.BICUBIC)


def frame(draw: ImageDraw.ImageDraw, box: Box, color: Color, width: int, seam: int = 0) -> None:
    """Paint the outermost ``width`` pixels of a box, and a dark seam of ``seam`` inside them.

    With the seam a frame shows on any ground.
    """
    x0, y0, x1, y1 = box
    if seam:
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=BLACK, width=width + seam)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=color, width=width)


def framed(pixels: NDArray[np.uint8], color: Color, width: int = 3) -> Image.Image:
    """Return a patch with a margin around it; no pixel of the patch is hidden."""
    height, length = pixels.shape[:2]
    picture = Image.new("RGB", (length + 2 * width, height + 2 * width), color)
    picture.paste(Image.fromarray(np.ascontiguousarray(pixels)), (width, width))
    return picture


def draw_frames(
    pixels: NDArray[np.uint8],
    corners: NDArray[Any],
    theta: int,
    colors: Sequence[Color],
    marks: Sequence[Mark] = (),
    *,
    zoom: int = 1,
    width: int = 2,
) -> Image.Image:
    """Frame patches in their image, each with a mark; the first lies on top.

    A frame is the outermost ``width`` pixels of the patch itself, with a dark seam of one pixel
    inside; that of a patch at the place of an earlier one lies within the latter's. Marks stand
    inside their frame where they hide no other, and are left out where there is no such place.

    Args:
        pixels: uint8 (H, W, 3).
        corners: top-left (y, x) of each patch in pixels (k, 2).
        theta: side of the patches in pixels.
        colors: of the frames (k).
        marks: of the patches (k), or none at all.
        zoom: enlarge the picture so many times.
        width: of the frames, in pixels of the enlarged picture.
    """
    picture = enlarged(pixels, zoom)
    draw = ImageDraw.Draw(picture)
    taken = Image.new("1", picture.size)
    mask = ImageDraw.Draw(taken)
    side = theta * zoom
    boxes: list[Box] = []
    places = [tuple(corner) for corner in np.asarray(corners).tolist()]
    for rank, (y, x) in enumerate(places):
        inset = places[:rank].count((y, x)) * (width + 1)
        left, top = x * zoom + inset, y * zoom + inset
        boxes.append((left, top, left + side - 2 * inset, top + side - 2 * inset))
    for box, color in reversed(list(zip(boxes, colors, strict=True))):
        frame(draw, box, color, width, seam=1)
        x0, y0, x1, y1 = box
        mask.rectangle((x0, y0, x1 - 1, y1 - 1), outline=1, width=width + 1)
    for (x0, y0, x1, y1), mark in zip(boxes, marks, strict=False):
        inner = (x0 + width + 1, y0 + width + 1, x1 - width - 1, y1 - width - 1)
        place = _free(inner, np.asarray(taken))
        if place is not None:
            mark(draw, *place)
            mask.rectangle((*place, place[0] + MARK - 1, place[1] + MARK - 1), fill=1)
    return picture


def badge(mark: Mark) -> Image.Image:
    """Return a mark as a picture of its own."""
    picture = Image.new("RGB", (MARK, MARK), PAPER)
    mark(ImageDraw.Draw(picture), 0, 0)
    return picture


def number(value: int, color: Color) -> Mark:
    """Return a mark that shows a number, dark on a light colour and light on a dark one."""
    return partial(_number, value, color)


def tick(color: Color) -> Mark:
    """Return a mark that shows a tick, white on a colour."""
    return partial(_sign, color, [[(3, 8), (6, 11), (11, 4)]])


def cross(color: Color) -> Mark:
    """Return a mark that shows a cross, white on a colour."""
    return partial(_sign, color, [[(4, 4), (10, 10)], [(4, 10), (10, 4)]])


def _number(value: int, color: Color, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    draw.rectangle((x, y, x + MARK - 1, y + MARK - 1), fill=color)
    middle = (x + MARK / 2, y + MARK / 2)
    face = font(11 if value < 100 else 6, bold=True).face
    light = (299 * color[0] + 587 * color[1] + 114 * color[2]) / 1000
    draw.text(middle, str(value), BLACK if light > 100 else PAPER, face, anchor="mm")


def _sign(
    color: Color,
    strokes: Sequence[Sequence[tuple[int, int]]],
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
) -> None:
    draw.ellipse((x, y, x + MARK - 1, y + MARK - 1), fill=color)
    for stroke in strokes:
        draw.line([(x + dx, y + dy) for dx, dy in stroke], fill=PAPER, width=2, joint="curve")


def _free(inner: Box, taken: NDArray[np.bool_]) -> tuple[int, int] | None:
    """Return the left top of a free square along the upper edge of a box, else the lower one."""
    x0, y0, x1, y1 = inner
    for y in (y0, y1 - MARK):
        for x in range(x0, x1 - MARK + 1):
            if not taken[y : y + MARK, x : x + MARK].any():
                return x, y
    return None
