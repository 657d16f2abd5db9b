from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
import torch

from anchorpatch.cli.output import print_result
from anchorpatch.jobs.results import Speed, Table3, Table3Row, Table4, Table4Row
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights
from tests.conftest import Program
from tests.jobs.patch_shards import Drawn, classes_of, write_shards
from tests.program import run_ranks

NETWORK, SIX = "mobilenet_v3_small", classes_of(6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    images = [
        Drawn(scale, i % 6, [[(37 * i + 13 * x) % 256 for x in range(200)]] * (1 + i % 3))
        for i, scale in enumerate([63, 63, 95, 111, 111, 63, 95])
    ]
    write_shards(root / "shards" / "val", images, SIX, store_images=True)
    torch.manual_seed(0)
    best = root / "runs" / NETWORK / "best.safetensors"
    save_weights(best, build(NETWORK, 6).state_dict(), WeightsMeta(NETWORK, SIX))
    return root


def common(root: Path, *more: object) -> list[str]:
    options = ["--shards", root / "shards", "--runs", root / "runs", "--device", "cpu", *more]
    return ["evaluate", NETWORK, *map(str, options)]


def test_one_process_and_two_give_the_same_table(program: Program, root: Path, tmp_path: Path):
    options = ("--json", "--batch-size", 4, "--predictions")
    one = program(*common(root, *options, tmp_path / "one.csv"))
    assert one.returncode == 0, one.stderr
    assert "\x1b" not in one.stdout + one.stderr
    assert one.stderr.count("best.safetensors was fine-tuned on patches and understates") == 1
    two = run_ranks(
        *common(root, *options, tmp_path / "two.csv"),
        *("--result", tmp_path / "table3.json"),
        cwd=tmp_path,
    )
    assert two.returncode == 0, two.stderr
    expected, found = json.loads(one.stdout), json.loads(two.stdout)
    assert json.loads((tmp_path / "table3.json").read_text()) == found
    assert [row["scale"] for row in found["rows"]] == ["224", "63", "95", "111", "all"]
    for a, b in zip(expected["rows"], found["rows"], strict=True):
        assert b.pop("loss") == pytest.approx(a.pop("loss"), rel=1e-6)
    assert found == expected
    tables = [
        list(csv.reader((tmp_path / name).read_text().splitlines()))
        for name in ("one.csv", "two.csv")
    ]
    assert len(tables[0]) == 1 + 7
    for a, b in zip(*tables, strict=True):
        assert a[:9] == b[:9]
        if a[0] != "path":
            assert [*map(float, a[9:])] == pytest.approx([*map(float, b[9:])], rel=1e-4)


def test_the_result_goes_to_a_file_whatever_is_printed(
    program: Program, root: Path, tmp_path: Path
):
    file = tmp_path / "new" / "table4.json"
    args = common(root, "--protocol", "rescale", "--format", "markdown", "--result", file)
    done = program(*args, "--localizers", "center,random")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| scale | images |")
    assert "| center top-1 | random top-1 |" in done.stdout
    document = json.loads(file.read_text())
    assert (document["protocol"], document["network"]) == ("rescale", NETWORK)
    assert [row["images"] for row in document["rows"]] == [3, 2, 2, 7]
    assert [path.name for path in file.parent.iterdir()] == ["table4.json"]


def test_dynamic_inference_in_every_format(program: Program, root: Path, tmp_path: Path):
    options = ("--protocol", "dynamic", "--no-speed", "--threshold", "0,0.5,1")
    result = tmp_path / "dynamic.json"
    done = program(*common(root, *options, "--glance", 96, "--result", result))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["looks", "patches", "GMACs", "in"]
    (stopping,) = (line for line in lines if line.startswith("dynamic 0.5 "))
    assert "Saved by stopping early:" in lines
    assert any("after a glance at the whole image at 96 px" in line for line in lines)
    document = json.loads(result.read_text())
    assert document["protocol"] == "dynamic"
    ways = [row["way"] for row in document["rows"]]
    assert ways[:6] + ways[-4:] == ["whole"] * 5 + ["fixed"] * 2 + ["dynamic"] * 3
    assert f"{document['rows'][-2]['top1']:.2%}" in stopping
    table = program(*common(root, *options, "--format", "csv"))
    rows = list(csv.DictReader(io.StringIO(table.stdout)))
    assert [row["setting"] for row in rows[-3:]] == ["0", "0.5", "1"]
    assert rows[-3]["stopped"].startswith("1/0")
    assert "Left out" not in table.stderr


def test_errors_and_wrong_usage(program: Program, root: Path, tmp_path: Path):
    missing = program("evaluate", NETWORK)
    assert missing.returncode == 1
    assert missing.stdout == ""
    assert missing.stderr.count("\n") == 1
    assert "anchorpatch extract --split val --out shards" in missing.stderr
    for wrong, why in (
        (("evaluate", "anchornet", "--scale", 63), "--scale is only for classifiers"),
        (("evaluate", NETWORK, "--labels", "x"), "--labels is only for anchornet"),
        (("evaluate", "anchornet", "--format", "csv"), "--format csv is only for classifiers"),
        (
            ("evaluate", NETWORK, "--protocol", "rescale", "--no-speed"),
            "Error: --no-speed needs",
        ),
        (("evaluate", NETWORK, "--per-scale", "--weights", "default"), "--per-scale and --weights"),
        (("evaluate", NETWORK, "--budget", 1), "--budget needs --protocol dynamic"),
        (("evaluate", NETWORK, "--localizers", "center"), "--localizers needs --protocol rescale"),
        (("evaluate", "anchornet", "--glance", 95), "--glance is only for classifiers"),
    ):
        done = program(*wrong)
        assert (done.returncode, done.stdout) == (2, "")
        assert why in done.stderr


LINES = (
    Table3Row("224", 8, None, 4.1, None, None, None, 0.726, 0.91, 1.1),
    Table3Row("63", 0, None, None, None, None, None, None, None, None),
    Table3Row("all", 8, 3.25, 2.05, 0.5, 2.444, 0.404, 0.719, 0.897, 1.2),
)
SPEED = Speed(32, 3, 10.0, 18.0, 1.8, 3.5)
TABLE_3 = Table3(
    "resnet50", "s/val", "w", "w", "the crops", 4.1, 0.394, LINES, SPEED, ("x: y",), "patches"
)


def test_table_3_in_every_format(capsys: pytest.CaptureFixture[str]):
    print_result(TABLE_3.to_json(), TABLE_3.tables(), "table")
    lines = capsys.readouterr().out.splitlines()
    heads = " ".join(lines[0].split())
    assert heads == "scale images patches GMACs saved in all saved in all top-1 top-5"
    assert lines[1].split() == ["224", "px", "8", *"-", "4.100", *"---", "72.60%", "91.00%"]
    assert lines[2].split() == ["63", "px", "0", *"-------"]
    assert " ".join(lines[3].split()) == "all 8 3.25 2.050 50% 2.444 40% 71.90% 89.70%"
    assert "saved: of 4.100 GMACs at 224 px." in lines
    assert "resnet50 on s/val; weights: w." in lines
    assert "Row 224: the crops; weights: w (fine-tuned on patches)." in lines
    assert any("18.0 images/s" in line and "1.80 times as many" in line for line in lines)
    assert lines[-1] == "Left out: x: y."

    print_result(TABLE_3.to_json(), TABLE_3.tables(), "markdown")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "| :--- |" + " ---: |" * 8
    assert lines[4] == "| all | 8 | 3.25 | 2.050 | 50% | 2.444 | 40% | 71.90% | 89.70% |"
    assert lines[-1] == "- Left out: x: y."

    print_result(TABLE_3.to_json(), TABLE_3.tables(), "csv")
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert rows[2]["gmacs_with_anchornet"] == "2.444"
    assert rows[1]["top1"] == ""
    assert "Left out: x: y." in printed.err

    print_result(TABLE_3.to_json(), TABLE_3.tables(), "json")
    document = json.loads(capsys.readouterr().out)
    assert document["speed"]["ratio"] == 1.8
    assert document["rows"][2]["saved"] == 0.5


def test_table_4(capsys: pytest.CaptureFixture[str]):
    rows = (Table4Row("63", 3, 0.156, 0.382, 0.3, 0.5), Table4Row("all", 3, 0.156, 0.382, 0.3, 0.5))
    table = Table4("resnet50", "s/val", "w", "the crops", rows, "whole images")
    print_result(table.to_json(), table.tables(), "table")
    lines = capsys.readouterr().out.splitlines()
    heads = re.sub(r" +", " ", lines[0]).strip()
    assert heads == "scale images -R top-1 -L top-1 -R top-5 -L top-5"
    assert lines[1].split() == ["63", "px", "3", "15.60%", "38.20%", "30.00%", "50.00%"]
    assert "resnet50 on s/val; weights: w (trained on whole images)." in lines
    print_result(table.to_json(), table.tables(), "json")
    assert json.loads(capsys.readouterr().out)["rows"][0]["localized_top1"] == 0.382
