"""Compare ways to read random patches: ``python -m tests.benchmarks.bench_reader``.

Writes shards of random pixels in a temporary folder and reads 95-px patches from a warm cache.
The ways take turns within each round, the best round counts, and ratios are to the reader's
batch gather on codec raw. Random pixels are the worst case for JPEG: photographs are about
a quarter of the bytes and decode faster.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from anchorpatch.settings import CODECS, CROP
from anchorpatch.shards import PatchDataset, ShardReader
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.manifest import FilesDigest, Manifest
from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.writer import PatchBatch, ShardWriter

SCALE, PER_IMAGE = 95, 10


def make_split(folder: Path, codec: str, images: int, shard_size: int) -> tuple[Manifest, float]:
    """Write shards whose images all chose 95 px; return the seconds that took too."""
    settings = ShardSettings((24, 10, 8), 0.8, (0.3,) * 3, codec=codec, shard_size=shard_size)
    header = ShardHeader("train", ("a",), ("a",), settings, "0" * 64)
    count = -(-images // shard_size)
    manifest = open_manifest(folder, header, FilesDigest(images, "0" * 64, ("",) * count))
    rng = np.random.default_rng(0)
    n = 32
    pixels = rng.integers(0, 256, (n, CROP, CROP, 3), dtype=np.uint8)
    seconds = 0.0
    for shard in range(count):
        images = manifest.shard_range(shard)
        began = time.perf_counter()
        with ShardWriter(manifest.shard_path(shard), header) as writer:
            for start in images[::n]:
                k = min(n, images.stop - start)
                writer.append(
                    PatchBatch(
                        path=np.array([f"a/{start + i:08d}.jpg".encode() for i in range(k)]),
                        label=np.zeros(k, np.int32),
                        predicted=np.zeros(k, np.int32),
                        scale=np.full(k, SCALE, np.uint8),
                        branch_class=np.zeros((k, 3), np.int32),
                        branch_prob=np.ones((k, 3), np.float32),
                        size=np.full((k, 2), 256, np.int32),
                        pixels=pixels[:k],
                        counts=np.full(k, PER_IMAGE, np.int32),
                        corners=8 * rng.integers(0, 17, (k, PER_IMAGE, 2)),
                        scores=np.zeros((k, PER_IMAGE), np.float32),
                    )
                )
        manifest = manifest.commit(writer.entry)
        seconds += time.perf_counter() - began
    return manifest, seconds


def ways(folder: Path, codec: str) -> dict[str, Callable[[np.ndarray], object]]:
    """Return the ways to read one batch of random rows."""
    reader = ShardReader(folder)
    found: dict[str, Callable[[np.ndarray], object]] = {
        f"{codec}: reader.patches": lambda rows: reader.patches(SCALE, rows)
    }
    dataset = PatchDataset(reader, SCALE)
    found[f"{codec}: PatchDataset batch"] = lambda rows: dataset.__getitems__(rows.tolist())
    if codec == "raw":
        per_shard = reader._entries[0].patches[SCALE]
        files = [h5py.File(path, "r") for path in sorted(folder.glob("*.h5"))]
        pixels = [file[f"patches/{SCALE}/pixels"] for file in files]

        def one_by_one(rows: np.ndarray) -> object:
            return np.stack([pixels[row // per_shard][row % per_shard] for row in rows])

        def fancy(rows: np.ndarray) -> object:
            rows = np.unique(rows)  # h5py wants them in order, each once
            shard = rows // per_shard
            return [pixels[i][rows[shard == i] % per_shard] for i in np.unique(shard)]

        found["raw: h5py dset[i]"] = one_by_one
        found["raw: h5py fancy indexing"] = fancy
    return found


def main() -> None:
    """Print patches/s and bytes an image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as name:
        every: dict[str, Callable[[np.ndarray], object]] = {}
        print(f"{'codec':8} {'kB an image':>12} {'written images/s':>17}")
        for codec in CODECS:
            folder = Path(name, codec)
            manifest, seconds = make_split(folder, codec, args.images, args.shard_size)
            size = sum(entry.bytes for entry in manifest.entries) / args.images
            print(f"{codec:8} {size / 1000:12.1f} {args.images / seconds:17.0f}")
            every |= ways(folder, codec)
        best = dict.fromkeys(every, float("inf"))
        total = args.images * PER_IMAGE
        for _ in range(args.rounds):
            for way, read in every.items():
                batches = rng.integers(0, total, (3, args.batch))
                began = time.perf_counter()
                for rows in batches:
                    read(rows)
                best[way] = min(best[way], (time.perf_counter() - began) / batches.size)
        base = best["raw: reader.patches"]
        print(f"\n{'random 95-px patches':28} {'patches/s':>10} {'ratio':>7}")
        for way, seconds in best.items():
            print(f"{way:28} {1 / seconds:10,.0f} {base / seconds:7.3f}")


if __name__ == "__main__":
    main()
