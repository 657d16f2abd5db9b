from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from anchorpatch.errors import DataError
from anchorpatch.figures.tradeoff import read_dynamic, tradeoff_curves, tradeoff_figure
from anchorpatch.jobs.tradeoff import Dynamic, DynamicRow, Saving
from tests.conftest import Program


def sample(network: str = "resnet50", glance: int | None = None) -> Dynamic:
    rows = (
        DynamicRow("whole", "224", 8, 0.0, 4.1, 4.1, 0.8, 0.9),
        DynamicRow("whole", "96", 8, 0.0, 0.8, 0.8, 0.5, 0.7),
        DynamicRow("fixed", "1/1/1", 8, 1.0, 0.3, 0.7, 0.6, 0.9, stopped=(1.0, 0.0)),
        DynamicRow("fixed", "2/2/1", 8, 1.9, 0.6, 1.0, 0.7, 0.9, stopped=(0.1, 0.9)),
        DynamicRow("dynamic", "0.9", 8, 1.5, 0.4, 0.8, 0.7, 0.9, threshold=0.9, stopped=(0.5, 0.5)),
    )
    return Dynamic(
        network,
        "shards/val",
        "best.safetensors",
        "best.safetensors",
        "the stored crops",
        "max",
        glance,
        0.4,
        rows,
        (Saving("2/2/1", 0.7, 0.6, 0.33, 0.2, 0.4, 0.2, 0.1, 0.3),),
        ((0.0, 0.3, 0.7, 0.6), (0.5, 0.4, 0.8, 0.7), (1.0, 0.6, 1.0, 0.7)),
        None,
        (),
    )


def test_curves_have_both_costs():
    curves = tradeoff_curves(sample(glance=95))
    found = {(curve.way, curve.in_all): curve.points for curve in curves}
    assert found["whole", True] == ((0.8, 0.5), (4.1, 0.8))
    assert found["fixed", True] == ((0.7, 0.6), (1.0, 0.7))
    assert found["fixed", False] == ((0.3, 0.6), (0.6, 0.7))
    assert found["dynamic", False] == ((0.3, 0.6), (0.4, 0.7), (0.6, 0.7))
    assert found["dynamic", True] == ((0.7, 0.6), (0.8, 0.7), (1.0, 0.7))
    assert any("glance 95 px" in curve.name for curve in curves)
    axes = tradeoff_figure([sample(), sample("resnet18")]).axes
    assert [each.get_title() for each in axes] == ["resnet50", "resnet18"]
    assert [len(each.lines) for each in axes] == [5, 5]


def test_the_command_draws_results_and_refuses_others(program: Program, tmp_path: Path):
    path = tmp_path / "dynamic.json"
    path.write_text(json.dumps(sample().to_json()))
    assert read_dynamic(path) == sample()
    done = program("figure", "tradeoff", path, "--out", "t.png")
    assert done.returncode == 0, done.stderr
    assert "t.png, t.csv, t.json" in done.stdout
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.size == (960, 780)
    facts = json.loads((tmp_path / "t.json").read_text())
    assert (facts["figure"], facts["picture"]) == ("tradeoff", "t.png")
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert len(rows) == 2 + 2 * 2 + 2 * 3
    assert rows[0] == {
        **{"network": "resnet50", "shards": "shards/val", "way": "whole", "with_anchornet": "1"},
        **{"gmacs": "0.8", "top1": "0.5"},
    }
    for text, found in (
        ('{"protocol": "patches"}', "one of protocol 'patches'"),
        ("{}", "other JSON"),
        ("[]", "other"),
        ('{"protocol": "dynamic", "rows": 3}', "a damaged or other file"),
        ("{", "a damaged or other file"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=f"--protocol dynamic --result FILE`, found .*{found}"):
            read_dynamic(path)
    bad = program("figure", "tradeoff", "none.json")
    assert bad.returncode == 1
    assert bad.stderr.count("\n") == 1
