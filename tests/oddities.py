"""Every kind of odd or bad image file that a folder in the wild may hold.

`make_oddities` writes them into a class folder and says what each should come to: None for an
image that decodes, else the reason for which it is skipped.
"""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

Array = npt.NDArray[np.uint8]


def picture(height: int = 180, width: int = 240, seed: int = 0) -> Array:
    """Return a smooth picture that is different in every corner, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Array | Image.Image, format: str, **options: Any) -> bytes:
    """Return the bytes of an image file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_orientation(orientation: int, format: str = "JPEG", **options: Any) -> bytes:
    """Return an image file whose EXIF data say that it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), format, exif=exif, **options)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """Return one chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int,
    height: int,
    depth: int,
    color: int,
    rows: bytes,
    interlace: int = 0,
    transparency: bytes | None = None,
) -> bytes:
    """Return a PNG file made by hand, for what Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + (png_chunk(b"tRNS", transparency) if transparency else b"")
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def png_rgb16(pixels: npt.NDArray[np.uint16]) -> bytes:
    """Return a PNG file of 16 bits a channel; Pillow writes none."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(width, height, 16, 2, rows)


def png_interlaced(pixels: Array) -> bytes:
    """Return a PNG file in Adam7 order; Pillow writes none."""
    height, width, _ = pixels.shape
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)]
    passes += [(2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(
        b"\0" + row.tobytes()
        for top, left, down, right in passes
        for row in pixels[top::down, left::right]
    )
    return png(width, height, 8, 2, rows, interlace=1)


def bmp_top_down(pixels: Array) -> bytes:
    """Return a BMP file whose first row is the top one (a negative height)."""
    height, width, _ = pixels.shape
    pad = -3 * width % 4
    rows = b"".join(row[:, ::-1].tobytes() + bytes(pad) for row in pixels)
    info = struct.pack("<IiiHHIIiiII", 40, width, -height, 1, 24, 0, len(rows), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + info + rows


def bmp_rle(height: int = 60, width: int = 80) -> bytes:
    """Return a BMP file of 256 grays, run-length encoded: each row is one gray."""
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    body = b"".join(bytes([width, 4 * y, 0, 0]) for y in range(height)) + b"\0\1"
    start = 54 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + palette + body


def ycck(pixels: Array) -> bytes:
    """Return a JPEG file in YCCK: a CMYK one whose Adobe marker says so.

    The numbers of a CMYK file are read otherwise, so the colors are wild, but the file is
    built as those of Photoshop are.
    """
    plain = encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=90)
    at = plain.find(b"\xff\xee")
    if at >= 0:
        (length,) = struct.unpack_from(">H", plain, at + 2)
        plain = plain[:at] + plain[at + 2 + length :]
    adobe = b"\xff\xee" + struct.pack(">H", 14) + b"Adobe" + struct.pack(">HHHB", 100, 0, 0, 2)
    return plain[:2] + adobe + plain[2:]


def bomb_png(side: int = 60_000) -> bytes:
    """Return a small file that claims ``side`` x ``side`` pixels."""
    return png(side, side, 8, 2, bytes(1 << 16))


def bad_crc_png() -> bytes:
    """Return a PNG file with one changed byte in the middle of its pixels."""
    data = bytearray(encoded(picture(), "PNG"))
    data[len(data) // 2] ^= 0x10
    return bytes(data)


def long_text(*, after: bool = False, profile: bool = False) -> bytes:
    """Return a PNG file with 3 MB of compressed text, or of what is no color profile."""
    data, packed = encoded(picture(), "PNG"), zlib.compress(b"lorem ipsum " * 250_000)
    name = b"iCCP" if profile else b"zTXt"
    at = len(data) - 12 if after else 33  # before the end, or behind the header
    return data[:at] + png_chunk(name, b"Comment\0\0" + packed) + data[at:]


def transparent_files() -> dict[str, bytes]:
    """Return files with transparent parts, by name."""
    rgb = Image.fromarray(picture())
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    palette = rgb.quantize(64)
    few = palette.convert("RGB")
    return {
        "gray-alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "palette-one.png": encoded(palette, "PNG", transparency=3),
        "palette.png": encoded(palette, "PNG", transparency=bytes(range(64))),
        "one-color.png": encoded(few, "PNG", transparency=few.getpixel((9, 9))),
        "palette.gif": encoded(palette, "GIF", transparency=3),
        "alpha.tif": encoded(alpha, "TIFF"),
        "alpha.avif": encoded(alpha, "AVIF"),
    }


def animation(format: str) -> bytes:
    """Return an animated file of three pictures, the first of which is `picture`."""
    frames = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    options = {"lossless": True} if format == "WEBP" else {}
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)


def good_files() -> dict[str, bytes]:
    """Return odd files that hold a picture, by name."""
    rgb = Image.fromarray(picture())
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gray16 = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    palette = rgb.quantize(64)
    jpeg = encoded(rgb, "JPEG", quality=90)
    files = {
        "plain.jpg": jpeg,
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "subsampled.jpg": encoded(rgb, "JPEG", subsampling="4:2:0"),
        "gray.jpg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "ycck.jpg": ycck(picture()),
        "icc.jpg": encoded(rgb, "JPEG", icc_profile=icc),
        "trailing-junk.jpg": jpeg + b"junk" * 1000,
        "bad-exif.jpg": encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01"),
        "mpo.jpg": encoded(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]),
        "huge-aspect.jpg": encoded(picture(4, 30_000), "JPEG"),
        "upper-case.JPEG": jpeg,
        "mixed-case.JpG": jpeg,
        "a jpeg.png": jpeg,
        "a png.jpg": encoded(rgb, "PNG"),
        "a gif.jpg": encoded(rgb.quantize(32), "GIF"),
        "an animated gif.png": animation("GIF"),
        "gray.png": encoded(rgb.convert("L"), "PNG"),
        "one-bit.png": encoded(rgb.convert("1"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette-one-transparent.png": encoded(palette, "PNG", transparency=3),
        "palette-transparency.png": encoded(palette, "PNG", transparency=bytes(range(64))),
        "gray-16-bit.png": encoded(Image.fromarray(gray16), "PNG"),
        "rgb-16-bit.png": png_rgb16(picture().astype(np.uint16) * 257),
        "gray-alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "interlaced.png": png_interlaced(picture()),
        "animated.png": animation("PNG"),
        "trailing-junk.png": encoded(rgb, "PNG") + b"junk",
        "orientation.png": with_orientation(6, "PNG"),
        "one-pixel.png": encoded(picture(1, 1), "PNG"),
        "sliver-wide.png": encoded(picture(1, 5_000), "PNG"),
        "sliver-high.png": encoded(picture(5_000, 1), "PNG"),
        "lossy.webp": encoded(rgb, "WEBP"),
        "lossless.webp": encoded(rgb, "WEBP", lossless=True),
        "alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "animated.webp": animation("WEBP"),
        "plain.jfif": jpeg,
        "plain.JPE": jpeg,
        "plain.gif": encoded(rgb, "GIF"),
        "plain.tif": encoded(rgb, "TIFF"),
        "packed.TIFF": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "gray-16-bit.tif": encoded(Image.fromarray(gray16), "TIFF"),
        "lossless.avif": encoded(rgb, "AVIF", quality=100, subsampling="4:4:4"),
        "long-text.png": long_text(),
        "plain.bmp": encoded(rgb, "BMP"),
        "palette.bmp": encoded(palette, "BMP"),
        "top-down.bmp": bmp_top_down(picture()),
        "run-length.bmp": bmp_rle(),
        "with spaces.jpg": jpeg,
        "ünïcode-画像.jpg": jpeg,
        "new\nline.jpg": jpeg,
        "-dash, comma & 'quotes\".jpg": jpeg,
    }
    for orientation in range(1, 9):
        files[f"orientation-{orientation}.jpg"] = with_orientation(orientation)
    return files


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Return files that hold no picture and the reasons for which they are skipped, by name."""
    jpeg = encoded(picture(), "JPEG", quality=90)
    png_data = encoded(picture(), "PNG")
    webp = encoded(picture(), "WEBP")
    noise = np.random.default_rng(0).bytes(5_000)
    page = b"<!DOCTYPE html>\n<html><body><h1>404 Not Found</h1></body></html>\n"
    return {
        "empty.jpg": (b"", "empty file"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "truncated-progressive.jpg": (
            encoded(picture(), "JPEG", progressive=True)[:-400],
            "truncated",
        ),
        "header-only.jpg": (jpeg[:20], "truncated"),
        "two-bytes.jpg": (jpeg[:2], "truncated"),
        "damaged-header.jpg": (jpeg[:20] + b"\0" * 300 + jpeg[320:], "damaged"),
        "truncated.png": (png_data[: len(png_data) // 2], "truncated"),
        "header-only.png": (png_data[:40], "truncated"),
        "bad-crc.png": (bad_crc_png(), "damaged"),
        "no-pixels.png": (png(10, 10, 8, 2, b""), "truncated"),
        "bomb.png": (bomb_png(), "too many pixels"),
        "bomb.bmp": (
            b"BM"
            + struct.pack("<IHHI", 60, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0)
            + bytes(6),
            "too many pixels",
        ),
        "truncated.webp": (webp[: len(webp) // 2], "truncated"),
        "truncated.bmp": (encoded(picture(), "BMP")[:5_000], "truncated"),
        "text.jpg": (b"this is not an image\n", "not an image"),
        "page.jpg": (page, "not an image"),
        "random.jpg": (noise, "not an image"),
        "zeros.png": (bytes(4_096), "not an image"),
        "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
        "jpeg-2000.jpg": (encoded(picture(), "JPEG2000"), "not an image"),
        "floating-point.tif": (
            encoded(Image.fromarray(picture()).convert("F"), "TIFF"),
            "32-bit pixels",
        ),
    }


def make_oddities(folder: Path) -> dict[str, str | None]:
    """Write every oddity into a class folder.

    Returns:
        For each name in the folder the reason for which it must be skipped, None for an image
        that must decode. Files that are to be passed over without a word are not in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, str | None] = {}
    for name, data in good_files().items():
        (folder / name).write_bytes(data)
        expected[name] = None
    for name, (data, reason) in bad_files().items():
        (folder / name).write_bytes(data)
        expected[name] = reason
    (folder / "dangling-link.jpg").symlink_to("nowhere.jpg")
    (folder / "link-to-itself.jpg").symlink_to("link-to-itself.jpg")
    (folder / "good-link.jpg").symlink_to("plain.jpg")
    (folder / "a-folder.jpg").mkdir()
    os.mkfifo(folder / "a-pipe.jpg")
    (folder / "a-device.jpg").symlink_to("/dev/zero")
    expected |= {
        "dangling-link.jpg": "missing",
        "link-to-itself.jpg": "too many links",
        "good-link.jpg": None,
        "a-folder.jpg": "not a regular file",
        "a-pipe.jpg": "not a regular file",
        "a-device.jpg": "not a regular file",
    }
    # Not images by their names: hidden (macOS writes the first), a list, no extension.
    for name in ("._plain.jpg", ".hidden.jpg", "list.txt", "README"):
        (folder / name).write_bytes(b"passed over")
    return expected
