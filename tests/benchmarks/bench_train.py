"""Training against a plain torchvision-style loop, in one run, and where the time goes.

python -m tests.benchmarks.bench_train DATA [--images 256] [--batch 16] [--device cpu]

DATA/train/CLASS/* are pictures. Each way runs in a process of its own, as the C library's memory
settings stay, and the two take turns. Only steps after the first count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from anchorpatch.images.crops import RandomCrop, build_cache, epoch_order, load_training_batches
from anchorpatch.images.source import open_source
from anchorpatch.metrics import six_losses
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.networks import Normalization
from anchorpatch.runtime.checkpoint import WeightsMeta
from anchorpatch.runtime.device import keep_freed_memory

META = WeightsMeta("anchornet", ())
WAYS = ("plain", "ours", "ours-cache", "ours-bf16", "ours-compile")


def plain_batches(args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(META.mean, META.std),
        ]
    )
    images = datasets.ImageFolder(args.data / "train", transform)
    loader = DataLoader(images, args.batch, shuffle=True, num_workers=args.workers, drop_last=True)
    for pixels, labels in loader:
        yield pixels.to(args.device), labels.to(args.device)


def our_batches(args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    folder = open_source(args.data, "train")
    cache = build_cache(folder, args.cache, 2) if args.way == "ours-cache" else None
    order = epoch_order(len(folder), 0, 0)
    plan = [(0, order[i : i + args.batch]) for i in range(0, len(order) - args.batch, args.batch)]
    normalize = Normalization(META, torch.device(args.device))
    cuda = args.device != "cpu"
    for rows, pixels, *_ in load_training_batches(
        folder, plan, RandomCrop(), workers=args.workers, cache=cache, pin_memory=cuda
    ):
        labels = torch.from_numpy(folder.labels[rows].astype(np.int64))
        yield (
            normalize(pixels),
            labels.to(args.device, non_blocking=True),
        )


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return images/s and the seconds an image of each part."""
    plain, cuda = args.way == "plain", args.device != "cpu"
    classes = len(datasets.ImageFolder(args.data / "train").classes)
    net = AnchorNet(classes).to(args.device)
    if not plain:
        keep_freed_memory()
        net = net.to(memory_format=torch.channels_last)
    forward: Callable[[Tensor], tuple[Tensor, Tensor]] = net
    if args.way == "ours-compile":
        forward = torch.compile(net)
    amp = args.way == "ours-bf16" or (cuda and not plain)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=1e-4)
    parts: dict[str, list[float]] = {"loading": [], "forward": [], "backward": [], "step": []}

    def lap(name: str, since: float) -> float:
        if cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        parts[name].append(now - since)
        return now

    batches = plain_batches(args) if plain else our_batches(args)
    now = time.perf_counter()
    for done, (inputs, labels) in enumerate(batches):
        now = lap("loading", now)
        with torch.autocast(args.device, torch.bfloat16, enabled=amp):
            out = forward(inputs)
            if plain:
                rows = [*out.localization.unbind(1), *out.attention.unbind(1)]
                loss = sum(functional.cross_entropy(row, labels) for row in rows)
            else:
                loss = six_losses(out, labels).sum()
        now = lap("forward", now)
        optimizer.zero_grad()
        loss.backward()
        now = lap("backward", now)
        optimizer.step()
        now = lap("step", now)
        if (done + 1) * args.batch >= args.images + args.batch:
            break
    means = {name: statistics.fmean(times[1:]) / args.batch for name, times in parts.items()}
    return {"images_per_second": 1 / sum(means.values()), **means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["plain", "ours", "ours-cache"])
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    results: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(args.rounds):
            for way in args.ways:
                command = [sys.executable, "-m", __spec__.name, *sys.argv[1:]]
                out = subprocess.check_output([*command, f"--way={way}", f"--cache={cache}"])
                results[way].append(json.loads(out))
    best = {w: max(r, key=lambda x: x["images_per_second"]) for w, r in results.items()}
    reference = best[args.ways[0]]["images_per_second"]
    print(
        f"batch {args.batch}, {args.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    print("way           images/s  ratio   ms an image: loading forward backward step")
    for way, r in best.items():
        ms = "  ".join(f"{1000 * r[p]:7.2f}" for p in ("loading", "forward", "backward", "step"))
        rate = r["images_per_second"]
        print(f"{way:12} {rate:9.1f} {rate / reference:6.2f}   {ms}")


if __name__ == "__main__":
    main()
