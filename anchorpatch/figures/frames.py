"""Images with their patches: framed where they lie, marked without color too, and cut out beside.

One pixel of a picture is one of the image, times ``zoom``.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from anchorpatch.figures.canvas import (
    BLACK,
    PAPER,
    Color,
    Font,
    beside,
    bordered,
    rounded,
    small,
    stacked,
    tiled,
    written,
)

#: Left, top, right, bottom in pixels; right and bottom lie outside.
Box = tuple[int, int, int, int]

#: Color of the frames by scale: three of Okabe and Ito's, apart for the color-blind too.
COLORS: Final = {63: (86, 180, 233), 95: (240, 228, 66), 111: (213, 94, 0)}

#: Color of the dashed frame of the true box.
TRUTH: Final = (255, 255, 255)

#: Side of a mark in pixels.
MARK: Final = 15

#: Width of a frame in pixels.
_FRAME: Final = 2

#: How many times a contact sheet enlarges its images.
_ZOOM: Final = 1.5

#: Length of a dash in pixels.
_DASH: Final = 6

#: Height that a sheet of patches aims at, in pixels: that of the crop, twice enlarged.
_SHEET_HEIGHT: Final = 448


# --- pictures -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """One image of a contact sheet.

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
    box: Box | None = None


def contact_sheet(tiles: Sequence[Tile], columns: int, title: str) -> Image.Image:
    """Draw images in rows: the strongest patch with a bold frame, the others with thin ones.

    Args:
        tiles: images of one size, one at least.
        columns: images in a row.
        title: one line above all.
    """
    cells = []
    for tile in tiles:
        corners = np.asarray(tile.corners).reshape(-1, 2)
        colors = [COLORS[tile.scale]] * len(corners)
        boxes = squares(corners, tile.scale)
        image = draw_frames(tile.pixels, boxes, colors, zoom=_ZOOM, bold=True)
        if tile.box is not None:
            _dash(ImageDraw.Draw(image), _zoomed(tile.box, _ZOOM))
        cells.append(stacked([written(tile.caption, image.width), image], 4))
    sheet = tiled(cells, columns, 12)
    return bordered(stacked([written(title, sheet.width), sheet], 16), 12)


def patch_figure(
    patches: NDArray[np.uint8],
    corners: NDArray[Any],
    scores: Sequence[float] | NDArray[Any],
    *,
    image: NDArray[np.uint8] | None = None,
    boxes: NDArray[Any] | None = None,
    caption: str = "",
    zoom: int = 2,
) -> Image.Image:
    """Show the patches of an image, numbered, beside the image with their frames, if at hand.

    Args:
        patches: uint8 (k, theta, theta, 3), the strongest first.
        corners: top-left (y, x) of each in the crop, in pixels (k, 2).
        scores: activation of each (k,).
        image: uint8 (H, W, 3), the crop, or the picture that it was taken from.
        boxes: x0, y0, x1, y1 of each in that picture, which is drawn about as large as a crop
            (k, 4); None where ``image`` is the crop.
        caption: one line above.
        zoom: enlarge everything so many times.
    """
    parts = [patch_sheet(patches, scores, zoom=zoom)]
    if image is not None:
        colors = [rank_color(rank, len(corners)) for rank in range(len(corners))]
        marks = [number(rank + 1, color) for rank, color in enumerate(colors)]
        size = float(zoom)
        if boxes is None:
            boxes = squares(corners, patches.shape[1])
        else:
            high, wide = image.shape[:2]
            size = zoom * _SHEET_HEIGHT / 2 / max(high, wide / 2)
        parts.insert(0, draw_frames(image, boxes, colors, marks, zoom=size))
    picture = beside(parts, 6)
    return bordered(stacked([written(caption, None), picture], 6) if caption else picture, 6)


def patch_sheet(
    patches: NDArray[np.uint8], scores: Sequence[float] | NDArray[Any], *, zoom: int = 1
) -> Image.Image:
    """Lay patches out in rows, the strongest first, each with its rank and score.

    Args:
        patches: uint8 (k, theta, theta, 3).
        scores: activation of each (k,).
        zoom: enlarge the patches so many times.
    """
    cells = []
    for rank, (patch, score) in enumerate(zip(patches, scores, strict=True)):
        text = written(f"{rank + 1}:  {rounded(float(score))}", None)
        color = rank_color(rank, len(patches))
        cells.append(stacked([text, cut_out(patch, (0, 0), len(patch), color, zoom)], 0))
    rows = max(1, min(len(cells), round(_SHEET_HEIGHT / (cells[0].height + 6))))
    return tiled(cells, -(-len(cells) // rows), 6)


def localized_picture(
    pixels: NDArray[np.uint8], corners: NDArray[Any], theta: int, *, note: str = ""
) -> Image.Image:
    """Draw an image with its patches framed and numbered, and cut out beside it, in rows.

    Args:
        pixels: the crop, uint8 (S, S, 3).
        corners: top-left (y, x) of each patch in pixels (k, 2), the strongest first.
        theta: side of the patches in pixels.
        note: a line below the image.
    """
    color = COLORS[theta]
    marks = [number(rank + 1, color) for rank in range(len(corners))]
    image = draw_frames(pixels, squares(corners, theta), [color] * len(corners), marks)
    # The number stands beside the patch: no pixel of it is hidden.
    cuts = [
        beside([badge(mark), cut_out(pixels, corner, theta, color)], 0)
        for mark, corner in zip(marks, np.asarray(corners).tolist(), strict=True)
    ]
    most = max(1, round(len(pixels) / (theta + 3 * _FRAME)))  # rows beside the image
    if note:
        image = stacked([image, small(note, image.width)], _FRAME)
    columns = -(-len(cuts) // most)
    return beside([image, tiled(cuts, columns, 2 * _FRAME, down=_FRAME)], 2 * _FRAME)


def heading(scale: int, text: str) -> Image.Image:
    """Return the line above a block: the color and the name of a scale, and a text."""
    swatch = Image.new("RGB", (16, 16), COLORS[scale])
    name = written(f"{scale} px", None, size=16, bold=True)
    return beside([swatch, name, small(text, None, 15)])


def rank_color(rank: int, count: int) -> Color:
    """Return the color of a patch, from yellow for the strongest to blue for the weakest.

    Example:
        >>> rank_color(0, 5), rank_color(4, 5)
        ((255, 229, 0), (31, 31, 255))
    """
    share = rank / max(1, count - 1)
    # Through red and purple: apart from each other, and from most of what photographs show.
    hue = (0.15 - 0.48333 * share) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 1.0 - 0.12 * share, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


# --- frames -------------------------------------------------------------------------------


def squares(corners: ArrayLike, theta: int) -> NDArray[Any]:
    """Return the boxes x0, y0, x1, y1 (k, 4) of patches with corners (y, x) (k, 2) in a crop."""
    first = np.asarray(corners).reshape(-1, 2)[:, ::-1]
    return np.concatenate((first, first + theta), axis=1)


def cut_out(
    pixels: NDArray[np.uint8],
    corner: Sequence[int],
    theta: int,
    color: Color,
    zoom: int = 1,
    width: int = _FRAME,
) -> Image.Image:
    """Return a patch of an image with a margin around it; no pixel of the patch is hidden."""
    y, x = corner
    patch = _enlarged(pixels[y : y + theta, x : x + theta], zoom)
    picture = Image.new("RGB", (patch.width + 2 * width, patch.height + 2 * width), color)
    picture.paste(patch, (width, width))
    return picture


def draw_frames(
    pixels: NDArray[np.uint8],
    patches: NDArray[Any],
    colors: Sequence[Color],
    marks: Sequence[Image.Image] = (),
    *,
    zoom: float = 1,
    width: int = _FRAME,
    bold: bool = False,
) -> Image.Image:
    """Frame patches in their image, each with a mark; the first lies on top.

    A frame is the outermost ``width`` pixels of the patch itself, with a dark seam of one pixel
    inside, so that it shows on any ground; that of a patch at the place of an earlier one lies
    within the latter's. Marks stand inside their frame where they hide neither frame nor mark,
    else where they hide no mark, and are left out where there is no such place either.

    Args:
        pixels: uint8 (H, W, 3).
        patches: x0, y0, x1, y1 of each in pixels (k, 4), as `squares` returns them; what lies
            outside the image is cut off.
        colors: of the frames (k).
        marks: of the patches (k), or none at all.
        zoom: enlarge the picture so many times.
        width: of the frames, in pixels of the enlarged picture.
        bold: make the first frame three pixels wider, and leave out the seam of the others.
    """
    picture = _enlarged(pixels, zoom)
    draw = ImageDraw.Draw(picture)
    taken, marked = np.zeros((2, picture.height, picture.width), bool)
    ends = np.array([picture.width, picture.height] * 2)
    places = [tuple(box) for box in (patches * zoom).round().astype(int).clip(0, ends).tolist()]
    # Width of each frame, and with its seam.
    widths = [width + 3 * (bold and rank == 0) for rank in range(len(places))]
    edges = [w + (rank == 0 or not bold) for rank, w in enumerate(widths)]
    boxes: list[Box] = []
    for rank, (x0, y0, x1, y1) in enumerate(places):
        inset = sum(edges[i] for i in range(rank) if places[i] == (x0, y0, x1, y1))
        boxes.append((x0 + inset, y0 + inset, x1 - inset, y1 - inset))
    frames = list(zip(boxes, colors, widths, edges, strict=True))
    for (x0, y0, x1, y1), color, outer, edge in reversed(frames):
        if min(x1 - x0, y1 - y0) <= 2 * edge:
            continue  # next to nothing of it is in the image
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=BLACK, width=edge)
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=color, width=outer)
        for start, stop in ((x0, x0 + edge), (x1 - edge, x1)):
            taken[y0:y1, start:stop] = True
        for start, stop in ((y0, y0 + edge), (y1 - edge, y1)):
            taken[start:stop, x0:x1] = True
    for (x0, y0, x1, y1), edge, mark in zip(boxes, edges, marks, strict=False):
        place = _free((x0 + edge, y0 + edge, x1 - edge, y1 - edge), taken, marked)
        if place is not None:
            picture.paste(mark, place, mark)
            x, y = place
            for mask in (taken, marked):
                mask[y : y + MARK, x : x + MARK] = True
    return picture


def _enlarged(pixels: NDArray[np.uint8], zoom: float) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    size = max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom))
    return picture if zoom == 1 else picture.resize(size, Image.Resampling.BICUBIC)


def _zoomed(box: Box, zoom: float) -> Box:
    x0, y0, x1, y1 = (round(v * zoom) for v in box)
    return x0, y0, x1, y1


def _dash(draw: ImageDraw.ImageDraw, box: Box) -> None:
    """Draw the edge of a box in dashes of two colors, which show on any ground."""
    x0, y0, right, bottom = box
    x1, y1 = right - 1, bottom - 1
    for k, x in enumerate(range(x0, x1 + 1, _DASH)):
        for y in (y0, y1):
            ends = (x, y, min(x + _DASH - 1, x1), y)
            draw.line(ends, fill=BLACK if k % 2 else TRUTH, width=2)
    for k, y in enumerate(range(y0, y1 + 1, _DASH)):
        for x in (x0, x1):
            ends = (x, y, x, min(y + _DASH - 1, y1))
            draw.line(ends, fill=BLACK if k % 2 else TRUTH, width=2)


# --- marks --------------------------------------------------------------------------------


def number(value: int, color: Color) -> Image.Image:
    """Return a mark that shows a number, dark on a light color and light on a dark one."""
    mark = Image.new("RGBA", (MARK, MARK), color)
    face = Font(11 if value < 100 else 6, bold=True).face
    light = (299 * color[0] + 587 * color[1] + 114 * color[2]) / 1000
    ink = BLACK if light > 100 else PAPER
    ImageDraw.Draw(mark).text((MARK / 2, MARK / 2), str(value), ink, face, anchor="mm")
    return mark


def tick(color: Color) -> Image.Image:
    """Return a mark that shows a tick, white on a color."""
    return _sign(color, [(3, 8), (6, 11), (11, 4)])


def cross(color: Color) -> Image.Image:
    """Return a mark that shows a cross, white on a color."""
    return _sign(color, [(4, 4), (10, 10)], [(4, 10), (10, 4)])


def _sign(color: Color, *strokes: list[tuple[int, int]]) -> Image.Image:
    mark = Image.new("RGBA", (MARK, MARK))
    draw = ImageDraw.Draw(mark)
    draw.ellipse((0, 0, MARK - 1, MARK - 1), fill=color)
    for stroke in strokes:
        draw.line(stroke, fill=PAPER, width=2, joint="curve")
    return mark


def badge(mark: Image.Image) -> Image.Image:
    """Return a mark on paper."""
    picture = Image.new("RGB", mark.size, PAPER)
    picture.paste(mark, (0, 0), mark)
    return picture


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
