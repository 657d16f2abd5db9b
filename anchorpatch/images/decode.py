"""From the bytes of one image file to the pixels that AnchorNet sees.

By default the transform is the validation transform of ImageNet: short side 256, center crop 224,
antialiased bilinear on uint8, with sizes and offsets rounded as by ``Resize(256)`` and
``CenterCrop(224)`` of torchvision.transforms.v2; `anchorpatch.geometry` knows the others.

Two decoders do the work, and each file takes one of two paths:

- ``simplejpeg`` (libjpeg-turbo): JPEG in gray or RGB, which is nearly every file. Resized by
  torchvision's uint8 kernel: equal to v2 on a tensor. Its strict mode also tells which files
  libjpeg decodes with a warning, hence with a flaw.
- ``pillow``: everything else. The crop is cut out by the ``box`` argument of Pillow's resize, so
  that an image of 1 x 60,000 px never becomes one of 256 x 15,360,000: within one level of v2 on
  a PIL image.

Which decoder is first was settled by measurement: `tests/benchmarks/bench_decode.py`, CPU time
per image on one thread, decode and transform, 200 ImageNet photographs at their real sizes
(0.21 Mpx in the mean), best of 5 interleaved rounds, 2026-11-25, AMD EPYC, torch 2.14.1,
torchvision 0.29.1, simplejpeg 1.9.0, Pillow 13.0.0:

==========================================  =======  =====
way                                         ms       ratio
==========================================  =======  =====
simplejpeg, v2 resize (taken)               1.73     1.00
simplejpeg, Pillow resize with box          2.24     1.29
torchvision, v2 resize                      1.69     0.98
Pillow, v2 resize of a tensor               2.25     1.30
Pillow, resize with box (the other path)    2.38     1.37
Pillow, v2 resize and crop of the image     3.31     1.91
Pillow, draft (a scaled decode)             2.37     1.36
==========================================  =======  =====

The first row alone looks at the header by Pillow too, as it must. Decoding alone takes 1.17 ms
by simplejpeg, 1.30 ms by torchvision, whose decoder is deprecated and keeps libjpeg's warnings to
itself, and 1.54 ms by Pillow. The pixels of the three are equal. Draft is here for comparison: it
changes the pixels. The two paths differ by at most two levels.
"""

from __future__ import annotations

import re
import struct
import warnings
from io import BytesIO
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import AvifImagePlugin, Image, ImageColor
from simplejpeg import decode_jpeg
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from anchorpatch.errors import ImageError, reason_of
from anchorpatch.geometry import geometry
from anchorpatch.settings import CropSettings

#: Images of more pixels are refused unread: Pillow's own limit for decompression bombs. One of
#: this size takes 0.7 GB while it is decoded.
MAX_PIXELS: Final = 178_956_970

#: What a file may hold, whatever its name says. Pillow knows more formats, some of which start
#: other programs.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")

#: Longer images go to Pillow, which resizes only what the crop keeps. From about here on that
#: is also the faster way.
_LONGEST_ASPECT: Final = 4

#: Pixels of an image that is for nvJPEG: 256 of this size are 3 GB.
_MOST_FOR_NVJPEG: Final = 1 << 22

#: EXIF orientation -> what undoes it. ``ImageOps.exif_transpose`` also writes the metadata anew,
#: which fails where it is damaged.
_ORIENTATIONS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG: Final = 0x0112

#: MPO is a JPEG with several frames, of which the first is read.
_JPEG: Final = ("JPEG", "MPO")

#: Chunks of a PNG that say nothing about its pixels, and that Pillow limits in size.
_PNG_TEXT: Final = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})

#: Where the data of a JPEG's scan end: at a marker that is neither a stuffed FF nor a restart.
_SCAN_END: Final = re.compile(rb"\xff+(?:[^\x00\xd0-\xd7\xff]|\Z)")

# Images are decoded side by side: each on one thread.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


class Decoded(NamedTuple):
    """One image, ready for the network.

    Attributes:
        pixels: RGB, uint8 (S, S, 3) of the side S that the settings say, 224 by default.
        size: (height, width) of the source image in pixels, as it is meant to be looked at
            (after EXIF orientation).
        damaged: libjpeg had to make up for missing or corrupt data.
    """

    pixels: npt.NDArray[np.uint8]
    size: tuple[int, int]
    damaged: bool = False


class Picture(NamedTuple):
    """One whole image, as training needs it: neither cropped nor resized.

    Attributes:
        image: gray or RGB, upright as its EXIF orientation says.
        damaged: as of `Decoded`.
    """

    image: Image.Image
    damaged: bool = False


def decode(data: bytes, settings: CropSettings | None = None) -> Decoded:
    """Decode one image file and apply the validation transform.

    Gray, palette, CMYK and 16-bit pixels become RGB; of 16 bits the upper eight stay. Transparent
    pixels are composited on the background color. Of an animation or a file of several pages the
    first frame is taken. EXIF orientation is respected. Bytes behind the end of the image do not
    matter, nor does the file's name.

    A PNG whose checksums are wrong is refused. JPEG has none: where libjpeg notices that data are
    missing or corrupt, it makes up for them, and the image counts as ``damaged``. Changes that
    leave a valid stream go unnoticed, here as in every other program.

    torch resizes small images fastest on one thread, which is for the caller to set.

    Args:
        data: the whole file.
        settings: how the image becomes a crop; None for the defaults.

    Raises:
        ImageError: the image cannot be decoded. Its reason is "empty file", "not an image"
            (none of JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF), "truncated", "damaged", "too many
            pixels" or "32-bit pixels". With ``damaged="skip"``, images decoded with damage are
            "damaged" too.
    """
    settings = settings or CropSettings()
    whole, damaged = _load(data, settings.background)
    if damaged and settings.damaged == "skip":
        raise ImageError("damaged")
    return _cropped(whole, settings)._replace(damaged=damaged)


def crop_image(image: Image.Image, settings: CropSettings | None = None) -> Decoded:
    """Apply the validation transform to an image of Pillow, as `decode` does to the file of one.

    The pixels of a JPEG are equal. `decode` resizes others by another kernel: within two levels.

    Raises:
        ImageError: its pixels are floating-point numbers, or cannot be loaded.
    """
    settings = settings or CropSettings()
    if image.mode == "F":
        raise ImageError("32-bit pixels")
    transparency = _transparency(image)
    try:
        copy = image.copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"cannot be loaded: {reason_of(error)}") from error
    if transparency is not None:
        copy.info["transparency"] = transparency
    upright, turned = _as_rgb_or_gray(copy, settings.background), _turned(image)
    upright = upright if turned is None else upright.transpose(turned)
    return _cropped(np.array(upright.convert("RGB")), settings)


def _cropped(whole: Image.Image | npt.NDArray[np.uint8], settings: CropSettings) -> Decoded:
    """Resize and crop an image that is upright, and gray or RGB."""
    if isinstance(whole, np.ndarray):
        height, width = whole.shape[:2]
        if max(height, width) <= _LONGEST_ASPECT * min(height, width):
            pixels = crop_tensor(torch.from_numpy(whole).permute(2, 0, 1), settings)
            return Decoded(pixels.numpy(), (height, width))
        whole = Image.fromarray(whole)
    return Decoded(_resized(whole, settings), (whole.height, whole.width))


def crop_tensor(image: Tensor, settings: CropSettings) -> Tensor:
    """Resize and crop uint8 RGB (3, H, W), on its device; return uint8 (S, S, 3).

    A GPU's kernel rounds otherwise: within one level of a CPU's.
    """
    h, w, top, left = geometry(*image.shape[1:], settings)
    resized = F.resize(image, [h, w], antialias=True)
    (y0, y1), (x0, x1) = _kept(top, h, settings), _kept(left, w, settings)
    return _framed(resized[:, y0:y1, x0:x1].permute(1, 2, 0).contiguous(), top, left, settings)


def size_for_nvjpeg(data: bytes) -> tuple[int, int] | None:
    """Return height and width of a file that nvJPEG decodes as libjpeg does; None for any other.

    These are whole, baseline JPEGs in gray or YCbCr that lie upright, and are neither too long nor
    too large for a GPU to decode hundreds of them at once.
    """
    if not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _open(data) as image:
                info = image.info
                plain = image.format == "JPEG" and not info.get("progressive")
                known = image.mode == "L" or (
                    image.mode == "RGB" and ("jfif" in info or info.get("adobe_transform") == 1)
                )
                long = max(image.size) > _LONGEST_ASPECT * min(image.size)
                large = image.width * image.height > _MOST_FOR_NVJPEG
                if plain and known and not (long or large) and _turned(image) is None:
                    return image.height, image.width
        except Exception:  # as of Pillow, which `decode` then puts into words
            return None
    return None


def decode_picture(data: bytes, background: str = "#ffffff") -> Picture:
    """Decode one image file as a whole; see `decode` for what becomes of odd files.

    Args:
        data: the whole file.
        background: color behind transparent pixels, as Pillow takes it.

    Raises:
        ImageError: as `decode`.
    """
    image, damaged = _load(data, background)
    return Picture(image if isinstance(image, Image.Image) else Image.fromarray(image), damaged)


def _load(data: bytes, background: str) -> tuple[Image.Image | npt.NDArray[np.uint8], bool]:
    """Return one image, upright, and whether it is damaged.

    It is gray or RGB, or RGB pixels (H, W, 3) where a JPEG was decoded without Pillow.
    """
    if not data:
        raise ImageError("empty file")
    # Pillow warns of odd metadata and of big images: neither says anything about this image that
    # the caller could use.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                return _load_intact(data, background)
            except ValueError as error:
                # Pillow's limits for text guard against decompression bombs, and stay.
                if "MAX_TEXT_" not in str(error):
                    raise
                return _load_intact(_without_text(data), background)
        except (ImageError, MemoryError):
            raise
        except Image.DecompressionBombError:
            raise ImageError("too many pixels") from None
        # Pillow's plugins raise nearly anything on damaged bytes: OSError, SyntaxError,
        # ValueError, struct.error, IndexError, zlib.error ...
        except Exception as error:
            raise ImageError(_reason(data, error)) from error


def _load_intact(data: bytes, background: str) -> tuple[Image.Image | npt.NDArray[np.uint8], bool]:
    with _open(data) as image:
        if image.format in _JPEG and image.mode in ("L", "RGB"):
            return _load_jpeg(image, data)
        upright = _load_upright(image, background)
        return upright, image.format in _JPEG and _is_damaged(data, "CMYK")


def _open(data: bytes) -> Image.Image:
    """Open a file, and check what can be checked before its pixels are decoded."""
    image = Image.open(BytesIO(data), formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("too many pixels")
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ImageError("32-bit pixels")  # which may have any range
    if image.format == "PNG":
        # Pillow skips the checksums of the pixels' chunks, and deflate seldom notices.
        with Image.open(BytesIO(data), formats=_FORMATS) as again:
            again.verify()
    return image


def _load_jpeg(image: Image.Image, data: bytes) -> tuple[npt.NDArray[np.uint8], bool]:
    """Decode a gray or RGB JPEG: RGB (H, W, 3), upright, and whether it is damaged."""
    try:
        array, damaged = decode_jpeg(data, "RGB"), False
    except ValueError:  # libjpeg refused it, or warned
        # Pillow has the last word: it refuses what is cut off.
        array, damaged = np.array(image.convert("RGB")), _is_damaged(data)
    turned = _turned(image)
    return array if turned is None else np.array(Image.fromarray(array).transpose(turned)), damaged


def _is_damaged(data: bytes, colors: str = "RGB") -> bool:
    """Tell whether libjpeg warns of a JPEG's pixels, and not only of what surrounds them."""
    try:
        decode_jpeg(data, colors, strict=False)
    except ValueError:  # of a kind that simplejpeg cannot decode at all
        return False
    try:
        decode_jpeg(_without_surroundings(data), colors)
    except ValueError:
        return True
    return False


def _without_surroundings(data: bytes) -> bytes:
    """Return a JPEG's tables and scans, without metadata, padding or junk between its segments."""
    parts, at = [b"\xff\xd8"], 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 3:
        kind = data[at + 1]
        if kind == 0xD9:
            break
        if kind in (0x00, 0x01, 0xFF) or 0xD0 <= kind <= 0xD8:  # without a length
            at += 1 if kind == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if not 0xE0 <= kind <= 0xEF and kind != 0xFE:  # application data, comment
            parts.append(data[at:end])
        if kind == 0xDA:
            found = _SCAN_END.search(data, end)
            stop = found.start() if found else len(data)
            scan = data[end:stop].rstrip(b"\0")
            parts.append(scan + b"\0" if scan.endswith(b"\xff") else scan)
            end = stop
        at = end
    return b"".join([*parts, b"\xff\xd9"])


def _without_text(data: bytes) -> bytes:
    """Return a PNG without its texts and color profile, none of which is used."""
    parts, at = [data[:8]], 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in _PNG_TEXT:
            parts.append(data[at:end])
        at = end
    return b"".join([*parts, data[at:]])


def _load_upright(image: Image.Image, background: str) -> Image.Image:
    """Load any image that Pillow has opened, as gray or RGB."""
    transparency = _transparency(image)
    image.load()
    if transparency is not None:
        image.info["transparency"] = transparency
    opaque = _as_rgb_or_gray(image, background)
    turned = _turned(image)  # after loading, by which Pillow has turned a TIFF
    return opaque if turned is None else opaque.transpose(turned)


def _transparency(image: Image.Image) -> object:
    """Return the transparent color or colors of an image on the scale of Pillow's pixels.

    Pillow scales the pixels of a PNG to 8 bits and leaves the transparent color as it is.
    """
    transparency = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    layout = tiles[0][-1] if image.format == "PNG" and tiles else None
    if layout in ("L;2", "L;4") and isinstance(transparency, int):
        return transparency * {"L;2": 0x55, "L;4": 0x11}[layout]
    if layout == "RGB;16B" and isinstance(transparency, tuple):
        return tuple(value >> 8 for value in transparency)
    return transparency


def _kept(offset: int, length: int, settings: CropSettings) -> tuple[int, int]:
    """Return from where to where a crop shows a resized image, along one axis."""
    return max(offset, 0), min(offset + settings.img_size, length)


def _framed(pixels: Tensor, top: int, left: int, settings: CropSettings) -> Tensor:
    """Put what a crop shows of an image into its place in the crop, on the background."""
    (height, width), side = pixels.shape[:2], settings.img_size
    if (height, width) == (side, side):
        return pixels
    color = torch.tensor(ImageColor.getrgb(settings.background), dtype=torch.uint8)
    crop = color.to(pixels.device).repeat(side, side, 1)
    y, x = max(-top, 0), max(-left, 0)
    crop[y : y + height, x : x + width] = pixels
    return crop


def _resized(image: Image.Image, settings: CropSettings) -> npt.NDArray[np.uint8]:
    """Resize and crop in one step; gray becomes RGB last, when there is least to do."""
    h, w, top, left = geometry(image.height, image.width, settings)
    (y0, y1), (x0, x1) = _kept(top, h, settings), _kept(left, w, settings)
    x, y = image.width / w, image.height / h
    # Clamped, since the rounding of the division may put an edge a hair outside the image.
    box = (x0 * x, y0 * y, min(x1 * x, image.width), min(y1 * y, image.height))
    crop = image.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=box)
    pixels = torch.from_numpy(np.array(crop.convert("RGB")))
    return _framed(pixels, top, left, settings).numpy()


def _as_rgb_or_gray(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit gray; convert() would clip it at 255 instead of scaling it.
        deep, transparency = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((deep >> 8).astype(np.uint8))
        if transparency is not None:
            image.putalpha(Image.fromarray(deep != transparency).convert("L"))
    if image.has_transparency_data:
        # Premultiplied gray has no way to RGBA of its own.
        layers = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        ground = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(ground, layers).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _turned(image: Image.Image) -> Image.Transpose | None:
    """Return what makes an image upright; None where nothing must, or the metadata is damaged."""
    try:
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # as above: anything; damaged metadata does not spoil the pixels
        return None


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
    elif data.startswith((b"II", b"MM")) or data[4:12] in (b"ftypavif", b"ftypavis"):
        cut = False
    else:
        return "not an image"
    return "truncated" if cut or "truncated" in str(error).lower() else "damaged"
