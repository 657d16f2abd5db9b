"""CPU time per image of AnchorNet's features, by engine, precision and number of threads.

python -m tests.benchmarks.bench_engine [--weights FILE|demo|photos] [--data DATA --split val]
    [--images 64] [--rounds 9] [--threads 1,2] [--others] [--graph]

The engines take turns on the same pixels. Errors are relative to torch in float32: the largest
difference over the largest value. A second table counts the images whose patches differ from
torch's in float32. To hide instructions of the CPU, set ONEDNN_MAX_CPU_ISA=AVX2. --others adds
ONNX Runtime, if it and onnx are installed, and torch.compile.

--graph times all of it instead, AnchorNet, decision and LSP (preset dense), by each engine and
in ONNX Runtime as `anchorpatch export` writes it, and compares the patches.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anchorpatch.demo import find_weights
from anchorpatch.demo.scene_folder import make_scenes
from anchorpatch.errors import SettingsError
from anchorpatch.images.loader import load_batches
from anchorpatch.images.source import open_source
from anchorpatch.jobs.graph import export
from anchorpatch.jobs.localizer import CPU_CHUNK, Localized, Localizer, Runner, resolve_engine
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.settings import ENGINES, PRECISIONS, PRESETS
from anchorpatch.text import counted
from tests.benchmarks.bench_stages import random_weights

CPU = torch.device("cpu")


def pixels_of(data: Path | None, split: str, images: int, tmp: Path) -> Tensor:
    if data is None:
        data = tmp / "scenes"
        make_scenes(data, 0, images, 1)
    folder = open_source(data, split).limited(images)
    rows = [range(i, min(i + 64, len(folder))) for i in range(0, len(folder), 64)]
    return torch.cat([batch.pixels for batch in load_batches(folder, rows, workers=0)])


def usable() -> list[tuple[str, str]]:
    found = []
    for precision in PRECISIONS:
        for engine in ENGINES:
            try:
                resolve_engine(engine, CPU, precision)
            except SettingsError as error:
                print(f"left out: {engine} {precision}: {error}")
            else:
                found.append((engine, precision))
    return found


class Flat(nn.Module):
    def __init__(self, net: AnchorNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.net.features(inputs) for tensor in part)


def others(weights: Weights, threads: int, tmp: Path) -> dict[str, Callable[[Tensor], Any]]:
    runner = Runner(weights, CPU, engine="torch")
    flat, normalize = Flat(runner.net), runner._normalize
    compiled = torch.compile(flat)
    found: dict[str, Callable[[Tensor], Any]] = {
        "torch.compile float32": lambda pixels: compiled(normalize(pixels))
    }
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        print(f"left out: ONNX Runtime: {error}")
        return found
    path = tmp / "anchornet.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(flat, (torch.zeros(CPU_CHUNK, 3, 224, 224),), path, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found["ONNX Runtime float32"] = lambda pixels: list(
        map(torch.from_numpy, session.run(None, {name: normalize(pixels).contiguous().numpy()}))
    )
    return found


def forward(weights: Weights, pixels: Tensor, rounds: int, more: bool, tmp: Path) -> None:
    """Print start-up, CPU time, wall time and error of each engine."""
    threads, ways, starts = torch.get_num_threads(), {}, {}
    for engine, precision in usable():
        began = time.perf_counter()
        runner = Runner(weights, CPU, engine=engine, precision=precision)
        ways[f"{engine} {precision}"] = runner.features
        runner.features(pixels[:CPU_CHUNK])
        starts[f"{engine} {precision}"] = time.perf_counter() - began
    if more:
        for name, way in others(weights, threads, tmp).items():
            began = time.perf_counter()
            way(pixels[:CPU_CHUNK])
            ways[name], starts[name] = way, time.perf_counter() - began
    chunks = [chunk for chunk in pixels.split(CPU_CHUNK) if len(chunk) == CPU_CHUNK]
    first = [flatten(way(chunks[0])) for way in ways.values()]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for i in range(rounds):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way(chunks[i % len(chunks)])
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    for name, tensors in zip(ways, first, strict=True):
        cpu, wall = (
            statistics.median(t) / CPU_CHUNK * 1e3 for t in zip(*seconds[name], strict=True)
        )
        pairs = zip(tensors, first[0], strict=True)
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        print(
            f"{name:>22}, {counted(threads, 'thread')}: {cpu:5.2f} ms CPU, {wall:5.2f} ms wall "
            f"an image, error {error:.1e}, start {starts[name]:.1f} s"
        )


def flatten(features: Any) -> list[Tensor]:
    parts = [[part] if isinstance(part, Tensor) else part for part in features]
    return [tensor.float() for part in parts for tensor in part]


def patches(weights: Weights, pixels: Tensor) -> None:
    """Print how many images get other patches than by torch in float32."""
    found: dict[tuple[str, str], Localized] = {}
    for engine, precision in usable():
        settings = PRESETS["dense"]
        options = {"engine": engine, "precision": precision}
        with Localizer(weights, settings, CPU, **options) as localizer:
            found[engine, precision] = localizer.submit(pixels).result()
    expected = found["torch", "float32"]
    for (engine, precision), got in found.items():
        same = (got.corners == expected.corners).all((1, 2)) & (got.counts == expected.counts)
        same &= (got.scale == expected.scale) & (got.predicted == expected.predicted)
        decided = np.mean(got.predicted == expected.predicted)
        print(
            f"{engine} {precision}: {(~same).mean():.2%} of {len(same)} images have other "
            f"patches, {1 - decided:.2%} another class"
        )


def graph(weights: Weights, pixels: Tensor, rounds: int, tmp: Path) -> None:
    """Print the speed of the whole localizer, ours and exported, and whose patches differ."""
    import onnxruntime

    threads, settings = torch.get_num_threads(), PRESETS["dense"]
    path = tmp / "anchornet.onnx"
    if not path.exists():
        export(weights.path, path, settings)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ours = {
        engine: Localizer(weights, settings, CPU, engine) for engine, p in usable() if p[0] == "f"
    }
    ways: dict[str, Callable[[Tensor], Localized]] = {
        **{name: lambda chunk, one=one: one.submit(chunk).result() for name, one in ours.items()},
        "ONNX Runtime": lambda chunk: Localized(*session.run(None, {"pixels": chunk.numpy()})),
    }
    batches = pixels.split(4 * CPU_CHUNK)
    parts = {name: [way(batch) for batch in batches] for name, way in ways.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            way(batches[0])
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    found = {
        name: Localized(*map(np.concatenate, zip(*p, strict=True))) for name, p in parts.items()
    }
    for name, got in found.items():
        cpu, wall = (
            statistics.median(t) / len(batches[0]) for t in zip(*seconds[name], strict=True)
        )
        same = [a == b for a, b in zip(got, found["torch"], strict=True) if a.dtype != np.float32]
        other = sum(not all(field[i].all() for field in same) for i in range(len(pixels)))
        error = np.abs(got.branch_prob - found["torch"].branch_prob).max()
        print(
            f"{name:>12}, {counted(threads, 'thread')}: {1 / wall:6.1f} images/s, "
            f"{cpu * 1e3:5.2f} ms CPU an image; {other} of {len(pixels)} images otherwise than by "
            f"torch, probabilities differ by {error:.0e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", help="default: random ones for 1,000 classes")
    parser.add_argument("--data", type=Path, help="default: the demo's scenes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--graph", action="store_true")
    args = parser.parse_args()
    hidden = os.environ.get("ONEDNN_MAX_CPU_ISA", "nothing hidden")
    print(f"{torch.backends.cpu.get_cpu_capability()} ({hidden}), torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        tmp = Path(name)
        if args.weights is None:
            weights = random_weights(tmp / "w", 1000)
        else:
            weights = load_weights(find_weights(args.weights, Path("runs")))
        pixels = pixels_of(args.data, args.split, args.images, tmp)
        for threads in map(int, args.threads.split(",")):
            torch.set_num_threads(threads)
            if args.graph:
                graph(weights, pixels, args.rounds, tmp)
            else:
                forward(weights, pixels, args.rounds, args.others, tmp)
        if not args.graph:
            patches(weights, pixels)


if __name__ == "__main__":
    main()
