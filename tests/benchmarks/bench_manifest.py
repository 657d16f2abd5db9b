"""What a split of very many shards, and a list of very many images, cost beside their pixels.

python -m tests.benchmarks.bench_manifest [--shards 100000] [--images 1000000] [--folder DIR]

Shards are links to one real shard of one image, images are names in memory. The peak is that of the
process so far, without what it takes to import everything.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from anchorpatch.images.folder import list_class_folders
from anchorpatch.images.index import open_index
from anchorpatch.images.source import ImageSource
from anchorpatch.jobs.extract_plan import files_digest
from anchorpatch.shards import PatchDataset, ShardReader
from anchorpatch.shards.dataset import batches_of, epoch_rows
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.layout import shard_name
from anchorpatch.shards.manifest import (
    FilesDigest,
    Manifest,
    ShardEntry,
    read_manifest,
    split_facts,
    write_manifest,
)
from anchorpatch.shards.reader import _map_limit
from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.verify import verify_folder, verify_shards
from anchorpatch.shards.writer import PatchBatch, ShardWriter

#: Links that a file may have on every filesystem.
LINKS = 30_000

#: Commits that are timed at each size.
COMMITS = 20

#: Shards of ImageNet-1k and -21k, of 1,024 images each.
SIZES = (1_252, 13_900)

PATCHES = 18

_T = TypeVar("_T")


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


START = peak()


def timed(what: str, act: Callable[[], _T], each: int = 1) -> _T:
    """Print elapsed and CPU time of an act, or of each of its parts, and the growth of the peak."""
    began, worked = time.perf_counter(), time.process_time()
    result = act()
    times = time.perf_counter() - began, time.process_time() - worked
    shown = [f"{t / each * 1e6:,.2f} us" if each > 1 else f"{t:,.3f} s" for t in times]
    print(f"{what:52} {shown[0]:>13} {shown[1]:>13} {(peak() - START) >> 20:7,} MiB", flush=True)
    return result


def note(what: str, text: str) -> None:
    print(f"{what:52} {text:>27}", flush=True)


def one_shard(path: Path, header: ShardHeader) -> ShardEntry:
    rng = np.random.default_rng(0)
    with ShardWriter(path, header) as writer:
        writer.append(
            PatchBatch(
                path=np.array([b"n01440764/ILSVRC2012_val_00000293.JPEG"]),
                label=np.zeros(1, np.int32),
                predicted=np.zeros(1, np.int32),
                scale=np.full(1, 63, np.uint8),
                branch_class=np.zeros((1, 3), np.int32),
                branch_prob=np.ones((1, 3), np.float32),
                size=np.full((1, 2), 500, np.int32),
                pixels=rng.integers(0, 256, (1, 224, 224, 3), dtype=np.uint8),
                counts=np.full(1, PATCHES, np.int32),
                corners=8 * rng.integers(0, 21, (1, PATCHES, 2)),
                scores=np.zeros((1, PATCHES), np.float32),
            )
        )
    return writer.entry


def make(folder: Path, count: int) -> Manifest:
    """Return the manifest of a split whose shards are there, without writing it."""
    folder.mkdir()
    names = tuple(f"n{i:08d}" for i in range(1000))
    settings = ShardSettings((24, 10, 8), 0.8, (0.3,) * 3, codec="image", shard_size=1)
    header = ShardHeader("train", names, names, settings, "0" * 64)
    entry = one_shard(folder / shard_name("train", 0), header)
    for i in range(1, count):
        source, path = folder / shard_name("train", i - i % LINKS), folder / shard_name("train", i)
        if source == path:
            shutil.copyfile(folder / shard_name("train", 0), path)
        else:
            os.link(source, path)
    entries = tuple(replace(entry, name=shard_name("train", i)) for i in range(count))
    return Manifest(folder, header, count, "f" * 64, entries)


def commits(whole: Manifest, done: int) -> None:
    """Commit some shards to a manifest that has ``done`` of them."""
    manifest = write_manifest(replace(whole, entries=whole.entries[:done]))
    new = whole.entries[done : done + COMMITS]

    def commit() -> None:
        found = manifest
        for entry in new:
            found = found.commit(entry)

    timed(f"commit a shard, {done:,} done", commit, len(new))


def bookkeeping(folder: Path, count: int) -> None:
    """Measure what the list of shards costs."""
    whole = timed("(write the shards)", lambda: make(folder, count))
    for done in (*(n for n in SIZES if n < count - COMMITS), count - COMMITS - 1):
        commits(whole, done)
    whole = timed("replace the manifest", lambda: write_manifest(whole))
    note("", f"{(folder / 'manifest.json').stat().st_size / count:,.0f} B a shard")
    manifest = timed("open the manifest", lambda: read_manifest(folder))
    timed("look for changes, as before each shard", manifest.refreshed)
    files = FilesDigest(count, whole.files_sha256, ("",) * count)
    timed("resume: compare inputs", lambda: open_manifest(folder, whole.header, files))
    timed("resume: find the pending shards", manifest.missing)
    timed("shards inspect", lambda: split_facts(read_manifest(folder)))
    timed("shards verify: the list alone", lambda: verify_list(folder))


def reading(folder: Path, count: int) -> None:
    """Measure what each shard costs those who read all of them."""
    manifest = write_manifest(make(folder, count))
    few = manifest.entries[:500]
    timed("shards verify: a shard", lambda: verify_shards(manifest, few, 1), len(few))
    reader = timed("ShardReader: open a shard", lambda: ShardReader(folder), count)
    timed("ShardReader: table of images, a shard", lambda: reader.label, count)
    timed("ShardReader: table of patches, a shard", lambda: reader.patch_image(63, [0]), count)
    for group, rows in (("images", len(reader)), ("patches/63", reader.patch_count(63))):
        held = sum(c.nbytes for name, c in reader._columns.items() if name.startswith(group))
        note(f"ShardReader: {group}", f"{held / rows:,.1f} B a row")
    rng, patches = np.random.default_rng(0), reader.patch_count(63)
    for most in (_map_limit() // 2, count):
        rows = rng.integers(0, most * PATCHES, (2, 4_000))
        reader.patches(63, rows[0])
        of = f"{most:,} shards, {_map_limit():,} maps"
        timed(f"random patch of {of}", lambda rows=rows[1]: reader.patches(63, rows), 4_000)
    dataset = timed("PatchDataset, a patch", lambda: PatchDataset(reader, 63), patches)
    note("PatchDataset", f"{(dataset.images.nbytes + dataset.labels.nbytes) / patches} B a patch")
    order = timed("finetune: order of an epoch, a patch", lambda: epoch_rows(reader, rng), patches)
    timed("finetune: its batches, a patch", lambda: batches_of(order, 64, rng), patches)


def verify_list(folder: Path) -> None:
    """Do what verify does, without looking at a shard."""
    from anchorpatch.shards import verify

    whole, verify.verify_shards = verify.verify_shards, lambda *_: []
    try:
        assert not verify_folder(folder)
    finally:
        verify.verify_shards = whole


def listing(folder: Path, files: int, count: int) -> None:
    """Measure what each image costs before it is read, with empty files and with names alone."""
    for i in range(files):
        path = folder / f"n{i % 100:08d}" / f"n{i % 100:08d}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for _ in range(2):
        timed("extract: list a folder, an image", lambda: list_class_folders(folder), files)
    tracemalloc.start()
    list_class_folders(folder)
    note(
        "extract: list a folder, peak",
        f"{tracemalloc.get_traced_memory()[1] / files:,.0f} B an image",
    )
    tracemalloc.stop()
    with tarfile.open(folder.with_name("images.tar"), "w") as tar:
        tar.add(folder, "")
    archive = [folder.with_name("images.tar")]
    os.utime(archive[0], (0, 0))
    timed("extract: index a tar, an image", lambda: open_index(archive), files)
    timed("extract: the same, from the cache", lambda: open_index(archive), files)
    names = (b"n%08d/n%08d_%d.JPEG" % (i % 1000, i % 1000, i) for i in range(count))
    paths = np.array(list(names))
    labels = np.arange(count, dtype=np.int32) % 1000
    source = ImageSource(Path(), "train", paths, labels, np.full(count, 110_000), ("a",))
    held = source.paths.nbytes + source.labels.nbytes + source.sizes.nbytes
    note(f"extract: a list of {count:,} images", f"{held / count:,.1f} B an image")
    order = timed("extract: sort it", lambda: np.argsort(paths, kind="stable"), count)
    source = timed("extract: put it in order", lambda: source.taking(order), count)
    timed("extract: its digests", lambda: files_digest(source, 1024), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--read", type=int, default=2_000, help="shards that are read")
    parser.add_argument("--files", type=int, default=50_000, help="that are listed")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the shards are written for a while")
    args = parser.parse_args()
    # As on most systems, whatever it is here: a reader maps half as many files.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (1_024, hard))
    print(f"{'':52} {'elapsed':>13} {'CPU':>13} {'peak':>11}")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        os.environ["ANCHORPATCH_CACHE"] = str(Path(name, "cache"))
        bookkeeping(Path(name, "many"), args.shards)
        reading(Path(name, "read"), args.read)
        listing(Path(name, "images"), args.files, args.images)


if __name__ == "__main__":
    main()
