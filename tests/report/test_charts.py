from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from anchorpatch.report.charts import (
    Chart,
    Series,
    comparison,
    draw,
    epoch_table,
    run_charts,
    run_table,
)
from anchorpatch.report.collect import Run
from anchorpatch.training.run_folder import best_record
from tests.report.samples import DASH, EVIL, SHOWN, records
from tests.report.samples import texts as cells

SVG = "{http://www.w3.org/2000/svg}"
RUN = Run("anchornet", Path("runs/anchornet"), tuple(records(4)), {})


def texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_run_of_anchornet_has_its_loss_its_branches_and_its_rate() -> None:
    loss, top1, rate = run_charts(RUN)
    assert [line.name for line in loss.series] == ["training", "validation"]
    assert loss.series[0].points == ((1, 10), (2, 5), (3, 10 / 3), (4, 2.5))
    assert [line.name for line in top1.series] == [
        "decision (Eq. 7)",
        *(f"localization {scale}" for scale in (63, 95, 111)),
        *(f"attention {scale}" for scale in (63, 95, 111)),
    ]
    assert top1.series[0].points[-1] == (4, 0.75)
    assert rate.series[0].points[1] == (2, 0.05)
    looks = {(line.hue, line.dash, line.hollow) for line in top1.series}
    assert len(looks) == 7
    assert "decision (Eq. 7): 18.8% at epoch 1, 75.0% at epoch 4" in top1.description


def test_other_networks_have_one_line_and_gaps_stay_gaps() -> None:
    found = records(3, anchornet=False)
    found[1]["val"]["top1"] = float("nan")
    del found[2]["train"]["loss"], found[2]["lr"]
    loss, top1, rate = run_charts(Run("x", Path(), tuple(found), {}))
    assert [len(line.points) for line in top1.series] == [2]
    assert top1.series[0].name == "top-1"
    assert [len(line.points) for line in loss.series] == [2, 3]
    assert len(rate.series[0].points) == 2
    assert run_charts(Run("x", Path(), ({"epoch": 1},), {})) == []


def test_the_svg_is_whole_and_takes_its_colors_from_the_page() -> None:
    for i, chart in enumerate(run_charts(RUN)):
        svg = draw(chart, f"c{i}")
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("width") is root.get("height") is None
        assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
        assert {"var(--ink)", "var(--rule)"} <= set(re.findall(r"var\(--\w+\)", svg))
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        assert all(str(name).startswith(f"c{i}-") for name in ids)
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert used <= set(ids)
        assert "font-family" not in svg
        assert "<style" not in svg
        assert svg == draw(chart, f"c{i}")


def test_the_legend_names_the_lines_and_tells_them_apart_without_color() -> None:
    svg = draw(run_charts(RUN)[1], "c")
    found = texts(svg)
    assert {"decision (Eq. 7)", "localization 63", "attention 111", "epoch"} <= set(found)
    assert any(text.endswith("%") for text in found)
    dashed = re.findall(r"stroke-dasharray: [^;]+", svg)
    assert dashed


def test_names_of_runs_are_text_and_nothing_else() -> None:
    evil = Run(EVIL, Path(), tuple(records(3)), {})
    dull = Run("_hidden", Path(), tuple(records(2)), {})
    chart = comparison([evil, dull])
    assert chart is not None
    found = texts(draw(chart, "c"))
    assert {SHOWN, "_hidden"} <= set(found)
    long = Chart("x", tuple(Series("n" * 99, ((1, 1.0),), hue=i) for i in range(2)))
    assert max(map(len, texts(draw(long, "c")))) == 30
    names = [f"{'a' * 40}{i}" for i in range(2)]
    apart = Chart("x", tuple(Series(name, ((1, 1.0),), hue=0) for name in names))
    assert {f"{'a' * 15}…{'a' * 13}{i}" for i in range(2)} <= set(texts(draw(apart, "c")))


def test_runs_are_compared_where_there_are_several() -> None:
    assert comparison([RUN]) is None
    chart = comparison([RUN] * 9)
    assert chart is not None
    assert chart.title.endswith(", the first 7 of 9 runs")
    looks = {(line.hue, line.dash, line.mark) for line in chart.series}
    assert len(looks) == len(chart.series) == 7


@pytest.mark.parametrize("epochs", [1, 300])
def test_any_number_of_epochs_can_be_drawn(epochs: int) -> None:
    run = Run("x", Path(), tuple(records(epochs)), {})
    sizes = [len(draw(chart, "c")) for chart in run_charts(run)]
    assert max(sizes) < 120_000


def test_runs_are_summed_up() -> None:
    found = records(4)
    found[2]["val"]["top1"] = 0.9
    run = Run("a", Path(), tuple(found), {"epochs": 5})
    (row,) = cells(run_table([run]))
    assert row == ["a", "4 of 5", "90.00%", "3", "2.250", "43.0", "0.07", "2.00"]
    epochs = epoch_table(run)
    assert epochs.folded
    assert cells(epochs)[1] == [
        *("2", "0.05", "5.0000", "4.5000"),
        *("37.50%", "57.50%", "42.0", "1%", "1.0"),
    ]
    found[3]["val"]["top1"] = found[1]["val"]["top1"] = 0.9
    # best.safetensors holds the first of equal epochs.
    assert best_record(found) == found[1]
    (tied,) = cells(run_table([Run("a", Path(), tuple(found), {})]))
    assert tied[2:4] == ["90.00%", "2"]
    (bare,) = cells(run_table([Run("b", Path(), ({"epoch": 1},), {})]))
    assert bare == ["b", "1", *[DASH] * 6]
