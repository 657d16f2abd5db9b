#!/usr/bin/env python3
"""Does AnchorNet choose a wider field for a larger object?

    python examples/object_sizes.py shards/val --boxes scenes/boxes.csv     # `anchorpatch scenes`
    python examples/object_sizes.py a/val b/val --network resnet50          # photographs

The size of an object is the area of its true box, or, where no boxes are known, the area that
Grad-CAM of a network marks: the pixels whose value is at least a share, --level, of the largest.
Shards of several AnchorNets, of the same images, give one table of their means; they must store
the whole images (`extract --store-images`). Prints, in Markdown, the mean area by chosen scale,
with its standard error over the AnchorNets, and Spearman's rank correlation of scale and area with
a 95 % interval, by a bootstrap over the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from anchorpatch.demo.scene_folder import read_boxes
from anchorpatch.figures.localizers import class_heatmaps, last_feature_map
from anchorpatch.jobs.crops import CropSource
from anchorpatch.networks import Normalization, load_network
from anchorpatch.runtime.device import resolve_device
from anchorpatch.settings import SCALES
from anchorpatch.shards.reader import ShardReader


def of_boxes(reader: ShardReader, boxes: Path) -> np.ndarray:
    """Return the share of each image's crop that the true box takes (n,)."""
    known = read_boxes(boxes)
    found = [known[f"{reader.header.split}/{path.decode()}"][1] for path in reader.path.tolist()]
    x0, y0, x1, y1 = np.array([box.in_crop(reader.settings.crop) for box in found]).T
    return (x1 - x0) * (y1 - y0) / reader.settings.img_size**2


def of_gradcam(reader: ShardReader, args: argparse.Namespace) -> np.ndarray:
    """Return the share of each image's crop that Grad-CAM marks (n,)."""
    device = resolve_device(args.device)
    network = load_network(args.network, reader.classes, args.weights)
    module = network.module.to(device)
    features = last_feature_map(module, reader.settings.img_size)
    normalize, areas = Normalization(network.meta, device), []
    for batch in CropSource.of_shards(reader).batches(np.arange(len(reader)), 32):
        heatmaps = class_heatmaps(module, features, normalize(batch.pixels)).flatten(1)
        marked = heatmaps >= args.level * heatmaps.amax(1, keepdim=True).clamp(min=1e-12)
        areas.append(marked.float().mean(1).cpu())
    return torch.cat(areas).double().numpy()


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(scales: list[np.ndarray], areas: np.ndarray, rows: np.ndarray) -> float:
    """Return Spearman's correlation on some images, the mean over the AnchorNets."""
    found, y = [], ranks(areas[rows])
    for scale in scales:
        x = ranks(scale[rows])
        spread = x.std() * y.std()
        found.append(((x - x.mean()) * (y - y.mean())).mean() / spread if spread else 0.0)
    return float(np.mean(found))


def mean_and_error(values: list[float]) -> str:
    """Return the mean in percent, and its standard error where there are several values."""
    mean = f"{100 * np.mean(values):.1f}"
    if len(values) > 1:
        mean += f" ± {100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f}"
    return f"{mean} %"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, nargs="+", help="folders of shards of the same images")
    parser.add_argument("--boxes", type=Path, help="boxes.csv of `anchorpatch scenes`")
    parser.add_argument("--network", help="network whose Grad-CAM measures the object")
    parser.add_argument("--weights", default="default", help="its weights; default: pretrained")
    parser.add_argument("--level", type=float, default=0.5, help="share of Grad-CAM's maximum")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args()
    if (args.boxes is None) == (args.network is None):
        parser.error("give either --boxes or --network")
    readers = [ShardReader(folder) for folder in args.shards]
    for reader in readers:
        if reader.path.tolist() != readers[0].path.tolist():
            parser.error(f"{reader.folder}: other images than {readers[0].folder}")
    areas = of_boxes(readers[0], args.boxes) if args.boxes else of_gradcam(readers[0], args)
    scales = [np.asarray(reader.scale, np.int64) for reader in readers]

    print("| chosen scale | images | mean area |\n|---:|---:|---:|")
    for theta in SCALES:
        chosen = [scale == theta for scale in scales]
        means = [float(areas[of].mean()) for of in chosen if of.any()]
        count = mean_and_error([float(of.mean()) for of in chosen])
        print(f"| {theta} px | {count} | {mean_and_error(means) if means else '-'} |")
    every, rng = np.arange(len(areas)), np.random.default_rng(0)
    drawn = [correlation(scales, areas, rng.choice(every, len(every))) for _ in range(1000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    rho = correlation(scales, areas, every)
    print(f"\nrank correlation {rho:.3f} ({low:.3f} to {high:.3f}), {len(every):,} images")


if __name__ == "__main__":
    main()
