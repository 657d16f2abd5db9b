"""Shards whose patches spell the logits of a network: small enough to work out by hand.

Patch k of an image lies at corner (k, 0), and the reds of its top row are its logits times ten.
`Spelled` reads them back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from anchorpatch.runtime.checkpoint import WeightsMeta
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.layout import shard_name
from anchorpatch.shards.manifest import FilesDigest
from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.writer import PatchBatch, ShardWriter


class Drawn(NamedTuple):
    """An image: chosen scale, label, and the logits of each patch, times ten, 0 to 255."""

    scale: int
    label: int
    logits: Sequence[Sequence[int]]


class Spelled(nn.Module):
    """Reads C logits off the reds of the top row; has one weight of 1, as networks have some."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, 0, 0, : self.classes] * 25.5 * self.weight


def meta_of(classes: Sequence[str], architecture: str = "spelled") -> WeightsMeta:
    return WeightsMeta(architecture, tuple(classes), mean=(0.0,) * 3, std=(1.0,) * 3)


def classes_of(n: int) -> tuple[str, ...]:
    return tuple(f"class{i:02d}" for i in range(n))


def write_shards(
    folder: Path,
    images: Sequence[Drawn],
    classes: Sequence[str],
    *,
    per_shard: int = 4,
    network_classes: Sequence[str] | None = None,
    **settings: object,
) -> Path:
    """Write the images as a split's folder; their paths are in order."""
    values: dict = dict(
        max_patches=(24, 10, 8),
        iou_threshold=0.3,
        coverage=(0.3, 0.3, 0.3),
        shard_size=per_shard,
        preset="dense",
    )
    header = ShardHeader(
        folder.name,
        tuple(classes),
        tuple(network_classes or classes),
        ShardSettings(**{**values, **settings}),
        "ab" * 32,
    )
    n = max(1, math.ceil(len(images) / per_shard))
    files = FilesDigest(len(images), "f0" * 32, tuple(f"{i:064x}" for i in range(n)))
    manifest = open_manifest(folder, header, files)
    for i in range(n):
        part = images[i * per_shard : (i + 1) * per_shard]
        path = folder / shard_name(folder.name, i)
        with ShardWriter(path, header, files_sha256=files.shards[i]) as writer:
            if part:
                writer.append(_batch(part, i * per_shard, classes))
        manifest = manifest.commit(writer.entry)
    return folder


def _batch(images: Sequence[Drawn], start: int, classes: Sequence[str]) -> PatchBatch:
    n, width = len(images), max(len(image.logits) for image in images)
    pixels = np.zeros((n, 224, 224, 3), np.uint8)
    corners = np.zeros((n, width, 2), np.int64)
    scores = np.zeros((n, width), np.float32)
    for i, image in enumerate(images):
        for k, logits in enumerate(image.logits):
            pixels[i, k, : len(logits), 0] = logits
            corners[i, k], scores[i, k] = (k, 0), 1 / (k + 1)
    paths = [f"images/{start + i:04d}.png" for i in range(n)]
    return PatchBatch(
        path=np.array([path.encode() for path in paths]),
        label=np.array([image.label for image in images], np.int32),
        predicted=np.array([image.label for image in images], np.int32),
        scale=np.array([image.scale for image in images], np.uint8),
        branch_class=np.zeros((n, 3), np.int32),
        branch_prob=np.full((n, 3), 0.5, np.float32),
        size=np.full((n, 2), 256, np.int32),  # of which the crop is the center
        pixels=pixels,
        counts=np.array([len(image.logits) for image in images], np.int32),
        corners=corners,
        scores=scores,
    )


def summed_softmax(image: Drawn) -> list[float]:
    """The sum of the distributions of an image's patches, in plain Python."""
    total = [0.0] * len(image.logits[0])
    for patch in image.logits:
        powers = [math.exp(v / 10) for v in patch]
        total = [t + p / sum(powers) for t, p in zip(total, powers, strict=True)]
    return total
