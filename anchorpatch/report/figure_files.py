"""Figures that ``anchorpatch figure NAME`` wrote: a picture, and JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from anchorpatch.errors import DataError, ImageError, reason_of
from anchorpatch.images.decode import decode_picture

__all__ = ["FigureFile", "read_figure"]


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
    texts = {key: document[key] for key in ("figure", "title", "caption", "picture")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"expected text as {key}, found {value!r}")
    summary = document.get("summary", [])
    if not isinstance(summary, list) or not all(isinstance(row, dict) for row in summary):
        raise DataError("expected a list of rows as summary, found other JSON")
    settings, left_out = document.get("settings", {}), document.get("left_out", [])
    # By its name alone: what lies elsewhere is none of this figure's.
    picture = path.with_name(Path(texts["picture"]).name)
    try:
        encoded = picture.read_bytes()
        decoded = decode_picture(encoded).image
    except OSError as error:
        raise DataError(f"its picture {picture.name}: {reason_of(error)}") from error
    except ImageError as error:
        raise DataError(f"its picture {picture.name}: {error.reason}") from error
    return FigureFile(
        source=str(path),
        name=texts["figure"],
        number=int(document.get("number", 0)),
        title=texts["title"],
        caption=texts["caption"],
        picture=decoded.convert("RGB"),
        encoded=encoded,
        summary=tuple(summary),
        left_out=tuple(map(str, left_out)) if isinstance(left_out, list) else (),
        settings=settings if isinstance(settings, dict) else {},
        weights_sha256=str(document.get("weights_sha256") or ""),
        images=str(document.get("source") or ""),
    )
