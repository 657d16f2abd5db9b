"""Images/s of whole images and of patches, with the network in torch and in OpenVINO.

python -m tests.benchmarks.bench_networks NETWORK SHARDS --anchornet-weights FILE|demo|photos
    [--weights default|none|FILE] [--images 64] [--batch-size 32] [--threads 1]

SHARDS is the folder of one split, with codec image. What `anchorpatch evaluate` measures as
speed, on a CPU, but the network is computed by OpenVINO too. AnchorNet is computed by OpenVINO in
both; all ways take turns, from pixels in memory to decisions in memory. Weights do not matter for
speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from torch import Tensor, nn

from anchorpatch.demo import find_weights
from anchorpatch.images.source import spread_rows
from anchorpatch.jobs.crops import CropSource, open_shards
from anchorpatch.jobs.patch_scores import Distributions
from anchorpatch.jobs.speed import Stopwatch
from anchorpatch.models.anchornet_openvino import openvino_core
from anchorpatch.networks import load_network
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.runtime.device import keep_freed_memory
from anchorpatch.settings import SCALES, Computing

CPU = torch.device("cpu")


def in_openvino(module: nn.Module, sides: tuple[int, ...]) -> nn.Module:
    """Return the network on OpenVINO, compiled for each side and any batch."""
    traced = openvino.convert_model(module, example_input=torch.zeros(2, 3, sides[0], sides[0]))
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    requests = {}
    for side in sides:
        traced.reshape(openvino.PartialShape([-1, 3, side, side]))
        compiled = openvino_core().compile_model(traced, "CPU", options)
        requests[side] = compiled.create_infer_request()

    class Compiled(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            pixels = np.ascontiguousarray(inputs.numpy())
            return torch.from_numpy(requests[inputs.shape[-1]].infer([pixels])[0])

    return Compiled()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--anchornet-weights", required=True)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    reader = open_shards(args.shards.parent, args.shards.name)
    network = load_network(
        args.network, reader.classes, args.weights, replace_head=args.weights == "none"
    )
    module = network.module.eval().to(memory_format=torch.channels_last)
    crops = CropSource.of_shards(reader)
    rows = spread_rows(len(reader), args.images)
    pixels = torch.cat([batch.pixels for batch in crops.batches(rows, args.batch_size)])
    anchornet = load_weights(find_weights(args.anchornet_weights, Path("runs")))
    modules = {"torch": module, "openvino": in_openvino(module, (*SCALES, pixels.shape[1]))}
    watches, ways = {}, {}
    for name, form in modules.items():
        run = Distributions(form, CPU, network.meta, amp=False)
        how: tuple[Any, ...] = reader.settings, CPU, Computing(device="cpu"), pixels
        watches[name] = Stopwatch(dict.fromkeys(SCALES, run), anchornet, *how, args.batch_size)
        ways[f"{name}, whole images"] = watches[name].whole(run)
        ways[f"{name}, by patches"] = watches[name].by_patches
    with torch.inference_mode():
        for way in ("whole images", "by patches"):
            sums = [ways[f"{name}, {way}"](pixels[:32]) for name in modules]
            torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-4)
    rates = watches["torch"].rates(ways)
    patches = watches["torch"].mean_patches
    print(f"{args.network}, {len(pixels)} images, {patches:.2f} patches each")
    for name in modules:
        whole, by_patches = rates[f"{name}, whole images"], rates[f"{name}, by patches"]
        print(f"{name}: {whole:.1f} whole, {by_patches:.1f} by patches ({by_patches / whole:.2f})")
    latencies = watches["torch"].latencies(ways)
    for name, found in latencies.items():
        print(f"a single image, {name}: {found}")
    for watch in watches.values():
        watch.close()


if __name__ == "__main__":
    main()
