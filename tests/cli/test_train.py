from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from anchorpatch.cli.train import print_summary, train
from anchorpatch.jobs.train import TrainSummary
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.settings import ARCHITECTURES
from tests.conftest import Program
from tests.program import run_program, start_program
from tests.training.runs import TRAIN, VAL, make_pictures

OPTIONS = ("--epochs", 1, "--batch-size", 4, "--crop-size", 111, "--device", "cpu", "--workers", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def test_train_then_evaluate(program: Program, data: Path, tmp_path: Path):
    done = program("train", "--data", data, *OPTIONS, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "computing on 1 CPU thread (--threads)\n" in done.stderr
    best = tmp_path / "runs" / "anchornet" / "best.safetensors"
    assert f"1 epoch on {TRAIN} images of 2 classes, measured on {VAL}: " in done.stdout
    assert "epoch 1/1: loss " in done.stderr
    assert "\x1b" not in done.stderr + done.stdout

    figures = program("evaluate", "anchornet", "--data", data, "--workers", 0, "--json")
    assert figures.returncode == 0, figures.stderr
    result = json.loads(figures.stdout)
    record = load_weights(best).meta.training["record"]["val"]
    assert result["images"] == VAL
    assert result["top1"] == record["top1"]
    assert result["top1_by_output"] == record["top1_by_output"]
    assert result["loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert result["gmacs"] == pytest.approx(0.39, abs=0.01)
    assert set(result["mean_patches"]) == {"figure", "finetune", "evaluate", "dense"}
    assert result["mean_patches"]["figure"]["all"] <= 5

    file = tmp_path / "result.json"
    table = program("evaluate", "anchornet", "--data", data, "--workers", 0, "--result", file)
    written = json.loads(file.read_text())
    for of_one_run in (result, written):
        del of_one_run["images_per_second"]
    assert written == result
    assert "decision (Eq. 7)" in table.stdout
    assert f"{VAL} images, 0 skipped; " in table.stdout


def test_the_small_recipe_and_options_before_it(program: Program, data: Path, tmp_path: Path):
    done = program(
        "train", "--data", data, *OPTIONS, "--recipe", "small", "--accumulate", 1, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == [TRAIN, VAL]
    config = json.loads((tmp_path / "runs" / "anchornet" / "config.json").read_text())
    assert (config["recipe"], config["schedule"], config["nesterov"]) == ("small", "cosine", True)
    assert (config["accumulate"], config["batch_size"]) == (1, 4)


def test_a_peer_is_trained_by_the_same_command(program: Program, data: Path, tmp_path: Path):
    options = ("--arch", "bagnet77", "--crop-size", 77, "--lr", 0.01, "--amp")
    done = program("train", "--data", data, *OPTIONS, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["weights", "top-1", "top-5", "val", "loss", "train", "loss"]
    assert [line.split()[:3] for line in lines[1:3]] == [
        ["best:", "epoch", "1"],
        ["last:", "epoch", "1"],
    ]
    assert lines[3].endswith(f"measured on {VAL}: runs/bagnet77/best.safetensors")
    weights = load_weights(tmp_path / "runs" / "bagnet77" / "best.safetensors", "bagnet77")
    assert weights.meta.classes == ("cat", "dog")

    for arguments, line in (
        (("saccader", "--no-se"), "anchorpatch: se: only for anchornet, not for saccader"),
        (("bagnet77", "--crop-size", 64), "anchorpatch: crop_size: the largest patch of bagnet77"),
    ):
        refused = program("train", "--data", data, "--arch", *arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.splitlines()[-1].startswith(line)


def test_the_choices_are_the_networks_that_can_be_trained():
    choices = {param.name: param for param in train.params}["arch"].type.choices
    assert tuple(choices) == tuple(ARCHITECTURES)


def test_the_stages_before_the_last_have_rows(capsys: pytest.CaptureFixture[str]):
    record = {"epoch": 2, "train": {"loss": 0.5}, "val": {"top1": 0.25, "top5": 1.0, "loss": 0.75}}
    stages = {"BagNet-77": record, "places": {**record, "epoch": 1}}
    best = Path("runs/saccader/best.safetensors")
    summary = TrainSummary(
        weights=best,
        epochs=2,
        classes=10,
        images=(40, 8),
        best=record,
        last=record,
        bad={},
        damaged=0,
        ignored={},
        earlier=stages,
    )
    print_summary(summary, False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:5]] == ["BagNet-77", "places", "best", "last"]
    assert lines[2].split() == ["places:", "epoch", "1", "25.00%", "100.00%", "0.750", "0.500"]
    assert lines[5].startswith("2 epochs per stage on 40 images of 10 classes, measured on 8")


def test_other_classes_are_one_clear_line(
    program: Program, data: Path, tmp_path: Path, weights: Path
):
    three = make_pictures(tmp_path / "three", ("cat", "dog", "emu"))
    done = program("evaluate", "anchornet", "--data", three, "--weights", weights)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "expected only the 2 classes of" in done.stderr
    assert "found 1 more (emu)" in done.stderr


def test_missing_data_is_one_clear_line(program: Program):
    done = program("train")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "data" in done.stderr


def test_a_wrong_option_is_wrong_usage(program: Program):
    assert program("train", "--recipe", "large").returncode == 2
    assert program("evaluate", "resnet9000").returncode == 2


@pytest.mark.parametrize(
    ("number", "workers"),
    # A worker that is stopped stands for one that waits for a disk, and its parent for it.
    [(signal.SIGINT, 0), (signal.SIGTERM, 1), (signal.SIGUSR1, 0)],
)
def test_signals_write_a_checkpoint(data: Path, tmp_path: Path, number: int, workers: int):
    arguments = ["train", "--data", data, *OPTIONS, "--epochs", 999, "--workers", workers]
    with start_program(*arguments, cwd=tmp_path) as process:
        log = tmp_path / "runs" / "anchornet" / "log.jsonl"
        deadline = time.monotonic() + 120
        while not (log.is_file() and log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for worker in children(process.pid) if workers else ():
            os.kill(worker, signal.SIGSTOP)
        process.send_signal(number)
        done = process.wait(timeout=120)
    assert done.returncode == 128 + number
    assert re.match(
        rf"anchorpatch: stopped by {signal.Signals(number).name} in epoch \d+; "
        "run the same command again to resume",
        done.stderr.splitlines()[-1],
    )
    assert (tmp_path / "runs" / "anchornet" / "last.pt").is_file()


def children(pid: int) -> list[int]:
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in found for child in text.split()]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("extract", "--max-patches", 1, "--batch-size", 12, "--shard-size", 2), 0),
        (("train", *OPTIONS[:-2]), 1),  # its checkpoint is too large
    ],
    ids=["extract", "train"],
)
def test_what_limits_files_holds_nothing_up(
    data: Path, tmp_path: Path, weights: Path, arguments: tuple[object, ...], status: int
):
    # Shared memory counts as a file. A batch has 1.8 MB, the crops of a shard less than 0.5.
    options = ["--data", data, "--workers", 1]
    if arguments[0] != "train":
        options += ["--weights", weights]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (500 << 10, 500 << 10))
    done = run_program(*arguments, *options, cwd=tmp_path, before=limit)
    assert done.returncode == status, done.stderr
    assert ("cannot write: File too large" in done.stderr) == bool(status)
    assert "Traceback" not in done.stderr
