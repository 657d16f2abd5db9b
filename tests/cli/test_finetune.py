from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from anchorpatch.runtime.checkpoint import load_weights
from tests.conftest import Program
from tests.jobs.finetune_runs import CLASSES, TRAIN, VAL, write_shards

NETWORK = "squeezenet1_1"
OPTIONS = ("--epochs", 1, "--batch-size", 12, "--weights", "none", "--workers", 1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "train", TRAIN, store_images=True)
    write_shards(root / "val", VAL, store_images=True)
    return root


def test_finetune_then_report(program: Program, shards: Path, tmp_path: Path):
    done = program("finetune", NETWORK, "--shards", shards, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert re.search(r"^epoch 1/1: loss .* patches/s", done.stderr, re.MULTILINE)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["weights", "top-1", "top-5", "val", "loss", "train", "loss"]
    assert [line.split()[0] for line in lines if " px " in line] == ["63", "95", "111"]
    assert f"{len(TRAIN)} images of 3 classes, measured on {len(VAL)}: " in lines[-1]
    meta = load_weights(tmp_path / "runs" / NETWORK / "best.safetensors", NETWORK).meta
    assert meta.classes == CLASSES

    again = program("finetune", NETWORK, "--shards", shards, *OPTIONS, "--json")
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert result["images"] == [len(TRAIN), len(VAL)]
    assert result["best"]["val"]["top1"] == meta.training["record"]["val"]["top1"]


def test_a_dry_run_writes_nothing(program: Program, shards: Path, tmp_path: Path):
    done = program(
        *("finetune", NETWORK, "--weights", "none", "--batch-size", 12, "--dry-run"),
        env={"ANCHORPATCH_SHARDS": str(shards)},
    )
    assert done.returncode == 0, done.stderr
    assert "30 epochs of 5 steps of 12 patches: " in done.stdout
    assert "would write runs/squeezenet1_1" in done.stdout
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line(program: Program):
    missing = program("finetune", NETWORK, *OPTIONS)
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1
    assert "`anchorpatch extract --split train --out shards`" in missing.stderr
    wrong = program("finetune", "resnet5")
    assert wrong.returncode == 2
    assert "did you mean" in wrong.stderr


def test_the_help_tells_the_defaults(program: Program):
    text = " ".join(program("finetune", "--help").stdout.split())
    for default in ("5; 30 with --weights none", "0.01; 0.1 with --weights none", "cosine"):
        assert f"[default: {default}]" in text
