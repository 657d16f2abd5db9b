"""From the bytes of an image file to the whole picture, as training needs it.

`anchorpatch.images.decode` gives the validation crop; here nothing is cropped or resized.
"""

from __future__ import annotations

import warnings

from PIL import Image

from anchorpatch.errors import ImageError
from anchorpatch.images.decode import (
    MAX_PIXELS,
    _as_rgb_or_grey,
    _open,
    _orientation,
    _reason,
    _verify,
)

__all__ = ["decode_picture"]

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_picture(data: bytes) -> Image.Image:
    """Decode a file to a grey or RGB picture, upright as its EXIF orientation says.

    Raises:
        ImageError: with the same reasons as `anchorpatch.images.decode.decode`.
    """
    if not data:
        raise ImageError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _open(data) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError("too many pixels")
                orientation = _orientation(image)
                _verify(image, data)
                image.load()
                picture = _as_rgb_or_grey(image)
                if orientation in _TRANSPOSE:
                    picture = picture.transpose(_TRANSPOSE[orientation])
                return picture
        except (ImageError, MemoryError):
            raise
        except Image.DecompressionBombError:
            raise ImageError("too many pixels") from None
        except Exception as error:  # as `decode`: Pillow raises nearly anything
            raise ImageError(_reason(data, error)) from error
