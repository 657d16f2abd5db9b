"""Where the time of `extract` goes on a GPU (or CPU): decode, model stage, writing, end to end.

python -m tests.benchmarks.bench_stages DATA [--split val] [--limit N] [--device cuda]
    [--batch-sizes 256,512,1024] [--classes 1000] [--no-compile] [--repeat N]

--repeat takes each image N times, as rates of a few hundred images are those of the start.
The model stage is AnchorNet, decision and LSP on uint8 batches in host memory, copies included,
with two batches in flight. Weights are random: speed does not depend on them, but for the number
of patches. On a GPU the stage runs in bfloat16, channels last, with and without a CUDA graph and
torch.compile, and images are decoded by libjpeg and by nvJPEG.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import deque
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from anchorpatch.images.loader import load_batches
from anchorpatch.images.nvjpeg import NvJpeg
from anchorpatch.images.source import ImageSource, open_source
from anchorpatch.jobs.extract import run
from anchorpatch.jobs.extract_plan import ExtractConfig
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.runtime.checkpoint import Weights, WeightsMeta, load_weights, save_weights
from anchorpatch.runtime.device import cpu_count, resolve_device
from anchorpatch.settings import PRESETS, CropSettings
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.writer import PatchBatch, ShardWriter

SECONDS = 3.0


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
    settings = PRESETS["dense"]
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


def cpu_seconds() -> float:
    """Return the CPU time of this process and its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def linked(folder: ImageSource, repeat: int, split: Path) -> Path:
    """Link each image of a folder so many times into a new one; return that of its data."""
    for path in map(folder.path, range(len(folder))):
        target = split / path
        target.parent.mkdir(parents=True, exist_ok=True)
        for i in range(repeat):
            target.with_name(f"{i}-{target.name}").symlink_to((folder.root / path).resolve())
    return split.parent


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
    parser.add_argument("--repeat", type=int, default=1)
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

        decoders = ("libjpeg", "nvjpeg") if gpu else ("libjpeg",)
        rows = np.tile(np.arange(len(folder)), args.repeat)
        for decoder in decoders:
            nvjpeg = NvJpeg(device, CropSettings()) if decoder == "nvjpeg" else None
            began, cpu = time.perf_counter(), cpu_seconds()
            parts = np.split(rows, range(256, len(rows), 256))
            how = {"workers": args.workers, "pin_memory": gpu, "nvjpeg": nvjpeg}
            with closing(load_batches(folder, parts, **how)) as batches:
                read = sum(len(batch.index) for batch in batches)
            seconds = time.perf_counter() - began
            speeds[decoder] = read / seconds
            cpu = (cpu_seconds() - cpu) / read
            print(
                f"decode, {decoder}, {args.workers} workers: {speeds[decoder]:,.0f} images/s, "
                f"{1000 * cpu:.2f} ms of CPU time per image"
            )

        ways = [(False, False), (True, False), *(() if args.no_compile else [(True, True)])]
        for graph, compile in ways if gpu else [way for way in ways if way != (True, False)]:
            for n in sizes:
                pixels = torch.randint(0, 256, (n, 224, 224, 3), dtype=torch.uint8)
                pixels = pixels.pin_memory() if gpu else pixels
                with Localizer(
                    weights,
                    PRESETS["dense"],
                    device,
                    batch_size=n,
                    precision=precision,
                    compile=compile,
                    graph=graph,
                ) as localizer:
                    speed = model_stage(localizer, pixels)
                    if n == sizes[0] and not (graph or compile):
                        for codec in ("raw", "image"):
                            speeds[f"writing {codec}"] = writing(localizer, pixels, codec, tmp)
                speeds["model"] = max(speed, speeds.get("model", 0))
                how = f"batch {n}, graph {graph}, compile {compile}"
                print(f"model stage, {how}: {speed:,.0f} images/s")
        for codec in ("raw", "image"):
            print(f"cut and write, codec {codec}: {speeds[f'writing {codec}']:,.0f} images/s")
        many = linked(folder, args.repeat, tmp / "many" / args.split)
        for codec in ("raw", "image"):
            for decoder in decoders:
                config = ExtractConfig(
                    many, args.split, tmp / "w", tmp / codec / decoder, codec=codec,
                    batch_size=sizes[0], workers=args.workers, device=args.device,
                    precision=precision, decoder=decoder,
                )  # fmt: skip
                summary = run(config)
                waits = ", ".join(f"{stage} {share:.0%}" for stage, share in summary.waits.items())
                print(
                    f"end to end, codec {codec}, {decoder}: {summary.images_per_second:,.0f} "
                    f"images/s; waiting for {waits}"
                )


if __name__ == "__main__":
    main()
