from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from anchorpatch.figures.coverage import LOOKS
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights
from tests.conftest import Program

NETWORK = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    path = runs / NETWORK / "best.safetensors"
    save_weights(path, build(NETWORK, 2).state_dict(), WeightsMeta(NETWORK, ("cat", "dog")))
    return runs


@pytest.fixture
def command(image_folder: Path, runs: Path, weights: Path) -> list[object]:
    return [
        *("figure", "coverage", NETWORK, "--data", image_folder, "--runs", runs),
        *("--anchornet-weights", weights, "--device", "cpu", "--workers", 0, "--limit", 5),
        *("--areas", "0.2,0.5", "--seeds", 2),
    ]


def test_it_draws_tells_and_writes_every_point(
    program: Program, command: list[object], tmp_path: Path
):
    done = program(*command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Area under the curve of top-1 by area")
    listed = [
        *("anchornet", "branch63", "branch95", "branch111"),
        *("gradcam", "sobel", "center", "random"),
    ]
    for line, name in zip(lines[2:10], listed, strict=True):
        assert line.startswith(f"{LOOKS[name].label} ")
    assert "Left out: BagNet-33: no" in done.stdout
    assert "`anchorpatch train --arch saccader` makes it" in done.stdout
    with Image.open(tmp_path / "figures" / "coverage.png") as picture:
        assert picture.width > 1000
    facts = json.loads((tmp_path / "figures" / "coverage.json").read_text())
    assert (facts["figure"], facts["number"], facts["images"]) == ("coverage", 6, 5)
    assert facts["picture"] == "coverage.png"
    assert [row["localizer"] for row in facts["summary"]] == listed
    points = (tmp_path / "figures" / "coverage.csv").read_text()
    rows = list(csv.DictReader(points.splitlines()))
    assert len(rows) == len(listed) * 4
    for row in rows:
        (curve,) = [c for c in facts["curves"] if c["localizer"] == row["localizer"]]
        at = facts["areas"].index(float(row["area"]))
        assert float(row["covered_top1"]) == curve["covered"]["top1"][at]
        assert float(row["masked_top1"]) == curve["masked"]["top1"][at]


def test_json_and_chosen_localizers(program: Program, command: list[object], tmp_path: Path):
    out = tmp_path / "some" / "six.webp"
    done = program(*command, "--localizers", "center, sobel", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [curve["localizer"] for curve in facts["curves"]] == ["sobel", "center"]
    assert out.is_file()
    assert out.with_suffix(".csv").is_file()
    assert out.with_suffix(".json").is_file()


@pytest.mark.parametrize(
    ("options", "status", "why"),
    [
        (("--localizers", "edges"), 2, "localizers: expected some of anchornet"),
        (("--areas", "0.5,0.2"), 2, "areas: expected increasing shares"),
        (("--areas", "half"), 2, "expected numbers such as X,X,..., got 'half'"),
        (("--out", "six.gif"), 2, "expected a name that ends in .png"),
        (("--peer", "nothing.safetensors"), 1, "nothing.safetensors: expected a weights file"),
        (("--weights", "nothing.pth"), 1, "nothing.pth: "),
    ],
)
def test_wrong_options_leave_nothing(
    program: Program,
    command: list[object],
    tmp_path: Path,
    options: tuple[str, ...],
    status: int,
    why: str,
):
    done = program(*command, *options)
    assert done.returncode == status
    assert why in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "figures").exists()
