"""Grad-CAM (Selvaraju et al., 2017) of any network with a last feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anchorpatch.errors import SettingsError

__all__ = ["GradCam", "last_feature_map"]


def last_feature_map(module: nn.Module, side: int = 224) -> str:
    """Return the name of the layer whose output is the last one with several places.

    Args:
        module: a network of images; one image of zeros goes through it.
        side: of the image in pixels.

    Raises:
        SettingsError: no layer gives a map (N, C, H, W), as in a transformer.

    Example:
        >>> from anchorpatch.models.registry import build
        >>> last_feature_map(build("resnet18"))
        'layer4'
    """
    found: list[str] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
                found.append(name)

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in module.named_modules()]
    parameter = next(module.parameters())
    training = module.training
    try:
        with torch.inference_mode():
            module.eval()(torch.zeros(1, 3, side, side, device=parameter.device))
    finally:
        module.train(training)
        for handle in hooks:
            handle.remove()
    if not found or not found[-1]:
        raise SettingsError("the network has no feature map (N, C, H, W) for Grad-CAM")
    return found[-1]


class GradCam:
    """Heatmaps of the class that a network predicts.

    Args:
        module: the network, in evaluation mode and on its device.

    Raises:
        SettingsError: it has no feature map.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layer = last_feature_map(module)

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
        layer = self.module.get_submodule(self.layer)
        handle = layer.register_forward_hook(lambda *call: maps.append(call[2]))
        try:
            with torch.enable_grad():
                # The map needs a gradient also where no parameter asks for one.
                logits = self.module(inputs.detach().requires_grad_())
                # An image's logit depends on its own map alone, so the sum parts by image.
                best = logits.amax(1).sum()
                (gradient,) = torch.autograd.grad(best, maps[0])
        finally:
            handle.remove()
        weights = gradient.mean((2, 3), keepdim=True)
        heatmap = (weights * maps[0].detach()).sum(1, keepdim=True).float()
        size = (inputs.shape[2], inputs.shape[3])
        return functional.interpolate(heatmap, size, mode="bilinear", align_corners=False)[:, 0]
