from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anchorpatch.demo import bundled_weights
from anchorpatch.errors import WeightsError
from anchorpatch.report.collect import collect
from anchorpatch.report.page import ReportConfig, run
from anchorpatch.report.pictures import embed, make_figures
from anchorpatch.runtime.progress import Reporter
from tests.conftest import draw_photo
from tests.report.samples import Parsed, sheet, write_figure
from tests.shards.samples import make_split


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
    assert (found.width, found.height) == (60, 40)


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


def test_figures_of_the_demo_are_made_from_its_shards(demo: Path) -> None:
    made = make_figures(collect(demo), None, Reporter())
    assert (made.weights, made.left_out) == (bundled_weights(), ())
    for figure in made.figures:
        assert figure.picture.width > 300
        assert figure.facts["caption"]
        assert figure.facts["source"] == str(demo / "shards" / "val")
        assert figure.facts["weights_sha256"] == collect(demo).splits[0].facts.weights_sha256
    numbers = {figure.number for figure in made.figures}
    assert numbers >= {3, 5}
    # On a dozen scenes no branch may be wrong where another is right.
    assert numbers | made.nothing.keys() == {3, 4, 5}


def test_a_figure_that_is_there_is_not_made_again(demo: Path, tmp_path: Path) -> None:
    for number in (3, 4, 5):
        write_figure(tmp_path / "figures", f"figure{number}", number)
    contents = collect(demo, figures=tmp_path / "figures")
    assert make_figures(contents, None, Reporter()).figures == ()


def test_without_crops_or_weights_nothing_is_made(weights: Path, tmp_path: Path) -> None:
    make_split(tmp_path / "val", store_images=True)
    made = make_figures(collect(tmp_path), None, Reporter())
    assert made.figures == ()
    assert made.reason.startswith("the weights that made the shards (SHA-256 abababababab) are")
    with pytest.raises(WeightsError, match=r"expected the weights that made shards .* abababab"):
        make_figures(collect(tmp_path), weights, Reporter())
    make_split(tmp_path / "none" / "val")
    assert "--store-images" in make_figures(collect(tmp_path / "none"), None, Reporter()).reason
    with pytest.raises(WeightsError, match=r"found SHA-256 .* no shards that store their crops"):
        make_figures(collect(tmp_path / "none"), weights, Reporter())
    with pytest.raises(WeightsError, match="found none"):
        make_figures(collect(tmp_path), tmp_path / "no.safetensors", Reporter())


def test_the_page_of_the_demo(demo: Path, tmp_path: Path) -> None:
    summary = run(ReportConfig(demo, out=tmp_path / "report.html"))
    assert summary.left_out == ()
    assert summary.bytes < 5_000_000
    page = summary.report.read_bytes()
    assert (b"has nothing to show" in page) == (not summary.sections["figures"]["figure 4"])
    parsed = Parsed(page)
    order = [section["id"] for section in parsed.all("section")]
    assert order == ["figures", "scenes", "shards", "training", "tables", "settings"]
    fit = parsed.tables["Patches against the true boxes"]
    assert [row[0] for row in fit[1:]] == ["strongest", "random, same scale", "middle, same scale"]
    sizes = parsed.tables["Chosen scale by the object's size"]
    assert sum(int(cell) for row in sizes[1:] for cell in row[1:4]) == 12
    assert summary.sections["figures"]["figure 3"] == 1
    assert len(parsed.all("img")) == sum(summary.sections["figures"].values())


def test_damaged_shards_and_other_boxes_are_left_out(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo / "shards", tmp_path / "shards")
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "boxes.csv").write_text((demo / "scenes" / "boxes.csv").read_text()[:99])
    (shard,) = (tmp_path / "shards" / "val").glob("*.h5")
    data = bytearray(shard.read_bytes())
    data[: 1 << 12] = bytes(1 << 12)
    shard.write_bytes(data)
    summary = run(ReportConfig(tmp_path))
    assert len(summary.left_out) >= 3
    assert all("\n" not in what.reason for what in summary.left_out)
    assert "Figure 3" in " ".join(what.source for what in summary.left_out)
    parsed = Parsed(summary.report.read_bytes())
    assert parsed.tables["Images and patches by chosen scale"][-1][1] == "12"
