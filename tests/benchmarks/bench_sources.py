"""Images/s from a folder and from archives of the same images, by turns, from a warm cache.

python -m tests.benchmarks.bench_sources DATA [--split val] [--workers 2] [--rounds 5]

Reads alone, and reads that are decoded and cropped by workers, as `extract` and the evaluation of
`train` load them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from anchorpatch.images.loader import load_batches
from anchorpatch.images.source import ImageSource, open_source
from tests.images.packing import KINDS, tree_of

BATCH = 32


def read(source: ImageSource, workers: int) -> None:
    for row in range(len(source)):
        source.read(row)


def load(source: ImageSource, workers: int) -> None:
    rows = range(len(source))
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    for _ in load_batches(source, batches, workers=workers):
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tree = tree_of(args.data / args.split)
    with tempfile.TemporaryDirectory() as folder:
        sources = {"folder": open_source(args.data, args.split)}
        for kind in ("tar", "tar-of-tars", "zip", "zip-deflated", "shards"):
            sources[kind] = open_source(KINDS[kind](Path(folder, kind), tree), "val")
        what: dict[str, Callable[[ImageSource, int], None]] = {"read": read, "load": load}
        for name, run in what.items():
            speeds: dict[str, list[float]] = {kind: [] for kind in sources}
            for round_ in range(args.rounds + 1):
                for kind, source in sources.items():
                    began = time.perf_counter()
                    run(source, args.workers)
                    if round_:  # the first fills the cache
                        speeds[kind].append(len(source) / (time.perf_counter() - began))
            for kind, found in speeds.items():
                ratios = [a / b for a, b in zip(found, speeds["folder"], strict=True)]
                print(
                    f"{name} {kind:>14} {statistics.median(found):10,.0f} images/s "
                    f"{statistics.median(ratios):6.3f} x the folder"
                )


if __name__ == "__main__":
    main()
