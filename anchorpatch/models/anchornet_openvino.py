"""AnchorNet's features through OpenVINO, on CPUs.

The graph is built module by module: that takes a tenth of a second, where tracing the network
takes several. Normalization is folded into the first convolution, so that pixels go in.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from anchorpatch.errors import SettingsError
from anchorpatch.models.anchornet import AnchorNet, Bottleneck, Features
from anchorpatch.settings import CROP

#: Images per inference, the fastest of 1 to 64: the maps of larger batches leave the cache.
_IMAGES = 4

_ACTIVATIONS = {nn.ReLU: "relu", nn.Hardswish: "hswish", nn.Hardsigmoid: "hsigmoid"}


@functools.cache
def openvino_core() -> Any:
    """Return OpenVINO's Core, without the reports that the package sends to its makers.

    Raises:
        ImportError: it is not installed, or not for this machine.
    """
    # Importing openvino reports that to Google Analytics, unless this package is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    # One for the life of the process: each gives the thread a stack for signal handlers, and of
    # two that overlap the later one puts back, at its end, that of the first, which is gone.
    openvino, ops = map(importlib.import_module, ("openvino", "openvino.opset13"))
    core = openvino.Core()
    # Its Python module fills tables at the first inference, and hangs if two threads do so.
    pixels = ops.parameter([1], np.uint8)
    smallest = core.compile_model(openvino.Model([ops.convert(pixels, "f32")], [pixels]), "CPU")
    smallest.create_infer_request().infer([np.zeros(1, np.uint8)], True, True).to_tuple()
    return core


class OpenVinoFeatures:
    """Computes `Features` of pixels; an image's do not depend on the others.

    Args:
        net: AnchorNet, fused.
        mean: of the weights' normalization; with ``std``.
        side: of the images in pixels.
        precision: float32 or bfloat16.
        streams: threads that may call at once; their calls share the threads that torch has.
        images: of an inference.

    Raises:
        SettingsError: OpenVINO cannot compile the network, and says why.
    """

    def __init__(
        self,
        net: AnchorNet,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        side: int = CROP,
        precision: str = "float32",
        streams: int = 1,
        images: int = _IMAGES,
    ) -> None:
        core = openvino_core()
        settings = {
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,  # processes of one machine would share the first cores
        }
        try:
            graph = _graph(
                importlib.import_module("openvino.opset13"), net, mean, std, (images, side)
            )
            self._compiled = core.compile_model(graph, "CPU", settings)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise SettingsError(f"--engine openvino: {reason}; use --engine torch") from error
        self._shapes = [tuple(out.shape)[1:] for out in self._compiled.outputs]
        self._thread, self._images = threading.local(), images

    def __call__(self, pixels: Tensor) -> Features:
        """Return the features of uint8 pixels (n, side, side, 3)."""
        if not hasattr(self._thread, "request"):
            self._thread.request = self._compiled.create_infer_request()
        found = [np.empty((len(pixels), *shape), np.float32) for shape in self._shapes]
        for begin in range(0, len(pixels), self._images):
            piece = np.ascontiguousarray(pixels[begin : begin + self._images].numpy())
            n = len(piece)
            piece = np.concatenate((piece, piece[:1].repeat(self._images - n, 0)))
            made = self._thread.request.infer([piece], share_inputs=True, share_outputs=True)
            for array, part in zip(found, made.values(), strict=True):
                array[begin : begin + n] = part[:n]
        tensors = [torch.from_numpy(array) for array in found]
        third = len(tensors) // 3
        return Features(*(tuple(tensors[i * third : (i + 1) * third]) for i in range(3)))


def _graph(
    ops: Any,
    net: AnchorNet,
    mean: Sequence[float],
    std: Sequence[float],
    shape: tuple[int, int],
) -> Any:
    """Return the model from uint8 pixels to the tensors of `Features`, one after another.

    The shape is the number of images, and their side in pixels.
    """
    pixels = ops.parameter([shape[0], shape[1], shape[1], 3], np.uint8)
    x = ops.convert(ops.transpose(pixels, [0, 3, 1, 2]), "f32")
    head = _apply(ops, _apply(ops, x, _on_pixels(net.stem, mean, std)), net.head)
    weighted, attention, pooled = [], [], []
    for branch in net._branches():
        local = _apply(ops, head, branch.localization)
        x = _apply(ops, local, branch.attention)
        s = _spatial_attention(ops, x, _apply(ops, x, branch.gate))
        if branch.weighted_mean:
            s = ops.multiply(s, np.float32(np.prod(tuple(s.shape)[2:])))
        weighted.append(ops.multiply(local, s))
        attention.append(s)
        pooled.append(ops.reduce_mean(x, [2, 3]))
    return importlib.import_module("openvino").Model(weighted + attention + pooled, [pixels])


def _apply(ops: Any, x: Any, module: nn.Module) -> Any:
    """Return what a module of AnchorNet makes of a node (N, C, H, W)."""
    if isinstance(module, nn.Sequential):  # which Conv2dNormActivation is
        for layer in module:
            x = _apply(ops, x, layer)
        return x
    if isinstance(module, nn.Identity):
        return x
    if isinstance(module, nn.Conv2d):
        weight = _array(module.weight)
        strides, window = list(module.stride), ([0, 0], [0, 0], [1, 1])
        if module.groups > 1:  # depthwise
            y = ops.group_convolution(x, weight[:, None], strides, *window)
        else:
            y = ops.convolution(x, weight, strides, *window)
        assert module.bias is not None
        return ops.add(y, _array(module.bias).reshape(1, -1, 1, 1))
    if isinstance(module, SqueezeExcitation):
        gates = ops.reduce_mean(x, [2, 3], keep_dims=True)
        for layer in (module.fc1, module.activation, module.fc2, module.scale_activation):
            gates = _apply(ops, gates, layer)
        return ops.multiply(x, gates)
    if isinstance(module, Bottleneck):
        y = _apply(ops, x, module.layers)
        if not module.has_shortcut:
            return y
        if m := module.margin:
            x = ops.slice(x, [m, m], [-m, -m], [1, 1], [2, 3])
        return ops.add(y, x)
    return getattr(ops, _ACTIVATIONS[type(module)])(x)


def _spatial_attention(ops: Any, x: Any, gate: Any) -> Any:
    """Return S (N, 1, H, W), as `anchorpatch.models.anchornet.spatial_attention` does."""
    weighted = ops.multiply(x, _softmax_of_map(ops, gate))
    channel = ops.softmax(ops.reduce_sum(weighted, [2, 3], keep_dims=True), 1)
    return _softmax_of_map(ops, ops.reduce_sum(ops.multiply(x, channel), [1], keep_dims=True))


def _softmax_of_map(ops: Any, x: Any) -> Any:
    n, _, h, w = x.shape
    flat = ops.softmax(ops.reshape(x, [n, h * w], special_zero=False), 1)
    return ops.reshape(flat, [n, 1, h, w], special_zero=False)


def _on_pixels(stem: Any, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Return the stem for pixels from 0 to 255 instead of normalized ones."""
    conv, *rest = copy.deepcopy(stem)
    scale, shift = torch.tensor(std).double(), torch.tensor(mean).double()
    weight = conv.weight.data.double() / scale[:, None, None]
    conv.bias.data -= (weight * shift[:, None, None]).sum((1, 2, 3)).float()
    conv.weight.data = (weight / 255).float()
    return nn.Sequential(conv, *rest)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().numpy())
