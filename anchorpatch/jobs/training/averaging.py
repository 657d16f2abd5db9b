"""The moving average of a network's weights, which is what gets measured and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["averaged"]


def averaged(module: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential average of a network's weights and buffers.

    Args:
        module: the network.
        decay: weight of the past in each step, once the average is old enough.
    """

    def update(average: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        # A young average leaves its random beginning behind faster.
        n = float(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        if average[0].is_floating_point():
            torch._foreach_lerp_(list(average), list(current), weight)
        else:  # counters
            for a, c in zip(average, current, strict=True):
                a.copy_(c)

    return AveragedModel(module, multi_avg_fn=update, use_buffers=True)
