"""Bytes an image and patches/s of the reader for each codec and preset, on real images.

python -m tests.benchmarks.bench_codecs DATA [--split val] [--weights FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from anchorpatch.demo import bundled_weights
from anchorpatch.jobs.extract import run
from anchorpatch.jobs.extract_plan import ExtractConfig
from anchorpatch.settings import CODECS, PRESETS, SCALES
from anchorpatch.shards.reader import ShardReader

BATCH = 64


def patches_per_second(reader: ShardReader, seconds: float = 1.0) -> float:
    """Random batches of one scale, the scales by turns, from a warm cache."""
    rng = np.random.default_rng(0)
    scales = [s for s in SCALES if reader.patch_count(s)]
    read, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for scale in scales:
            read += len(reader.patches(scale, rng.integers(0, reader.patch_count(scale), BATCH)))
    return read / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--weights", type=Path, default=None)
    args = parser.parse_args()
    weights = args.weights or bundled_weights()
    print(f"{'preset':>9} {'codec':>6} {'patches/image':>14} {'bytes/image':>12} {'patches/s':>10}")
    with tempfile.TemporaryDirectory() as out:
        for preset in PRESETS:
            for codec in CODECS:
                config = ExtractConfig(
                    args.data, args.split, weights, Path(out), preset=preset, codec=codec,
                    device="cpu", overwrite=True,
                )  # fmt: skip
                facts = run(config).facts
                reader = ShardReader(facts.folder)
                patches_per_second(reader, 0.2)  # warms the cache
                print(
                    f"{preset:>9} {codec:>6} {reader.counts.mean():14.2f} "
                    f"{facts.bytes / facts.images:12,.0f} {patches_per_second(reader):10,.0f}"
                )


if __name__ == "__main__":
    main()
