"""Tiny fine-tuning runs: a network of two convolutions, shards of tinted noise."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from anchorpatch.jobs.finetune import FinetuneConfig, run
from anchorpatch.models import registry
from anchorpatch.runtime.progress import Reporter
from anchorpatch.shards.header import ShardHeader
from anchorpatch.shards.layout import shard_name
from anchorpatch.shards.manifest import FilesDigest
from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.writer import PatchBatch, ShardWriter
from tests.shards.samples import make_settings
from tests.training.runs import keep_trained

CLASSES = ("blue", "lime", "red")
TINTS = np.array([[0, 0, 160], [0, 160, 0], [160, 0, 0]], np.uint8)


class Image(NamedTuple):
    """What the shards hold of an image."""

    scale: int
    patches: int


#: 26 patches of 63 px, 12 of 95, 7 of 111.
TRAIN = [
    Image(63, 5),
    Image(95, 3),
    Image(63, 2),
    Image(111, 2),
    Image(63, 6),
    Image(95, 3),
] * 2 + [
    Image(111, 2),
    Image(111, 1),
]
#: One patch of 63 px, three of 95.
FEW = [Image(63, 1), Image(95, 3), *[Image(111, 3)] * 6]
VAL = [Image(63, 4), Image(95, 2), Image(111, 1), Image(111, 2), Image(63, 1)]


def build_tiny(classes: int) -> nn.Module:
    """Batch normalization and dropout are what makes resuming delicate."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8, classes),
    )


def build_plain(classes: int) -> nn.Module:
    """Each picture by itself, so that pieces cannot matter."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def register() -> None:
    """Give the networks names."""
    registry.NETWORKS["tiny"] = build_tiny
    registry.NETWORKS["plain"] = build_plain


def write_shards(
    folder: Path,
    images: Sequence[Image] = TRAIN,
    *,
    seed: int = 0,
    per_shard: int = 4,
    **header: Any,
) -> Path:
    """Write a split; the label of image i is i modulo 3 and gives its tint."""
    settings = {k: header.pop(k) for k in ("codec", "store_images") if k in header}
    made = ShardHeader(
        **{
            "split": folder.name,
            "classes": CLASSES,
            "network_classes": CLASSES,
            "settings": make_settings(shard_size=per_shard, **settings),
            "weights_sha256": "ab" * 32,
            **header,
        }
    )
    n = -(-len(images) // per_shard)
    files = FilesDigest(len(images), "f0" * 32, tuple(f"{i:064x}" for i in range(n)))
    manifest = open_manifest(folder, made, files)
    for i in range(n):
        part = images[i * per_shard : (i + 1) * per_shard]
        path = folder / shard_name(folder.name, i)
        with ShardWriter(path, made, files_sha256=files.shards[i]) as writer:
            writer.append(_batch(part, i * per_shard, seed))
        manifest = manifest.commit(writer.entry)
    return folder


def _batch(images: Sequence[Image], start: int, seed: int) -> PatchBatch:
    rng = np.random.default_rng((seed, start))
    n, width = len(images), max(image.patches for image in images)
    label = (np.arange(start, start + n) % 3).astype(np.int32)
    scale = np.array([image.scale for image in images], np.uint8)
    counts = np.array([image.patches for image in images], np.int32)
    valid = np.arange(width) < counts[:, None]
    corners = rng.integers(0, 225 - scale.astype(int)[:, None, None], (n, width, 2))
    noise = rng.integers(0, 96, (n, 224, 224, 3), dtype=np.uint8)
    return PatchBatch(
        path=np.array([f"{start + i:02d}/{CLASSES[k]}.png".encode() for i, k in enumerate(label)]),
        label=label,
        predicted=label,
        scale=scale,
        branch_class=np.zeros((n, 3), np.int32),
        branch_prob=np.full((n, 3), 0.5, np.float32),
        size=np.full((n, 2), 256, np.int32),
        pixels=noise + TINTS[label][:, None, None],
        counts=counts,
        corners=corners * valid[..., None],
        scores=np.where(valid, 1.0, 0.0).astype(np.float32),
    )


def tiny(shards: Path, folder: Path, **changes: Any) -> FinetuneConfig:
    """A run of two epochs of batches of up to 8: eight steps each."""
    register()
    config = FinetuneConfig(
        network="tiny",
        shards=shards,
        folder=folder,
        weights="none",
        epochs=2,
        batch_size=8,
        lr=1.0,
        ema_decay=0.9,
        device="cpu",
        checkpoint_minutes=0.0,
        workers=1,
    )
    return replace(config, **changes)


class DieAt(Reporter):
    """Kills this process at a step."""

    def __init__(self, step: int) -> None:
        self.steps = step

    def advance(self, n: int, **counts: int) -> None:
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def run_tiny(shards: Path, folder: Path, report: Reporter) -> None:
    """For a process of its own, which does not know the networks."""
    run(tiny(shards, folder), report)


def keep_tiny(shards: Path, folder: Path, changes: dict[str, Any]) -> None:
    """The same with the modules that it ends with."""
    keep_trained("finetune", tiny(shards, folder, **changes))
