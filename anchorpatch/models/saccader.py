"""Saccader (Elsayed et al., 2019): hard attention over the patches of BagNet-77-lowD.

An attention network looks at the whole map of features; from what it finds, a cell picks one
place after the other. A class is judged by the mean of BagNet's logits at the picked places.

The page that defines the network leaves open what the attention network reads and where biases
are. This reading gives its 35,523,112 parameters and 19.50 GMACs exactly:

- The attention network reads the 2048 channels before BagNet's bottleneck. Its convolutions have
  no bias, as batch normalization follows; the 3 x 3 ones are padded by 2, which keeps the map.
- Its 512 channels come after BagNet's 512 in the input of the mixing convolution.
- The cell reads the mixed features, both times.
- Logits are read from BagNet's full map, which the GMACs count.

Shapes use N images, C classes, G glimpses, D mixed features, and P = H * W places: 361 in 19 rows
for 224 x 224 pixels. A place is its row-major index into the map.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from anchorpatch.errors import SettingsError
from anchorpatch.models.bagnet import WIDTH, BagNet

#: Places that an image is judged by.
GLIMPSES: Final = 6

#: What a place loses that was visited: more than any logit.
_VISITED: Final = 1e5


class Maps(NamedTuple):
    """What the cell works on.

    Attributes:
        mixed: features of each place (N, D, P), float32.
        features: BagNet's, of each place (N, D, P).
        logits: of each place (N, C, P), BagNet's.
        width: W, places of a row.
    """

    mixed: Tensor
    features: Tensor
    logits: Tensor
    width: int


class Glimpses(NamedTuple):
    """The places that were picked, in their order.

    Attributes:
        places: row-major indices into the map (N, G), int64.
        logits: of the classes at these places (N, G, C).
        log_prob: logarithm of the probability that sampling picks the place, given the earlier
            ones (N, G), float32.
    """

    places: Tensor
    logits: Tensor
    log_prob: Tensor


class Cell(nn.Module):
    """Scores the places of an image, given those that were visited.

    Args:
        channels: D.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.location = nn.Conv1d(channels, 1, 1, bias=False)
        self.scale = 1 / math.sqrt(channels)

    def saliency(self, mixed: Tensor) -> Tensor:
        """Return the logits (N, P) of the location weights, no place being visited."""
        logits: Tensor = self.location(mixed)[:, 0].float() * self.scale
        return logits

    def forward(self, mixed: Tensor, saliency: Tensor, visited: Tensor) -> Tensor:
        """Return the logit of each place (N, P).

        Args:
            mixed: features (N, D, P), float32.
            saliency: of `saliency`; it is the same for every glimpse.
            visited: 1 at each place that was picked, else 0 (N, P), float32.
        """
        penalty = _VISITED * visited
        # Products and sums, not matrix products: those would compute in bfloat16 with autocast.
        location = (saliency - penalty).softmax(-1)
        channel = (mixed * location[:, None]).sum(-1).softmax(-1)
        return (mixed * channel[:, :, None]).sum(1) - penalty


class Saccader(nn.Module):
    """BagNet-77-lowD, the attention network, the mixing convolution and the cell.

    Args:
        classes: C.
        width: see `BagNet`; 64 is the paper's.
        glimpses: places of `forward`.

    Attributes:
        theta: side of the patch that is read at a place, in pixels.
        stride: distance of neighboring patches in pixels.
        bagnet: the network that classifies patches.

    Raises:
        SettingsError: a number that gives no network.

    Example:
        >>> net = Saccader(classes=10, width=4).eval()
        >>> places, logits, _ = net.look(net.maps(torch.zeros(2, 3, 101, 109)), 5)
        >>> places.shape, logits.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 10]))
    """

    def __init__(
        self, classes: int = 1000, *, width: int = WIDTH, glimpses: int = GLIMPSES
    ) -> None:
        super().__init__()
        if glimpses < 1:
            raise SettingsError(f"Saccader: expected at least one glimpse, got {glimpses}")
        self.bagnet = BagNet(77, classes, width=width)
        self.theta, self.stride = self.bagnet.theta, self.bagnet.stride
        self.default_glimpses = glimpses
        channels = self.bagnet.channels
        self.attention = nn.Sequential(
            *_attention_group(self.bagnet.wide_channels, 2 * channels),
            *_attention_group(2 * channels, channels),
        )
        self.mix = nn.Conv2d(2 * channels, channels, 1)
        self.cell = Cell(channels)

    def maps(self, images: Tensor) -> Maps:
        """Run everything but the cell on normalized pixels (N, 3, y, x).

        BagNet gets its gradients from the logits alone, not from what chooses the places.
        """
        wide = self.bagnet.wide_features(images)
        features = self.bagnet.bottleneck(wide)
        mixed = self.mix(torch.cat((features.detach(), self.attention(wide.detach())), 1))
        logits = self.bagnet.classifier(features)
        return Maps(
            mixed.flatten(2).float(), features.flatten(2), logits.flatten(2), mixed.shape[-1]
        )

    def follow(self, maps: Maps, places: Tensor) -> Tensor:
        """Return what the cell says of all places, when these are visited one after the other.

        Args:
            maps: of `maps`.
            places: (N, G), int64.

        Returns:
            Logits of the places (N, G, P): row g is given the first g of ``places``.
        """
        saliency = self.cell.saliency(maps.mixed)
        visited = torch.zeros_like(saliency)
        rows = []
        for g in range(places.shape[1]):
            rows.append(self.cell(maps.mixed, saliency, visited))
            visited = visited.scatter(1, places[:, g : g + 1], 1.0)
        return torch.stack(rows, 1)

    def look(
        self,
        maps: Maps,
        count: int | None = None,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Glimpses:
        """Look at the best places of each image, no place twice.

        Args:
            maps: of `maps`.
            count: G; None for ``glimpses``, or all places where there are fewer.
            sample: draw each place from the softmax of the cell's logits instead of taking the
                best one (of equal ones the first).
            generator: on the CPU, draws the samples; the default is torch's own. Everything is
                drawn there, so that a device changes nothing about the draw.

        Raises:
            SettingsError: the map has fewer places.
        """
        n, _, size = maps.mixed.shape
        count = min(self.default_glimpses, size) if count is None else count
        if not 1 <= count <= size:
            raise SettingsError(f"Saccader: expected 1 to {size} glimpses, got {count}")
        noise = _gumbel((count, n, size), generator, maps.mixed.device) if sample else None
        saliency = self.cell.saliency(maps.mixed)
        visited = torch.zeros_like(saliency)
        picked, log_probs = [], []
        for g in range(count):
            logits = self.cell(maps.mixed, saliency, visited)
            scores = logits.detach() if noise is None else logits.detach() + noise[g]
            place = scores.argmax(-1, keepdim=True)
            picked.append(place)
            log_probs.append(logits.log_softmax(-1).gather(1, place))
            visited = visited.scatter(1, place, 1.0)
        places = torch.cat(picked, 1)
        index = places[:, None].expand(-1, maps.logits.shape[1], -1)
        at_places = maps.logits.gather(2, index).transpose(1, 2)
        return Glimpses(places, at_places, torch.cat(log_probs, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized pixels (N, 3, y, x) to logits (N, C), means over the glimpses.

        An image with fewer places than glimpses is seen whole.
        """
        return self.look(self.maps(images)).logits.mean(1)


def _attention_group(inputs: int, outputs: int) -> list[nn.Module]:
    """Return a 1 x 1 and a dilated 3 x 3 convolution, each with normalization and ReLU."""
    return [
        Conv2dNormActivation(inputs, outputs, 1, padding=0),
        Conv2dNormActivation(outputs, outputs, 3, padding=2, dilation=2),
    ]


def _gumbel(
    shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Draw noise whose arg max with logits is a draw from their softmax."""
    drawn = torch.empty(shape).exponential_(generator=generator)
    # An exact 0 would become infinite, and beat what keeps visited places out.
    noise = -drawn.clamp_(min=torch.finfo(drawn.dtype).tiny).log()
    # From page-locked memory, as the host would wait for the GPU otherwise.
    return (noise.pin_memory() if device.type == "cuda" else noise).to(device, non_blocking=True)


def saccader(classes: int = 1000) -> Saccader:
    """Return Saccader: 35.5 M parameters, 19.5 GMACs at 224 x 224 px."""
    return Saccader(classes)
