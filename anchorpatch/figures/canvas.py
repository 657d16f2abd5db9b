"""What pictures of several parts share: type, measures, and how parts are put together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "BLACK",
    "GAP",
    "GREY",
    "PAPER",
    "Color",
    "beside",
    "bordered",
    "fitted",
    "font",
    "rounded",
    "stacked",
    "written",
]

Color = tuple[int, int, int]

BLACK: Final = (0, 0, 0)
GREY: Final = (88, 88, 88)
PAPER: Final = (255, 255, 255)

#: Space between parts, in pixels.
GAP: Final = 8


@lru_cache(maxsize=16)
def font(size: int = 14, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic and more."""
    import matplotlib  # not for pictures without type

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def fitted(text: str, width: int, face: ImageFont.FreeTypeFont) -> str:
    """Shorten a line in its middle until it fits into a width in pixels.

    Example:
        >>> fitted("n02102040", 200, font())
        'n02102040'
        >>> fitted("a_very_long_class_name", 100, font())[:4]
        'a_ve'
    """
    if face.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        shorter = f"{text[: ceil(kept / 2)]}…{text[-(kept // 2) :]}"
        if face.getlength(shorter) <= width:
            return shorter
    return "…"


def written(
    text: str,
    width: int | None,
    *,
    size: int = 14,
    bold: bool = False,
    fill: Color = BLACK,
    lines: int | None = None,
) -> Image.Image:
    """Return text as a picture, on as many lines as it needs.

    Args:
        text: words too long for a line are shortened in their middle.
        width: of the picture in pixels; None: of the text, on one line.
        size: of the type in pixels.
        bold: take the bold type.
        fill: colour of the type.
        lines: how many lines to have; the rest is dropped or left empty.
    """
    face = font(size, bold=bold)
    broken = [text] if width is None else _wrapped(text, width, face)
    broken = broken if lines is None else broken[:lines]
    width = ceil(face.getlength(text)) if width is None else width
    height = round(size * 1.3)
    picture = Image.new("RGB", (width, (lines or max(1, len(broken))) * height), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(broken):
        draw.text((0, i * height), line, fill, face)
    return picture


def rounded(value: float) -> str:
    """Write a number with at least three digits and no exponent.

    Example:
        >>> rounded(4792.4), rounded(13.52), rounded(0.01234)
        ('4,792', '13.5', '0.0123')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def stacked(parts: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    """Put pictures below each other, flush left."""
    height = sum(part.height for part in parts) + gap * (len(parts) - 1)
    joined = Image.new("RGB", (max(part.width for part in parts), height), PAPER)
    top = 0
    for part in parts:
        joined.paste(part, (0, top))
        top += part.height + gap
    return joined


def beside(parts: Sequence[Image.Image], gap: int = GAP, *, width: int = 0) -> Image.Image:
    """Put pictures side by side, flush with the top.

    Args:
        parts: the pictures.
        gap: between them, in pixels.
        width: the least that each takes, in pixels.
    """
    widths = [max(width, part.width) for part in parts]
    total = sum(widths) + gap * (len(parts) - 1)
    joined = Image.new("RGB", (total, max(part.height for part in parts)), PAPER)
    left = 0
    for part, length in zip(parts, widths, strict=True):
        joined.paste(part, (left, 0))
        left += length + gap
    return joined


def bordered(picture: Image.Image, margin: int = 2 * GAP) -> Image.Image:
    """Return a picture with an empty margin around it."""
    page = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), PAPER)
    page.paste(picture, (margin, margin))
    return page


def _wrapped(text: str, width: int, face: ImageFont.FreeTypeFont) -> list[str]:
    lines: list[str] = []
    for word in (fitted(word, width, face) for word in text.split()):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and face.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
