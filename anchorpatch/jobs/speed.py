"""Images per second of a network on whole images, and on the patches that AnchorNet finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor

from anchorpatch.jobs.localizer import Localizer
from anchorpatch.jobs.patch_scores import Distributions
from anchorpatch.jobs.results import Speed
from anchorpatch.lsp import crop
from anchorpatch.runtime.device import to_device
from anchorpatch.settings import SCALES


@torch.inference_mode()
def measure_speed(
    networks: Mapping[int, Distributions],
    localizer: Localizer,
    pixels: Tensor,
    *,
    batch_size: int,
    rounds: int = 3,
) -> Speed:
    """Time both ways from pixels in memory to decisions in memory.

    Args:
        networks: of one architecture, by the scale of the patches that they decide on.
        localizer: AnchorNet, the decision and LSP, on the same device.
        pixels: uint8 (n, 224, 224, 3), n at least 1; in pinned memory for a GPU.
        batch_size: of whole images, and of patches.
        rounds: turns of each way, after one to warm up.
    """
    counts: list[int] = []
    ways: tuple[Callable[[], object], ...] = (
        lambda: _whole(networks[SCALES[0]], pixels, batch_size),
        lambda: counts.append(_patches(networks, localizer, pixels, batch_size)),
    )
    seconds: tuple[list[float], ...] = ([], [])
    for _ in range(1 + rounds):
        for way, times in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            times.append(time.perf_counter() - began)
    n = len(pixels)
    whole, patches = (n / median(times[1:]) for times in seconds)
    return Speed(n, rounds, whole, patches, patches / whole, counts[0] / n)


def _whole(run: Distributions, pixels: Tensor, batch_size: int) -> None:
    decided = [run(batch).argmax(1) for batch in torch.split(pixels, batch_size)]
    torch.cat(decided).cpu()  # waits for the device


def _patches(
    networks: Mapping[int, Distributions], localizer: Localizer, pixels: Tensor, batch_size: int
) -> int:
    """Decide on images by their patches, and return how many patches there were."""
    decided, patches, device = [], 0, localizer.device
    for batch in torch.split(pixels, batch_size):
        found = localizer.submit(batch).result()
        on_device = batch.to(device, non_blocking=True)
        sums: Tensor | None = None
        for scale in SCALES:
            _, *of_patches = found.of_scale(scale)
            image, corner = (to_device(of_each, device) for of_each in of_patches)
            patches += len(image)
            for some, at in zip(
                *(torch.split(t, batch_size) for t in (image, corner)), strict=True
            ):
                if not len(some):
                    continue
                p = networks[scale](crop(on_device, some, at, scale))
                if sums is None:
                    sums = p.new_zeros(len(batch), p.shape[1])
                sums.index_add_(0, some, p)
        assert sums is not None  # LSP selects a patch of every image
        decided.append(sums.argmax(1))
    torch.cat(decided).cpu()
    return patches
