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
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchorpatch.errors import DataError, ShardBusy, ShardError
from anchorpatch.images.loader import Batch, load_batches
from anchorpatch.images.source import ImageSource, open_source, spread_rows, without_images
from anchorpatch.jobs.localizer import Localizer, Pending, resolve_engine
from anchorpatch.jobs.selection import tuned_or_begun
from anchorpatch.runtime.checkpoint import Weights, WeightsMeta, load_weights
from anchorpatch.runtime.device import computing_on, cpu_count, has_bfloat16, resolve_device
from anchorpatch.runtime.distributed import Task
from anchorpatch.runtime.progress import Reporter, Stopwatch, Waits
from anchorpatch.settings import PRESETS, Computing, CropSettings, LspSettings, default_preset
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.manifest import (
    FilesDigest,
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
class ExtractConfig(Computing):
    """What to extract, from where, to where.

    Attributes:
        data: folder that holds the split's folder or archive, or archives.
        split: name of the split.
        weights: a weights file of AnchorNet.
        out: folder that gets SPLIT/SPLIT-00000.h5, ...
        labels: CSV with the labels of a flat split folder.
        files: list of images to take instead; see `anchorpatch.images.labels.read_list`.
        only_labelled: leave out images without a label.
        preset: a name in `anchorpatch.settings.PRESETS`; None: by the split.
        lsp: K, T and P in place of the preset's.
        patches: mean patches per image at each scale, for which P is found on a sample of the
            images, and K where that of ``lsp`` is too small.
        codec: raw, jpeg or image.
        jpeg_quality: 1 to 100, for codec jpeg.
        store_images: store the crop of each image too.
        shard_size: images in a shard.
        batch_size: images in a batch; None: 64 on CPU, 256 on a GPU, where shards of another
            batch size may differ.
        workers: decoding processes; by default one per CPU core.
        engine: auto: as the shards in ``out`` were made, else as for
            `anchorpatch.jobs.localizer.resolve_engine`.
        compile: use ``torch.compile``.
        limit: take only so many images, evenly spread over the sorted list.
        crop_mode: how images become crops; None, as for the next three: as the weights record it.
        crop_pct: share of the resized side that a crop keeps; None with another ``crop_mode``: that
            of the mode.
        img_size: side of the crops in pixels.
        background: color behind transparent pixels.
        damaged: what becomes of images that are decoded with damage, keep or skip.
        allow_empty: accept class folders without images.
        max_bad: share of unreadable images that fails the run when exceeded.
        overwrite: replace shards of other settings, weights or files instead of refusing.
        retry_skipped: read skipped and damaged images again, and make the shards again of those
            that come out otherwise now.
        repair: verify the shards that are there, and make damaged ones again.
        task: the part of the shards that this process does.
        ranks: processes of ``torchrun`` for whose parts `run` waits, to sum them up too; 1 for none
            but this one's.
    """

    data: Path
    split: str
    weights: Path
    out: Path
    labels: Path | None = None
    files: Path | None = None
    only_labelled: bool = False
    preset: str | None = None
    lsp: LspSettings | None = None
    patches: tuple[float, float, float] | None = None
    codec: str = "raw"
    jpeg_quality: int = 95
    store_images: bool = False
    shard_size: int = 1024
    batch_size: int | None = None
    workers: int = field(default_factory=cpu_count)
    compile: bool = False
    limit: int | None = None
    crop_mode: str | None = None
    crop_pct: float | None = None
    img_size: int | None = None
    background: str | None = None
    damaged: str = "keep"
    allow_empty: bool = False
    max_bad: float = 0.01
    overwrite: bool = False
    retry_skipped: bool = False
    repair: bool = False
    task: Task = field(default_factory=Task)
    ranks: int = 1


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


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before the first image is decoded."""

    config: ExtractConfig
    images: ImageSource
    weights: Weights
    device: torch.device
    batch_size: int
    header: ShardHeader
    files: FilesDigest

    @property
    def out(self) -> Path:
        return self.config.out / self.config.split

    @property
    def owned(self) -> range:
        task = self.config.task
        return range(task.index, len(self.files.shards), task.total)

    @property
    def overridden(self) -> str:
        """What is to be said where the crops are not those that the weights were trained for."""
        trained, taken = str(self.weights.meta.cropping), str(self.header.settings.crop)
        if trained == taken:
            return ""
        return f"the crops are {taken}, but the weights were trained for {trained}"

    def load(self, batches: Iterable[Sequence[int]], workers: int) -> Generator[Batch, None, None]:
        return load_batches(
            self.images,
            batches,
            workers=workers,
            crop=self.header.settings.crop,
            pin_memory=self.device.type == "cuda",
        )

    def localizer(self) -> Localizer:
        settings = self.header.settings
        return Localizer(
            self.weights,
            settings.lsp,
            self.device,
            settings.engine,
            settings.precision,
            side=settings.img_size,
            batch_size=self.batch_size,
            compile=settings.compile,
        )


def run(config: ExtractConfig, reporter: Reporter | None = None) -> ExtractSummary:
    """Extract what is not done yet and return the summary of the task's shards.

    Raises:
        AnchorpatchError: see `anchorpatch.errors`. Shards that are done stay; the same call
            goes on behind them.
    """
    before = files_in(config.out / config.split) if config.ranks > 1 else set()
    reporter, task = reporter or Reporter(), config.task
    plan = _plan(config, reporter)
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
        where = computing_on(plan.device, plan.header.settings.engine)
        reporter.message(f"extract {plan.config.split}: {where}")
        with ExitStack() as stack:
            # Built while the workers decode the first batches.
            build = cache(lambda: stack.enter_context(plan.localizer()))
            # Again, as long as shards have come free whose process has failed.
            while pending and (made := _extract(plan, manifest, pending, build, reporter, waits)):
                images += made
                manifest = manifest.refreshed()
                pending = _pending(plan, manifest)
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
        _summary(plan.out, task),
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
    plan = _plan(config, reporter)
    if plan.overridden:
        (reporter or Reporter()).message(plan.overridden)
    manifest = open_manifest(
        plan.out, plan.header, plan.files, overwrite=config.overwrite, dry_run=True
    )
    rejected = _rejected(plan, manifest, Reporter())
    manifest = replace(manifest, entries=tuple(e for e in manifest.entries if e not in rejected))
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


def _engine(config: ExtractConfig, device: torch.device) -> str:
    name = config.engine
    if name == "auto" and device.type == "cpu":
        with suppress(ShardError):
            begun = read_manifest(config.out / config.split).header.settings
            if begun.device != "cuda" and begun.engine == "torch":
                name = "torch"
    return resolve_engine(name, device, config.precision, compile=config.compile)


def _plan(config: ExtractConfig, reporter: Reporter | None = None) -> _Plan:
    device = resolve_device(config.device)
    batch_size = config.batch_size or (256 if device.type == "cuda" else 64)
    weights = load_weights(config.weights)
    images = open_source(
        config.data,
        config.split,
        config.labels,
        files=config.files,
        only_labelled=config.only_labelled,
        allow_empty=config.allow_empty,
        report=reporter,
    ).limited(config.limit)
    preset, crop = config.preset or default_preset(config.split), _crop(config, weights.meta)
    lsp = config.lsp or PRESETS[preset]
    engine = _engine(config, device)
    if config.patches is not None:
        how = weights, (device, engine, config.precision), crop
        found = tuned_or_begun(
            config.out / config.split, images, *how, config.patches, lsp, config.workers
        )
        lsp = found.settings
        if reporter is not None and found.images:
            reporter.message(f"--patches: {found}")
    settings = ShardSettings(
        **vars(lsp),
        codec=config.codec,
        store_images=config.store_images,
        shard_size=config.shard_size,
        precision=config.precision,
        preset=preset if PRESETS[preset] == lsp else None,
        jpeg_quality=config.jpeg_quality,
        crop_mode=crop.mode,
        background=crop.background,
        damaged=crop.damaged,
        device=device.type,
        batch_size=batch_size,
        compile=config.compile,
        engine=engine,
        img_size=crop.img_size,
        crop_pct=crop.crop_pct,
        patches=config.patches,
    )
    header = ShardHeader(
        split=config.split,
        classes=images.classes,
        network_classes=weights.meta.classes,
        settings=settings,
        weights_sha256=weights.sha256,
    )
    files = files_digest(images, config.shard_size)
    return _Plan(config, images, weights, device, batch_size, header, files)


def _crop(config: ExtractConfig, meta: WeightsMeta) -> CropSettings:
    """Return how images become crops: as the weights record it, but for what is asked for."""
    found = replace(meta.cropping, damaged=config.damaged)
    if config.crop_mode not in (None, found.mode):
        found = replace(found, mode=config.crop_mode, crop_pct=None)
    asked = ("img_size", "crop_pct", "background")
    given = {name: value for name in asked if (value := getattr(config, name)) is not None}
    return replace(found, **given)


def files_digest(images: ImageSource, shard_size: int) -> FilesDigest:
    """Return the digests of the images of a source, in all and by shard."""
    return FilesDigest(
        count=len(images),
        sha256=images.digest(),
        shards=tuple(images.digest(i, i + shard_size) for i in range(0, len(images), shard_size)),
        paths=lambda start, stop: [images.path(i) for i in range(start, stop)],
    )


def _extract(
    plan: _Plan,
    manifest: Manifest,
    shards: Sequence[int],
    build: Callable[[], Localizer],
    reporter: Reporter,
    waits: Waits,
) -> int:
    """Make those of the pending shards that no other process makes, in one overlapping pipeline.

    Returns:
        The number of images of these shards.
    """
    total, left = (sum(len(manifest.shard_range(i)) for i in part) for part in (plan.owned, shards))
    network, reasons = Stopwatch(), Counter[str]()
    begun: set[int] = set()
    sink = ShardSink(manifest, plan.files.shards, reporter.advance)
    batches, made = _claimed(plan, sink, shards, begun, waits), 0
    try:
        with closing(plan.load(batches, plan.config.workers)) as loader:
            localizer = build()
            reporter.start(f"extract {plan.config.split}", total, total - left)
            for batch in waits.each("decoding", loader):
                if batch.bad:
                    reasons.update(reason for _, reason in batch.bad)
                    _check_bad(plan, sink.manifest, begun, reasons, batch.bad[-1][0])
                with waits.on("network"):
                    pending = localizer.submit(batch.pixels) if len(batch.index) else None
                write = partial(_append, plan=plan, batch=batch, pending=pending, network=network)
                rows = [*batch.index.tolist(), *(row for row, _ in batch.bad)]
                shard = rows[0] // plan.config.shard_size
                last = max(rows) == manifest.shard_range(shard)[-1]
                with waits.on("writing", behind=("network", network)):
                    sink.put(shard, write, len(rows), len(batch.bad), last=last)
                made += len(rows)
            with waits.on("writing", behind=("network", network)):
                sink.drain()
    finally:
        sink.close()
        reporter.stop()
    return made


def _claimed(
    plan: _Plan, sink: ShardSink, shards: Sequence[int], begun: set[int], waits: Waits
) -> Iterator[range]:
    """Yield the images of each batch; no batch crosses a shard.

    A shard is claimed when the loader asks for its first batch, and is added to ``begun``.
    """
    for shard in shards:
        with waits.on("writing"):
            if not sink.claim(shard):
                continue
        begun.add(shard)
        images = sink.manifest.shard_range(shard)
        for start in range(0, len(images), plan.batch_size):
            yield images[start : start + plan.batch_size]


def _pending(plan: _Plan, manifest: Manifest) -> list[int]:
    """Return the shards of this task that are not done, in the order in which it tries them."""
    pending = [i for i in manifest.missing() if plan.config.task.owns(i)]
    if (job := plan.config.task.job) is not None:
        # Jobs that begin at the same place would race for each shard, and where a filesystem
        # has no locks they would all make the same ones.
        random.Random(job).shuffle(pending)
    return pending


def _rejected(plan: _Plan, manifest: Manifest, reporter: Reporter) -> list[ShardEntry]:
    """Return the entries of this task's shards that ``repair`` and ``retry_skipped`` reject."""
    done = [manifest.shard_path(i).name for i in plan.owned if manifest.has(i)]
    entries = [entry for entry in manifest.entries if entry.name in set(done)]
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


def _readable_now(plan: _Plan, entries: Sequence[ShardEntry]) -> tuple[Counter[str], int]:
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
    writer: ShardWriter, *, plan: _Plan, batch: Batch, pending: Pending | None, network: Stopwatch
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


def _check_bad(
    plan: _Plan, manifest: Manifest, begun: Collection[int], reasons: Counter[str], last: int
) -> None:
    """Raise where the task's shards have more unreadable images than they may.

    To ``reasons``, why this process has skipped images of the shards that it has begun, up to the
    row ``last``, are added those of earlier runs and other jobs.
    """
    others = {manifest.shard_path(i).name for i in plan.owned if i not in begun}
    entries = (entry for entry in manifest.entries if entry.name in others)
    found = reasons + Counter(reason for entry in entries for _, reason in entry.skipped)
    total = sum(len(manifest.shard_range(i)) for i in plan.owned)
    if found.total() > math.floor(plan.config.max_bad * total + 1e-9):
        most = ", ".join(f"{n} {reason}" for reason, n in found.most_common(5))
        details = f": {most}; the last is {plan.images.path(last)}"
        raise plan.images.too_many_bad(found.total(), total, plan.config.max_bad, details)


def _advice(plan: _Plan, waited: Mapping[str, float]) -> str:
    """Say what a run waited for most, and what would help."""
    config = plan.config
    faster = "more GPUs" if plan.device.type == "cuda" else "more CPU cores, or a GPU"
    if config.precision == "float32" and has_bfloat16(plan.device):
        faster = "--precision bfloat16"
    limits = {
        "decoding": "decoding: more "
        + ("--workers" if config.workers < cpu_count() else "CPU cores"),
        "network": f"the network: {faster}",
        "writing": "writing: a faster disk for --out",
    }
    return f"limited by {limits[max(STAGES, key=lambda stage: waited.get(stage, 0.0))]}"


# --- the summary --------------------------------------------------------------------------------


def _summary(folder: Path, task: Task) -> ExtractSummary:
    """Sum up the shards that a task owns, from the manifest alone."""
    manifest = read_manifest(folder)
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
