"""Localizers of Figure 6: each says in which order an image's pixels are taken.

AnchorNet, and each of its branches alone; the peers that the paper names, BagNets ordered by
logits and Saccader; Grad-CAM; and what knows nothing of classes: edges, the centre, chance.

Patches come in an order, and each brings the pixels that none before it has: from its centre
outwards, in squares, so that any area is reached to the pixel and all localizers are compared
at exactly the same ones. A pixel's *arrival* says when: the rank of the first patch that covers
it, plus its distance from that patch's centre as a share of half the side. Pixels that no patch
covers come last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from anchorpatch.errors import NonFiniteError
from anchorpatch.figures.gradcam import GradCam
from anchorpatch.jobs.localizer import Runner
from anchorpatch.lsp import Decision, select
from anchorpatch.models.bagnet import BagNet
from anchorpatch.models.saccader import Saccader
from anchorpatch.networks import Network, Normalization
from anchorpatch.runtime.checkpoint import Weights, WeightsMeta
from anchorpatch.runtime.device import exact_float32
from anchorpatch.settings import SCALES, STRIDE

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


class See(Runner):
    """Runs AnchorNet on batches.

    Args:
        weights: of AnchorNet.
        device: where it computes.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        super().__init__(weights, device)
        self.source = str(weights.path)

    @torch.inference_mode()
    @exact_float32()
    def __call__(self, rows: NDArray[np.int64], pixels: Tensor) -> Seen:
        """Look at a batch: rows (n,) and uint8 pixels (n, 224, 224, 3), on any device.

        Raises:
            NonFiniteError: AnchorNet gave NaN or infinity.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        logits, features, decision, heatmaps = self.run(self.normalize(pixels))
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"{self.source} gave NaN or infinity: train AnchorNet again")
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
    cam, normalized = GradCam(module), Normalization(meta, device)
    return lambda seen: -cam(normalized(seen.pixels))


def peer(network: Network, device: torch.device) -> Localize:
    """Return a BagNet, whose patches are ordered by the logit of the predicted class, or Saccader.

    Args:
        network: of the architecture bagnet33, bagnet77 or saccader.
        device: where it computes.
    """
    normalized = Normalization(network.meta, device)
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
    places = saccader.look(saccader.maps(inputs), h * w).places
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


# --- the order of pixels ------------------------------------------------------------------


def patch_ranks(heatmap: Tensor, theta: int, iou_threshold: float | None = None) -> Tensor:
    """Rank the patches of a scale by activation, ties in row-major order.

    Args:
        heatmap: activation of each location (N, H, W).
        theta: side of the patches in pixels.
        iou_threshold: T; first come the patches that Algorithm 1 accepts among all locations,
            then the others. None leaves the algorithm out.

    Returns:
        Rank from 0 of each location (N, H, W), int64.

    Example:
        >>> heatmap = torch.tensor([[[3.0, 2.0, 1.0]]])
        >>> patch_ranks(heatmap, 63).tolist()
        [[[0, 1, 2]]]
        >>> patch_ranks(heatmap, 63, iou_threshold=0.7).tolist()  # neighbours have 0.775
        [[[0, 2, 1]]]
    """
    n, h, w = heatmap.shape
    order = heatmap.flatten(1).sort(dim=1, descending=True, stable=True).indices
    if iou_threshold is not None:
        chosen = select(heatmap, theta, h * w, iou_threshold, 1.0)
        location = torch.div(chosen.corners, STRIDE, rounding_mode="floor")
        place = location[..., 0] * w + location[..., 1]  # (N, K), zeros behind the counts
        taken = torch.arange(place.shape[1], device=place.device) < chosen.counts[:, None]
        accepted = torch.zeros(n, h * w, dtype=torch.bool, device=heatmap.device)
        accepted.scatter_(1, torch.where(taken, place, place[:, :1]), True)
        # Algorithm 1 accepts from the strongest on: among the accepted, its order is this one.
        first = accepted.gather(1, order)
        order = order.gather(1, first.int().sort(dim=1, descending=True, stable=True).indices)
    return _inverse(order).view(n, h, w)


def arrival(rank: Tensor, theta: int, side: int) -> Tensor:
    """Return when each pixel arrives.

    Args:
        rank: of each patch of the grid (N, H, W), int64, from `patch_ranks`.
        theta: side of the patches in pixels.
        side: of the image in pixels.

    Returns:
        float32 (N, side, side): rank of the first patch that covers the pixel, plus its
        distance from the patch's centre in [0, 1); H * W where none does.
    """
    n, h, w = rank.shape
    none = h * w
    # The least rank over all windows that hold a pixel: along one axis, then along the other.
    rows = rank.new_full((n, side, w), none)
    for i in range(h):
        window = rows[:, i * STRIDE : i * STRIDE + theta]
        torch.minimum(window, rank[:, i : i + 1], out=window)
    first = rank.new_full((n, side, side), none)
    for j in range(w):
        window = first[:, :, j * STRIDE : j * STRIDE + theta]
        torch.minimum(window, rows[:, :, j : j + 1], out=window)
    location = _inverse(rank.flatten(1))  # (N, H * W): where the patch of each rank lies
    at = location.gather(1, first.flatten(1).clamp(max=none - 1)).view_as(first)
    half = (theta - 1) / 2
    pixel = torch.arange(side, device=rank.device)
    y = torch.div(at, w, rounding_mode="floor") * STRIDE + half
    x = at % w * STRIDE + half
    distance = torch.maximum((pixel[:, None] - y).abs(), (pixel - x).abs()) / (theta / 2)
    return torch.where(first < none, first + distance, float(none)).float()


def squares_from_centre(side: int, device: torch.device | None = None) -> Tensor:
    """Return the distance of each pixel from the middle of an image (side, side), float32."""
    away = (torch.arange(side, device=device) - (side - 1) / 2).abs()
    return torch.maximum(away[:, None], away)


def pixel_positions(arrivals: Tensor) -> Tensor:
    """Return the place of each pixel in the order of arrival; ties in row-major order.

    Args:
        arrivals: of each pixel (N, S, S); the smallest comes first.

    Returns:
        int64 (N, S, S), from 0.
    """
    order = arrivals.flatten(1).sort(dim=1, stable=True).indices
    return _inverse(order).view(arrivals.shape)


def mask_of_area(positions: Tensor, area: float) -> Tensor:
    """Return which pixels the first share ``area`` of an image are, (N, S, S), bool.

    Example:
        >>> mask_of_area(torch.arange(16).view(1, 4, 4), 0.25).sum().item()
        4
    """
    return positions < round(area * positions[0].numel())


def _inverse(order: Tensor) -> Tensor:
    """Return the inverse of each row's permutation (N, L), int64."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
