"""Evaluate AnchorNet on a labelled split: accuracy by branch and by Eq. 7, patches, cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anchorpatch.errors import NonFiniteError
from anchorpatch.images.loader import load_batches
from anchorpatch.images.source import open_source, without_images
from anchorpatch.jobs.localizer import Runner
from anchorpatch.jobs.results import AnchorNetFigures
from anchorpatch.lsp import localize
from anchorpatch.metrics import AnchorNetAccuracy, per_branch
from anchorpatch.models.anchornet import Logits
from anchorpatch.models.complexity import macs
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.runtime.device import computing_on, exact_float32, joined, to_device
from anchorpatch.runtime.distributed import World, sum_ranks
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import PRESETS, SCALES, Computing
from anchorpatch.text import counted


@dataclass(frozen=True)
class EvaluateAnchorNetConfig(Computing):
    """What is evaluated, and on what.

    Attributes:
        data: folder that holds the split.
        weights: of AnchorNet.
        split: name of the split's folder.
        labels: CSV with the labels of a flat split images.
        files: list of images to take instead; see `anchorpatch.images.labels.read_list`.
        only_labelled: leave out images without a label.
        batch_size: images in a batch; None for 16 on CPU and 256 on a GPU.
        workers: loading processes.
        limit: take only so many images, evenly spread over the split.
        max_bad: share of unreadable images that fails the run.
    """

    data: Path
    weights: Path
    split: str = "val"
    labels: Path | None = None
    files: Path | None = None
    only_labelled: bool = False
    batch_size: int | None = None
    workers: int = 0
    limit: int | None = None
    max_bad: float = 0.01


def run(config: EvaluateAnchorNetConfig, progress: Reporter | None = None) -> AnchorNetFigures:
    """Evaluate AnchorNet.

    Raises:
        DataError: the folder's classes are not those of the weights.
        WeightsError: the weights cannot be used.
        TooManyBadImages: too many images cannot be decoded.
    """
    with joined(config.device, progress) as (device, world, report):
        weights = load_weights(config.weights)
        images = open_source(
            config.data,
            config.split,
            config.labels,
            classes=weights.meta.classes,
            classes_of=str(config.weights),
            files=config.files,
            only_labelled=config.only_labelled,
            report=report,
        ).limited(config.limit)
        for remark in (images.passed_over(), without_images(images.labels, images.classes)):
            if remark:
                report.message(remark)
        meter = _Meter(weights, device, config.engine, config.precision)
        rows = list(world.share(len(images)))
        size = config.batch_size or (16 if device.type == "cpu" else 256)
        loaded = load_batches(
            images,
            [rows[i : i + size] for i in range(0, len(rows), size)],
            workers=config.workers,
            crop=weights.meta.cropping,
            pin_memory=device.type == "cuda",
        )
        bad = damaged = 0
        report.message(computing_on(device, meter.engine))
        advance = world.counter(report.advance, len(rows), len(images))
        with report.counting("evaluating", len(images)), closing(loaded):
            for batch in loaded:
                bad += len(batch.bad)
                damaged += len(batch.damaged)
                if len(batch.index):
                    labels = torch.from_numpy(images.labels[batch.index].astype(np.int64))
                    meter.update(batch.pixels, labels)
                advance(len(batch.index) + len(batch.bad))
        skipped, damaged = sum_ranks(torch.tensor([bad, damaged], device=device)).tolist()
        if skipped > config.max_bad * len(images):
            raise images.too_many_bad(skipped, len(images), config.max_bad)
        return AnchorNetFigures(
            skipped=skipped,
            damaged=damaged,
            ignored=dict(images.ignored),
            **meter.result(world),
        )


class _Meter(Runner):
    """Runs the network on batches and counts."""

    def __init__(self, weights: Weights, device: torch.device, *computing: str) -> None:
        super().__init__(weights, device, *computing)
        self._accuracy, self._seconds = AnchorNetAccuracy(device), 0.0
        # Images by chosen scale, and their patches by preset and scale.
        self._images = torch.zeros(len(SCALES), dtype=torch.float64, device=device)
        self._patches = torch.zeros(len(PRESETS), len(SCALES), dtype=torch.float64, device=device)
        self._bad = torch.zeros((), dtype=torch.int64, device=device)

    @torch.inference_mode()
    @exact_float32()
    def update(self, pixels: Tensor, labels: Tensor) -> None:
        """Count a batch: uint8 pixels (n, side, side, 3) and labels (n,)."""
        labels = to_device(labels, self.device)
        pixels = pixels.to(self.device, non_blocking=True)
        # Localizing alone is timed: the outputs of the attention branches are no part of it.
        began = self._now()
        found = self.run(pixels)
        self._seconds += self._now() - began
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            attention = self.net.attention_logits(found.features)
        self._accuracy.update(Logits(found.logits, attention), labels)
        self.count_patches(found.heatmaps, found.decision.branch)

    def count_patches(self, heatmaps: Sequence[Tensor], branch: Tensor) -> None:
        """Select patches by every preset and count them."""
        chosen = per_branch(branch).double()
        self._images += chosen.sum(0)
        # Looked at in the end, as a look waits for the GPU; 0 * x is 0 for every finite x alone.
        zero = torch.stack([(heatmap.flatten(1) * 0).sum(1) for heatmap in heatmaps], 1)
        self._bad += (zero.gather(1, branch[:, None]) != 0).sum()
        for row, settings in enumerate(PRESETS.values()):
            patches = localize(heatmaps, branch, settings, check=False)
            self._patches[row] += patches.counts.double() @ chosen

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def result(self, world: World) -> dict[str, Any]:
        """Return the figures of all processes' images, as `AnchorNetFigures` names them.

        Raises:
            NonFiniteError: heatmaps held NaN or infinity.
        """
        figures = self._accuracy.result()
        del figures["losses"]
        if bad := int(sum_ranks(self._bad)):
            raise NonFiniteError(
                f"AnchorNet produced NaN or infinity for {counted(bad, 'image')}; the weights may "
                "be damaged or badly trained: use others, or --precision float32"
            )
        images = sum_ranks(self._images).tolist()
        means: dict[str, dict[str, float | None]] = {}
        for name, row in zip(PRESETS, sum_ranks(self._patches).tolist(), strict=True):
            by_scale = zip(SCALES, row, images, strict=True)
            means[name] = {str(scale): s / n if n else None for scale, s, n in by_scale}
            means[name]["all"] = sum(row) / sum(images) if sum(images) else None
        seconds = float(sum_ranks(torch.tensor(self._seconds, device=self.device))) / world.size
        return {
            **figures,
            "mean_patches": means,
            "gmacs": macs(self.net, self.side, self.net.localize) / 1e9,
            "images_per_second": figures["images"] / max(seconds, 1e-9),
        }
