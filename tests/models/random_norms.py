"""Networks that have seen training."""

from __future__ import annotations

from torch import nn


def randomize_norms(net: nn.Module) -> None:
    """Give batch normalization statistics and offsets other than 0 and 1."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
