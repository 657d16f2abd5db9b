"""From the bytes of one image file to the pixels that AnchorNet sees.

The transform is the validation transform of ImageNet: short side 256, centre crop 224,
antialiased bilinear on uint8, with sizes and offsets rounded as by ``Resize(256)`` and
``CenterCrop(224)`` of torchvision.transforms.v2.

Two decoders do the work, and each file takes one of two paths:

- ``torchvision``: JPEG in grey or RGB, which is nearly every file. Decoded by torchvision and
  resized by its uint8 kernel: equal to v2 on a tensor.
- ``pillow``: everything else, and every JPEG that torchvision refuses. The crop is cut out by
  the ``box`` argument of Pillow's resize, so that an image of 1 x 60,000 px never becomes one
  of 256 x 15,360,000: within one level of v2 on a PIL image.

Which decoder is first was settled by measurement: `tests/benchmarks/bench_decode.py`, CPU time
an image on one thread, decode and transform, 200 ImageNet photographs at their real sizes
(0.21 Mpx in the mean), best of 5 interleaved rounds, 2026-11-22, AMD EPYC, torch 2.14.1,
torchvision 0.29.1, Pillow 13.0.0:

==========================================  =======  =====
way                                         ms       ratio
==========================================  =======  =====
torchvision, v2 resize (taken)              1.73     1.00
torchvision, Pillow resize with box         2.42     1.40
Pillow, v2 resize of a tensor               2.29     1.33
Pillow, resize with box (the other path)    2.42     1.40
Pillow, v2 resize and crop of the image     3.13     1.82
Pillow, draft (a scaled decode)             2.29     1.33
==========================================  =======  =====

Decoding alone takes 1.29 ms by torchvision and 1.43 ms by Pillow. Draft is here for
comparison: it changes the pixels. The two paths differ by at most two levels.
torchvision's decoder is deprecated in favour of TorchCodec; where it is missing, Pillow does
the whole work.
"""

from __future__ import annotations

import struct
import warnings
from io import BytesIO
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from anchorpatch.errors import ImageError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # pragma: no cover - a torchvision that has dropped its decoders
    decode_jpeg = None

__all__ = ["CROP", "MAX_PIXELS", "RESIZE", "Decoded", "Geometry", "decode", "geometry"]

#: Side of the crop in pixels: what AnchorNet sees.
CROP: Final = 224

#: The short side of the image after resizing, in pixels.
RESIZE: Final = 256

#: Images of more pixels are refused unread: Pillow's own limit for decompression bombs. One of
#: this size takes 0.7 GB while it is decoded.
MAX_PIXELS: Final = 178_956_970

#: What a file may hold, whatever its name says. Pillow knows more formats, some of which start
#: other programs; GIF is here because it is met under other names.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

#: Longer images go to Pillow, which resizes only what the crop keeps. From about here on that
#: is also the faster way.
_LONGEST_ASPECT: Final = 4

#: EXIF orientation -> what undoes it: swap the axes, then flip vertically, horizontally.
_ORIENTATIONS: Final = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_ORIENTATION_TAG: Final = 0x0112


class Decoded(NamedTuple):
    """One image, ready for the network.

    Attributes:
        pixels: RGB, uint8 (224, 224, 3).
        size: (height, width) of the source image in pixels, as it is meant to be looked at
            (after EXIF orientation).
    """

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]


class Geometry(NamedTuple):
    """Size of the resized image and corner of the crop in it, in pixels."""

    height: int
    width: int
    top: int
    left: int


def geometry(height: int, width: int) -> Geometry:
    """Return how an image of ``height`` x ``width`` px is resized and cropped.

    Example:
        >>> geometry(375, 500)
        Geometry(height=256, width=341, top=16, left=58)
    """
    if height <= width:
        h, w = RESIZE, int(RESIZE * width / height)
    else:
        h, w = int(RESIZE * height / width), RESIZE
    return Geometry(h, w, round((h - CROP) / 2), round((w - CROP) / 2))


def decode(data: bytes) -> Decoded:
    """Decode one image file and apply the validation transform.

    Grey, palette, CMYK and 16-bit pixels become RGB; of 16 bits the upper eight stay. Alpha and
    palette transparency are dropped, as by Pillow's ``convert("RGB")``: the colour below a
    transparent pixel shows. Of an animation the first frame is taken. EXIF orientation is
    respected. Bytes behind the end of the image do not matter, nor does the file's name.

    A PNG whose checksums are wrong is damaged. JPEG and WebP have none: a few changed bytes
    within the pixels give a picture with a flaw, here as in every other program.

    torch resizes small images fastest on one thread, which is for the caller to set.

    Args:
        data: the whole file.

    Raises:
        ImageError: the image cannot be decoded. Its reason is "empty file", "not an image"
            (no JPEG, PNG, WebP, BMP or GIF), "truncated", "damaged" or "too many pixels".
    """
    if not data:
        raise ImageError("empty file")
    # Pillow warns of odd metadata and of big images, torchvision of its own end: neither says
    # anything about this image that the caller could use.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _decode(data)
        except (ImageError, MemoryError):
            raise
        except Image.DecompressionBombError:
            raise ImageError("too many pixels") from None
        # Pillow's plugins raise nearly anything on damaged bytes: OSError, SyntaxError,
        # ValueError, struct.error, IndexError, zlib.error ...
        except Exception as error:
            raise ImageError(_reason(data, error)) from error


def _decode(data: bytes) -> Decoded:
    with _open(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ImageError("too many pixels")
        orientation = _orientation(image)
        _verify(image, data)
        # MPO: a JPEG with several frames; both decoders read the first.
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            try:
                return _by_torchvision(data, orientation)
            except (RuntimeError, TypeError):
                pass  # refused, or no decoder in this torchvision: Pillow has the last word
        return _by_pillow(image, orientation)


def _open(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data), formats=_FORMATS)


def _by_torchvision(data: bytes, orientation: int) -> Decoded:
    """Decode a grey or RGB JPEG.

    Raises:
        RuntimeError: torchvision refuses the file, or was built without decoders.
        TypeError: torchvision has no decoders any more.
    """
    # frombuffer warns that bytes are read-only; nothing writes to them.
    pixels: Tensor = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
    swap, *flips = _ORIENTATIONS.get(orientation, (False, False, False))
    if swap:
        pixels = pixels.transpose(1, 2)
    if axes := [axis for axis, flip in zip((1, 2), flips, strict=True) if flip]:
        pixels = pixels.flip(axes)
    height, width = pixels.shape[1:]
    if max(height, width) > _LONGEST_ASPECT * min(height, width):
        array = pixels.permute(1, 2, 0).contiguous().numpy()
        return Decoded(_resized(Image.fromarray(array)), (height, width))
    h, w, top, left = geometry(height, width)
    resized = F.resize(pixels, [h, w], antialias=True)[:, top : top + CROP, left : left + CROP]
    return Decoded(resized.permute(1, 2, 0).contiguous().numpy(), (height, width))


def _by_pillow(image: Image.Image, orientation: int) -> Decoded:
    """Decode any image that Pillow has opened."""
    image.load()
    image = _as_rgb_or_grey(image)
    swap, vertical, horizontal = _ORIENTATIONS.get(orientation, (False, False, False))
    if swap:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    if vertical:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if horizontal:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Decoded(_resized(image), (image.height, image.width))


def _resized(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Resize and crop in one step; grey becomes RGB last, when there is least to do."""
    h, w, top, left = geometry(image.height, image.width)
    x, y = image.width / w, image.height / h
    # Clamped, since the rounding of the division may put an edge a hair outside the image.
    box = (
        left * x,
        top * y,
        min((left + CROP) * x, image.width),
        min((top + CROP) * y, image.height),
    )
    crop = image.resize((CROP, CROP), Image.Resampling.BILINEAR, box=box)
    return np.array(crop.convert("RGB"))


def _verify(image: Image.Image, data: bytes) -> None:
    """Check a PNG; Pillow skips the checksums of the pixels' chunks, and deflate seldom notices."""
    if image.format == "PNG":
        with _open(data) as again:
            again.verify()


def _as_rgb_or_grey(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):
        # 16-bit grey; convert() would clip it at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("1", "LA"):
        return image.convert("L")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (as stored) where the metadata is missing or damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # as above: anything; damaged metadata does not spoil the pixels
        return 1
    return value if isinstance(value, int) else 1


def _reason(data: bytes, error: Exception) -> str:
    """Say why ``data`` could not be decoded, in words that can be counted."""
    if data.startswith(b"\xff\xd8"):
        cut = b"\xff\xd9" not in data
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        cut = b"IEND" not in data
    elif data.startswith((b"GIF87a", b"GIF89a")):
        cut = not data.endswith(b";")
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        cut = struct.unpack_from("<I", data, 4)[0] + 8 > len(data)
    elif data.startswith(b"BM"):
        cut = len(data) < 6 or struct.unpack_from("<I", data, 2)[0] > len(data)
    else:
        return "not an image"
    return "truncated" if cut or "truncated" in str(error).lower() else "damaged"
