"""Reading patches for training: from shards, and by cropping the files anew.

python -m tests.benchmarks.bench_finetune DATA [--split val] [--images 512] [--workers 2]

Extracts DATA/SPLIT with the demo weights and preset finetune, once for each codec, into a
temporary folder. Then all patches of random images are read in batches, without a network: from
the shards by `load_rows`, and by an `ImageFolder` whose items are opened, resized and cropped
with Pillow at the same corners in as many worker processes as the other has threads. The ways
take turns within each round, from a warm cache, and the best round counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from anchorpatch.settings import CODECS, SCALES
from anchorpatch.shards import ShardReader
from anchorpatch.shards.dataset import load_rows


class Request(NamedTuple):
    scale: int
    rows: np.ndarray


class CroppedFolder(ImageFolder):
    """Patches of an image, cut from its file as the shards' were: uint8 (k, T, T, 3)."""

    def __init__(self, root: Path, reader: ShardReader) -> None:
        super().__init__(str(root))
        self.reader = reader
        self.crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
        names = {str(Path(path).relative_to(root)): i for i, (path, _) in enumerate(self.samples)}
        self.place = [names[path.decode()] for path in reader.path.tolist()]

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        path, label = self.samples[self.place[row]]
        with Image.open(path) as image:
            crop = np.asarray(self.crop(image.convert("RGB")))
        reader, scale = self.reader, int(self.reader.scale[row])
        first = int(reader.first[row])
        corners = reader.corners(scale, np.arange(first, first + reader.counts[row]))
        cut = [crop[y : y + scale, x : x + scale] for y, x in corners.tolist()]
        return torch.from_numpy(np.stack(cut)), label


def collate(items: list[tuple[Tensor, int]]) -> list[tuple[Tensor, Tensor]]:
    """Put the patches of each scale together, with a label for each."""
    found = []
    for scale in SCALES:
        some = [(pixels, label) for pixels, label in items if pixels.shape[1] == scale]
        if some:
            labels = torch.tensor([label for pixels, label in some for _ in pixels])
            found.append((torch.cat([pixels for pixels, _ in some]), labels))
    return found


def from_files(data: Path, reader: ShardReader, batches: list[np.ndarray], workers: int) -> int:
    """Read batches of images; return how many patches came."""
    loader: DataLoader[Any] = DataLoader(
        CroppedFolder(data, reader),
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=workers,
        collate_fn=collate,
    )
    return sum(len(pixels) for batch in loader for pixels, _ in batch)


def from_shards(reader: ShardReader, batches: list[np.ndarray], workers: int) -> int:
    """Read batches of images; return how many patches came."""

    def requests() -> Iterator[Request]:
        for batch in batches:
            for scale in SCALES:
                some = batch[reader.scale[batch] == scale]
                if len(some):
                    first, count = reader.first[some], reader.counts[some]
                    rows = [np.arange(a, a + n) for a, n in zip(first, count, strict=True)]
                    yield Request(scale, np.concatenate(rows))

    return sum(len(found.pixels) for _, found in load_rows(reader, requests(), threads=workers))


def extract(args: argparse.Namespace, codec: str, out: Path) -> ShardReader:
    command = [sys.executable, "-m", "anchorpatch", "extract", "--data", args.data, "--out", out]
    command += ["--split", args.split, "--codec", codec, "--preset", "finetune"]
    command += ["--weights", "demo", "--limit", args.images, "--workers", args.workers]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return ShardReader(out / args.split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        readers = {codec: extract(args, codec, Path(folder, codec)) for codec in CODECS}
        raw = readers["raw"]
        n, patches = len(raw), int(raw.counts.sum())
        order = np.random.default_rng(0).permutation(n)
        batches = np.array_split(order, -(-n // args.batch))
        ways: dict[str, Callable[[], int]] = {
            f"shards, {codec}": partial(from_shards, reader, batches, args.workers)
            for codec, reader in readers.items()
        }
        root = args.data / args.split
        ways["files, Pillow"] = partial(from_files, root, raw, batches, args.workers)
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(args.rounds):
            for way, read in ways.items():
                began = time.perf_counter()
                assert read() == patches
                best[way] = min(best[way], time.perf_counter() - began)
    print(f"{n} images, {patches} patches, {args.workers} workers")
    print(f"{'way':16} {'images/s':>10} {'patches/s':>10} {'ratio':>7}")
    for way, seconds in best.items():
        ratio = best["files, Pillow"] / seconds
        print(f"{way:16} {n / seconds:10,.0f} {patches / seconds:10,.0f} {ratio:7.1f}")


if __name__ == "__main__":
    main()
