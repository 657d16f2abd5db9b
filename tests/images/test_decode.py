"""Decoding against torchvision's validation transform, and what odd files come to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from anchorpatch.errors import ImageError
from anchorpatch.images import decode as module
from anchorpatch.images.decode import CROP, RESIZE, decode, geometry
from tests.oddities import (
    bad_files,
    encoded,
    good_files,
    picture,
    png_rgb16,
    with_orientation,
)

Array = npt.NDArray[np.uint8]
GOOD, BAD = good_files(), bad_files()
SIDE = st.integers(1, 300)


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


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_geometry_is_torchvisions(height: int, width: int) -> None:
    got = geometry(height, width)
    resized = F.resize(torch.empty(3, height, width, device="meta"), [RESIZE], antialias=True)
    assert (got.height, got.width) == tuple(resized.shape[1:])
    rows = torch.arange(got.height)[None, :, None].expand(1, got.height, got.width)
    columns = torch.arange(got.width)[None, None, :].expand(1, got.height, got.width)
    assert got.top == F.center_crop(rows, [CROP])[0, 0, 0]
    assert got.left == F.center_crop(columns, [CROP])[0, 0, 0]


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
def test_jpeg_path_equals_v2_on_a_tensor(height: int, width: int, grey: bool, seed: int) -> None:
    image = Image.fromarray(picture(height, width, seed))
    data = encoded(image.convert("L") if grey else image, "JPEG", quality=95)
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
    if name != "bad-exif.jpg":  # Pillow warns of it
        with Image.open(BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image) if name.startswith("orientation") else image
            assert decoded.size == (upright.height, upright.width)


@pytest.mark.parametrize("name", BAD)
def test_bad_oddities_have_reasons(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(orientation: int, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = with_orientation(orientation, format, **options)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    decoded = decode(data)
    assert decoded.size == ((180, 240) if orientation < 5 else (240, 180))
    assert levels_apart(decoded.pixels, validation_transform(upright)) <= 2
    if format != "JPEG":  # lossless: the picture itself, turned
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
        ("alpha.png", 1),
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


@pytest.mark.parametrize("name", ["grey-16-bit.png", "grey.png", "grey-alpha.png"])
def test_grey_is_equal_in_all_channels(name: str) -> None:
    want = validation_transform(Image.fromarray(picture()).convert("L"))
    pixels = decode(GOOD[name]).pixels
    assert levels_apart(pixels, want) <= 1
    assert (pixels == pixels[..., :1]).all()


def test_the_upper_half_of_16_bits_stays() -> None:
    deep = np.random.default_rng(0).integers(0, 1 << 16, (CROP, CROP, 3), dtype=np.uint16)
    want = decode(encoded((deep >> 8).astype(np.uint8), "PNG"))
    np.testing.assert_array_equal(decode(png_rgb16(deep)).pixels, want.pixels)
    grey = encoded(Image.fromarray(deep[..., 0]), "PNG")
    want = decode(encoded((deep[..., 0] >> 8).astype(np.uint8), "PNG"))
    np.testing.assert_array_equal(decode(grey).pixels, want.pixels)


def test_run_length_bmp_has_one_grey_a_row() -> None:
    pixels = decode(GOOD["run-length.bmp"]).pixels
    assert (pixels == pixels[:, :1]).all()
    assert pixels[0, 0, 0] > pixels[-1, 0, 0]  # the first row of the file is the lowest


def test_cmyk_of_photoshop_is_inverted() -> None:
    with Image.open(BytesIO(GOOD["ycck.jpg"])) as image:
        assert image.info["adobe_transform"] == 2
        assert image.mode == "CMYK"
        want = validation_transform(image)
    assert levels_apart(decode(GOOD["ycck.jpg"]).pixels, want) <= 1


def test_palette_transparency_is_dropped() -> None:
    opaque = decode(GOOD["palette.png"]).pixels
    np.testing.assert_array_equal(decode(GOOD["palette-transparency.png"]).pixels, opaque)
    np.testing.assert_array_equal(decode(GOOD["palette-one-transparent.png"]).pixels, opaque)


@pytest.mark.parametrize("format", ["JPEG", "PROGRESSIVE", "PNG", "WEBP", "BMP", "GIF"])
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
    assert reasons <= {"empty file", "truncated", "not an image"}


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


@pytest.mark.parametrize("decoder", ["refuses", "is missing"])
def test_pillow_is_the_last_resort(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no")

    want = decode(GOOD["orientation-6.jpg"])
    monkeypatch.setattr(module, "decode_jpeg", refuse if decoder == "refuses" else None)
    got = decode(GOOD["orientation-6.jpg"])
    assert got.size == want.size
    assert levels_apart(got.pixels, want.pixels) <= 2
    with pytest.raises(ImageError, match="truncated"):
        decode(BAD["truncated.jpg"][0])


def test_memory_errors_are_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "_by_pillow", fail)
    with pytest.raises(MemoryError):
        decode(GOOD["grey.png"])


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
