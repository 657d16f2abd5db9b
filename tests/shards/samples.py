"""Random shards for tests: small batches of everything that a writer takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anchorpatch.settings import SCALES
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.layout import shard_name
from anchorpatch.shards.manifest import FilesDigest, Manifest, ShardEntry, read_manifest
from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.writer import PatchBatch, ShardWriter

CLASSES = ("cat", "dog", "hen", "owl")


def make_settings(**changes: object) -> ShardSettings:
    values: dict = dict(
        max_patches=(5, 3, 2),
        iou_threshold=0.3,
        coverage=(0.05, 0.04, 0.03),
        shard_size=8,
        preset="figure",
    )
    return ShardSettings(**{**values, **changes})


def make_header(split: str = "val", **changes: object) -> ShardHeader:
    return ShardHeader(split, CLASSES, (*CLASSES, "elk"), make_settings(**changes), "ab" * 32)


def make_batch(
    n: int, seed: int = 0, *, width: int = 5, start: int = 0, side: int = 224
) -> PatchBatch:
    """Random images; ``width`` is K, the padded number of patches, ``side`` that of the crops."""
    rng = np.random.default_rng(seed)
    scale = rng.choice(SCALES, n).astype(np.uint8)
    counts = rng.integers(1, width + 1, n).astype(np.int32)
    valid = np.arange(width) < counts[:, None]
    corners = rng.integers(0, 1 + (side - scale.astype(int))[:, None, None], (n, width, 2))
    scores = -np.sort(-rng.normal(size=(n, width)).astype(np.float32))
    paths = [f"{CLASSES[min(3, (start + i) // 6)]}/{start + i:06d}é.jpg".encode() for i in range(n)]
    return PatchBatch(
        path=np.array(paths, dtype="S"),
        label=rng.integers(0, 4, n).astype(np.int32),
        predicted=rng.integers(0, 5, n).astype(np.int32),
        scale=scale,
        branch_class=rng.integers(0, 5, (n, 3)).astype(np.int32),
        branch_prob=rng.random((n, 3)).astype(np.float32),
        size=rng.integers(1, 3000, (n, 2)).astype(np.int32),
        pixels=rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
        counts=counts,
        corners=corners * valid[..., None],
        scores=scores * valid,
    )


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, into one without a checksum as earlier versions wrote it."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data.pop("sha256", None)
    change(data)
    path.write_text(json.dumps(data))


def split_batch(batch: PatchBatch, sizes: list[int]) -> Iterator[PatchBatch]:
    start = 0
    for size in sizes:
        yield PatchBatch(*(array[start : start + size] for array in batch))
        start += size


def make_split(
    folder: Path,
    shards: int = 3,
    per_shard: int = 8,
    last: int = 5,
    crops: int | None = None,
    **changes: object,
) -> tuple[Manifest, list[PatchBatch]]:
    """Write a whole split under ``folder`` and return its manifest and what went in.

    ``crops`` is the side of the crops that are written; None for that of the settings.
    """
    header = make_header(folder.name, shard_size=per_shard, **changes)
    sizes = [per_shard] * (shards - 1) + [last]
    files = FilesDigest(sum(sizes), "f0" * 32, tuple(f"{i:064x}" for i in range(shards)))
    manifest = open_manifest(folder, header, files)
    batches = []
    for i, size in enumerate(sizes):
        side = crops or header.settings.img_size
        batch = make_batch(size, seed=i, start=i * per_shard, side=side)
        with ShardWriter(
            folder / shard_name(folder.name, i), header, files_sha256=files.shards[i]
        ) as writer:
            writer.append(batch)
        manifest = manifest.commit(writer.entry)
        batches.append(batch)
    return manifest, batches


def adopt(manifest: Manifest, index: int = 0) -> Manifest:
    """Enter a changed shard into the manifest, so that only its contents can tell."""
    path = manifest.shard_path(index)
    data = path.read_bytes()
    now = read_manifest(manifest.folder)
    entry = next(e for e in now.entries if e.name == path.name)
    return now.commit(replace(entry, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)))


def digest_of(paths: list[str], size: int = 8) -> FilesDigest:
    def sha256(part: list[str]) -> str:
        return hashlib.sha256("\0".join(part).encode()).hexdigest()

    parts = [paths[i : i + size] for i in range(0, len(paths), size)]
    return FilesDigest(
        len(paths), sha256(paths), tuple(map(sha256, parts)), lambda a, b: paths[a:b]
    )


def entry(index: int, **changes: object) -> ShardEntry:
    values: dict = dict(
        name=f"val-{index:05d}.h5",
        images=7,
        patches={63: 1, 95: 2, 111: 3},
        chosen={63: 4, 95: 2, 111: 1},
        correct=5,
        bytes=4,
        sha256="ab" * 32,
        skipped=(("cat/bäd.jpg", "truncated"), ("cat/\udcff.jpg", "empty file")),
        files_sha256="cd" * 32,
    )
    return ShardEntry(**{**values, **changes})


def begin(folder: Path, header: ShardHeader, files: FilesDigest) -> Manifest:
    """Begin a split that has a shard, which other inputs may not take the place of."""
    manifest = open_manifest(folder, header, files)
    for split in ("val", "train"):
        (folder / f"{split}-00000.h5").write_bytes(b"h5")
    return manifest.commit(entry(0, bytes=2, files_sha256=files.shards[0]))
