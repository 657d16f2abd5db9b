from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anchorpatch.figures.coverage_curves import CoverageResult, curves_of
from anchorpatch.jobs.training.runlog import best_record
from anchorpatch.report.collect import Run, Split, collect
from anchorpatch.report.tables import (
    Cell,
    Table,
    count,
    coverage_table,
    decimal,
    epoch_table,
    facts_table,
    histogram_table,
    output_table,
    preset_table,
    run_table,
    scale_table,
    share,
    skipped_table,
    table_3,
    table_4,
    text,
)
from anchorpatch.settings import SCALES
from tests.report.samples import ANCHORNET, TABLE_3, TABLE_4, records, write_all

DASH = "–"  # noqa: RUF001 (an en dash)


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in (*table.rows, *table.foot)]


def test_cells_write_numbers_and_keep_what_is_none() -> None:
    assert count(1234567) == Cell("1,234,567", 1234567)
    assert decimal(0.12345, 3) == Cell("0.123", 0.12345)
    assert share(0.758) == Cell("75.80%", 0.758)
    assert share(None) == Cell(DASH, None)
    assert (decimal(-1e-9).text, share(-1e-9, 0).text) == ("0.00", "0%")
    for odd in ("many", float("nan"), True, [1]):
        assert decimal(odd) == Cell(str(odd), None)
    assert [text(words).long for words in ("some short words", "a" * 25, "")] == [
        False,
        True,
        False,
    ]


def test_table_3_says_what_evaluate_prints() -> None:
    table = table_3(TABLE_3)
    assert texts(table) == [
        ["224 px", "8", DASH, "1.814", DASH, DASH, DASH, "50.00%", "87.50%"],
        ["63 px", "3", "6.00", "0.900", "50%", "1.294", "29%", "75.00%", "100.00%"],
        ["95 px", "0", *[DASH] * 7],
        ["111 px", "5", "2.00", "0.800", "56%", "1.194", "34%", "25.00%", "50.00%"],
        ["all", "8", "3.50", "0.838", "54%", "1.232", "32%", "43.75%", "68.75%"],
    ]
    assert [row[0].text for row in table.foot] == ["all"]
    assert [row[0].key for row in table.rows] == [224, 63, 95, 111]
    notes = " ".join(table.notes)
    assert "61.2 images/s whole, 75.9 images/s by AnchorNet" in notes
    assert "1.24 times as many (32 images of 3.40 patches)" in notes
    assert "Left out: row 95: no image." in notes


def test_table_4_and_the_outputs_of_anchornet() -> None:
    assert texts(table_4(TABLE_4)) == [
        [scale, "3", "10.00%", "40.00%", "50.00%", "70.00%"] for scale in ("63 px", "all")
    ]
    outputs = texts(output_table(ANCHORNET))
    assert outputs[0] == ["localization 63 px", "70.00%", "90.00%", "20.0%"]
    assert outputs[3] == ["attention 63 px", "70.00%", "90.00%", DASH]
    assert outputs[-1] == ["decision (Eq. 7)", "74.00%", "96.00%", "100.0%"]
    assert texts(preset_table(ANCHORNET)) == [["figure", "4.80", "2.90", DASH, "3.10"]]


def test_runs_are_summed_up() -> None:
    found = records(4)
    found[2]["val"]["top1"] = 0.9
    run = Run("a", Path(), tuple(found), {"epochs": 5})
    (row,) = texts(run_table([run]))
    assert row == ["a", "4 of 5", "90.00%", "3", "2.250", "43.0", "0.07", "2.00"]
    epochs = epoch_table(run)
    assert epochs.folded
    assert texts(epochs)[1] == [
        *("2", "0.05", "5.0000", "4.5000"),
        *("37.50%", "57.50%", "42.0", "1%", "1.0"),
    ]
    found[3]["val"]["top1"] = found[1]["val"]["top1"] = 0.9
    # best.safetensors holds the first of equal epochs.
    assert best_record(found) is found[1]
    (tied,) = texts(run_table([Run("a", Path(), tuple(found), {})]))
    assert tied[2:4] == ["90.00%", "2"]
    (bare,) = texts(run_table([Run("b", Path(), ({"epoch": 1},), {})]))
    assert bare == ["b", "1", *[DASH] * 6]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return collect(write_all(tmp_path_factory.mktemp("all"))).splits[0]


def test_shards_by_scale(split: Split) -> None:
    table = scale_table(split)
    for row, scale in zip(table.rows, SCALES, strict=True):
        found = split.facts.scales[scale]
        assert [cell.key for cell in row] == [
            *(scale, found.images, found.images / 21),
            *(found.patches, found.mean_patches),
        ]
    assert max(cell.bar or 0 for row in table.rows for cell in row) == 1
    assert table.foot[0][1].text == "21"
    assert texts(skipped_table(split))[0][1] == "truncated"


def test_the_histogram_counts_every_image_once(split: Split) -> None:
    table = histogram_table(split)
    assert sum(cell.key for row in table.rows for cell in row[1:]) == 21
    assert not table.folded
    wide = Split(split.folder, split.facts, (), {63: (0, *[2] * 100), 95: (0, 5), 111: ()})
    binned = histogram_table(wide)
    assert len(binned.rows) <= 24
    assert binned.folded
    assert sum(row[1].key for row in binned.rows) == 200
    assert sum(row[2].key for row in binned.rows) == 5
    assert binned.rows[0][0].text == "1 to 5"


def test_figure_6_in_numbers_reads_as_on_the_terminal() -> None:
    right = np.random.default_rng(0).random((4, 2, 3, 30)) < 0.6
    curves = curves_of(["anchornet", "branch63", "random", "random"], right, (0.0, 0.4, 1.0))
    result = CoverageResult("net", "val", 30, (0.0, 0.4, 1.0), curves, {}, "", (), {"seeds": 2})
    table = coverage_table("Figure 6 in numbers", json.loads(json.dumps(result.summary())))
    assert [column.name for column in table.columns] == [
        *("localizer", "covered", "±", "gain", "masked", "±", "gain"),
    ]
    assert [cell.text for cell in table.rows[2]] == [
        *("random", *curves[2].covered.texts, *curves[2].masked.texts),
    ]
    assert [row[0].text for row in table.rows] == ["AnchorNet", "branch 63 px alone", "random"]
    assert [row[1].key for row in table.rows] == [curve.covered.auc for curve in curves]
    tiny = {"localizer": "of later", "covered_auc": 0.5, "covered_gain": -1e-6, "masked_auc": "x"}
    (row,) = texts(coverage_table("", [tiny]))
    assert row == ["of later", "0.5000", DASH, "+0.0000 ± 0.0000", DASH, DASH, DASH]


def test_any_facts_become_a_table() -> None:
    facts = facts_table("Facts", "what", {"x": {"lr": 0.1, "amp": False}, "y": {"amp": None}})
    assert texts(facts) == [["x", "0.1", "no"], ["y", "", "none"]]
