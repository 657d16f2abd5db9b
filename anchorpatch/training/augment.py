"""Augmentation on the device: part of the picture, brightness, contrast, saturation, flip.

Each picture of a batch draws its own. The draws come from numpy, not from the device, so that
a run augments alike on CPU and GPU, and a resumed one like one that was not stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from anchorpatch.images.crops import RandomCrop, random_box
from anchorpatch.runtime.device import to_device

#: Weights of red, green and blue in the gray of ITU-R BT.601, as in torchvision and Pillow.
_GRAY = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """What happens to a batch of uint8 pixels (n, H, W, 3) before normalization.

    Attributes:
        jitter: brightness, contrast and saturation are each multiplied by a factor from
            1 - jitter to 1 + jitter.
        flip: random horizontal flip (p = 0.5).
        min_area: smallest share of the picture that a random crop shows, resized to the
            picture's size; 1 for no crop.
    """

    jitter: float = 0.2
    flip: bool = True
    min_area: float = 1.0

    def __call__(self, pixels: Tensor, rng: np.random.Generator) -> Tensor:
        """Return the augmented pixels in [0, 1], float32 (n, 3, H, W), channels last."""
        n, height, width, _ = pixels.shape
        inputs = pixels.permute(0, 3, 1, 2).float() / 255
        # Drawn whatever the settings, so that one of them does not change the others' draws.
        draws = to_device(rng.random((n, 4), np.float32), pixels.device)
        if self.min_area < 1:
            crop = RandomCrop(min_area=self.min_area)
            boxes = [random_box(rng, width, height, crop) for _ in range(n)]
            inputs = crop_boxes(inputs, boxes)
        if self.jitter:
            inputs = adjust_colors(inputs, 1 + self.jitter * (2 * draws[:, :3] - 1))
        if self.flip:
            inputs = torch.where((draws[:, 3] < 0.5)[:, None, None, None], inputs.flip(3), inputs)
        return inputs.contiguous(memory_format=torch.channels_last)


def crop_boxes(inputs: Tensor, boxes: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """Magnify a box (left, top, right, bottom) of each picture to the picture's size, bilinearly.

    Args:
        inputs: pictures (n, 3, H, W).
        boxes: in pixels, inside the picture, one for each.
    """
    height, width = inputs.shape[2:]
    left, top, right, bottom = np.array(boxes, np.float32).T
    zero = np.zeros_like(left)
    theta = np.stack(
        [
            np.stack([(right - left) / width, zero, (left + right) / width - 1], 1),
            np.stack([zero, (bottom - top) / height, (top + bottom) / height - 1], 1),
        ],
        1,
    )
    grid = functional.affine_grid(
        to_device(theta, inputs.device), list(inputs.shape), align_corners=False
    )
    return functional.grid_sample(inputs, grid, padding_mode="border", align_corners=False)


def adjust_colors(inputs: Tensor, factors: Tensor) -> Tensor:
    """Adjust brightness, contrast and saturation of each picture, in this order.

    The same as torchvision's functions of these names, but with a factor for each picture.

    Args:
        inputs: pictures (n, 3, H, W) in [0, 1].
        factors: for brightness, contrast and saturation (n, 3); 1 leaves it.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    inputs = (inputs * brightness).clamp(0, 1)
    mean = _gray(inputs).mean((2, 3), keepdim=True)
    inputs = torch.lerp(mean, inputs, contrast).clamp(0, 1)
    return torch.lerp(_gray(inputs), inputs, saturation).clamp(0, 1)


def _gray(inputs: Tensor) -> Tensor:
    weights = _gray_weights(inputs.device)
    return (inputs * weights[:, None, None]).sum(1, keepdim=True)


@cache
def _gray_weights(device: torch.device) -> Tensor:
    return torch.tensor(_GRAY, device=device)
