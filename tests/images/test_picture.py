from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from anchorpatch.errors import ImageError
from anchorpatch.images.picture import decode_picture
from tests.conftest import draw_photo


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(draw_photo(1, (40, 30)), "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    assert np.array_equal(np.asarray(decode_picture(data)), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_grey_or_rgb(mode: str):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = draw_photo(1, (20, 10)).convert(mode)
    data = encoded(image, "JPEG" if kind == "TIFF" else kind)
    assert decode_picture(data).mode in ("L", "RGB")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"no image", "not an image"),
        (encoded(draw_photo(1, (90, 90)), "JPEG")[:600], "truncated"),
    ],
)
def test_bad_files_carry_a_reason(data: bytes, reason: str):
    with pytest.raises(ImageError) as caught:
        decode_picture(data)
    assert caught.value.reason == reason


def test_a_png_with_a_wrong_checksum_is_damaged():
    data = bytearray(encoded(draw_photo(0, (40, 40))))
    assert decode_picture(bytes(data)).size == (40, 40)
    data[data.index(b"IDAT") + 4 + 1000] ^= 1
    with pytest.raises(ImageError):
        decode_picture(bytes(data))
