from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorpatch.jobs.results import Table3, table_3_rows, table_4_rows
from anchorpatch.metrics import Figures, PatchFigures
from anchorpatch.settings import SCALES
from tests.report.samples import ANCHORNET, DASH, TABLE_3, TABLE_4, texts

COSTS = ({63: 0.4, 95: 0.9, 111: 1.1, 224: 4.0}, 0.5, {})  # of the network, and of AnchorNet
EMPTY = Figures(0, 0, None, None, None)


def test_costs_worked_out_by_hand():
    by_scale = {
        63: Figures(2, 9, 0.5, 1.0, 0.7),
        95: EMPTY,
        111: Figures(6, 12, 0.25, 0.5, 1.5),
    }
    figures = PatchFigures(8, 21, 2.5 / 8, 5 / 8, 1.3, by_scale)
    whole, small, middle, large, overall = table_3_rows(
        figures, Figures(8, 8, 0.75, 1.0, 0.2), *COSTS
    )
    assert (whole.scale, whole.images, whole.gmacs, whole.top1) == ("224", 8, 4.0, 0.75)
    assert (whole.mean_patches, whole.saved, whole.gmacs_with_anchornet) == (None, None, None)
    assert (small.mean_patches, large.mean_patches) == (4.5, 2.0)
    assert small.gmacs == pytest.approx(4.5 * 0.4)
    assert small.saved == pytest.approx(1 - 1.8 / 4)
    assert small.gmacs_with_anchornet == pytest.approx(2.3)
    assert small.saved_with_anchornet == pytest.approx(1 - 2.3 / 4)
    assert (middle.images, middle.gmacs, middle.saved_with_anchornet) == (0, None, None)
    # Eight images: two at 1.8 and six at 2.2 GMACs.
    assert overall.gmacs == pytest.approx((2 * 1.8 + 6 * 2.2) / 8)
    assert overall.gmacs_with_anchornet == pytest.approx(overall.gmacs + 0.5)
    assert overall.mean_patches == 21 / 8
    assert (overall.scale, overall.top1) == ("all", 2.5 / 8)


def test_whole_images_of_the_size_of_a_patch_are_a_row_of_their_own():
    patches = PatchFigures(4, 8, 0.5, 1.0, 1.3, {111: Figures(4, 8, 0.5, 1.0, 1.3)})
    weights = {"111": "patches", "all": "patches", "whole": "whole images"}
    found = table_3_rows(patches, Figures(4, 4, 0.75, 1.0, 0.2), *COSTS[:2], weights, side=111)
    assert [(row.scale, row.weights) for row in found] == [
        ("111", "whole images"),
        ("111", "patches"),
        ("all", "patches"),
    ]
    assert [row.gmacs for row in found] == [1.1, 2.2, 2.2]
    table = Table3("tiny", "val", "w", "w", "crops", 1.1, 0.5, found, None, (), img_size=111)
    (shown,) = table.tables()
    assert "Row 111: crops; weights: w." in shown.notes
    assert any("at 111 px" in column.help for column in shown.columns)


def test_without_whole_images_and_as_json():
    figures = PatchFigures(1, 2, 1.0, 1.0, 0.1, {95: Figures(1, 2, 1.0, 1.0, 0.1)})
    rows = table_3_rows(figures, None, *COSTS)
    assert [row.scale for row in rows] == ["95", "all"]
    table = Table3("resnet50", "val", "w", None, None, 4.0, 0.5, rows, None, ("row 224: no",))
    document = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert document["protocol"] == "patches"
    assert document["rows"][0]["gmacs"] == 1.8
    assert document["left_out"] == ["row 224: no"]


share = st.integers(0, 20)


@given(st.lists(st.tuples(st.integers(0, 20), share, share, share), min_size=3, max_size=3))
def test_the_overall_line_weighs_scales_by_their_images(drawn: list[tuple[int, ...]]):
    by_scale, rescaled = {}, {}
    total = [0, 0, 0, 0, 0.0]
    for scale, (n, more, right, other) in zip(SCALES, drawn, strict=True):
        patches, right, other = n + more if n else 0, min(right, n), min(other, n)
        by_scale[scale] = Figures(n, patches, right / n, 1.0, 0.5) if n else EMPTY
        rescaled[scale] = Figures(n, n, other / n, 1.0, 0.5) if n else EMPTY
        added = (n, patches, right, other, patches * COSTS[0][scale])
        total = [a + b for a, b in zip(total, added, strict=True)]
    n, patches, right, other, gmacs = total
    if not n:
        return
    figures = PatchFigures(n, patches, right / n, 1.0, 0.5, by_scale)
    overall = table_3_rows(figures, None, *COSTS)[-1]
    assert overall.gmacs == pytest.approx(gmacs / n)
    assert overall.saved == pytest.approx(1 - gmacs / n / 4.0)
    *lines, last = table_4_rows(rescaled, figures)
    assert [line.scale for line in lines] == ["63", "95", "111"]
    assert (last.images, last.localized_top1) == (n, right / n)
    assert last.rescaled_top1 == pytest.approx(other / n)


def test_table_3_says_what_evaluate_prints() -> None:
    (table,) = TABLE_3.tables()
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
    assert "1.24 times as many (32 images of 3.40 patches" in notes
    assert "Left out: row 95: no image." in notes


def test_table_4_and_the_outputs_of_anchornet() -> None:
    assert texts(*TABLE_4.tables()) == [
        [scale, "3", "10.00%", "40.00%", "50.00%", "70.00%"] for scale in ("63 px", "all")
    ]
    outputs, presets = map(texts, ANCHORNET.tables())
    assert outputs[0] == ["localization 63 px", "70.00%", "90.00%", "20.0%"]
    assert outputs[3] == ["attention 63 px", "70.00%", "90.00%", DASH]
    assert outputs[-1] == ["decision (Eq. 7)", "74.00%", "96.00%", "100.0%"]
    assert presets == [["figure", "4.80", "2.90", DASH, "3.10"]]
