"""Pictures inside the page: small enough to mail, without a file beside it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Final

from PIL import Image

__all__ = ["Embedded", "embed"]

#: A file up to here goes in as it is: making it smaller would not be seen in the page's size.
_SMALL: Final = 120_000

#: What one picture may take, in bytes: six of them stay below 4 MB as base64.
_MOST: Final = 480_000

#: WebP qualities to try in turn; below the last one the picture is made smaller instead.
_QUALITIES: Final = (90, 82, 74)


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

    A small PNG stays as it is and keeps every pixel; of photographs, WebP is much smaller.

    Args:
        picture: RGB.
        encoded: its PNG file, where there is one.
    """
    encoded = _png(picture) if encoded is None or encoded[:4] != b"\x89PNG" else encoded
    if len(encoded) <= _SMALL:
        return _embedded("png", encoded, picture)
    for quality in _QUALITIES:
        webp = _webp(picture, quality)
        if len(webp) <= _MOST:
            break
    while len(webp) > _MOST:
        half = (max(1, round(picture.width * 0.8)), max(1, round(picture.height * 0.8)))
        picture = picture.resize(half, Image.Resampling.LANCZOS)
        webp = _webp(picture, _QUALITIES[-1])
    if len(encoded) <= _MOST and len(webp) > 0.7 * len(encoded):
        return _embedded("png", encoded, picture)
    return _embedded("webp", webp, picture)


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
