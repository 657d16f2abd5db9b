"""In which order a localizer takes the pixels of an image, so that areas can be compared.

Patches come in an order, and each brings the pixels that none before it has: from its centre
outwards, in squares, so that any area is reached to the pixel and all localizers are compared
at exactly the same ones. A pixel's *arrival* says when: the rank of the first patch that covers
it, plus its distance from that patch's centre as a share of half the side. Pixels that no patch
covers come last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anchorpatch.lsp import select
from anchorpatch.settings import STRIDE

__all__ = ["arrival", "mask_of_area", "patch_ranks", "pixel_positions", "squares_from_centre"]


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
