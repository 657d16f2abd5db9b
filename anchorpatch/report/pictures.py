"""Pictures inside the page: small enough to mail, without a file beside it."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Final

from PIL import Image

__all__ = ["Embedded", "embed"]

#: A file up to here goes in as it is: making it smaller would not be seen in the page's size.
_SMALL: Final = 120_000

#: What one picture may take, in bytes: six of them stay below 4 MB as base64.
_MOST: Final = 480_000

#: WebP qualities to try in turn; where the second is not enough, the picture is made smaller.
_QUALITIES: Final = (90, 78)

#: Twice the width of the page's text, for screens of that density.
_WIDEST: Final = 2200


@dataclass(frozen=True)
class Embedded:
    """A picture as an <img> takes it.

    Attributes:
        url: data: URL.
        width: in pixels.
        height: in pixels.
        bytes: of the file in the URL.
    """

    url: str
    width: int
    height: int
    bytes: int


def embed(picture: Image.Image, encoded: bytes | None = None) -> Embedded:
    """Return a picture as a data: URL of at most about 0.65 MB.

    A file that is small stays as it is; of photographs, WebP is much smaller than PNG.

    Args:
        picture: RGB.
        encoded: its file, where there is one.
    """
    kind = _kind(encoded or b"")
    if encoded is None or not kind:
        encoded, kind = _png(picture), "png"
    if len(encoded) <= (_SMALL if kind == "png" else _MOST):
        return _embedded(kind, encoded, picture)
    smaller = _at_most(picture, _WIDEST)
    webp = _webp(smaller, _QUALITIES[0])
    if len(webp) > _MOST:
        webp = _webp(smaller, _QUALITIES[1])
    if len(encoded) <= _MOST and len(webp) > 0.7 * len(encoded):
        return _embedded(kind, encoded, picture)
    while len(webp) > _MOST:
        # Bytes grow about as the area does.
        share = 0.95 * math.sqrt(_MOST / len(webp))
        smaller = _at_most(smaller, max(1, int(smaller.width * share)))
        webp = _webp(smaller, _QUALITIES[1])
    return _embedded("webp", webp, smaller)


def _at_most(picture: Image.Image, width: int) -> Image.Image:
    if picture.width <= width:
        return picture
    size = (width, max(1, round(picture.height * width / picture.width)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _kind(encoded: bytes) -> str:
    """Return the kind of a file that every browser shows, or nothing."""
    if encoded.startswith(b"\x89PNG"):
        return "png"
    if encoded.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP" else ""


def _embedded(kind: str, data: bytes, picture: Image.Image) -> Embedded:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Embedded(url, picture.width, picture.height, len(data))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _webp(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=quality, method=4)
    return file.getvalue()
