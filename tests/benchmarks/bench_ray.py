"""`anchorpatch extract --ray` against the plain run on the same cores, byte for byte.

python -m tests.benchmarks.bench_ray DATA [--split val] [--limit 400] [--shard-size 32]

The rate counts from the first shard to the last, without the start of Ray and of its actors,
which the seconds of the whole include.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from anchorpatch.demo import find_weights
from anchorpatch.jobs.extract import run
from anchorpatch.jobs.extract_plan import ExtractConfig
from anchorpatch.jobs.extract_ray import RaySettings, connected
from anchorpatch.runtime.device import cpu_count
from anchorpatch.runtime.progress import Reporter


class Rate(Reporter):
    """Images per second, after those that came first."""

    def __init__(self) -> None:
        self.at: list[tuple[float, int]] = []

    def advance(self, n: int, **counts: int) -> None:
        self.at.append((time.perf_counter(), n))

    @property
    def images_per_second(self) -> float:
        (first, _), *rest = self.at
        return sum(n for _, n in rest) / (self.at[-1][0] - first)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--shard-size", type=int, default=32)
    args = parser.parse_args()
    cores = cpu_count()
    ways: list[tuple[str, RaySettings | None]] = [
        ("plain", None),
        (f"1 actor, {cores} cores", RaySettings("local", cores)),
        (f"{cores} actors, 1 core each", RaySettings("local", 1)),
        ("the same, --collect", RaySettings("local", 1, collect=True)),
    ]
    expected, plain = None, 0.0
    with tempfile.TemporaryDirectory() as name:
        for what, settings in ways:
            torch.set_num_threads(cores)
            config = ExtractConfig(
                args.data.absolute(), args.split, find_weights("demo", Path()), Path(name, what),
                limit=args.limit, shard_size=args.shard_size, batch_size=args.shard_size,
                workers=cores, device="cpu",
            )  # fmt: skip
            rate, began = Rate(), time.perf_counter()
            if settings is None:
                run(config, rate)
            else:
                with connected(settings, "cpu") as cluster:
                    run(config, rate, cluster)
            seconds, speed = time.perf_counter() - began, rate.images_per_second
            plain = plain or speed
            made = Path(name, what, args.split).glob("[!.]*")
            files = {path.name: path.read_bytes() for path in made}
            expected = expected or files
            assert files == expected, what
            print(
                f"{what:>24}: {speed:6.1f} images/s, {speed / plain:.2f} of plain; "
                f"{seconds:.1f} s in all",
                flush=True,
            )


if __name__ == "__main__":
    main()
