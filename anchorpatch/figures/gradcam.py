"""Grad-CAM (Selvaraju et al., 2017) of any network whose last feature map has a known layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from anchorpatch.errors import SettingsError
from anchorpatch.models.complexity import refusal

#: Layers that take and give (N, C, H, W) by definition.
_PLANAR: Final = (
    *(nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)

#: Letters of a layout are axes: batch, channels, height, width, tokens.
_LAYOUTS: Final = ("NCHW", "NHWC", "NLC")

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


def last_feature_map(module: nn.Module, side: int = 224) -> FeatureMap:
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


@dataclass
class _Trace:
    """What the layers of a network gave: the last tensor of each, in the order of their ends."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    planar: list[Tensor] = field(default_factory=list)

    def note(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(layer, _PLANAR):
            self.planar += [tensor for tensor in (*inputs, output) if isinstance(tensor, Tensor)]
        self.outputs.pop(name, None)
        if isinstance(output, Tensor) and output.ndim > 1:
            self.outputs[name] = output


@contextmanager
def _tracing(module: nn.Module) -> Iterator[_Trace]:
    trace = _Trace()

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, inputs, output: trace.note(name, layer, inputs, output)

    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if name:
                stack.callback(layer.register_forward_hook(hook(name)).remove)
        yield trace


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
    if larger is None or larger.ndim != output.ndim:
        return None
    growing = [i for i, (a, b) in enumerate(zip(output.shape, larger.shape, strict=True)) if a != b]
    if any(larger.shape[i] > _GROWTH * output.shape[i] for i in growing):
        return None
    # What does not grow may be the map of a network that first resizes its input.
    if output.ndim != 4 or growing not in ([1, 2], [2, 3]):
        return None
    return "NHWC" if growing == [1, 2] else "NCHW"


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


class GradCam:
    """Heatmaps of the class that a network predicts.

    Args:
        module: the network, in evaluation mode and on its device.

    Raises:
        SettingsError: it has no feature map of a known layout.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.features = last_feature_map(module)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the heatmap of each image.

        Args:
            inputs: normalised pixels (N, 3, S, S).

        Returns:
            float32 (N, S, S): feature maps weighted by the mean gradient of the predicted
            class's logit, enlarged bilinearly. The rectifier of the original, which would make
            all places without evidence equal, is left out: the order among them stays.
        """
        maps: list[Tensor] = []
        layer = self.module.get_submodule(self.features.layer)
        handle = layer.register_forward_hook(lambda *call: maps.append(call[2]))
        try:
            with torch.enable_grad():
                # The map needs a gradient also where no parameter asks for one.
                logits = self.module(inputs.detach().requires_grad_())
                # An image's logit depends on its own map alone, so the sum parts by image.
                best = logits.amax(1).sum()
                (gradient,) = torch.autograd.grad(best, maps[-1])
        finally:
            handle.remove()
        weights = self.features.of(gradient).mean((2, 3), keepdim=True)
        heatmap = (weights * self.features.of(maps[-1].detach())).sum(1, keepdim=True).float()
        size = (inputs.shape[2], inputs.shape[3])
        return functional.interpolate(heatmap, size, mode="bilinear", align_corners=False)[:, 0]
