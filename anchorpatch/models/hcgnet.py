"""HCGNet (Yang et al., 2019, "Gated Convolutional Networks with Hybrid Connectivity").

Cells are connected densely; within a cell, two fields of view are added to a squeezed map
through gates, as residuals are. Convolutions come after their normalization and activation.

Shapes use N images, c channels in, k channels out, and an H x W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anchorpatch.errors import SettingsError

#: Channels behind the stem.
_STEM: Final = 64


class _Conv(nn.Sequential):
    """Batch normalization, ReLU and a convolution without bias that keeps the map's size."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(
                inputs,
                outputs,
                kernel,
                stride=stride,
                padding=dilation * (kernel // 2),
                dilation=dilation,
                groups=groups,
                bias=False,
            ),
        )


class _VectorNorm(nn.BatchNorm1d):
    """Batch normalization of vectors (N, k).

    The last batch of an epoch may hold a lone image, which has no statistics of its own: it is
    normalized with the running ones.
    """

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1 or not self.training:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class _Context(nn.Module):
    """Sums a map over its positions, weighted by a softmax over them: (N, k, H, W) to (N, k)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.attention(x).flatten(2).softmax(-1)
        return (x.flatten(2) * weight).sum(-1)


class _UpdateGate(nn.Module):
    """Mixes the contexts of two maps, channel by channel: n = w_a * ctx(a) + w_b * ctx(b)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = 2 * channels // reduction
        self.contexts = nn.ModuleList(_Context(channels) for _ in range(2))
        self.squeeze = nn.Sequential(
            nn.Linear(2 * channels, hidden), _VectorNorm(hidden), nn.Tanh()
        )
        self.logits = nn.ModuleList(nn.Linear(hidden, channels) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        contexts = [context(x) for context, x in zip(self.contexts, (a, b), strict=True)]
        gate = self.squeeze(torch.cat(contexts, 1))
        weights = torch.stack([logits(gate) for logits in self.logits]).softmax(0)
        return (weights * torch.stack(contexts)).sum(0)


class _ForgetGate(nn.Module):
    """Says how much of each channel of a map stays: f in (0, 1), (N, k)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = channels // reduction
        self.context = _Context(channels)
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden),
            _VectorNorm(hidden),
            nn.Tanh(),
            nn.Linear(hidden, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.context(x))
        return gate


class _Gated(nn.Module):
    """A squeezed map u (N, k, H, W) with two fields of view: u * f + n, of the same shape."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        k = channels
        self.near = _Conv(k, k, 3, groups=k)
        self.far = _Conv(k, k, 3, dilation=2, groups=k)
        self.update = _UpdateGate(k, reduction)
        self.forget = _ForgetGate(k, reduction)

    def forward(self, u: Tensor) -> Tensor:
        new = self.update(self.near(u), self.far(u))
        out: Tensor = u * self.forget(u)[..., None, None] + new[..., None, None]
        return out


class Cell(nn.Module):
    """Squeeze, multi-scale, gate (SMG): concatenates k new channels behind its input.

    Args:
        inputs: channels c of the input.
        growth: new channels k.
    """

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(
            _Conv(inputs, 4 * growth, 1), _Conv(4 * growth, growth, 3, groups=4)
        )
        self.gated = _Gated(growth, reduction=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c, H, W) to (N, c + k, H, W)."""
        return torch.cat((x, self.gated(self.squeeze(x))), 1)


class Transition(nn.Module):
    """Halves channels and sides between two blocks: (N, c, H, W) to (N, c // 2, H/2, W/2)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        outputs = inputs // 2
        between = inputs - (inputs - outputs) // 2
        self.squeeze = nn.Sequential(
            _Conv(inputs, between, 1), _Conv(between, outputs, 3, stride=2)
        )
        self.gated = _Gated(outputs, reduction=4)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, c, H, W) to (N, c // 2, H/2, W/2)."""
        out: Tensor = self.gated(self.squeeze(x))
        return out


class HCGNet(nn.Module):
    """Blocks of densely connected SMG cells with a transition between each two.

    Args:
        growth: new channels k of a cell, for each block.
        cells: number of cells, for each block.
        classes: number of outputs.

    Raises:
        SettingsError: a number that gives no network.

    Example:
        >>> net = HCGNet((8, 8), (1, 2), classes=10).eval()
        >>> net(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, growth: Sequence[int], cells: Sequence[int], classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise SettingsError(f"HCGNet needs at least one class, got {classes}")
        if len(growth) != len(cells) or not growth or min(*growth, *cells) < 1:
            raise SettingsError(
                "HCGNet: expected one growth rate and one number of cells for each block, "
                f"got {tuple(growth)} and {tuple(cells)}"
            )
        if any(k % 4 for k in growth):
            raise SettingsError(
                f"HCGNet: expected growth rates that four divides, got {tuple(growth)}"
            )
        self.stem = nn.Sequential(
            *_stem_conv(3, _STEM // 2, stride=2),
            *_stem_conv(_STEM // 2, _STEM // 2),
            *_stem_conv(_STEM // 2, _STEM),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        channels = _STEM
        stages: list[nn.Module] = []
        for block, (k, count) in enumerate(zip(growth, cells, strict=True)):
            if block:
                stages.append(Transition(channels))
                channels //= 2
            stages.append(nn.Sequential(*(Cell(channels + i * k, k) for i in range(count))))
            channels += count * k
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized pixels (N, 3, H, W) to logits (N, classes)."""
        x = self.norm(self.stages(self.stem(images)))
        logits: Tensor = self.classifier(self.dropout(x.mean((2, 3))))
        return logits


def _stem_conv(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


def hcgnet_b(classes: int = 1000) -> HCGNet:
    """Return HCGNet-B: 12.8 M parameters, 2.0 GMACs at 224 x 224 px."""
    return HCGNet((32, 48, 64, 96), (3, 6, 12, 8), classes)


def hcgnet_c(classes: int = 1000) -> HCGNet:
    """Return HCGNet-C: 42.2 M parameters, 7.0 GMACs at 224 x 224 px."""
    return HCGNet((48, 56, 72, 112), (6, 12, 18, 14), classes)
