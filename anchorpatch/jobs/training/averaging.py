"""The moving average of a network's weights, which is what gets measured and kept."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["MovingAverage"]


class MovingAverage(AveragedModel):
    """An exponential average of a network's weights and buffers.

    Args:
        module: the network.
        decay: weight of the past in each step, once the average is old enough.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take a step towards the network's weights.

        As `AveragedModel` does, whose own method makes the host wait for a GPU four times.
        """
        n = int(self.n_averaged)  # lies on the host
        # A young average leaves its random beginning behind faster.
        weight = 1 - min(self.decay, (1 + n) / (10 + n))
        averages, currents = [], []
        pairs = zip(
            chain(self.module.parameters(), self.module.buffers()),
            chain(model.parameters(), model.buffers()),
            strict=True,
        )
        for average, current in pairs:
            if n and average.is_floating_point():
                averages.append(average)
                currents.append(current)
            else:  # the beginning, and counters
                average.copy_(current)
        if averages:
            torch._foreach_lerp_(averages, currents, weight)
        self.n_averaged += 1
