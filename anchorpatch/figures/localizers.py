"""Localizers of Figure 6: each says in which order an image's pixels are taken.

AnchorNet, and each of its branches alone; the peers that the paper names, BagNets ordered by
logits and Saccader; Grad-CAM; and what knows nothing of classes: edges, the center, chance.

Patches come in an order, and each brings the pixels that none before it has: from its center
outwards, in squares, so that any area is reached to the pixel and all localizers are compared
at exactly the same ones. A pixel's *arrival* says when: the rank of the first patch that covers
it, plus its distance from that patch's center as a share of half the side. Pixels that no patch
covers come last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

from anchorpatch.errors import NonFiniteError, SettingsError
from anchorpatch.jobs.localizer import Runner
from anchorpatch.lsp import Decision, grid_size, select
from anchorpatch.models.bagnet import BagNet
from anchorpatch.models.complexity import refusal
from anchorpatch.models.saccader import Saccader
from anchorpatch.networks import Network, Normalization
from anchorpatch.runtime.checkpoint import Weights, WeightsMeta
from anchorpatch.runtime.device import exact_float32
from anchorpatch.settings import CROP, SCALES, STRIDE


class Seen(NamedTuple):
    """A batch, and what AnchorNet says of it.

    Attributes:
        rows: of the images in their source (n,), int64; chance depends on them.
        pixels: uint8 (n, side, side, 3), on the device.
        decision: class and branch (Eq. 6-8).
        heatmaps: M of each branch for the decided class, (n, H, W) each.
        own_heatmaps: M of each branch for the class that it predicts itself.
        iou_threshold: T of Algorithm 1.
    """

    rows: NDArray[np.int64]
    pixels: Tensor
    decision: Decision
    heatmaps: tuple[Tensor, ...]
    own_heatmaps: tuple[Tensor, ...]
    iou_threshold: float

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return self.pixels.shape[1]


#: Returns when each pixel arrives (n, side, side), the first the smallest.
Localize = Callable[[Seen], Tensor]


class See(Runner):
    """Runs AnchorNet on batches.

    Args:
        weights: of AnchorNet.
        device: where it computes.
        iou_threshold: T of Algorithm 1, for localizers whose patches may not overlap.
        engine: as for `Runner`; with ``side``.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        iou_threshold: float = 0.3,
        *engine: str,
        side: int | None = None,
    ) -> None:
        super().__init__(weights, device, *engine, side=side)
        self.source, self.iou_threshold = weights.path, iou_threshold

    @torch.inference_mode()
    @exact_float32()
    def __call__(self, rows: NDArray[np.int64], pixels: Tensor) -> Seen:
        """Look at a batch: rows (n,) and uint8 pixels (n, side, side, 3), on any device.

        Raises:
            NonFiniteError: AnchorNet produced NaN or infinity.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        logits, features, decision, heatmaps = self.run(pixels)
        if not bool(logits.isfinite().all()):
            raise NonFiniteError(f"{self.source} produced NaN or infinity: train AnchorNet again")
        own = tuple(
            self.net.heatmaps(features, decision.branch_class[:, j])[j] for j in range(len(SCALES))
        )
        return Seen(rows, pixels, decision, heatmaps, own, self.iou_threshold)


def anchornet(seen: Seen) -> Tensor:
    """Take the patches of the branch that AnchorNet chose, by the heatmap of the decided class."""
    return _by_chosen_scale(seen, seen.heatmaps)


def branch(j: int, seen: Seen) -> Tensor:
    """Take the patches of the branch of index j, by the class that it predicts itself."""
    return _arrivals(seen.own_heatmaps[j], SCALES[j], seen.side, seen.iou_threshold)


def edges(seen: Seen) -> Tensor:
    """Take patches of the scale AnchorNet chose, by their mean Sobel energy."""
    energy = sobel_energy(seen.pixels)[:, None]
    means = [functional.avg_pool2d(energy, scale, STRIDE)[:, 0] for scale in SCALES]
    return _by_chosen_scale(seen, means)


def sobel_energy(pixels: Tensor) -> Tensor:
    """Return the squared length of the Sobel gradient of gray values.

    Args:
        pixels: uint8 (n, H, W, 3).

    Returns:
        float32 (n, H, W); the border repeats.
    """
    gray = pixels.float().mean(-1, keepdim=True).permute(0, 3, 1, 2)
    along = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack((along, along.T))[:, None].to(pixels.device)
    padded = functional.pad(gray, (1, 1, 1, 1), mode="replicate")
    return functional.conv2d(padded, kernels).square().sum(1)


def chance(seed: int, seen: Seen) -> Tensor:
    """Take random patches of the scale AnchorNet chose; they depend on seed and row alone."""
    heatmaps = []
    for found in seen.heatmaps:
        generators = [np.random.default_rng((seed, int(row))) for row in seen.rows]
        drawn = np.stack([rng.random(found.shape[1:], np.float32) for rng in generators])
        heatmaps.append(torch.from_numpy(drawn).to(found.device))
    return _by_chosen_scale(seen, heatmaps)


def center(seen: Seen) -> Tensor:
    """Take squares that grow from the middle."""
    return squares_from_center(seen.side, seen.pixels.device).expand(len(seen.pixels), -1, -1)


#: Localizers of Figure 6 that need no weights but AnchorNet's, and no seed.
PLAIN: Final[dict[str, Localize]] = {
    "anchornet": anchornet,
    **{f"branch{scale}": partial(branch, j) for j, scale in enumerate(SCALES)},
    "sobel": edges,
    "center": center,
}


def gradcam(
    module: nn.Module, meta: WeightsMeta, device: torch.device, side: int = CROP
) -> Localize:
    """Return Grad-CAM of the network that decides: its pixels by their heat.

    Args:
        module: the network.
        meta: of its weights.
        device: where it computes.
        side: of the images in pixels.

    Raises:
        SettingsError: the network has no feature map.
    """
    features, normalized = last_feature_map(module, side), Normalization(meta, device)
    return lambda seen: -class_heatmaps(module, features, normalized(seen.pixels))


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
        return _arrivals(heatmap, module.theta, seen.side, None)

    return localize


def _glimpsed(saccader: Saccader, inputs: Tensor) -> Tensor:
    """Order patches as Saccader looks at them, all of them."""
    h, w = grid_size(inputs.shape[2], inputs.shape[3], saccader.theta)
    places = saccader.look(saccader.maps(inputs), h * w).places
    return arrival(_inverse(places).view(-1, h, w), saccader.theta, inputs.shape[2])


def _arrivals(heatmap: Tensor, theta: int, side: int, iou_threshold: float | None) -> Tensor:
    return arrival(patch_ranks(heatmap.float(), theta, iou_threshold), theta, side)


def _by_chosen_scale(seen: Seen, heatmaps: Sequence[Tensor]) -> Tensor:
    """Take of each image the heatmap and the patches of its branch."""
    out = torch.empty(seen.pixels.shape[:3], device=seen.pixels.device)
    for j, scale in enumerate(SCALES):
        rows = (seen.decision.branch == j).nonzero()[:, 0]
        if len(rows):
            out[rows] = _arrivals(heatmaps[j][rows], scale, seen.side, seen.iou_threshold)
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
        >>> patch_ranks(heatmap, 63, iou_threshold=0.7).tolist()  # neighbors have 0.775
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
        distance from the patch's center in [0, 1); H * W where none does.
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


def squares_from_center(side: int, device: torch.device | None = None) -> Tensor:
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


# --- Grad-CAM (Selvaraju et al., 2017) ------------------------------------------------------

#: Layers that take and give (N, C, H, W) by definition.
_PLANAR: Final = (
    *(nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)

#: Letters of a layout are axes: batch, channels, height, width, tokens.
_LAYOUTS: Final = ("NCHW", "NHWC", "NLC")

#: Layout by the axes that grow with the image.
_GROWING: Final[dict[tuple[int, ...], str]] = {(1, 2): "NHWC", (2, 3): "NCHW"}

#: An axis of an image twice as large has about twice as many places, one of place by place four
#: times as many.
_GROWTH: Final = 3.5


@dataclass(frozen=True)
class FeatureMap:
    """A layer, and how the places of its output lie.

    Attributes:
        layer: name of the module.
        layout: of `_LAYOUTS`; tokens lie row by row, after those without a place (class token,
            registers).
        size: height and width of the map in places.
    """

    layer: str
    layout: str
    size: tuple[int, ...]

    def of(self, output: Tensor) -> Tensor:
        """Return an output of the layer, or its gradient, as a map (N, C, H, W)."""
        if self.layout == "NLC":
            tokens = output[:, -self.size[0] * self.size[1] :].transpose(1, 2)
            return tokens.reshape(*tokens.shape[:2], *self.size)
        return output.permute(0, 3, 1, 2) if self.layout == "NHWC" else output


def last_feature_map(module: nn.Module, side: int = CROP) -> FeatureMap:
    """Find the last layer that gives several places on which the logits depend.

    The layout of its output is never guessed from the shape alone. It is known where a layer
    takes or gives (N, C, H, W) by definition; where the network also takes larger images, since
    height and width are the axes that grow with them; and where the package says it, as timm
    does by ``forward_intermediates``.

    Args:
        module: a network of images; an image of noise goes through it, and a larger one if it
            can.
        side: of the image in pixels.

    Raises:
        SettingsError: there is no such layer, or its layout is unknown.

    Example:
        >>> from anchorpatch.models.registry import build
        >>> last_feature_map(build("resnet18"))
        FeatureMap(layer='layer4', layout='NCHW', size=(7, 7))
    """
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    training = module.training
    try:
        with torch.inference_mode(False), torch.enable_grad(), _tracing(module) as trace:
            image = noise.to(next(module.parameters())).requires_grad_()
            best = module.eval()(image).amax()
        with _tracing(module) as larger:
            grows = refusal(module, 2 * side) is None
        candidates = _known(trace, larger if grows else None) or _declared(module, trace, image)
    finally:
        module.train(training)
    for found in reversed(candidates):
        output = trace.outputs[found.layer]
        if not output.requires_grad:
            continue
        (gradient,) = torch.autograd.grad(best, output, retain_graph=True, allow_unused=True)
        # After the last attention a class token alone decides, and what lies at the places of
        # the image is not used.
        if gradient is not None and bool(found.of(gradient).any()):
            return found
    raise SettingsError(
        "Grad-CAM needs a feature map that the logits depend on, in a known layout: (N, C, H, W), "
        "(N, H, W, C) or a grid of tokens; the network has none"
    )


class _Trace(NamedTuple):
    """What the layers of a network gave: the last tensor of each, in the order of their ends."""

    outputs: dict[str, Tensor]
    planar: list[Tensor]


@contextmanager
def _tracing(module: nn.Module) -> Iterator[_Trace]:
    trace = _Trace({}, [])
    names = {layer: name for name, layer in module.named_modules() if name}

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        name = names.get(layer)
        if name is None:
            return
        if isinstance(layer, _PLANAR):
            trace.planar.extend(t for t in (*inputs, output) if isinstance(t, Tensor))
        trace.outputs.pop(name, None)
        if isinstance(output, Tensor) and output.ndim > 1:
            trace.outputs[name] = output

    hook = register_module_forward_hook(note)
    try:
        yield trace
    finally:
        hook.remove()


def _known(trace: _Trace, larger: _Trace | None) -> list[FeatureMap]:
    """Return the maps at the end of a network up to an output whose layout is unknown."""
    found: list[FeatureMap] = []
    for name, output in reversed(trace.outputs.items()):
        shape = tuple(output.shape)
        if shape[0] == 1 and sum(n > 1 for n in shape) < 2:
            continue  # features without places
        layout = _layout(output, trace, larger.outputs.get(name) if larger else None)
        if layout is None:
            break
        size = shape[2:] if layout == "NCHW" else shape[1:3]
        if max(size) > 1:
            found.append(FeatureMap(name, layout, size))
    return found[::-1]


def _layout(output: Tensor, trace: _Trace, larger: Tensor | None) -> str | None:
    """Return the layout of an output of one image, None where it is unknown.

    Args:
        output: of a layer.
        trace: of the network.
        larger: the same layer's output for an image of twice the side, if the network takes it.
    """
    if len(output) != 1:
        return None
    if output.ndim == 4 and any(output is tensor for tensor in trace.planar):
        return "NCHW"
    if larger is None or larger.ndim != 4 or output.ndim != 4:
        return None
    growth = [b / a for a, b in zip(output.shape, larger.shape, strict=True)]
    # What does not grow may be the map of a network that first resizes its input.
    growing = tuple(i for i, ratio in enumerate(growth) if ratio != 1)
    return _GROWING.get(growing) if max(growth) <= _GROWTH else None


def _declared(module: nn.Module, trace: _Trace, image: Tensor) -> list[FeatureMap]:
    """Return the maps whose layout the network's package tells."""
    if isinstance(module, torchvision.models.VisionTransformer):
        grid = module.image_size // module.patch_size
        blocks = [name for name, _ in module.encoder.layers.named_children()]
        return [FeatureMap(f"encoder.layers.{name}", "NLC", (grid, grid)) for name in blocks]
    try:
        with torch.no_grad():
            maps = module.forward_intermediates(  # type: ignore[operator]
                image, output_fmt="NCHW", intermediates_only=True
            )
    except Exception:  # there is none, or it does not give this layout
        return []
    # What lies as the map in some layout is the map: noise has no two equal places.
    return [
        found
        for name, output in trace.outputs.items()
        for tensor in maps
        for found in (FeatureMap(name, layout, tuple(tensor.shape[2:])) for layout in _LAYOUTS)
        if output.ndim == len(found.layout) and _equal(found, output, tensor)
    ]


def _equal(found: FeatureMap, output: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or expected.ndim != 4:
        return False
    if found.layout == "NLC" and output.shape[1] < found.size[0] * found.size[1]:
        return False
    tensor = found.of(output)
    return tensor.shape == expected.shape and torch.allclose(tensor, expected, 1e-3, 1e-4)


def class_heatmaps(module: nn.Module, features: FeatureMap, inputs: Tensor) -> Tensor:
    """Return Grad-CAM of the class that a network predicts for each image.

    Args:
        module: the network, in evaluation mode and on its device.
        features: from `last_feature_map`.
        inputs: normalized pixels (N, 3, S, S).

    Returns:
        float32 (N, S, S): feature maps weighted by the mean gradient of the predicted class's
        logit, enlarged bilinearly. The rectifier of the original, which would make all places
        without evidence equal, is left out: the order among them stays.
    """
    maps: list[Tensor] = []
    layer = module.get_submodule(features.layer)
    handle = layer.register_forward_hook(lambda *call: maps.append(call[2]))
    try:
        with torch.enable_grad():
            # The map needs a gradient also where no parameter asks for one.
            logits = module(inputs.detach().requires_grad_())
            # An image's logit depends on its own map alone, so the sum parts by image.
            (gradient,) = torch.autograd.grad(logits.amax(1).sum(), maps[-1])
    finally:
        handle.remove()
    weights = features.of(gradient).mean((2, 3), keepdim=True)
    heatmap = (weights * features.of(maps[-1].detach())).sum(1, keepdim=True).float()
    size = (inputs.shape[2], inputs.shape[3])
    return functional.interpolate(heatmap, size, mode="bilinear", align_corners=False)[:, 0]
