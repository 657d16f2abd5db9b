"""Files of figures: a picture, and beside it what it shows as JSON, which the report reads."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from anchorpatch.errors import DataError, ImageError, SettingsError, reason_of
from anchorpatch.figures.canvas import fallbacks
from anchorpatch.images.decode import decode_picture
from anchorpatch.storage import write_atomically

#: Kind of picture by the ending of its name.
_KINDS: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP", ".pdf": "PDF"}

#: Quality of JPEG and WebP, of 100.
_QUALITY: Final = 92


# --- writing ------------------------------------------------------------------------------


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
    """Write a picture and, with ``.json`` for its ending, what it shows; the picture first.

    Args:
        picture: from one of this package's functions.
        path: of the picture; its ending says in which format.
        facts: what it shows, as JSON; the picture's name is added.
        dpi: pixels per inch, for a matplotlib figure.

    Returns:
        Path of the JSON file.

    Raises:
        SettingsError: the format is not known.
        StorageError: the disk refused.
    """
    save_picture(picture, path, dpi=dpi)
    beside = path.with_suffix(".json")
    text = json.dumps({**facts, "picture": path.name}, indent=2, ensure_ascii=False)
    write_atomically(beside, lambda file: file.write(f"{text}\n".encode()))
    return beside


def save_picture(picture: Image.Image | Figure, path: Path, *, dpi: int = 100) -> None:
    """Write a picture, whole or not at all.

    Args:
        picture: from one of this package's functions.
        path: its ending says in which format.
        dpi: pixels per inch, for a matplotlib figure.

    Raises:
        SettingsError: the format is not known.
        StorageError: the disk refused.
    """
    data = encoded(picture, picture_kind(path), dpi=dpi)
    write_atomically(path, lambda file: file.write(data))


def encoded(picture: Image.Image | Figure, kind: str, *, dpi: int = 100) -> bytes:
    """Return the file of a picture.

    Args:
        picture: from one of this package's functions.
        kind: format, see `picture_kind`.
        dpi: pixels per inch, for a matplotlib figure.
    """
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
        picture.savefig(buffer, format=kind.lower(), dpi=dpi, metadata=metadata, pil_kwargs=pillow)
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


# --- reading ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FigureFile:
    """One figure of the paper.

    Attributes:
        source: the JSON file, or what the figure was made from just now.
        name: patches, errors, attention or coverage.
        number: of the figure in the paper, 3 to 6.
        title: a few words.
        caption: what is to be seen.
        picture: RGB.
        encoded: the picture's file, where there is one.
        summary: rows of a table, all with the same columns; may be empty.
        left_out: what the figure lacks, and why.
        settings: that the figure was made with.
        weights_sha256: of the weights, where they are known.
        images: where the pictures came from.
    """

    source: str
    name: str
    number: int
    title: str
    caption: str
    picture: Image.Image
    encoded: bytes | None = None
    summary: tuple[Mapping[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""
    images: str = ""


def read_figure(path: Path) -> FigureFile | None:
    """Read a figure's JSON and its picture; None for JSON of another kind.

    Raises:
        DataError: the JSON is no figure's, or its picture is missing or damaged.
        ValueError: the file is not JSON.
    """
    document = json.loads(path.read_bytes())
    if not isinstance(document, dict) or "figure" not in document:
        return None
    for key in ("figure", "title", "caption", "picture"):
        if not isinstance(document[key], str):
            raise DataError(f"expected text as {key}, found {document[key]!r}")
    # By its name alone: what lies elsewhere is none of this figure's.
    picture = path.with_name(Path(document["picture"]).name)
    try:
        data = picture.read_bytes()
        decoded = decode_picture(data).image
    except OSError as error:
        raise DataError(f"its picture {picture.name}: {reason_of(error)}") from error
    except ImageError as error:
        raise DataError(f"its picture {picture.name}: {error.reason}") from error
    return figure_of(document, decoded, source=str(path), encoded=data)


def figure_of(
    facts: Mapping[str, Any], picture: Image.Image, *, source: str, encoded: bytes | None = None
) -> FigureFile:
    """Return a figure from its JSON, whose texts are known to be such, and its picture.

    Raises:
        DataError: the summary is no list of rows.
    """
    summary, left_out = facts.get("summary", ()), facts.get("left_out", ())
    settings = facts.get("settings", {})
    if not isinstance(summary, (list, tuple)) or not all(isinstance(r, dict) for r in summary):
        raise DataError("expected a list of rows as summary, found other JSON")
    return FigureFile(
        source=source,
        name=facts["figure"],
        number=int(facts.get("number", 0)),
        title=facts["title"],
        caption=facts["caption"],
        picture=picture.convert("RGB"),
        encoded=encoded,
        summary=tuple(summary),
        left_out=tuple(map(str, left_out)) if isinstance(left_out, (list, tuple)) else (),
        settings=settings if isinstance(settings, dict) else {},
        weights_sha256=str(facts.get("weights_sha256") or ""),
        images=str(facts.get("source") or ""),
    )
