"""Localizers of Figure 6: each says in which order an image's pixels are taken.

AnchorNet, and each of its branches alone; the peers that the paper names, BagNets ordered by
logits and Saccader; Grad-CAM; and what knows nothing of classes: edges, the centre, chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from anchorpatch.errors import NonFiniteError
from anchorpatch.jobs.figures.gradcam import GradCam
from anchorpatch.jobs.figures.pixel_order import arrival, patch_ranks, squares_from_centre
from anchorpatch.jobs.localizer import load_anchornet, normalize
from anchorpatch.lsp import Decision, decide
from anchorpatch.models.bagnet import BagNet
from anchorpatch.models.saccader import Saccader
from anchorpatch.networks import Network
from anchorpatch.runtime.checkpoint import Weights, WeightsMeta
from anchorpatch.runtime.device import exact_float32
from anchorpatch.settings import SCALES, STRIDE

__all__ = [
    "SIDE",
    "Localize",
    "See",
    "Seen",
    "anchornet_localizers",
    "centre",
    "chance",
    "edges",
    "gradcam",
    "peer",
    "sobel_energy",
]

#: Side of the images in pixels.
SIDE: Final = 224


class Seen(NamedTuple):
    """A batch, and what AnchorNet says of it.

    Attributes:
        rows: of the images in their source (n,), int64; chance depends on them.
        pixels: uint8 (n, 224, 224, 3), on the device.
        decision: class and branch (Eq. 6-8).
        heatmaps: M of each branch for the decided class, (n, H, W) each.
        own_heatmaps: M of each branch for the class that it predicts itself.
    """

    rows: NDArray[np.int64]
    pixels: Tensor
    decision: Decision
    heatmaps: tuple[Tensor, ...]
    own_heatmaps: tuple[Tensor, ...]


#: Returns when each pixel arrives (n, 224, 224), the first the smallest.
Localize = Callable[[Seen], Tensor]


class See:
    """Runs AnchorNet on batches.

    Args:
        weights: of AnchorNet.
        device: where it computes.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        self.device, self.source = device, str(weights.path)
        net = load_anchornet(weights).fuse().to(device)
        self.net = net.to(memory_format=torch.channels_last)
        self.mean = torch.tensor(weights.meta.mean, device=device)
        self.std = torch.tensor(weights.meta.std, device=device)

    @torch.inference_mode()
    @exact_float32()
    def __call__(self, rows: NDArray[np.int64], pixels: Tensor) -> Seen:
        """Look at a batch: rows (n,) and uint8 pixels (n, 224, 224, 3), on any device.

        Raises:
            NonFiniteError: AnchorNet gave NaN or infinity.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        logits, features = self.net.localize(normalize(pixels, self.mean, self.std))
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"{self.source} gave NaN or infinity: train AnchorNet again")
        decision = decide(logits.softmax(-1))
        heatmaps = self.net.heatmaps(features, decision.predicted)
        own = tuple(
            self.net.heatmaps(features, decision.branch_class[:, j])[j] for j in range(len(SCALES))
        )
        return Seen(rows, pixels, decision, heatmaps, own)


def anchornet_localizers(iou_threshold: float) -> dict[str, Localize]:
    """Return AnchorNet, and each branch alone with the class that it predicts itself.

    Args:
        iou_threshold: T of Algorithm 1.
    """

    def whole(seen: Seen) -> Tensor:
        return _by_chosen_scale(seen, seen.heatmaps, iou_threshold)

    def branch(j: int, seen: Seen) -> Tensor:
        return _arrivals(seen.own_heatmaps[j], SCALES[j], iou_threshold)

    alone = {f"branch{scale}": partial(branch, j) for j, scale in enumerate(SCALES)}
    return {"anchornet": whole, **alone}


def edges(iou_threshold: float) -> Localize:
    """Return the localizer by the mean Sobel energy of patches of the scale AnchorNet chose."""

    def localize(seen: Seen) -> Tensor:
        energy = sobel_energy(seen.pixels)[:, None]
        means = [functional.avg_pool2d(energy, scale, STRIDE)[:, 0] for scale in SCALES]
        return _by_chosen_scale(seen, means, iou_threshold)

    return localize


def sobel_energy(pixels: Tensor) -> Tensor:
    """Return the squared length of the Sobel gradient of grey values.

    Args:
        pixels: uint8 (n, H, W, 3).

    Returns:
        float32 (n, H, W); the border repeats.
    """
    grey = pixels.float().mean(-1, keepdim=True).permute(0, 3, 1, 2)
    along = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack((along, along.T))[:, None].to(pixels.device)
    padded = functional.pad(grey, (1, 1, 1, 1), mode="replicate")
    return functional.conv2d(padded, kernels).square().sum(1)


def chance(seed: int, iou_threshold: float) -> Localize:
    """Return random patches of the scale AnchorNet chose; they depend on seed and row alone."""

    def localize(seen: Seen) -> Tensor:
        heatmaps = []
        for found in seen.heatmaps:
            places = found.shape[1:]
            drawn = [
                np.random.default_rng((seed, int(row))).random(places, np.float32)
                for row in seen.rows
            ]
            heatmaps.append(torch.from_numpy(np.stack(drawn)).to(found.device))
        return _by_chosen_scale(seen, heatmaps, iou_threshold)

    return localize


def centre(seen: Seen) -> Tensor:
    """Take squares that grow from the middle."""
    return squares_from_centre(SIDE, seen.pixels.device).expand(len(seen.pixels), -1, -1)


def gradcam(module: nn.Module, meta: WeightsMeta, device: torch.device) -> Localize:
    """Return Grad-CAM of the network that decides: its pixels by their heat.

    Raises:
        SettingsError: the network has no feature map.
    """
    cam, normalized = GradCam(module), _Normalize(meta, device)
    return lambda seen: -cam(normalized(seen.pixels))


def peer(network: Network, device: torch.device) -> Localize:
    """Return a BagNet, whose patches are ordered by the logit of the predicted class, or Saccader.

    Args:
        network: of the architecture bagnet33, bagnet77 or saccader.
        device: where it computes.
    """
    normalized = _Normalize(network.meta, device)
    module = network.module.eval().to(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def localize(seen: Seen) -> Tensor:
        inputs = normalized(seen.pixels)
        if isinstance(module, Saccader):
            return _glimpsed(module, inputs)
        assert isinstance(module, BagNet)
        logits = module.logit_map(inputs).float()
        best = logits.mean((2, 3)).argmax(1)
        heatmap = logits[torch.arange(len(best), device=best.device), best]
        return _arrivals(heatmap, module.theta, None)

    return localize


def _glimpsed(saccader: Saccader, inputs: Tensor) -> Tensor:
    """Order patches as Saccader looks at them, all of them."""
    h, w = ((side - saccader.theta) // STRIDE + 1 for side in inputs.shape[2:])
    places = saccader.glimpses(inputs, h * w).places
    rank = torch.empty_like(places)
    rank.scatter_(1, places, torch.arange(h * w, device=places.device).expand_as(places))
    return arrival(rank.view(-1, h, w), saccader.theta, SIDE)


def _arrivals(heatmap: Tensor, theta: int, iou_threshold: float | None) -> Tensor:
    return arrival(patch_ranks(heatmap.float(), theta, iou_threshold), theta, SIDE)


def _by_chosen_scale(seen: Seen, heatmaps: Sequence[Tensor], iou_threshold: float) -> Tensor:
    """Take of each image the heatmap and the patches of its branch."""
    out = torch.empty(seen.pixels.shape[:3], device=seen.pixels.device)
    for j, scale in enumerate(SCALES):
        of_scale = (seen.decision.branch == j).nonzero()[:, 0]
        if len(of_scale):
            out[of_scale] = _arrivals(heatmaps[j][of_scale], scale, iou_threshold)
    return out


@dataclass(frozen=True)
class _Normalize:
    meta: WeightsMeta
    device: torch.device

    def __call__(self, pixels: Tensor) -> Tensor:
        mean = torch.tensor(self.meta.mean, device=self.device)
        std = torch.tensor(self.meta.std, device=self.device)
        return normalize(pixels, mean, std)
