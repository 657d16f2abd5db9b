"""What all pictures share: type, how parts are put together, and files."""

from __future__ import annotations

import contextlib
import io
import json
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont, ImageOps

from anchorpatch.errors import SettingsError
from anchorpatch.storage import write_atomically
from anchorpatch.text import clean, decimal

Color = tuple[int, int, int]

BLACK: Final = (0, 0, 0)
GRAY: Final = (88, 88, 88)
PAPER: Final = (255, 255, 255)

#: Stands for a character that no font has.
_BOX: Final = "\N{WHITE SQUARE}"

#: Space between parts, in pixels.
GAP: Final = 8


class Font:
    """Type of one size: DejaVu Sans, and a font of the system for what that lacks.

    Args:
        size: in pixels.
        bold: take the bold type, where DejaVu Sans has the character.

    Attributes:
        face: DejaVu Sans.
    """

    def __init__(self, size: int = 14, *, bold: bool = False) -> None:
        self._path = _dejavu(bold)
        self.face = _face(self._path, size)

    def width(self, text: str) -> float:
        """Return how wide a line is, in pixels."""
        return sum(face.getlength(run) for run, face in self._runs(text))

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, text: str, fill: Color) -> None:
        """Write a line whose top left corner is at (x, y)."""
        base = y + self.face.getmetrics()[0]
        for run, face in self._runs(text):
            draw.text((x, base), run, fill, face, anchor="ls")
            x += face.getlength(run)

    def _runs(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """Split a line into pieces that one font has."""
        text = _one_line(text)
        others = [entry.fname for entry in fallbacks(text)]
        if not others:
            return [(text, self.face)]

        def path_of(character: str) -> str:
            known = (p for p in (self._path, *others) if ord(character) in _characters(p))
            return next(known, self._path)

        size = int(self.face.size)
        return [("".join(run), _face(path, size)) for path, run in groupby(text, path_of)]


@lru_cache(maxsize=64)
def _face(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=1024)
def fallbacks(text: str) -> tuple[FontEntry, ...]:
    """Return the system's fonts for the characters that DejaVu Sans lacks, as few as it takes."""
    missing = {ord(c) for c in text if unicodedata.category(c)[0] != "C"}
    missing -= _characters(_dejavu(bold=False))
    chosen = []
    while missing:
        fonts = [entry for entry in _system_fonts() if entry not in chosen]
        whole = (entry for entry in fonts if missing <= _characters(entry.fname))
        best = next(whole, None) or max(
            fonts, key=lambda entry: len(missing & _characters(entry.fname)), default=None
        )
        if best is None or missing.isdisjoint(_characters(best.fname)):
            break
        chosen.append(best)
        missing -= _characters(best.fname)
    return tuple(chosen)


def _dejavu(bold: bool) -> str:
    """Return the path of DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic and more."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", name))


@cache
def _system_fonts() -> tuple[FontEntry, ...]:
    """Return the system's upright fonts, those of ordinary weight first."""
    manager, paths = font_manager.fontManager, set(font_manager.findSystemFonts())
    # Matplotlib keeps its list in a file, and does not look for fonts installed since.
    for path in sorted(paths - {entry.fname for entry in manager.ttflist}):
        # Bitmaps of one size, such as colored emoji, and damaged files.
        with contextlib.suppress(OSError, RuntimeError, NotImplementedError, ValueError, KeyError):
            manager.addfont(path)
    # Of a collection the first, as Pillow takes it.
    entries = {entry.fname: entry for entry in reversed(manager.ttflist)}
    usable = [
        entry
        for path, entry in entries.items()
        # Apple's last resort draws every character as a box.
        if path in paths and entry.style == "normal" and "LastResort" not in path
    ]
    return tuple(
        sorted(usable, key=lambda e: (abs(int(e.weight) - 400), "Serif" in e.name, e.fname))
    )


@cache
def _characters(path: str) -> frozenset[int]:
    """Return the code points that a font has."""
    return frozenset(FT2Font(path).get_charmap())


def _one_line(text: str) -> str:
    """Compose accents, and replace what cannot be drawn in one line: by a box what no font has."""
    text = re.sub(r"\s", " ", clean(unicodedata.normalize("NFC", text)))
    paths = (_dejavu(bold=False), *(entry.fname for entry in fallbacks(text)))
    return "".join(c if any(ord(c) in _characters(p) for p in paths) else _BOX for c in text)


def fitted(text: str, width: float, face: Font, *, start: str = "", end: str = "") -> str:
    """Shorten a name in its middle until its line fits into a width in pixels.

    Args:
        text: the name.
        width: in pixels.
        face: in which the line is written.
        start: what stands before the name and is never shortened.
        end: what stands behind it and is never shortened.

    Example:
        >>> fitted("n02102040", 200, Font())
        'n02102040'
        >>> fitted("a_very_long_class_name", 130, Font(), end=", 87%")
        'a_ve…name, 87%'
    """
    text = _one_line(text)
    line = f"{start}{text}{end}"
    for kept in range(len(text) - 1, 1, -1):
        if face.width(line) <= width:
            return line
        line = f"{start}{text[: ceil(kept / 2)]}…{text[-(kept // 2) :]}{end}"
    return line if face.width(line) <= width else f"{start}…{end}"


def written(
    text: str,
    width: int | None,
    *,
    size: int = 14,
    bold: bool = False,
    fill: Color = BLACK,
    start: str = "",
    end: str = "",
) -> Image.Image:
    """Return a line of text as a picture.

    Args:
        text: shortened in its middle where the line is too long.
        width: of the picture in pixels; None: of the text.
        size: of the type in pixels.
        bold: take the bold type.
        fill: color of the type.
        start: what stands before the text and is never shortened.
        end: what stands behind it and is never shortened.
    """
    face, line = Font(size, bold=bold), f"{start}{text}{end}"
    if width is None:
        width = ceil(face.width(line))
    else:
        line = fitted(text, width, face, start=start, end=end)
    picture = Image.new("RGB", (width, round(size * 1.3)), PAPER)
    face.draw(ImageDraw.Draw(picture), 0, 0, line, fill)
    return picture


def small(
    text: str, width: int | None, size: int = 12, *, start: str = "", end: str = ""
) -> Image.Image:
    """Return text as `written` does, small and gray."""
    return written(text, width, size=size, fill=GRAY, start=start, end=end)


def rounded(value: float) -> str:
    """Write a number with at least three digits and no exponent.

    Example:
        >>> rounded(4792.4), rounded(13.52), rounded(0.01234)
        ('4,792', '13.5', '0.0123')
    """
    return decimal(value, 0) if abs(value) >= 100 else f"{value + 0.0:.3g}"


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
    """Put pictures side by side, flush with the top, each at least ``width`` pixels wide."""
    widths = [max(width, part.width) for part in parts]
    total = sum(widths) + gap * (len(parts) - 1)
    joined = Image.new("RGB", (total, max(part.height for part in parts)), PAPER)
    left = 0
    for part, length in zip(parts, widths, strict=True):
        joined.paste(part, (left, 0))
        left += length + gap
    return joined


def tiled(
    parts: Sequence[Image.Image],
    columns: int,
    gap: int = GAP,
    *,
    down: int | None = None,
    width: int = 0,
) -> Image.Image:
    """Put pictures in rows, in columns of one width.

    Args:
        parts: the pictures.
        columns: pictures in a row.
        gap: between them, in pixels.
        down: between the rows, where that differs.
        width: the least of a column, in pixels.
    """
    width = max(width, *(part.width for part in parts))
    rows = [parts[i : i + columns] for i in range(0, len(parts), columns)]
    down = gap if down is None else down
    return stacked([beside(row, gap, width=width) for row in rows], down)


def bordered(picture: Image.Image, margin: int = 2 * GAP) -> Image.Image:
    """Return a picture with an empty margin around it."""
    return ImageOps.expand(picture, margin, PAPER)


# --- files --------------------------------------------------------------------------------

#: Kind of picture by the ending of its name.
_KINDS: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP", ".pdf": "PDF"}

#: Quality of JPEG and WebP, of 100.
_QUALITY: Final = 92


def picture_kind(path: Path) -> str:
    """Return the format that a picture's name asks for.

    Raises:
        SettingsError: it is none that can be written.

    Example:
        >>> picture_kind(Path("figures/patches.png"))
        'PNG'
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise SettingsError(
            f"--out: expected a name that ends in {', '.join(_KINDS)}, got {path.name!r}"
        )
    return kind


def save_picture(
    picture: Image.Image | Figure, path: Path, facts: Mapping[str, Any] | None = None
) -> None:
    """Write a picture, whole or not at all.

    Args:
        picture: from one of this package's functions.
        path: its ending says in which format.
        facts: what it shows: written as JSON beside it, with the picture's name added.

    Raises:
        SettingsError: the format is not known.
        StorageError: the disk refused.
    """
    data = encoded(picture, picture_kind(path))
    write_atomically(path, lambda file: file.write(data))
    if facts is not None:
        text = json.dumps({**facts, "picture": path.name}, indent=2, ensure_ascii=False)
        write_atomically(path.with_suffix(".json"), lambda file: file.write(f"{text}\n".encode()))


def encoded(picture: Image.Image | Figure, kind: str) -> bytes:
    """Return the file of a picture in a format of `picture_kind`."""
    buffer = io.BytesIO()
    # Nothing for PDF, which matplotlib writes by itself.
    pillow: dict[str, Any] | None
    pillow = {"PNG": {"optimize": True}, "PDF": None}.get(kind, {"quality": _QUALITY})
    if not isinstance(picture, Figure):
        picture.save(buffer, kind, **(pillow or {}))
        return buffer.getvalue()
    with drawable(picture):
        # Without the time of day, equal figures are equal files.
        metadata = {"CreationDate": None} if kind == "PDF" else None
        picture.savefig(
            buffer, format=kind.lower(), dpi="figure", metadata=metadata, pil_kwargs=pillow
        )
    return buffer.getvalue()


@contextlib.contextmanager
def drawable(figure: Figure) -> Iterator[None]:
    """Give a figure's text the fonts that it needs; what no font has becomes boxes, silently."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if others := [entry.name for entry in fallbacks(text.get_text())]:
            text.set_fontfamily(["DejaVu Sans", *others])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield
