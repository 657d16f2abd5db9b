"""Where the time of `extract` goes on a GPU (or CPU): decode, model stage, writing, end to end.

python -m tests.benchmarks.bench_stages DATA [--split val] [--limit N] [--device cuda]
    [--batch-sizes 256,512,1024] [--classes 1000] [--no-compile]

The model stage is AnchorNet, decision and LSP on uint8 batches in host memory, copies included,
with two batches in flight. Weights are random: speed does not depend on them, but for the number
of patches. On a GPU the stage runs in bfloat16, channels last, with and without torch.compile.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

from anchorpatch.images.loader import load_batches
from anchorpatch.images.source import open_source
from anchorpatch.jobs.extract import run
from anchorpatch.jobs.extract_plan import ExtractConfig
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.runtime.checkpoint import Weights, WeightsMeta, load_weights, save_weights
from anchorpatch.runtime.device import cpu_count, resolve_device
from anchorpatch.settings import PRESETS
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.writer import PatchBatch, ShardWriter

SECONDS = 5.0


def random_weights(path: Path, classes: int) -> Weights:
    torch.manual_seed(0)
    names = tuple(f"class{i:04d}" for i in range(classes))
    save_weights(path, AnchorNet(classes).state_dict(), WeightsMeta("anchornet", names))
    return load_weights(path)


def model_stage(localizer: Localizer, pixels: torch.Tensor) -> float:
    """Return images/s."""
    pending = deque([localizer.submit(pixels)])
    pending.popleft().result()  # compiles, and picks kernels
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        pending.append(localizer.submit(pixels))
        if len(pending) > 2:
            pending.popleft().result()
            done += len(pixels)
    for rest in pending:
        rest.result()
        done += len(pixels)
    return done / (time.perf_counter() - began)


def writing(localizer: Localizer, pixels: torch.Tensor, codec: str, folder: Path) -> float:
    """Return images/s of cutting and writing alone."""
    settings = PRESETS["evaluate"]
    found = localizer.submit(pixels).result()
    n = len(pixels)
    batch = PatchBatch(
        path=np.array([f"a/{i:06d}.jpg".encode() for i in range(n)]),
        label=np.zeros(n, np.int32),
        size=np.full((n, 2), 224, np.int32),
        pixels=pixels.numpy(),
        **found._asdict(),
    )
    header = ShardHeader(
        "val",
        ("a",),
        ("a",),
        ShardSettings(settings.max_patches, settings.iou_threshold, settings.coverage, codec=codec),
        "0" * 64,
    )
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        with ShardWriter(folder / "val-00000.h5", header) as writer:
            for _ in range(max(1, 1024 // n)):
                writer.append(batch)
                done += n
    return done / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-sizes", default="256,512,1024")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=cpu_count())
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    device = resolve_device(args.device)
    gpu = device.type == "cuda"
    precision = "bfloat16" if gpu else "float32"
    sizes = [int(n) for n in args.batch_sizes.split(",")]
    print(f"{torch.cuda.get_device_name(device) if gpu else 'CPU'}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        weights = random_weights(tmp / "w", args.classes)
        folder = open_source(args.data, args.split)
        folder = folder.limited(args.limit)
        speeds: dict[str, float] = {}

        batches = [range(i, min(i + 256, len(folder))) for i in range(0, len(folder), 256)]
        began = time.perf_counter()
        read = sum(
            len(batch.index)
            for batch in load_batches(folder, batches, workers=args.workers, pin_memory=gpu)
        )
        speeds["decode"] = read / (time.perf_counter() - began)
        print(f"decode, {args.workers} workers: {speeds['decode']:,.0f} images/s")

        for compile in (False,) if args.no_compile else (False, True):
            for n in sizes:
                pixels = torch.randint(0, 256, (n, 224, 224, 3), dtype=torch.uint8)
                pixels = pixels.pin_memory() if gpu else pixels
                with Localizer(
                    weights,
                    PRESETS["evaluate"],
                    device,
                    batch_size=n,
                    precision=precision,
                    compile=compile,
                ) as localizer:
                    speed = model_stage(localizer, pixels)
                    if n == sizes[0] and not compile:
                        for codec in ("raw", "image"):
                            speeds[f"writing {codec}"] = writing(localizer, pixels, codec, tmp)
                speeds["model"] = max(speed, speeds.get("model", 0))
                print(f"model stage, batch {n}, compile {compile}: {speed:,.0f} images/s")
        for codec in ("raw", "image"):
            print(f"cut and write, codec {codec}: {speeds[f'writing {codec}']:,.0f} images/s")
        for codec in ("raw", "image"):
            config = ExtractConfig(
                args.data, args.split, tmp / "w", tmp / codec, codec=codec, limit=args.limit,
                batch_size=sizes[0], workers=args.workers, device=args.device, precision=precision,
            )  # fmt: skip
            summary = run(config)
            stages = {k: speeds[k] for k in ("decode", "model", f"writing {codec}")}
            slowest = min(stages, key=stages.__getitem__)
            print(
                f"end to end, codec {codec}: {summary.images_per_second:,.0f} images/s; "
                f"the slowest stage alone is {slowest} with {stages[slowest]:,.0f}"
            )


if __name__ == "__main__":
    main()
