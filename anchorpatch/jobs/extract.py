"""The main job: images -> decode -> AnchorNet -> decide -> LSP -> crop -> shards.

Five things overlap: worker processes decode, the localizer computes, one thread fills shards, a
few cut patches and write full shards, and this thread hands batches on. Batches never cross
a shard, and only a few of them are on their way, and a shard goes to disk as it grows, so memory
does not depend on the number of images.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from anchorpatch.errors import DataError, ShardBusy
from anchorpatch.images.loader import Batch
from anchorpatch.images.source import spread_rows, without_images
from anchorpatch.jobs.extract_plan import ExtractConfig, Plan, make_plan
from anchorpatch.jobs.localizer import Localizer, Pending
from anchorpatch.runtime.device import computing_on, cpu_count, has_bfloat16
from anchorpatch.runtime.distributed import Task
from anchorpatch.runtime.progress import Reporter, Stopwatch, Waits
from anchorpatch.shards.manifest import (
    Manifest,
    ShardEntry,
    SplitFacts,
    read_manifest,
    split_facts,
)
from anchorpatch.shards.sink import ShardSink
from anchorpatch.shards.splits import files_in, open_manifest, wait_for_shards
from anchorpatch.shards.verify import verify_shards
from anchorpatch.shards.writer import PatchBatch, ShardWriter
from anchorpatch.storage import to_json
from anchorpatch.text import counted

#: What an extraction may wait for, in the order of the pipeline.
STAGES = ("decoding", "network", "writing")

#: Images that a forecast looks at.
_SAMPLE = 64


@dataclass(frozen=True)
class ExtractSummary:
    """What the shards of a task hold, and how fast this run made its part of them.

    Attributes:
        facts: of those of the task's shards that are done.
        owned: shards of the task.
        pending: shards of the whole split that are not done.
        damaged: images decoded with damage, which are stored all the same.
        seconds: of this run.
        waited: seconds of this run in which each of `STAGES` was what it waited for.
        advice: what limited it, and what would help; empty where nothing to do.
        images_run: images of this run, the skipped ones included.
        ignored: files of the images' folder that were passed over, by extension.
    """

    facts: SplitFacts
    owned: int
    pending: int
    damaged: int
    seconds: float = 0.0
    waited: Mapping[str, float] = field(default_factory=dict)
    advice: str = ""
    images_run: int = 0
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every shard of the split is done."""
        return not self.pending

    @property
    def images_per_second(self) -> float:
        """Speed of this run; 0 where nothing to do."""
        return self.images_run / self.seconds if self.images_run else 0.0

    @property
    def waits(self) -> dict[str, float]:
        """Share of the run in which each stage was what it waited for."""
        return {stage: self.waited.get(stage, 0.0) / (self.seconds or 1.0) for stage in STAGES}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object, with shares and means."""
        facts = self.facts
        scales = {
            str(scale): {
                "images": found["images"],
                "share": found["images"] / facts.images if facts.images else 0.0,
                "patches": found["patches"],
                "mean_patches": found["patches"] / found["images"] if found["images"] else 0.0,
            }
            for scale, found in facts.scales.items()
        }
        return {
            "folder": facts.folder,
            "complete": self.complete,
            "pending": self.pending,
            "split_shards": facts.total_shards,
            "shards": facts.shards,
            "total_shards": self.owned,
            "images": facts.images,
            "scales": scales,
            "skipped": facts.skipped,
            "damaged": self.damaged,
            "ignored": dict(self.ignored),
            "top1": facts.top1,
            "bytes": facts.bytes,
            "images_per_second": round(self.images_per_second, 2),
            "seconds": round(self.seconds, 3),
            "waits": {stage: round(share, 4) for stage, share in self.waits.items()},
            "advice": self.advice or None,
        }


class Engine(Protocol):
    """What makes shards: this process, or a cluster.

    Attributes:
        device: kind of device that computes; None: as the configuration says.
    """

    device: torch.device | None

    def making(
        self, plan: Plan, reporter: Reporter, waits: Waits
    ) -> AbstractContextManager[Callable[[Manifest, Sequence[int]], int]]:
        """Return a context with what makes pending shards, and returns their number of images.

        It leaves out those that other processes make.
        """


class _Here:
    """Makes shards in this process."""

    device: torch.device | None = None

    @contextmanager
    def making(
        self, plan: Plan, reporter: Reporter, waits: Waits
    ) -> Iterator[Callable[[Manifest, Sequence[int]], int]]:
        settings = plan.header.settings
        where = computing_on(plan.device, settings.engine)
        reporter.message(f"extract {plan.config.split}: {where}")
        with ExitStack() as stack:
            # Built while the workers decode the first batches.
            build = cache(lambda: stack.enter_context(plan.localizer()))

            def make(manifest: Manifest, shards: Sequence[int]) -> int:
                def begin() -> Localizer:
                    localizer = build()
                    start_counting(plan, manifest, shards, reporter)
                    return localizer

                try:
                    return make_shards(plan, manifest, shards, begin, waits, reporter.advance)
                finally:
                    reporter.stop()

            yield make


def start_counting(
    plan: Plan, manifest: Manifest, shards: Iterable[int], reporter: Reporter
) -> None:
    """Begin to show the progress of a task whose ``shards`` are to be made."""
    total, left = (sum(len(manifest.shard_range(i)) for i in part) for part in (plan.owned, shards))
    reporter.start(f"extract {plan.config.split}", total, total - left)


def run(
    config: ExtractConfig, reporter: Reporter | None = None, engine: Engine | None = None
) -> ExtractSummary:
    """Extract what is not done yet and return the summary of the task's shards.

    Args:
        config: what to extract.
        reporter: where to show progress.
        engine: what makes the shards; None for this process.

    Raises:
        AnchorpatchError: see `anchorpatch.errors`. Shards that are done stay; the same call
            goes on behind them.
    """
    before = files_in(config.out / config.split) if config.ranks > 1 else set()
    reporter, engine, task = reporter or Reporter(), engine or _Here(), config.task
    plan = make_plan(config, reporter, engine.device)
    manifest = open_manifest(plan.out, plan.header, plan.files, overwrite=config.overwrite)
    if rejected := _rejected(plan, manifest, reporter):
        manifest = manifest.forget(rejected)
    source = plan.images
    absent = without_images(source.labels, source.classes)
    for remark in (plan.overridden, source.passed_over(), absent):
        if remark:
            reporter.message(remark)
    began, images, waits = time.monotonic(), 0, Waits()
    if pending := _pending(plan, manifest):
        with engine.making(plan, reporter, waits) as make:
            # Again, as long as shards have come free whose process has failed.
            while pending and (made := make(manifest, pending)):
                images += made
                manifest = manifest.refreshed()
                pending = _pending(plan, manifest)
    manifest = manifest.folded()
    if pending and task.job is None:
        raise ShardBusy(
            f"{manifest.shard_path(pending[0])}: another process is writing this shard: "
            "wait for it, or end it and run again"
        )
    advice = _advice(plan, waits.seconds) if images else ""
    # Jobs of an array need not wait for each other.
    if config.ranks > 1 and task.job is None:
        task = Task(task.index // config.ranks, task.total // config.ranks)
        manifest = wait_for_shards(plan.out, task.owns)
        new = {name for name, _, _ in files_in(plan.out) - before}
        of_ranks = filter(task.owns, range(manifest.shard_count))
        ranges = (manifest.shard_range(i) for i in of_ranks if manifest.shard_path(i).name in new)
        images = sum(map(len, ranges))
    return replace(
        _summary(read_manifest(plan.out, manifest), task),
        seconds=time.monotonic() - began,
        waited=waits.seconds,
        advice=advice,
        images_run=images,
        ignored=source.ignored,
    )


def forecast(config: ExtractConfig, reporter: Reporter | None = None) -> dict[str, Any]:
    """Return what `run` would do, as JSON values, without writing into the output folder.

    ``bytes``, those of the whole split, follow from the ``bytes_per_image`` of a ``sample`` of up
    to 64 images, evenly spread over the list, that are extracted into a temporary folder.
    ``images`` include unreadable ones; ``pending`` are the shards of this task that are not done.
    """
    plan = make_plan(config, reporter)
    if plan.overridden:
        (reporter or Reporter()).message(plan.overridden)
    manifest = open_manifest(
        plan.out, plan.header, plan.files, overwrite=config.overwrite, dry_run=True
    )
    rejected = _rejected(plan, manifest, Reporter())
    names = {entry.name for entry in rejected}
    kept = tuple(entry for entry in manifest.entries if entry.name not in names)
    manifest = replace(manifest, entries=kept)
    n = len(plan.images)
    sample = spread_rows(n, _SAMPLE).tolist()
    with tempfile.TemporaryDirectory(prefix="anchorpatch-") as name:
        with plan.localizer() as localizer, ShardWriter(Path(name, "0.h5"), plan.header) as writer:
            for batch in plan.load([sample], 0):
                pending = localizer.submit(batch.pixels) if len(batch.index) else None
                _append(writer, plan=plan, batch=batch, pending=pending, network=Stopwatch())
        entry = writer.entry
    if not entry.images:
        path, reason = entry.skipped[0]
        raise DataError(
            f"{plan.images.root}: none of {len(sample)} images tried can be read; "
            f"the first is {path}: {reason}"
        )
    per_image = entry.bytes / entry.images
    return {
        "folder": str(plan.out),
        "images": n,
        "classes": len(plan.images.classes),
        "shards": len(plan.files.shards),
        "pending": len(_pending(plan, manifest)),
        "sample": len(sample),
        "bytes_per_image": per_image,
        "bytes": round(per_image * n),
        "settings": to_json(plan.header.settings),
        "ignored": dict(plan.images.ignored),
    }


def make_shards(
    plan: Plan,
    manifest: Manifest,
    shards: Iterable[int],
    begin: Callable[[], Localizer],
    waits: Waits,
    advance: Callable[..., object],
    commit: Callable[[int, ShardEntry | None], object] | None = None,
) -> int:
    """Make those of some shards that no other process makes, in one overlapping pipeline.

    Args:
        plan: of the extraction.
        manifest: of the folder that gets the shards.
        shards: drawn from while earlier ones are being made.
        begin: called while the first images are decoded; returns what localizes.
        waits: gets what the pipeline waits for.
        advance: as of `ShardSink`.
        commit: called with each shard and its entry in place of `Manifest.commit`, and with None
            for a shard that another process makes.

    Returns:
        The number of images of the shards made.

    Raises:
        AnchorpatchError: see `anchorpatch.errors`.
    """
    network, reasons = Stopwatch(), Counter[str]()
    begun: set[int] = set()
    total = sum(len(manifest.shard_range(i)) for i in plan.owned)
    sink = ShardSink(manifest, plan.files.shards, advance, commit=commit)
    batches, made = _claimed(plan, sink, shards, begun, waits, commit), 0

    @lru_cache(1)  # another sum for each shard, not for each batch
    def elsewhere(begun_now: int, done_now: int) -> Counter[str]:
        return skipped_elsewhere(plan, sink.manifest, begun)

    try:
        with closing(plan.load(batches, plan.config.workers)) as loader:
            localizer = begin()
            for batch in waits.each("decoding", loader):
                if batch.bad:
                    reasons.update(reason for _, reason in batch.bad)
                    found = reasons + elsewhere(len(begun), len(sink.manifest.entries))
                    check_bad(plan, total, found, plan.images.path(batch.bad[-1][0]))
                with waits.on("network"):
                    pending = localizer.submit(batch.pixels) if len(batch.index) else None
                write = partial(_append, plan=plan, batch=batch, pending=pending, network=network)
                rows = [*batch.index.tolist(), *(row for row, _ in batch.bad)]
                shard = rows[0] // plan.config.shard_size
                done = max(rows) == manifest.shard_range(shard)[-1]
                with waits.on("writing", behind=("network", network)):
                    sink.put(shard, write, len(rows), len(batch.bad), last=done)
                made += len(rows)
            with waits.on("writing", behind=("network", network)):
                sink.drain()
    finally:
        sink.close()
    return made


def _claimed(
    plan: Plan,
    sink: ShardSink,
    shards: Iterable[int],
    begun: set[int],
    waits: Waits,
    commit: Callable[[int, ShardEntry | None], object] | None,
) -> Iterator[range]:
    """Yield the images of each batch; no batch crosses a shard.

    A shard is claimed when the loader asks for its first batch, and is added to ``begun``.
    """
    for shard in shards:
        with waits.on("writing"):
            if not sink.claim(shard):
                if commit is not None:
                    commit(shard, None)
                continue
        begun.add(shard)
        images = sink.manifest.shard_range(shard)
        for start in range(0, len(images), plan.batch_size):
            yield images[start : start + plan.batch_size]


def _pending(plan: Plan, manifest: Manifest) -> list[int]:
    """Return the shards of this task that are not done, in the order in which it tries them."""
    pending = [i for i in plan.owned if not manifest.has(i)]
    if (job := plan.config.task.job) is not None:
        # Jobs that begin at the same place would race for each shard, and where a filesystem
        # has no locks they would all make the same ones.
        random.Random(job).shuffle(pending)
    return pending


def _rejected(plan: Plan, manifest: Manifest, reporter: Reporter) -> list[ShardEntry]:
    """Return the entries of this task's shards that ``repair`` and ``retry_skipped`` reject."""
    if not (plan.config.repair or plan.config.retry_skipped):
        return []
    done = {manifest.shard_path(i).name for i in plan.owned if manifest.has(i)}
    entries = [entry for entry in manifest.entries if entry.name in done]
    rejected: set[str] = set()
    if plan.config.repair:
        with reporter.counting(
            f"verify {plan.config.split}", sum(entry.images for entry in entries)
        ):
            problems = verify_shards(manifest, entries, plan.config.workers or 1, reporter.advance)
        rejected |= {problem.shard for problem in problems}
        reporter.message(f"repair: {len(rejected)} of {len(entries)} shards are damaged")
    if plan.config.retry_skipped:
        found, tried = _readable_now(plan, entries)
        reporter.message(
            f"retry-skipped: {sum(found.values())} of {counted(tried, 'image')} have changed, "
            f"in {counted(len(found), 'shard')}"
        )
        rejected |= found.keys()
    return [entry for entry in entries if entry.name in rejected]


def _readable_now(plan: Plan, entries: Sequence[ShardEntry]) -> tuple[Counter[str], int]:
    """Read again what was skipped, or decoded with damage.

    Returns:
        By shard, how many of these images come out otherwise now, and how many were read.
    """
    damage = "decoded with damage"
    was = {
        int(np.searchsorted(plan.images.paths, os.fsencode(path))): (entry.name, why)
        for entry in entries
        for path, why in (*entry.skipped, *((path, damage) for path in entry.damaged))
    }
    rows = sorted(was)
    chunks = [rows[i : i + plan.batch_size] for i in range(0, len(rows), plan.batch_size)]
    now: dict[int, str] = {}
    with closing(plan.load(chunks, min(plan.config.workers, len(chunks)))) as loader:
        for batch in loader:
            now |= dict(batch.bad) | dict.fromkeys(batch.damaged, damage)
    return Counter(shard for row, (shard, why) in was.items() if now.get(row) != why), len(was)


def _append(
    writer: ShardWriter, *, plan: Plan, batch: Batch, pending: Pending | None, network: Stopwatch
) -> int:
    """Write a batch into its shard, when the network is done; return the number of patches."""
    images = plan.images
    for row, reason in batch.bad:
        writer.skip(images.path(row), reason)
    if pending is None:
        return 0
    with network:
        found = pending.result(lambda i: images.name(int(batch.index[i])))
    writer.append(
        PatchBatch(
            path=images.paths[batch.index],
            label=images.labels[batch.index],
            size=batch.size,
            pixels=batch.pixels.numpy(),
            **found._asdict(),
        )
    )
    for row in batch.damaged:
        writer.note_damage(images.path(row))
    return int(found.counts.sum())


def skipped_elsewhere(plan: Plan, manifest: Manifest, begun: Collection[int]) -> Counter[str]:
    """Return why earlier runs and other jobs have skipped images of the task's shards."""
    others = {manifest.shard_path(i).name for i in plan.owned if i not in begun}
    entries = (entry for entry in manifest.entries if entry.name in others)
    return Counter(reason for entry in entries for _, reason in entry.skipped)


def check_bad(plan: Plan, total: int, found: Counter[str], last: str) -> None:
    """Raise where of ``total`` images more are unreadable than may be, up to the path ``last``."""
    if found.total() > math.floor(plan.config.max_bad * total + 1e-9):
        most = ", ".join(f"{n} {reason}" for reason, n in found.most_common(5))
        details = f": {most}; the last is {last}"
        raise plan.images.too_many_bad(found.total(), total, plan.config.max_bad, details)


def _advice(plan: Plan, waited: Mapping[str, float]) -> str:
    """Say what a run waited for most, and what would help."""
    config = plan.config
    faster = "more GPUs" if plan.device.type == "cuda" else "more CPU cores, or a GPU"
    if config.precision == "float32" and has_bfloat16(plan.device):
        faster = "--precision bfloat16"
    decoding = "more --workers" if config.workers < cpu_count() else "more CPU cores"
    if plan.device.type == "cuda" and config.decoder != "nvjpeg":
        decoding = "--decoder nvjpeg"
    limits = {
        "decoding": f"decoding: {decoding}",
        "network": f"the network: {faster}",
        "writing": "writing: a faster disk for --out",
    }
    return f"limited by {limits[max(STAGES, key=lambda stage: waited.get(stage, 0.0))]}"


# --- the summary --------------------------------------------------------------------------------


def _summary(manifest: Manifest, task: Task) -> ExtractSummary:
    """Sum up the shards that a task owns, from the manifest alone."""
    missing = set(manifest.missing())
    owned = range(task.index, manifest.shard_count, task.total)
    names = {manifest.shard_path(i).name for i in owned if i not in missing}
    entries = tuple(entry for entry in manifest.entries if entry.name in names)
    return ExtractSummary(
        facts=split_facts(replace(manifest, entries=entries)),
        owned=len(owned),
        pending=len(missing),
        damaged=sum(len(entry.damaged) for entry in entries),
    )
