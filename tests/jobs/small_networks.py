"""A small network for patches, as `finetune` would leave it."""

from __future__ import annotations

from pathlib import Path

import torch

from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights


def save_small_network(path: Path, bias: float = 0.0) -> Path:
    """Write an untrained network whose opinions differ: classes a, b, c."""
    torch.manual_seed(0)
    net = build("shufflenet_v2_x0_5", 3)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # takes the statistics of what it sees
    with torch.no_grad():
        net(torch.randn(32, 3, 63, 63))
        torch.nn.init.normal_(net.fc.weight, std=0.3)
        net.fc.bias.fill_(bias)
    save_weights(path, net.state_dict(), WeightsMeta("shufflenet_v2_x0_5", ("a", "b", "c")))
    return path
