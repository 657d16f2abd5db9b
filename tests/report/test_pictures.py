from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from anchorpatch.report.pictures import embed
from tests.conftest import draw_photo
from tests.report.samples import sheet


def opened(url: str) -> tuple[str, bytes, Image.Image]:
    head, data = url.split(",", 1)
    kind = head.removeprefix("data:image/").removesuffix(";base64")
    raw = base64.b64decode(data, validate=True)
    return kind, raw, Image.open(io.BytesIO(raw)).convert("RGB")


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_a_small_png_keeps_its_bytes() -> None:
    encoded = png(draw_photo(0, (60, 40)))
    found = embed(draw_photo(0, (60, 40)), encoded)
    assert opened(found.url)[:2] == ("png", encoded)
    assert (found.width, found.height, found.bytes) == (60, 40, len(encoded))


def test_photographs_become_webp_that_looks_the_same() -> None:
    picture = draw_photo(1, (700, 600))
    found = embed(picture, png(picture))
    kind, raw, shown = opened(found.url)
    assert kind == "webp"
    assert len(raw) < 0.7 * len(png(picture))
    assert shown.size == picture.size
    difference = np.abs(np.asarray(shown, float) - np.asarray(picture, float))
    assert difference.mean() < 6


def test_drawings_that_png_stores_better_stay_png() -> None:
    pixels = np.zeros((900, 900), np.uint8)
    rng = np.random.default_rng(0)
    pixels[rng.integers(0, 900, 200_000), rng.integers(0, 900, 200_000)] = 255
    picture = Image.fromarray(pixels).convert("RGB")
    encoded = png(Image.fromarray(pixels > 0))
    assert 120_000 > len(encoded) > 50_000
    assert opened(embed(picture, encoded).url)[1] == encoded


@pytest.mark.parametrize("size", [(1400, 1200), (2400, 900)])
def test_a_large_sheet_takes_a_bounded_share_of_the_page(size: tuple[int, int]) -> None:
    found = embed(sheet(*size))
    _, raw, shown = opened(found.url)
    assert len(raw) <= 480_000
    assert shown.size == (found.width, found.height)
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.01)


def test_other_kinds_of_files_are_taken_as_they_are_where_they_are_small_enough() -> None:
    picture = draw_photo(2, (300, 300))
    for kind in ("JPEG", "WEBP"):
        file = io.BytesIO()
        picture.save(file, kind)
        found = embed(picture, file.getvalue())
        assert opened(found.url)[:2] == (kind.lower(), file.getvalue())
