"""How fast images are decided on, from pixels in memory to decisions in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from anchorpatch.jobs.localizer import Localizer
from anchorpatch.jobs.looks import confidence, look_until_sure
from anchorpatch.jobs.patch_scores import Distributions, sum_localized
from anchorpatch.jobs.results import Latency, Speed
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.settings import SCALES, Computing
from anchorpatch.shards.header import ShardSettings

#: Images on which speed is measured: some seconds for a ResNet-50.
SPEED_IMAGES: Final = {"cpu": 32, "cuda": 2048}

#: Of these, so many come one by one.
_SINGLE_IMAGES: Final = {"cpu": 32, "cuda": 200}

#: Turns of each way that are timed, after one to warm up.
_ROUNDS: Final = 3

#: Decides on a batch of pixels, uint8 (n, S, S, 3).
Way = Callable[[Tensor], Tensor]


class Stopwatch(ExitStack):
    """Times ways to decide on the same images, in batches and one by one.

    Args:
        runs: the networks on patches, by scale.
        weights: of AnchorNet.
        shards: settings of the shards, as which patches are localized.
        device: that computes.
        computing: by what AnchorNet is computed.
        pixels: of the images, uint8 (n, S, S, 3).
        batch_size: images or patches in a batch.
    """

    def __init__(
        self,
        runs: Mapping[int, Distributions],
        weights: Weights,
        shards: ShardSettings,
        device: torch.device,
        computing: Computing,
        pixels: Tensor,
        batch_size: int,
    ) -> None:
        super().__init__()
        self._runs, self._device, self._size = runs, device, batch_size
        self._pixels = pixels.pin_memory() if device.type == "cuda" else pixels
        how = device, computing.engine, computing.precision
        options: dict[str, Any] = {"side": shards.img_size, "batch_size": batch_size}
        self._localizers = {
            single: self.enter_context(
                Localizer(weights, shards.lsp, *how, **options, latency=single)
            )
            for single in (False, True)
        }
        self._patches, self.mean_patches = 0, 0.0

    def whole(self, run: Distributions, change: Callable[[Tensor], Tensor] | None = None) -> Way:
        """Return the way by whole images, which may be changed first."""
        return lambda pixels: run(pixels if change is None else change(pixels))

    def by_patches(self, pixels: Tensor) -> Tensor:
        """Decide by AnchorNet, LSP and all patches."""
        found = self._localizers[len(pixels) == 1].submit(pixels).result()
        self._patches += int(found.counts.sum())
        on_device = pixels.to(self._device, non_blocking=True)
        return sum_localized(self._runs, found, on_device, self._size)

    def dynamic(self, threshold: float, measure: str, glance: Way | None = None) -> Way:
        """Return the way by a glance, if any, AnchorNet, LSP and as many patches as it takes."""

        def decide(pixels: Tensor) -> Tensor:
            begun = going = None
            decided = torch.zeros(0)
            if glance is not None:
                decided = glance(pixels)
                sure = confidence(decided, measure) >= threshold
                if threshold >= 1:
                    sure = torch.zeros_like(sure)
                going = (~sure).nonzero()[:, 0]
                if not len(going):
                    return decided
                begun, pixels = decided[going], pixels[going.to(pixels.device)]
            found = self._localizers[len(pixels) == 1].submit(pixels).result()
            on_device = pixels.to(self._device, non_blocking=True)
            how = self._size, threshold, measure, begun
            means, _ = look_until_sure(self._runs, found, on_device, *how)
            if going is None:
                return means
            decided[going] = means
            return decided

        return decide

    @torch.inference_mode()
    def rates(self, ways: Mapping[str, Way]) -> dict[str, float]:
        """Return the images per second of each way at the batch size, taking turns."""
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(1 + _ROUNDS):
            self._patches = 0
            for name, way in ways.items():
                began = time.perf_counter()
                batches = torch.split(self._pixels, self._size)
                torch.cat([way(batch).argmax(1) for batch in batches]).cpu()  # waits for the device
                seconds[name].append(time.perf_counter() - began)
            self.mean_patches = self._patches / len(self._pixels)
        return {name: len(self._pixels) / median(times[1:]) for name, times in seconds.items()}

    @torch.inference_mode()
    def latencies(self, ways: Mapping[str, Way]) -> dict[str, Latency]:
        """Return how long each way takes for a single image, taking turns."""
        images = self._pixels[: _SINGLE_IMAGES[self._device.type]]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        self._patches = 0
        for pixels in (*images[:2], *images):
            for name, way in ways.items():
                began = time.perf_counter()
                way(pixels[None]).argmax(1).cpu()
                seconds[name].append(time.perf_counter() - began)
        return {name: _latency(times[2:]) for name, times in seconds.items()}

    def speed(self) -> Speed:
        """Return the speed of whole images and of all of their patches."""
        ways = {"whole": self.whole(self._runs[SCALES[0]]), "patches": self.by_patches}
        rates, mean = self.rates(ways), self.mean_patches
        ratio, latency = rates["patches"] / rates["whole"], self.latencies(ways)
        both = rates["whole"], rates["patches"]
        return Speed(len(self._pixels), _ROUNDS, *both, ratio, mean, latency)


def _latency(seconds: list[float]) -> Latency:
    middle, high = (1000 * float(np.percentile(seconds, q)) for q in (50, 95))
    return Latency(len(seconds), middle, high, len(seconds) / sum(seconds))
