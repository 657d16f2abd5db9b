"""A network of one's own, named by module and function, through the commands that take one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.conftest import Program, draw_photo
from tests.shards.samples import make_split

NETWORK = """\
from torch import nn


def tiny(num_classes=1000):
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )


def fixed(classes):
    return tiny(1000)


def deep(classes):
    return nn.Conv2d(3, classes, 3)


def none(classes):
    return None


def broken(classes):
    raise KeyError("no such layer")


constant = 5
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(NETWORK)
    for split in ("train", "val"):
        make_split(tmp_path / "shards" / split, shards=1, last=8)
    return tmp_path


def test_finetune_evaluate_and_predict_with_a_network_of_ones_own(
    program: Program, folder: Path, weights: Path
) -> None:
    train = ("finetune", "nets:tiny", "--weights", "none", "--epochs", 1, "--batch-size", 8)
    done = program(*train, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    best = folder / "runs" / "nets-tiny" / "best.safetensors"
    assert best.is_file()
    done = program("evaluate", "nets:tiny", "--no-speed", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert sum(row["images"] for row in rows if row["scale"] in ("63", "95", "111")) == 8
    draw_photo(1, (260, 260)).save(folder / "a.jpg")
    words = ("predict", "a.jpg", "--anchornet-weights", weights, "--json")
    done = program(*words, "--network", "nets:tiny")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["architecture"] == "nets:tiny"
    assert found["images"][0]["class"] in ("cat", "dog", "hen", "owl")
    named = program(*words, "--network", "nets:tiny", "--weights", best)
    assert json.loads(named.stdout)["images"] == found["images"]
    # A file does not decide which code runs.
    done = program(*words, "--network", best)
    assert done.returncode == 1
    assert done.stderr == (
        f"anchorpatch: {best}: weights of nets:tiny, code that is not run because a file names "
        f"it: name it yourself with --network nets:tiny --weights {best}\n"
    )


def test_models_counts_a_network_of_ones_own(program: Program, folder: Path) -> None:
    done = program("models", "nets:tiny", "--classes", 10, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["networks"]
    assert row["parameters"] == 8 * 75 + 8 + 16 + 90
    assert row["gmacs_by_side"]["63"] == pytest.approx((15 * 15 * 8 * 75 + 80) / 1e9)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nots:tiny", "found: ModuleNotFoundError: No module named 'nots'"),
        ("nets:tony", "found: AttributeError: module 'nets' has no attribute 'tony'"),
        ("nets:constant", "found: TypeError: constant is not callable"),
        ("nets:none", "expected none to return a torch.nn.Module, got NoneType"),
        ("nets:broken", "broken(1000) failed: KeyError: no such layer"),
    ],
)
def test_what_is_no_network_is_a_usage_error(
    program: Program, folder: Path, name: str, said: str
) -> None:
    done = program("models", name)
    assert done.returncode == 2, done.stderr
    assert f"{name}: " in done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "found"), [("nets:fixed", "(1, 1000)"), ("nets:deep", "(1, 7, 61, 61)")]
)
def test_a_network_returns_one_output_per_class(
    program: Program, folder: Path, name: str, found: str
) -> None:
    train = ("finetune", name, "--weights", "none", "--epochs", 1, "--batch-size", 8)
    done = program(*train, "--device", "cpu")
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith(
        f"{name}: expected a network for 7 classes to return logits of shape (1, 7) for one "
        f"image, got {found}: return one output per class\n"
    )
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("where", ["import", "call"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_it_is_not_its_failure(
    program: Program, folder: Path, number: signal.Signals, where: str
) -> None:
    stop = f"import os, signal; os.kill(os.getpid(), signal.{number.name})\n"
    module = stop if where == "import" else f"{NETWORK}\ndef stopped(classes):\n    {stop}"
    (folder / "stopped.py").write_text(module)
    train = ("finetune", "stopped:stopped", "--weights", "none", "--batch-size", 8)
    done = program(*train, "--device", "cpu")
    assert done.returncode == 128 + number
    expected = "interrupted" if number == signal.SIGINT else f"terminated by {number.name}"
    assert done.stderr.split("anchorpatch: ")[1:] == [f"{expected}; run the same command again\n"]
