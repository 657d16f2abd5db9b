"""What an extraction has come to: counts from the manifest, speed from the run."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anchorpatch.errors import ShardError
from anchorpatch.runtime.distributed import Task
from anchorpatch.settings import SCALES
from anchorpatch.shards.manifest import read_manifest
from anchorpatch.signals import waiting_for
from anchorpatch.text import counted


@dataclass(frozen=True)
class ExtractSummary:
    """What shards hold, and how fast this run made its part of them.

    Attributes:
        folder: the split's folder.
        pending: shards of the whole split that are not done.
        split_shards: shards of the whole split.
        shards: shards of the task that are done.
        total_shards: shards of the task.
        images: stored.
        images_by_scale: stored, by chosen scale.
        patches_by_scale: stored, by scale.
        skipped: unreadable images, by reason.
        damaged: images decoded with damage, which are stored all the same.
        bytes: of all shards.
        top1: share of images whose predicted class is their label; None where the network's
            classes are not the folders.
        seconds: of this run.
        images_run: images of this run, the skipped ones included.
        ignored: files of the images' folder that were passed over, by extension.
    """

    folder: Path
    pending: int
    split_shards: int
    shards: int
    total_shards: int
    images: int
    images_by_scale: dict[int, int]
    patches_by_scale: dict[int, int]
    skipped: dict[str, int]
    damaged: int
    bytes: int
    top1: float | None
    seconds: float
    images_run: int
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every shard of the split is done."""
        return not self.pending

    @property
    def images_per_second(self) -> float:
        """Speed of this run; 0 where nothing was left to do."""
        return self.images_run / self.seconds if self.images_run else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, with shares and means."""
        scales = {
            str(scale): {
                "images": self.images_by_scale[scale],
                "share": self.images_by_scale[scale] / self.images if self.images else 0.0,
                "patches": self.patches_by_scale[scale],
                "mean_patches": mean_patches(self, scale),
            }
            for scale in SCALES
        }
        return {
            "folder": str(self.folder),
            "complete": self.complete,
            "pending": self.pending,
            "split_shards": self.split_shards,
            "shards": self.shards,
            "total_shards": self.total_shards,
            "images": self.images,
            "scales": scales,
            "skipped": self.skipped,
            "damaged": self.damaged,
            "ignored": dict(self.ignored),
            "top1": self.top1,
            "bytes": self.bytes,
            "images_per_second": round(self.images_per_second, 2),
            "seconds": round(self.seconds, 3),
        }


def mean_patches(summary: ExtractSummary, scale: int) -> float:
    """Return the mean number of patches of the images that chose a scale."""
    images = summary.images_by_scale[scale]
    return summary.patches_by_scale[scale] / images if images else 0.0


def summarize(
    folder: Path, task: Task, seconds: float = 0.0, images_run: int = 0
) -> ExtractSummary:
    """Return the summary of the shards that a task owns, from the manifest alone.

    Args:
        folder: the split's folder of shards.
        task: whose shards are counted.
        seconds: that this run took.
        images_run: images of this run, the skipped ones included.
    """
    manifest = read_manifest(folder)
    missing = set(manifest.missing())
    owned = [i for i in range(manifest.shard_count) if task.owns(i)]
    names = {manifest.shard_path(i).name for i in owned if i not in missing}
    entries = [entry for entry in manifest.entries if entry.name in names]
    images = sum(entry.images for entry in entries)
    comparable = manifest.header.classes == manifest.header.network_classes
    return ExtractSummary(
        folder=folder,
        pending=len(missing),
        split_shards=manifest.shard_count,
        shards=len(entries),
        total_shards=len(owned),
        images=images,
        images_by_scale={s: sum(entry.chosen[s] for entry in entries) for s in SCALES},
        patches_by_scale={s: sum(entry.patches[s] for entry in entries) for s in SCALES},
        skipped=dict(Counter(reason for entry in entries for _, reason in entry.skipped)),
        damaged=sum(len(entry.damaged) for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        top1=sum(entry.correct for entry in entries) / images if comparable and images else None,
        seconds=seconds,
        images_run=images_run,
    )


def wait_for_ranks(
    summary: ExtractSummary,
    task: Task,
    ranks: int,
    before: Collection[tuple[str, int, int]],
    patience: float = 3600.0,
) -> ExtractSummary:
    """Wait until the other ranks of ``torchrun`` are done too, and sum up all of them.

    The manifest tells when; no process talks to another. A rank that fails does not leave this
    one waiting: torchrun ends the others then. Other launchers may not.

    Args:
        summary: of this rank.
        task: of this rank.
        ranks: how many there are.
        before: what was in the folder when they began; new files are this run's.
        patience: seconds without a change in the folder after which the others count as gone.

    Raises:
        ShardError: shards are missing, and nobody has written for ``patience`` seconds.
    """
    began, together = time.monotonic(), Task(task.index // ranks, task.total // ranks)
    seen, since = None, began
    with waiting_for("the other ranks to write their shards"):
        while True:
            whole = summarize(summary.folder, together)
            now = time.monotonic()
            if whole.shards == whole.total_shards:
                seconds = summary.seconds + now - began
                return replace(
                    whole,
                    seconds=seconds,
                    images_run=_images_since(summary.folder, together, before),
                    ignored=summary.ignored,
                )
            there = what_is_there(summary.folder)
            if there != seen:
                seen, since = there, now
            elif now - since > patience:
                missing = counted(whole.total_shards - whole.shards, "shard is", "shards are")
                raise ShardError(
                    f"{summary.folder}: {missing} missing, "
                    f"and no rank has written for {patience:,.0f} s: one has probably failed; run "
                    "the same command again"
                )
            time.sleep(0.2)


def what_is_there(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of each file: they change while somebody writes."""
    found = []
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # just renamed
                info = entry.stat()
                found.append((entry.name, info.st_size, info.st_mtime_ns))
    return sorted(found)


def _images_since(folder: Path, task: Task, before: Collection[tuple[str, int, int]]) -> int:
    """Return the images of those shards of a task that were not there before."""
    manifest = read_manifest(folder)
    new = {name for name, _, _ in set(what_is_there(folder)).difference(before)}
    made = [i for i in range(manifest.shard_count) if manifest.shard_path(i).name in new]
    return sum(len(range(*manifest.shard_range(i))) for i in made if task.owns(i))
