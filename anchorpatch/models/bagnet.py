"""BagNet (Brendel and Bethge, 2019): a ResNet-50 whose convolutions are nearly all 1 x 1.

Nothing is padded, so location (h, w) of the last map sees exactly the pixels
``[8h, 8h + theta) x [8w, 8w + theta)``. The classifier reads each location alone, and its logits
are averaged: how much a patch speaks for a class is the logit at its location.

Shapes use N images, D features, C classes and an H x W map: 24 squared for BagNet-33 and 19
squared for BagNet-77 at 224 x 224 pixels.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from anchorpatch.errors import SettingsError
from anchorpatch.lsp import grid_size
from anchorpatch.settings import STRIDE

#: Channels of the stem, and planes of the first group.
WIDTH: Final = 64

#: Bottlenecks of the groups, and the stride of the first bottleneck of each.
_BLOCKS: Final = (3, 4, 6, 3)
_STRIDES: Final = (2, 2, 2, 1)

#: A bottleneck has so many times its planes as outputs.
_EXPANSION: Final = 4


class _Layout(NamedTuple):
    """Where a receptive field comes from.

    Attributes:
        stem: kernels of the stem's convolutions.
        threes: bottlenecks with a 3 x 3 kernel at the start of each group.
        low: times the width, the features that a 1 x 1 bottleneck leaves before the classifier.
    """

    stem: tuple[int, ...]
    threes: int
    low: int | None


#: By theta, the receptive field in pixels.
_LAYOUTS: Final = {33: _Layout((1, 3), 1, None), 77: _Layout((3,), 2, 8)}


def _conv(
    inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1, relu: bool = True
) -> nn.Module:
    """Return a convolution without padding and bias, batch normalization, and ReLU if wanted."""
    conv: nn.Module = Conv2dNormActivation(
        inputs, outputs, kernel, stride, padding=0, activation_layer=nn.ReLU if relu else None
    )
    return conv


class _Bottleneck(nn.Module):
    """1 x 1, k x k with the stride, 1 x 1, and a shortcut, without padding.

    The shortcut is center-cropped before its own stride: each location of the sum lies at the
    center of its receptive field, and none is computed that the crop would throw away.
    """

    def __init__(self, inputs: int, planes: int, kernel: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * planes
        self.layers = nn.Sequential(
            _conv(inputs, planes),
            _conv(planes, planes, kernel, stride=stride),
            _conv(planes, outputs, relu=False),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else _conv(inputs, outputs, stride=stride, relu=False)
        )
        self.relu = nn.ReLU()
        self.margin = (kernel - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 4 planes, H', W')."""
        m = self.margin
        cropped = x[..., m:-m, m:-m] if m else x
        out: Tensor = self.relu(self.layers(x) + self.shortcut(cropped))
        return out


class BagNet(nn.Module):
    """BagNet-33, or BagNet-77 with a bottleneck before its classifier ("lowD").

    The bottleneck is a 1 x 1 convolution without bias, with batch normalization and ReLU: with
    that, and with no bias but the classifier's, the parameters are those of the original networks.

    Args:
        theta: side of the patch that a location sees in pixels, 33 or 77.
        classes: C.
        width: channels of the stem; all others are multiples of it. Fewer than 64 give a
            smaller network with the same receptive field, which is no BagNet of the paper.

    Attributes:
        theta: see above.
        stride: distance of neighboring patches in pixels.
        channels: D, 2048 for BagNet-33 and 512 for BagNet-77.
        wide_channels: of the map before the bottleneck, 2048.

    Raises:
        SettingsError: a number that gives no network.

    Example:
        >>> import torch
        >>> net = BagNet(33, classes=10, width=4).eval()
        >>> net.logit_map(torch.zeros(2, 3, 49, 57)).shape
        torch.Size([2, 10, 3, 4])
    """

    stride: Final = STRIDE

    def __init__(self, theta: int, classes: int = 1000, *, width: int = WIDTH) -> None:
        super().__init__()
        if theta not in _LAYOUTS:
            raise SettingsError(f"BagNet: expected a receptive field of 33 or 77 px, got {theta}")
        if min(classes, width) < 1:
            raise SettingsError(
                f"BagNet: expected at least one class and one channel, got {classes} and {width}"
            )
        self.theta = theta
        layout = _LAYOUTS[theta]
        self.stem = nn.Sequential(*_stem(layout.stem, width))
        inputs = width
        groups = []
        for group, (count, stride) in enumerate(zip(_BLOCKS, _STRIDES, strict=True)):
            planes = width << group
            blocks = []
            for i in range(count):
                kernel = 3 if i < layout.threes else 1
                blocks.append(_Bottleneck(inputs, planes, kernel, stride if i == 0 else 1))
                inputs = _EXPANSION * planes
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.wide_channels = self.channels = inputs
        self.bottleneck: nn.Module = nn.Identity()
        if layout.low is not None:
            self.channels = layout.low * width
            self.bottleneck = _conv(inputs, self.channels)
        self.classifier = nn.Conv2d(self.channels, classes, 1)
        _initialize(self)

    def wide_features(self, images: Tensor) -> Tensor:
        """Map normalized pixels (N, 3, y, x) to the map before the bottleneck (N, 2048, H, W).

        Raises:
            SettingsError: an image is smaller than a patch.
        """
        grid_size(images.shape[2], images.shape[3], self.theta)
        wide: Tensor = self.groups(self.stem(images))
        return wide

    def features(self, images: Tensor) -> Tensor:
        """Map normalized pixels (N, 3, y, x) to what the classifier reads (N, D, H, W)."""
        features: Tensor = self.bottleneck(self.wide_features(images))
        return features

    def logit_map(self, images: Tensor) -> Tensor:
        """Map normalized pixels (N, 3, y, x) to the logits of each location (N, C, H, W)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized pixels (N, 3, y, x) to logits (N, C), the mean of `logit_map`.

        The classifier is linear, so it reads the mean features and no map of logits is built.
        """
        logits: Tensor = self.classifier(self.features(images).mean((2, 3), keepdim=True))
        return logits.flatten(1)


def _stem(kernels: tuple[int, ...], width: int) -> list[nn.Module]:
    """Return plain convolutions with one batch normalization and ReLU behind the last."""
    layers: list[nn.Module] = []
    inputs = 3
    for kernel in kernels:
        layers.append(nn.Conv2d(inputs, width, kernel, bias=False))
        inputs = width
    return [*layers, nn.BatchNorm2d(width), nn.ReLU()]


def _initialize(net: BagNet) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(net.classifier.weight, std=0.01)
    assert net.classifier.bias is not None
    nn.init.zeros_(net.classifier.bias)


def bagnet33(classes: int = 1000) -> BagNet:
    """Return BagNet-33: 18.3 M parameters, 17.2 GMACs with the map of logits at 224 x 224 px."""
    return BagNet(33, classes)


def bagnet77(classes: int = 1000) -> BagNet:
    """Return BagNet-77-lowD: 20.6 M parameters, 14.1 GMACs with the map of logits at 224 px."""
    return BagNet(77, classes)
