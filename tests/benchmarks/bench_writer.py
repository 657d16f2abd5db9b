"""What a shard of preset finetune costs to write, here and in another checkout, taking turns.

python -m tests.benchmarks.bench_writer [--other CHECKOUT] [--rounds 7] [--images 1024]

Each turn is a process of its own. CPU time is of the whole process, the system's part included;
an image has as many patches as the preset allows, of a scale drawn at random (284 kB on average).
Closing is timed once more on the wall clock, four shards by one thread and by two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path

import numpy as np

from anchorpatch.settings import PRESETS, SCALES
from anchorpatch.shards.manifest import ShardHeader, ShardSettings  # in older checkouts too
from anchorpatch.shards.writer import PatchBatch, ShardWriter

BATCH = 64

#: As a sink has them; writers had none once.
SPOOLS: dict = {"spools": []} if "spools" in signature(ShardWriter).parameters else {}


def make_batch(n: int) -> PatchBatch:
    rng = np.random.default_rng(0)
    scale = rng.choice(SCALES, n)
    counts = np.array(PRESETS["finetune"].max_patches)[np.searchsorted(SCALES, scale)]
    corners = rng.integers(0, (224 - scale)[:, None, None] // 8 + 1, (n, counts.max(), 2)) * 8
    return PatchBatch(
        path=np.array([f"a/{i:06d}.jpg".encode() for i in range(n)]),
        label=np.zeros(n, np.int32),
        predicted=np.zeros(n, np.int32),
        scale=scale.astype(np.uint8),
        branch_class=np.zeros((n, 3), np.int32),
        branch_prob=np.ones((n, 3), np.float32),
        size=np.full((n, 2), 224, np.int32),
        pixels=rng.integers(0, 256, (n, 224, 224, 3), dtype=np.uint8),
        counts=counts.astype(np.int32),
        corners=corners,
        scores=np.ones((n, counts.max()), np.float32),
    )


def begun(folder: Path, codec: str, batch: PatchBatch, images: int, number: int = 0) -> ShardWriter:
    """Return the writer of a shard that lacks nothing but its close."""
    settings = ShardSettings(*vars(PRESETS["finetune"]).values(), codec=codec)
    header = ShardHeader("val", ("a",), ("a",), settings, "0" * 64)
    path = folder / f"val-{number:05d}.h5"
    path.unlink(missing_ok=True)
    writer = ShardWriter(path, header, **SPOOLS)
    for _ in range(images // BATCH):
        writer.append(batch)
    return writer


def turn(images: int) -> dict[str, float]:
    """Return CPU ms per image of each part and codec, and how much faster two threads close."""
    batch, found = make_batch(BATCH), {}
    with tempfile.TemporaryDirectory(dir=".") as name:
        for codec in ("raw", "image"):
            begun(Path(name), codec, batch, images).close()  # the first shard warms up
            (Path(name) / "val-00000.h5").unlink()
            start = time.process_time()
            writer = begun(Path(name), codec, batch, images)
            appended = time.process_time()
            writer.close()
            closed = time.process_time()
            for part, seconds in (("append", appended - start), ("close", closed - appended)):
                found[f"{codec} {part}"] = seconds / images * 1e3
            found[f"{codec} total"] = (closed - start) / images * 1e3
            wall = []
            for threads in (1, 2):
                writers = [begun(Path(name), codec, batch, images, i) for i in range(4)]
                began = time.perf_counter()
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(lambda writer: writer.close(), writers))
                wall.append(time.perf_counter() - began)
            found[f"{codec} closed by two threads, times as fast"] = wall[0] / wall[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        print(json.dumps(turn(args.images)))
        return
    here = Path(__file__).parents[2]
    times: dict[tuple[str, Path], list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        for checkout in filter(None, (args.other, here)):
            command = [sys.executable, __file__, "--turn", "--images", str(args.images)]
            environment = {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            for what, value in json.loads(result.stdout).items():
                times[what, checkout].append(value)
    for (what, checkout), values in sorted(times.items(), key=lambda item: item[0][0]):
        low, high = min(values), max(values)
        print(f"{what}: {statistics.median(values):.3f} ({low:.3f} to {high:.3f}), {checkout}")


if __name__ == "__main__":
    main()
