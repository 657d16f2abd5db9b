from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anchorpatch.figures.coverage_curves import CoverageResult, curves_of
from anchorpatch.report.collect import Run, Split, collect
from anchorpatch.report.tables import (
    coverage_table,
    epoch_table,
    histogram_table,
    run_table,
    skipped_table,
)
from anchorpatch.settings import SCALES
from anchorpatch.training.run_folder import best_record
from tests.report.samples import DASH, records, texts, write_all


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
    assert best_record(found) == found[1]
    (tied,) = texts(run_table([Run("a", Path(), tuple(found), {})]))
    assert tied[2:4] == ["90.00%", "2"]
    (bare,) = texts(run_table([Run("b", Path(), ({"epoch": 1},), {})]))
    assert bare == ["b", "1", *[DASH] * 6]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return collect(write_all(tmp_path_factory.mktemp("all"))).splits[0]


def test_shards_by_scale(split: Split) -> None:
    table = split.facts.table()
    for row, scale in zip(table.rows, SCALES, strict=True):
        found = split.facts.scales[scale]
        assert [cell.key for cell in row] == [
            *(scale, found["images"], found["images"] / 21),
            *(found["patches"], found["patches"] / found["images"]),
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
