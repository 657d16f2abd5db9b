"""Tiny training runs: 16 pictures of two classes, crops of 111 px."""

from __future__ import annotations

import importlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.runtime.progress import Reporter
from anchorpatch.training.config import TrainConfig
from anchorpatch.training.loop import Trainer
from tests.conftest import draw_photo

TRAIN, VAL = 16, 5
TINTS = ("red", "blue", "lime")
WEIGHTS = ("best.safetensors", "last.safetensors")


def make_pictures(data: Path, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Draw DATA/train and DATA/val; each class has a tint."""
    for split, n in (("train", TRAIN), ("val", VAL)):
        for i in range(n):
            folder = data / split / classes[i % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            photo = draw_photo(1000 * len(split) + i, (130, 120))
            tint = Image.new("RGB", photo.size, TINTS[i % len(classes)])
            Image.blend(photo, tint, 0.5).save(folder / f"{i:02d}.png")
    return data


def tiny(data: Path, folder: Path, **changes: Any) -> TrainConfig:
    """A run of two epochs with four steps each."""
    config = TrainConfig(
        data=data,
        folder=folder,
        epochs=2,
        batch_size=4,
        crop_size=111,
        lr=1.0,
        ema_decay=0.9,
        warmup_epochs=0.5,
        device="cpu",
        checkpoint_minutes=0.0,
    )
    return replace(config, **changes)


class StopAt(Reporter):
    """Sends this process a signal after so many images."""

    def __init__(self, images: int, number: int = signal.SIGTERM) -> None:
        self.images, self.number, self.lines = images, number, []

    def advance(self, n: int, **counts: int) -> None:
        self.images -= n
        if self.images == 0:
            os.kill(os.getpid(), self.number)

    def message(self, text: str) -> None:
        self.lines.append(text)


def keep_trained(name: str, config: Any) -> None:
    """Run a job, and keep the modules that it ends with beside its folder as FOLDER-rankN.pt."""
    job = importlib.import_module(f"anchorpatch.jobs.{name}")

    class Kept(Trainer):
        def run(self, **more: Any) -> list[dict[str, Any]]:
            records = super().run(**more)
            state = {**self.module.state_dict(), **self.average.state_dict()}
            torch.save(state, f"{config.folder}-rank{self.world.rank}.pt")
            return records

    job.Trainer = Kept
    job.run(config)


def state_of(folder: Path) -> dict[str, Any]:
    """The content of last.pt."""
    return torch.load(folder / "last.pt", weights_only=True)["state"]


def records(folder: Path) -> list[dict]:
    """The lines of the log without what depends on the clock and the machine."""
    free = {"seconds", "images_per_second", "patches_per_second", "peak_memory", "waiting"}
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in free} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights bit for bit, losses exactly, and the whole training state."""
    assert records(a) == records(b)
    for name in WEIGHTS:
        ours, theirs = (load_weights(folder / name, None).tensors for folder in (a, b))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (state_of(folder) for folder in (a, b))
    for part in ("module", "average"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])
