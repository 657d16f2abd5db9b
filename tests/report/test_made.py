from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from anchorpatch.demo import demo_weights
from anchorpatch.errors import WeightsError
from anchorpatch.report.build import ReportConfig, run
from anchorpatch.report.collect import collect
from anchorpatch.report.made import make_figures
from anchorpatch.runtime.progress import Reporter
from tests.report.samples import Parsed, write_figure
from tests.shards.samples import make_split


def test_figures_of_the_demo_are_made_from_its_shards(demo: Path) -> None:
    made = make_figures(collect(demo), None, Reporter())
    assert (made.weights, made.left_out) == (demo_weights(), ())
    for figure in made.figures:
        assert figure.picture.width > 300
        assert figure.caption
        assert figure.images == str(demo / "shards" / "val")
        assert figure.weights_sha256 == collect(demo).splits[0].facts.weights_sha256
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
