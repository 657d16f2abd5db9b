"""`anchorpatch extract` on CPU against its parts and against a straight script, in one run.

python -m tests.benchmarks.bench_extract DATA [--split val] [--limit 200] [--memory DATA2 SPLIT]

DATA/SPLIT/CLASS/*.JPEG are photographs. CPU seconds count this process and its workers.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import v2

from anchorpatch.images.loader import load_batches
from anchorpatch.images.source import ImageSource, open_source, spread_rows
from anchorpatch.jobs.extract import run
from anchorpatch.jobs.extract_plan import ExtractConfig
from anchorpatch.jobs.localizer import Localizer, load_anchornet
from anchorpatch.lsp import decide
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.runtime.checkpoint import Weights, WeightsMeta, load_weights, save_weights
from anchorpatch.settings import PRESETS, SCALES
from tests.lsp_oracle import algorithm_1

BATCH = 64


def cpu_seconds() -> float:
    usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def batches_of(folder: ImageSource) -> list[range]:
    return [range(i, min(i + BATCH, len(folder))) for i in range(0, len(folder), BATCH)]


def straight_script(data: Path, split: str, limit: int, weights: Weights, out: Path) -> None:
    """What one writes first: torchvision's loader, the whole F, LSP per image, append to HDF5."""
    s = PRESETS["dense"]
    net = load_anchornet(weights)
    resize = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    folder = datasets.ImageFolder(data / split, resize)
    images = Subset(folder, spread_rows(len(folder), limit).tolist())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (weights.meta.mean, weights.meta.std))
    row = 0
    with h5py.File(out, "w") as file, torch.no_grad():
        for pixels, labels in DataLoader(images, BATCH, num_workers=2):
            maps = net.full((pixels / 255 - mean) / std)
            logits = torch.stack([f.mean((2, 3)) for f in maps], 1)
            decision = decide(logits.softmax(-1))
            for i in range(len(pixels)):
                j, gamma = int(decision.branch[i]), int(decision.predicted[i])
                found = algorithm_1(
                    maps[j][i, gamma].tolist(),
                    SCALES[j],
                    s.max_patches[j],
                    s.iou_threshold,
                    s.coverage[j],
                )
                t, image = SCALES[j], pixels[i].permute(1, 2, 0).numpy()
                group = file.create_group(str(row))
                group["patches"] = np.stack([image[y : y + t, x : x + t] for (y, x), _ in found])
                group["corners"] = [corner for corner, _ in found]
                group["scores"] = [score for _, score in found]
                group.attrs["label"] = int(labels[i])
                row += 1


def memory(data: Path, split: str, weights: Path, folder: Path) -> None:
    peaks = []
    for limit in (200, 2000):
        command = [sys.executable, "-m", "anchorpatch", "extract", "--data", data, "--split", split]
        command += ["--weights", weights, "--limit", limit, "--out", folder / f"memory-{limit}"]
        code = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True,"
            " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, command)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(result.stdout) / 1024)
    print(
        f"peak memory: {peaks[0]:.0f} MiB for 200 images, {peaks[1]:.0f} MiB for 2,000: "
        f"{peaks[1] / peaks[0] - 1:+.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", nargs=2, metavar=("DATA2", "SPLIT"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        torch.manual_seed(0)
        net = AnchorNet(1000)
        for branch in net.branches:
            torch.nn.init.normal_(branch.classifier.weight)
        classes = tuple(f"class{i:04d}" for i in range(1000))
        save_weights(tmp / "w", net.state_dict(), WeightsMeta("anchornet", classes))
        weights = load_weights(tmp / "w")
        folder = open_source(args.data, args.split).limited(args.limit)
        n, jobs = len(folder), batches_of(folder)
        ready = [b.pixels for b in load_batches(folder, jobs, workers=0)]

        def decode() -> None:
            for _ in load_batches(folder, jobs, workers=args.workers):
                pass

        def model() -> None:
            with Localizer(weights, PRESETS["dense"], torch.device("cpu")) as localizer:
                for pending in [localizer.submit(pixels) for pixels in ready]:
                    pending.result()

        config = ExtractConfig(
            args.data, args.split, tmp / "w", tmp / "shards", preset="dense", batch_size=BATCH,
            workers=args.workers, limit=args.limit, device="cpu", overwrite=True,
        )  # fmt: skip
        model()  # the first run compiles kernels
        results = {}
        for what, work in (
            ("decode alone", decode),
            ("model + LSP alone", model),
            ("extract, end to end", lambda: run(config)),
            (
                "straight script",
                lambda: straight_script(args.data, args.split, n, weights, tmp / "straight.h5"),
            ),
        ):
            results[what] = wall, cpu = measured(work)
            print(f"{what:>20}: {n / wall:6.1f} images/s, {cpu / n * 1e3:6.1f} ms CPU an image")
        wall, cpu = results["extract, end to end"]
        parts = [results[k][1] for k in ("decode alone", "model + LSP alone")]
        print(
            f"end to end / model alone: {results['model + LSP alone'][0] / wall:.2f} of its speed"
        )
        print(f"decode and model alone need {sum(parts) / cpu:.1%} of the CPU time of end to end")
        faster = results["straight script"][0] / wall
        print(f"end to end / straight script: {faster:.1f} times as fast")
        if args.memory:
            memory(Path(args.memory[0]), args.memory[1], tmp / "w", tmp)


if __name__ == "__main__":
    main()
