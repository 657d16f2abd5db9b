"""AnchorNet (section 3.2): a head, three localization branches, three attention branches.

Nothing is padded, so location (h, w) of the branch of scale theta sees exactly the pixels
``[8h, 8h + theta) x [8w, 8w + theta)``. One exception, by design of the paper: a
squeeze-and-excitation block pools over its whole map, so the *gates* of channels depend on
the whole image. With the gates held fixed, the statement is exact.

Shapes use N images, C classes, and an H x W map per branch: 21, 17 and 15 squared for
224 x 224 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from anchorpatch.errors import SettingsError
from anchorpatch.settings import SCALES

HS, RE = nn.Hardswish, nn.ReLU


class Row(NamedTuple):
    """One line of Table 1 or 2: a bottleneck."""

    kernel: int
    expand: int
    out: int
    se: bool
    activation: type[nn.Module]
    stride: int


#: First line of Table 1: a plain 3 x 3 convolution with 16 outputs, hard-swish, stride 2.
STEM = Row(3, 0, 16, False, HS, 2)

#: The other lines of Table 1. Receptive field and input resolution follow from them:
#: `anchorpatch.models.complexity.anchornet_receptive_fields` computes the one, a forward pass the
#: other.
HEAD = (
    #   kernel Exp  Out  SE    NL  s
    Row(3,  16,  16, False, RE, 2),
    Row(3,  72,  24, False, RE, 2),
    Row(1,  88,  24, False, RE, 1),
    Row(1,  96,  40, True,  HS, 1),
    Row(1, 240,  40, True,  HS, 1),
    Row(1, 240,  40, True,  HS, 1),
    Row(1, 120,  48, True,  HS, 1),
    Row(3, 144,  48, True,  HS, 1),
    Row(3, 288,  96, True,  HS, 1),
)  # fmt: skip

#: Table 2, by scale. The last line of each part is the bottleneck of the attention branch.
BRANCHES = {
    63: (
        Row(3, 480, 96, True, HS, 1),
        Row(1, 576, 96, True, HS, 1),
        Row(1, 192, 96, True, HS, 1),
    ),
    95: (
        Row(3, 480, 96, True, HS, 1),
        Row(5, 576, 96, True, HS, 1),
        Row(1, 192, 96, True, HS, 1),
    ),
    111: (
        Row(5, 480, 96, True, HS, 1),
        Row(5, 576, 96, True, HS, 1),
        Row(1, 192, 96, True, HS, 1),
    ),
}

_conv = partial(Conv2dNormActivation, padding=0, inplace=None)


class Bottleneck(nn.Module):
    """An inverted residual without padding: expand 1 x 1, depthwise k x k, project 1 x 1, SE.

    SE squeezes the projected output by a ratio of 4 (ReLU, hard sigmoid). The shortcut, where
    stride is 1 and the channels match, is center-cropped to the shrunken map, so that each
    location stays aligned with its own receptive field.
    """

    def __init__(self, inputs: int, row: Row, *, se: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if row.expand != inputs:
            layers.append(_conv(inputs, row.expand, kernel_size=1, activation_layer=row.activation))
        layers += [
            _conv(
                row.expand,
                row.expand,
                kernel_size=row.kernel,
                stride=row.stride,
                groups=row.expand,
                activation_layer=row.activation,
            ),
            _conv(row.expand, row.out, kernel_size=1, activation_layer=None),
        ]
        if row.se and se:
            layers.append(SqueezeExcitation(row.out, row.out // 4, scale_activation=nn.Hardsigmoid))
        self.layers = nn.Sequential(*layers)
        self.margin = (row.kernel - 1) // 2
        self.has_shortcut = row.stride == 1 and inputs == row.out

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, out, H', W')."""
        out: Tensor = self.layers(x)
        if self.has_shortcut:
            m = self.margin
            out = out + (x[..., m:-m, m:-m] if m else x)
        return out


def _bottlenecks(inputs: int, rows: Sequence[Row], *, se: bool) -> nn.Sequential:
    blocks = []
    for row in rows:
        blocks.append(Bottleneck(inputs, row, se=se))
        inputs = row.out
    return nn.Sequential(*blocks)


class Branch(nn.Module):
    """A localization branch with its attention branch (Table 2, Eq. 1-5).

    Args:
        inputs: channels of the head's output.
        rows: a part of Table 2; the last line belongs to the attention branch.
        classes: C.
        se: build the squeeze-and-excitation blocks of the table.
        weighted_mean: multiply S by H * W, which makes the average pooling of F the
            attention-weighted mean of the logits. S itself sums to 1, so that the mean as
            printed shrinks the logits by H * W and stalls training.
    """

    def __init__(
        self, inputs: int, rows: Sequence[Row], classes: int, *, se: bool, weighted_mean: bool
    ) -> None:
        super().__init__()
        self.localization = _bottlenecks(inputs, rows[:-1], se=se)
        self.classifier = nn.Conv2d(rows[-2].out, classes, 1)
        self.attention = _bottlenecks(rows[-2].out, rows[-1:], se=se)
        self.gate = nn.Conv2d(rows[-1].out, 1, 1)
        self.attention_classifier = nn.Linear(rows[-1].out, classes)
        self.weighted_mean = weighted_mean

    def features(self, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return X_loc (N, 96, H, W), S (N, 1, H, W), scaled as said, and X (N, 96, H, W)."""
        local = self.localization(head)
        x = self.attention(local)
        s = spatial_attention(x, self.gate(x))
        if self.weighted_mean:
            s = s * (s.shape[-2] * s.shape[-1])
        return local, s, x

    def full(self, head: Tensor) -> Tensor:
        """Return the whole F (N, C, H, W): slow, the oracle of the fast path."""
        local, s, _ = self.features(head)
        logits: Tensor = self.classifier(local)
        return logits * s

    def pooled_logits(self, weighted: Tensor, s: Tensor) -> Tensor:
        """Return mean(F) (N, C) from S * X_loc, without building F: everything is linear."""
        weight, bias = self._classifier_parameters()
        with _full_precision(weighted):
            return weighted.float().mean((2, 3)) @ weight.T + s.float().mean((2, 3)) * bias

    def heatmap(self, weighted: Tensor, s: Tensor, gamma: Tensor) -> Tensor:
        """Return M = F[..., gamma] (N, H, W), one dot product a location."""
        weight, bias = self._classifier_parameters()
        with _full_precision(weighted):
            dot = torch.einsum("nchw,nc->nhw", weighted.float(), weight[gamma])
            return dot + s.float().squeeze(1) * bias[gamma, None, None]

    def _classifier_parameters(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.classifier.weight, self.classifier.bias
        assert bias is not None
        return weight.flatten(1), bias


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Leave autocast: sums of logits and the order of activations want float32."""
    if not torch.is_autocast_enabled(x.device.type):
        return nullcontext()  # exported graphs would have a node for it
    return torch.autocast(x.device.type, enabled=False)


def spatial_attention(x: Tensor, gate: Tensor) -> Tensor:
    """Return S (N, 1, H, W), which sums to 1 over the map (Eq. 1-5).

    Args:
        x: X, the output of the attention bottleneck (N, 96, H, W).
        gate: G~, X compacted to one channel (N, 1, H, W).
    """
    n, _, h, w = x.shape
    g = gate.flatten(2).softmax(-1)  # (1)
    channel = (x.flatten(2) * g).sum(-1).softmax(-1)  # (2), (3)
    s = (x * channel[..., None, None]).sum(1)  # (4)
    return s.flatten(1).softmax(-1).view(n, 1, h, w)  # (5)


class Logits(NamedTuple):
    """The six supervised outputs: (N, 3, C) each, branches in the order 63, 95, 111."""

    localization: Tensor
    attention: Tensor


class Features(NamedTuple):
    """What the outputs need of each branch: S * X_loc (N, 96, H, W), S (N, 1, H, W), X's mean."""

    weighted: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]
    pooled: tuple[Tensor, ...]


class AnchorNet(nn.Module):
    """The light localizer of section 3.2 with receptive fields of 63, 95 and 111 px.

    Args:
        classes: number of classes C.
        se: False leaves out squeeze-and-excitation (for ablations).
        weighted_mean: False takes S as printed (for ablations); see `Branch`.

    Example:
        >>> net = AnchorNet(classes=10).eval()
        >>> logits = net(torch.zeros(2, 3, 224, 224))
        >>> logits.localization.shape, logits.attention.shape
        (torch.Size([2, 3, 10]), torch.Size([2, 3, 10]))
    """

    scales = SCALES

    def __init__(self, classes: int = 1000, *, se: bool = True, weighted_mean: bool = True) -> None:
        super().__init__()
        if classes < 1:
            raise SettingsError(f"AnchorNet needs at least one class, got {classes}")
        self.classes = classes
        self.stem = _conv(
            3, STEM.out, kernel_size=STEM.kernel, stride=STEM.stride, activation_layer=HS
        )
        self.head = _bottlenecks(STEM.out, HEAD, se=se)
        self.branches = nn.ModuleList(
            Branch(HEAD[-1].out, BRANCHES[scale], classes, se=se, weighted_mean=weighted_mean)
            for scale in self.scales
        )
        self._initialize()

    def _initialize(self) -> None:
        # As MobileNetV3, whose bottlenecks these are.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
        for branch in self._branches():
            nn.init.normal_(branch.classifier.weight, 0, 0.01)
            # One output: by fan-out its weights would be so large that the softmax of (1) picks
            # one location from the first step on, and the slightest rounding another.
            nn.init.normal_(branch.gate.weight, 0, 0.01)

    def _branches(self) -> list[Branch]:
        return list(self.branches)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Logits:
        """Return the six sets of logits that training supervises.

        Args:
            images: normalized pixels (N, 3, H, W), at least 111 px a side.
        """
        features = self.features(images)
        return Logits(self.logits(features), self.attention_logits(features))

    def full(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return F of each branch, (N, C, H, W): the slow oracle of `features`."""
        head = self.head(self.stem(images))
        return tuple(branch.full(head) for branch in self._branches())

    def features(self, images: Tensor) -> Features:
        """Return what `logits`, `attention_logits` and `heatmaps` read."""
        head = self.head(self.stem(images))
        found = []
        for branch in self._branches():
            local, s, x = branch.features(head)
            found.append((local * s, s, x.mean((2, 3))))
        return Features(*zip(*found, strict=True))

    def logits(self, features: Features) -> Tensor:
        """Return the logits of the localization branches (N, 3, C)."""
        parts = zip(self._branches(), features.weighted, features.attention, strict=True)
        return torch.stack([branch.pooled_logits(local, s) for branch, local, s in parts], 1)

    def attention_logits(self, features: Features) -> Tensor:
        """Return the logits of the attention branches (N, 3, C)."""
        parts = zip(self._branches(), features.pooled, strict=True)
        return torch.stack([branch.attention_classifier(x) for branch, x in parts], 1)

    def localize(self, images: Tensor) -> tuple[Tensor, Features]:
        """Return the logits (N, 3, C) and the features that `heatmaps` reads.

        The C-channel tensor F is never built: 0.39 instead of 0.49 GMACs at 1,000 classes.
        """
        features = self.features(images)
        return self.logits(features), features

    def heatmaps(self, features: Features, gamma: Tensor) -> tuple[Tensor, ...]:
        """Return M = F[..., gamma] of each branch, (N, H, W).

        Args:
            features: from `features`.
            gamma: class index of each image (N,), int64.
        """
        return tuple(
            branch.heatmap(weighted, s, gamma)
            for branch, weighted, s in zip(
                self._branches(), features.weighted, features.attention, strict=True
            )
        )

    def fuse(self) -> AnchorNet:
        """Fold every batch normalization into its convolution, in place; for inference only."""
        self.eval()
        for module in self.modules():
            if isinstance(module, Conv2dNormActivation) and isinstance(module[1], nn.BatchNorm2d):
                module[0] = fuse_conv_bn_eval(module[0], module[1])
                module[1] = nn.Identity()
        return self
