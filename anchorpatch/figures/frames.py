"""Frames around patches, and marks that tell them apart without colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
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
    inside their frame where they hide neither frame nor mark, else where they hide no mark, and are
    left out where there is no such place either.

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
    taken, marked = np.zeros((2, picture.height, picture.width), bool)
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
        edge = width + 1
        taken[y0:y1, [*range(x0, x0 + edge), *range(x1 - edge, x1)]] = True
        taken[[*range(y0, y0 + edge), *range(y1 - edge, y1)], x0:x1] = True
    for (x0, y0, x1, y1), mark in zip(boxes, marks, strict=False):
        inner = (x0 + width + 1, y0 + width + 1, x1 - width - 1, y1 - width - 1)
        place = _free(inner, taken, marked)
        if place is not None:
            mark(draw, *place)
            x, y = place
            for mask in (taken, marked):
                mask[y : y + MARK, x : x + MARK] = True
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


def _free(inner: Box, *taken: NDArray[np.bool_]) -> tuple[int, int] | None:
    """Return the left top of a square within a box that is free in the first mask that has one.

    Along the upper edge of the box if possible, else along the lower one, else anywhere.
    """
    x0, y0, x1, y1 = inner
    if min(x1 - x0, y1 - y0) < MARK:
        return None
    for mask in taken:
        windows = sliding_window_view(mask[y0:y1, x0:x1], (MARK, MARK))
        free: NDArray[np.bool_] = np.logical_not(windows.any((2, 3)))
        for y in (0, len(free) - 1, *range(1, len(free) - 1)):
            if free[y].any():
                return x0 + int(free[y].argmax()), y0 + y
    return None
