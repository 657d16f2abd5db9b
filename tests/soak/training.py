"""SIGKILL at random moments of `train` and `finetune`; run again, they end in the weights, the log
and the state of a run that nobody disturbed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.jobs.finetune_runs import TRAIN, Image, write_shards
from tests.program import run_program
from tests.soak.server import Fault, Trial, run, soak
from tests.training.runs import assert_same_run, make_pictures

COMMON = "--epochs 2 --lr 1 --ema-decay 0.9 --checkpoint-minutes 0 --threads 1 --device cpu"
COMMANDS = {
    "train": f"train --batch-size 8 --crop-size 111 --img-size 111 {COMMON}".split(),
    "finetune": f"finetune nets:tiny --weights none --batch-size 8 {COMMON}".split(),
}
FOLDERS = {"train": "runs/anchornet", "finetune": "runs/nets-tiny"}

NETWORK = """
from torch import nn

def tiny(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, classes),
    )
"""


def make_inputs(material: Path, images: Sequence[Image] = TRAIN) -> dict[str, list[object]]:
    """Write pictures, shards and a network; return the command line of each command."""
    make_pictures(material / "data")
    for split in ("train", "val"):
        write_shards(material / "shards" / split, images)
    sources = {
        "train": ("--data", material / "data"),
        "finetune": ("--shards", material / "shards"),
    }
    return {name: [*words, *sources[name]] for name, words in COMMANDS.items()}


def check_run(folder: Path, expected: Path) -> None:
    """Raise Fault unless a run has ended as another one."""
    try:
        assert_same_run(folder, expected)
    except AssertionError as error:
        raise Fault(f"{folder} and {expected} differ: {error}") from error


def prepare(material: Path) -> Trial:
    commands = make_inputs(material)
    for words in commands.values():
        (material / "nets.py").write_text(NETWORK)
        result = run_program(*words, "--workers", 0, cwd=material, fresh=True)
        assert result.returncode == 0, result.stderr
    took: dict[str, float] = {}

    def trial(rng: random.Random, folder: Path) -> Counter[str]:
        name = rng.choice(("train", "finetune", "finetune"))
        words = [*commands[name], "--workers", rng.choice((0, 0, 1, 2))]
        (folder / "nets.py").write_text(NETWORK)
        counts: Counter[str] = Counter()
        for _ in range(rng.randint(2, 5)):
            moment = rng.random() * took.get(name, 1.0)
            killed = run(*words, cwd=folder, kill_after=moment, group=rng.random() < 0.3)
            if not killed.killed:
                killed.expect(0)
                break
            counts[f"kills of {name}"] += 1
        ended = run(*words, cwd=folder).expect(0)
        took[name] = max(ended.seconds, took.get(name, 0.0))
        check_run(folder / FOLDERS[name], material / FOLDERS[name])
        return counts

    return trial


if __name__ == "__main__":
    soak("training", prepare, __doc__)
