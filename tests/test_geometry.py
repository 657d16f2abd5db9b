"""Where crops and patches lie in their pictures, against torchvision, timm and the pixels."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from anchorpatch.errors import SettingsError
from anchorpatch.geometry import geometry, source_box
from anchorpatch.images.decode import decode
from anchorpatch.settings import CROP_MODES, SCALES, CropSettings
from tests.oddities import encoded, picture

SIDE = st.integers(1, 6000)
CROPS = st.builds(
    CropSettings,
    st.sampled_from(CROP_MODES),
    img_size=st.sampled_from([111, 224, 225, 256, 320]),
    crop_pct=st.sampled_from([None, 0.875, 0.9, 0.95, 1.0]),
)


@given(SIDE, SIDE)
def test_geometry_is_torchvisions(height: int, width: int) -> None:
    got = geometry(height, width)
    resized = F.resize(torch.empty(3, height, width, device="meta"), [256], antialias=True)
    assert (got.height, got.width) == tuple(resized.shape[1:])
    rows = torch.arange(got.height)[None, :, None].expand(1, got.height, got.width)
    columns = torch.arange(got.width)[None, None, :].expand(1, got.height, got.width)
    assert got.top == F.center_crop(rows, [224])[0, 0, 0]
    assert got.left == F.center_crop(columns, [224])[0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 900), st.integers(20, 900), CROPS)
def test_crops_are_timms(height: int, width: int, crop: CropSettings) -> None:
    """The same size and place in all modes; pixels that say where they lie, in nothing resized."""
    factory = pytest.importorskip("timm.data.transforms_factory")
    pct = crop.crop_pct or {"center": 0.875, "squash": 1.0, "border": 1.0}[crop.mode]
    transform = factory.transforms_imagenet_eval(
        crop.img_size, pct, crop.mode, mean=(1.0, 1.0, 1.0), use_prefetcher=True
    )
    image = Image.fromarray(picture(height, width))
    found = decode(encoded(image, "PNG"), crop).pixels.astype(int)
    expected = transform(image).permute(1, 2, 0).numpy().astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2
    # The border is where timm has it, to the pixel.
    if crop.mode == "border":
        white = transform(Image.new("RGB", (width, height))).permute(1, 2, 0).numpy() > 0
        black = decode(encoded(Image.new("RGB", (width, height)), "PNG"), crop).pixels > 0
        np.testing.assert_array_equal(black, white)


@given(SIDE, SIDE, CROPS, st.sampled_from(SCALES), st.data())
@example(1, 6000, CropSettings("border"), 63, None)
def test_boxes_are_the_crops_turned_back(
    height: int, width: int, crop: CropSettings, theta: int, data: st.DataObject | None
) -> None:
    last = crop.img_size - theta
    corner = data.draw(st.tuples(st.integers(0, last), st.integers(0, last))) if data else (0, 0)
    x0, y0, x1, y1 = source_box((height, width), [corner], theta, crop)[0]
    g = geometry(height, width, crop)
    for first, end, place, offset, resized, length in (
        (y0, y1, corner[0], g.top, g.height, height),
        (x0, x1, corner[1], g.left, g.width, width),
    ):
        # The same numbers forward: a point of the picture in the crop.
        assert first * resized / length - offset == pytest.approx(place, abs=1e-6)
        assert end * resized / length - offset == pytest.approx(place + theta, abs=1e-6)
        if crop.mode != "border":
            assert -1e-9 <= first < end <= length + 1e-9


def test_boxes_of_several_pictures() -> None:
    crop = CropSettings("squash", img_size=256)
    sizes = np.array([[512, 256], [256, 256], [512, 256]])
    found = source_box(sizes, [[0, 8], [16, 0], [8, 8]], 63, crop)
    assert found.tolist() == [[8, 0, 71, 126], [0, 16, 63, 79], [8, 16, 71, 142]]
    assert source_box(np.empty((0, 2), int), np.empty((0, 2), int), 63, crop).shape == (0, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", CROP_MODES)
def test_boxes_are_of_the_upright_picture(mode: str, orientation: int) -> None:
    """A white square in the picture as it is looked at is found at its box, in any orientation."""
    crop = CropSettings(mode, "black", img_size=225)
    upright = np.zeros((300, 460, 3), np.uint8)
    corner, theta = (64, 96), 63
    x0, y0, x1, y1 = source_box((300, 460), [corner], theta, crop)[0].round().astype(int)
    upright[y0:y1, x0:x1] = 255
    # What the file holds is turned so that its orientation turns it back.
    methods = Image.Transpose
    back = [None, *[methods(m) for m in (0, 3, 1, 5, 2, 6, 4)]][orientation - 1]
    stored = Image.fromarray(upright)
    if back is not None:
        stored = stored.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    with Image.open(BytesIO(data)) as image:
        looked_at = np.asarray(ImageOps.exif_transpose(image).convert("L"))
    assert looked_at.shape == (300, 460)
    assert looked_at[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].min() > 200
    decoded = decode(data, crop)
    assert decoded.size == (300, 460)
    seen = decoded.pixels[..., 0] > 127
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    ends = np.array([rows[0], rows[-1] + 1 - theta, columns[0], columns[-1] + 1 - theta])
    assert np.abs(ends - np.repeat(corner, 2)).max() <= 1


def test_boxes_of_photographs_hold_what_the_patches_show(photos: Path) -> None:
    """The box of a picture, resized to the patch, is the patch within the resampling's two levels.

    The box is resized within the picture, since at its edges the resampling reaches across them.
    """
    rng, compared = np.random.default_rng(0), 0
    paths = sorted(photos.glob("imagenet-photos/**/*.JPEG"))
    for k, path in enumerate(paths[:: len(paths) // 200]):
        data = path.read_bytes()
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        crop = CropSettings(CROP_MODES[k % 3], img_size=(224, 256, 225)[k // 3 % 3])
        pixels, size, _ = decode(data, crop)
        theta = SCALES[k % 3]
        g = geometry(*size, crop)
        corner = _inside(g, crop.img_size, theta, rng)
        if corner is None:
            continue
        box = source_box(size, [corner], theta, crop)[0]
        cut = image.resize((theta, theta), Image.Resampling.BILINEAR, box=tuple(box))
        y, x = corner
        patch = pixels[y : y + theta, x : x + theta].astype(int)
        apart = np.abs(np.asarray(cut).astype(int) - patch)
        assert apart.max() <= 2, path
        compared += 1
    assert compared >= 200


def _inside(g, side: int, theta: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """Draw a corner whose patch shows nothing but the picture."""
    found = []
    for offset, length in ((g.top, g.height), (g.left, g.width)):
        low, high = max(-offset, 0), min(side, length - offset) - theta
        if high < low:
            return None
        found.append(int(rng.integers(low, high + 1)))
    return found[0], found[1]


def test_settings_of_crops() -> None:
    assert CropSettings().resize == 256
    assert CropSettings(crop_pct=0.875) == CropSettings()
    assert CropSettings("squash", crop_pct=0.875).resize == 256
    assert CropSettings("border", img_size=256).resize == 256
    assert CropSettings(img_size=111).resize == 126
    for wrong in ({"img_size": 110}, {"img_size": 32_768}, {"crop_pct": 1.01}, {"crop_pct": 0.0}):
        with pytest.raises(SettingsError, match=r"--(img-size|crop-pct): expected"):
            CropSettings(**wrong)
