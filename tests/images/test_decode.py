"""Decoding against torchvision's validation transform, and what odd files come to."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageOps
from torchvision.transforms.v2 import functional as F

from anchorpatch.errors import ImageError
from anchorpatch.images import decode as module
from anchorpatch.images.decode import decode, decode_picture
from anchorpatch.settings import CROP, CropSettings
from tests.oddities import (
    bad_files,
    encoded,
    good_files,
    long_text,
    picture,
    png,
    png_rgb16,
    transparent_files,
    with_orientation,
)

Array = npt.NDArray[np.uint8]
GOOD, BAD, TRANSPARENT = good_files(), bad_files(), transparent_files()
SIDE = st.integers(1, 300)
RESIZE = 256


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def validation_transform(image: Image.Image) -> Array:
    """The oracle: v2's Resize(256) and CenterCrop(224) on the whole PIL image."""
    resized = F.resize(image.convert("RGB"), [RESIZE], antialias=True)
    return np.asarray(F.center_crop(resized, [CROP]))


def validation_transform_of_tensor(image: Image.Image) -> Array:
    tensor = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    resized = F.resize(tensor, [RESIZE], antialias=True)
    return np.asarray(F.center_crop(resized, [CROP]).permute(1, 2, 0).numpy())


def levels_apart(a: Array, b: Array) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@settings(max_examples=40, deadline=None)
@given(SIDE, SIDE, st.integers(0, 9))
def test_pillow_path_is_within_one_level_of_v2_on_a_pil_image(
    height: int, width: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    decoded = decode(encoded(pixels, "PNG"))
    assert decoded.size == (height, width)
    assert levels_apart(decoded.pixels, validation_transform(Image.fromarray(pixels))) <= 1


@settings(max_examples=40, deadline=None)
@given(SIDE, SIDE, st.booleans(), st.integers(0, 9))
def test_jpeg_path_equals_v2_on_a_tensor(height: int, width: int, gray: bool, seed: int) -> None:
    image = Image.fromarray(picture(height, width, seed))
    data = encoded(image.convert("L") if gray else image, "JPEG", quality=95)
    stored = Image.open(BytesIO(data))
    decoded = decode(data)
    assert decoded.size == (height, width)
    if max(height, width) > 4 * min(height, width):
        assert levels_apart(decoded.pixels, validation_transform(stored)) <= 1
    else:
        np.testing.assert_array_equal(decoded.pixels, validation_transform_of_tensor(stored))


@pytest.mark.parametrize("name", GOOD)
def test_good_oddities_decode(name: str) -> None:
    data = GOOD[name]
    decoded = decode(data)
    assert decoded.pixels.shape == (CROP, CROP, 3)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.pixels.flags.c_contiguous
    if name not in ("bad-exif.jpg", "long-text.png"):  # Pillow warns of it, or refuses it
        with Image.open(BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image) if name.startswith("orientation") else image
            assert decoded.size == (upright.height, upright.width)


@pytest.mark.parametrize("name", BAD)
def test_bad_oddities_have_reasons(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(orientation: int, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = with_orientation(orientation, format, **options)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    decoded = decode(data)
    assert decoded.size == ((180, 240) if orientation < 5 else (240, 180))
    assert levels_apart(decoded.pixels, validation_transform(upright)) <= 2
    if format not in ("JPEG", "AVIF"):  # lossless: the picture itself, turned
        turned = Image.fromarray(picture())
        if orientation >= 5:
            turned = turned.transpose(Image.Transpose.TRANSPOSE)
        if orientation in {3, 4, 7, 8}:
            turned = ImageOps.flip(turned)
        if orientation in {2, 3, 6, 7}:
            turned = ImageOps.mirror(turned)
        assert decoded.size == turned.size[::-1]
        assert levels_apart(decoded.pixels, validation_transform(turned)) <= 1


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_is_ignored(orientation: int) -> None:
    plain = decode(encoded(picture(), "JPEG"))
    np.testing.assert_array_equal(decode(with_orientation(orientation)).pixels, plain.pixels)


def test_damaged_exif_does_not_spoil_the_pixels() -> None:
    plain = decode(encoded(picture(), "JPEG"))
    np.testing.assert_array_equal(decode(GOOD["bad-exif.jpg"]).pixels, plain.pixels)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("plain.jpg", 6),
        ("progressive.jpg", 20),
        ("trailing-junk.jpg", 6),
        ("mpo.jpg", 20),
        ("a png.jpg", 1),
        ("an animated gif.png", 60),
        ("rgb-16-bit.png", 1),
        ("interlaced.png", 1),
        ("animated.png", 1),
        ("plain.tif", 1),
        ("lossless.avif", 8),
        ("lossless.webp", 1),
        ("animated.webp", 1),
        ("plain.bmp", 1),
        ("top-down.bmp", 1),
        ("cmyk.jpg", 40),
    ],
)
def test_the_picture_survives(name: str, levels: int) -> None:
    want = validation_transform(Image.fromarray(picture()))
    assert levels_apart(decode(GOOD[name]).pixels, want) <= levels


@pytest.mark.parametrize("name", ["gray-16-bit.png", "gray.png", "gray-16-bit.tif"])
def test_gray_is_equal_in_all_channels(name: str) -> None:
    want = validation_transform(Image.fromarray(picture()).convert("L"))
    pixels = decode(GOOD[name]).pixels
    assert levels_apart(pixels, want) <= 1
    assert (pixels == pixels[..., :1]).all()


def test_the_upper_half_of_16_bits_stays() -> None:
    deep = np.random.default_rng(0).integers(0, 1 << 16, (CROP, CROP, 3), dtype=np.uint16)
    want = decode(encoded((deep >> 8).astype(np.uint8), "PNG"))
    np.testing.assert_array_equal(decode(png_rgb16(deep)).pixels, want.pixels)
    gray = encoded(Image.fromarray(deep[..., 0]), "PNG")
    want = decode(encoded((deep[..., 0] >> 8).astype(np.uint8), "PNG"))
    np.testing.assert_array_equal(decode(gray).pixels, want.pixels)


def test_run_length_bmp_has_one_gray_a_row() -> None:
    pixels = decode(GOOD["run-length.bmp"]).pixels
    assert (pixels == pixels[:, :1]).all()
    assert pixels[0, 0, 0] > pixels[-1, 0, 0]  # the first row of the file is the lowest


def test_cmyk_of_photoshop_is_inverted() -> None:
    with Image.open(BytesIO(GOOD["ycck.jpg"])) as image:
        assert image.info["adobe_transform"] == 2
        assert image.mode == "CMYK"
        want = validation_transform(image)
    assert levels_apart(decode(GOOD["ycck.jpg"]).pixels, want) <= 1


@pytest.mark.parametrize("background", ["white", "#204060"])
@pytest.mark.parametrize("name", [*sorted(TRANSPARENT), "alpha.png", "alpha.webp"])
def test_transparency_shows_the_background(name: str, background: str) -> None:
    data = TRANSPARENT.get(name) or GOOD[name]
    with Image.open(BytesIO(data)) as image:
        layers = np.asarray(image.convert("RGBA")).astype(float)
    ground = np.array(ImageColor.getrgb(background))
    alpha = layers[..., 3:] / 255
    want = (layers[..., :3] * alpha + ground * (1 - alpha)).round().astype(np.uint8)
    crop = CropSettings(background=background)
    got = decode(data, crop).pixels
    assert levels_apart(got, validation_transform(Image.fromarray(want))) <= 2
    picture_of = decode_picture(data, crop.background).image.convert("RGB")
    assert levels_apart(np.asarray(picture_of), want) <= 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_gray_is_that_of_the_files_own_scale(depth: int) -> None:
    # Half of the columns have the largest value, which is transparent; the others are black.
    top = (1 << depth) - 1
    values = [0, top] * 8
    bits = "".join(format(value, f"0{depth}b") for value in values)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    data = png(16, 16, depth, 0, row * 16, transparency=struct.pack(">H", top))
    pixels = np.asarray(decode_picture(data, "#ff0000").image)
    assert (pixels[:, 0::2] == 0).all()
    assert (pixels[:, 1::2] == (255, 0, 0)).all()


def test_16_bit_gray_keeps_its_shades_beside_a_transparent_one() -> None:
    row = b"\0" + struct.pack(">4H", 0x1234, 0x1235, 0x8000, 0xFFFF)
    data = png(4, 1, 16, 0, row, transparency=struct.pack(">H", 0x1234))
    pixels = np.asarray(decode_picture(data, "#ff0000").image)
    assert pixels.tolist() == [[[255, 0, 0], [0x12] * 3, [0x80] * 3, [255] * 3]]


def test_a_transparent_color_of_16_bits() -> None:
    row = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x4321, 0x5678, 0x9ABC)
    data = png(2, 1, 16, 2, row, transparency=struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    pixels = np.asarray(decode_picture(data, "#ff0000").image)
    assert pixels.tolist() == [[[255, 0, 0], [0x43, 0x56, 0x9A]]]


def test_opaque_files_do_not_see_the_background() -> None:
    red = CropSettings(background="red")
    for name in ("palette.png", "plain.jpg", "gray.png", "lossless.webp", "an animated gif.png"):
        np.testing.assert_array_equal(decode(GOOD[name], red).pixels, decode(GOOD[name]).pixels)


@settings(max_examples=20, deadline=None)
@given(SIDE, SIDE, st.sampled_from(["JPEG", "PNG"]), st.integers(0, 9))
def test_squash_is_a_resize_of_both_sides(height: int, width: int, format: str, seed: int) -> None:
    data = encoded(picture(height, width, seed), format)
    with Image.open(BytesIO(data)) as image:
        want = F.resize(image.convert("RGB"), [CROP, CROP], antialias=True)
    decoded = decode(data, CropSettings("squash"))
    assert decoded.size == (height, width)
    assert levels_apart(decoded.pixels, np.asarray(want)) <= 2


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "AVIF", "GIF"])
def test_whole_pictures_are_the_decoders(format: str) -> None:
    data = encoded(picture(), format)
    with Image.open(BytesIO(data)) as image:
        want = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_picture(data).image.convert("RGB")), want)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_whole_pictures_stand_upright(orientation: int, format: str) -> None:
    data = with_orientation(orientation, format)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(decode_picture(data).image), np.asarray(upright))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_every_mode_becomes_gray_or_rgb(mode: str) -> None:
    image = Image.fromarray(picture(10, 20)).convert("L" if mode == "I;16" else mode).convert(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert decode_picture(data).image.mode in ("L", "RGB")


@pytest.mark.parametrize("name", ["empty.jpg", "text.jpg", "truncated.jpg", "bad-crc.png"])
def test_whole_pictures_carry_the_same_reasons(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(ImageError) as caught:
        decode_picture(data)
    assert caught.value.reason == reason


def test_long_texts_of_a_png_do_not_matter() -> None:
    want = decode(encoded(picture(), "PNG")).pixels
    for info in (long_text(), long_text(after=True), long_text(profile=True)):
        np.testing.assert_array_equal(decode(info).pixels, want)
        assert decode_picture(info).image.size == (240, 180)


def damaged_jpegs() -> dict[str, bytes]:
    """JPEGs whose data libjpeg has to make up for."""
    plain = encoded(picture(), "JPEG", quality=90)
    files = {}
    for name, data in (
        ("baseline", plain),
        ("progressive", encoded(picture(), "JPEG", progressive=True)),
        ("restarts", encoded(picture(), "JPEG", restart_marker_blocks=5)),
        ("gray", encoded(Image.fromarray(picture()).convert("L"), "JPEG")),
    ):
        start = data.index(b"\xff\xda")
        files[name] = data[: start + 200] + data[start + 240 :]  # within the first scan
    return files


def test_damage_of_a_cmyk_jpeg_is_seen() -> None:
    for name in ("cmyk.jpg", "ycck.jpg"):
        data = GOOD[name]
        start = data.index(b"\xff\xda") + 400
        damaged = data[:start] + data[start + 40 :]
        assert [decode(data).damaged, decode(damaged).damaged] == [False, True]
        assert [decode_picture(d).damaged for d in (data, damaged)] == [False, True]


@pytest.mark.parametrize("name", damaged_jpegs())
def test_damage_is_seen_and_the_pixels_are_those_of_libjpeg(name: str) -> None:
    data = damaged_jpegs()[name]
    with Image.open(BytesIO(data)) as image:
        want = image.convert("RGB")
    decoded = decode(data)
    assert decoded.damaged
    np.testing.assert_array_equal(decoded.pixels, validation_transform_of_tensor(want))
    whole = decode_picture(data)
    assert whole.damaged
    np.testing.assert_array_equal(np.asarray(whole.image), np.asarray(want))
    with pytest.raises(ImageError, match=r"^damaged$"):
        decode(data, CropSettings(damaged="skip"))


def test_what_surrounds_the_pixels_is_no_damage() -> None:
    plain = GOOD["plain.jpg"]
    tables = plain.index(b"\xff\xdb")
    harmless = {
        "padding": plain[:-2] + b"\0" * 9 + plain[-2:],
        "filling": plain[:-2] + b"\xff" * 9 + plain[-2:],
        "junk before a table": plain[:tables] + b"junk" + plain[tables:],
        "unknown JFIF revision": plain.replace(b"JFIF\0\1", b"JFIF\0\7"),
        **{name: data for name, data in GOOD.items() if name.endswith(".jpg")},
    }
    want = decode(plain).pixels
    for name, data in harmless.items():
        decoded = decode(data)
        assert not decoded.damaged, name
        if name not in GOOD:
            np.testing.assert_array_equal(decoded.pixels, want)


@pytest.mark.parametrize(
    "format", ["JPEG", "PROGRESSIVE", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"]
)
def test_no_part_of_a_file_is_taken_for_the_whole(format: str) -> None:
    options = {"progressive": True} if format == "PROGRESSIVE" else {}
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    data = encoded(noise, "JPEG" if options else format, **options)
    whole = decode(data).pixels
    accepted, reasons = 0, set()
    step = max(1, len(data) // 60)
    for length in {*range(0, len(data), step), *range(len(data) - 20, len(data))}:
        try:
            part = decode(data[:length])
        except ImageError as error:
            reasons.add(error.reason)
        else:
            accepted += 1
            np.testing.assert_array_equal(part.pixels, whole)
    assert accepted < 10  # only what lacks no more than the end marker
    assert reasons <= {"empty file", "truncated", "not an image"} | (
        {"damaged"} if format in ("TIFF", "AVIF") else set()
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(set(GOOD) - {"huge-aspect.jpg"})),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
)
def test_damage_raises_nothing_but_image_errors(
    name: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(GOOD[name])
    for where, value in changes:
        data[int(where * len(data))] = value
    with contextlib.suppress(ImageError):
        assert decode(bytes(data)).pixels.shape == (CROP, CROP, 3)


@given(
    st.binary(min_size=1, max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"BM", b"GIF89a"])
)
def test_arbitrary_bytes_raise_nothing_but_image_errors(data: bytes, start: bytes) -> None:
    with pytest.raises(ImageError):
        decode(start + data)


@pytest.mark.parametrize("name", ["bomb.png", "bomb.bmp"])
def test_bombs_are_refused_unread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(*_: object) -> None:
        raise AssertionError("the pixels were asked for")

    monkeypatch.setattr(Image.Image, "load", must_not_run)
    monkeypatch.setattr(module, "decode_jpeg", must_not_run)
    with pytest.raises(ImageError, match="too many pixels"):
        decode(BAD[name][0])


def test_the_limit_of_pixels_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 180 * 240)
    decode(GOOD["plain.jpg"])
    monkeypatch.setattr(module, "MAX_PIXELS", 180 * 240 - 1)
    with pytest.raises(ImageError, match="too many pixels"):
        decode(GOOD["plain.jpg"])


def test_an_elongated_image_is_never_resized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "resize", None)
    data = encoded(picture(2, 60_000), "JPEG")
    assert decode(data).size == (2, 60_000)
    assert decode(encoded(picture(60_000, 1), "PNG")).size == (60_000, 1)


def test_pillow_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no")

    want = decode(GOOD["orientation-6.jpg"])
    monkeypatch.setattr(module, "decode_jpeg", refuse)
    got = decode(GOOD["orientation-6.jpg"])
    assert (got.size, got.damaged) == (want.size, False)
    np.testing.assert_array_equal(got.pixels, want.pixels)
    with pytest.raises(ImageError, match="truncated"):
        decode(BAD["truncated.jpg"][0])


def test_memory_errors_are_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "_load_upright", fail)
    with pytest.raises(MemoryError):
        decode(GOOD["gray.png"])


@pytest.mark.photos
def test_photographs() -> None:
    folder = os.environ.get("ANCHORPATCH_TEST_PHOTOS")
    if not folder:
        pytest.skip("ANCHORPATCH_TEST_PHOTOS names no folder of photographs")
    files = [
        *sorted(Path(folder, "imagenet-photos").rglob("*.JPEG")),
        *sorted(Path(folder, "imagenette224", "val").rglob("*.JPEG")),
    ]
    assert len(files) > 200
    for i, file in enumerate(files):
        data = file.read_bytes()
        decoded = decode(data)
        if i < 60:
            with Image.open(BytesIO(data)) as image:
                upright = ImageOps.exif_transpose(image)
            assert decoded.size == (upright.height, upright.width)
            np.testing.assert_array_equal(decoded.pixels, validation_transform_of_tensor(upright))
            assert levels_apart(decoded.pixels, validation_transform(upright)) <= 2
