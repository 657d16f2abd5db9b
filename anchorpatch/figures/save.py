"""Writing a figure: the picture, and beside it what it shows as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from anchorpatch.errors import SettingsError
from anchorpatch.figures.canvas import fallbacks
from anchorpatch.storage import write_atomically

__all__ = ["drawable", "encoded", "picture_kind", "save_figure"]

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


def save_figure(
    picture: Image.Image | Figure, path: Path, facts: Mapping[str, Any], *, dpi: int = 100
) -> Path:
    """Write a picture and, with ``.json`` for its ending, what it shows.

    Each file is written whole or not at all, the picture first.

    Args:
        picture: from one of this package's functions.
        path: of the picture; its ending says in which format.
        facts: what it shows, as JSON knows it; the picture's name is added.
        dpi: pixels of an inch, for a matplotlib figure.

    Returns:
        Path of the JSON file.

    Raises:
        SettingsError: the format is not known.
        StorageError: the disk refused.
    """
    data = encoded(picture, picture_kind(path), dpi=dpi)
    write_atomically(path, lambda file: file.write(data))
    beside = path.with_suffix(".json")
    text = json.dumps({**facts, "picture": path.name}, indent=2, ensure_ascii=False)
    write_atomically(beside, lambda file: file.write(f"{text}\n".encode()))
    return beside


def encoded(picture: Image.Image | Figure, kind: str, *, dpi: int = 100) -> bytes:
    """Return the file of a picture.

    Args:
        picture: from one of this package's functions.
        kind: format, see `picture_kind`.
        dpi: pixels of an inch, for a matplotlib figure.
    """
    buffer = io.BytesIO()
    if not isinstance(picture, Figure):
        picture.save(buffer, kind, **(_pillow(kind) or {}))
        return buffer.getvalue()
    with drawable(picture):
        # Without the time of day, equal figures are equal files.
        metadata = {"CreationDate": None} if kind == "PDF" else None
        picture.savefig(
            buffer, format=kind.lower(), dpi=dpi, metadata=metadata, pil_kwargs=_pillow(kind)
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


def _pillow(kind: str) -> dict[str, Any] | None:
    """Return what Pillow is to be told; nothing for PDF, which matplotlib writes by itself."""
    return {"PNG": {"optimize": True}, "PDF": None}.get(kind, {"quality": _QUALITY})
