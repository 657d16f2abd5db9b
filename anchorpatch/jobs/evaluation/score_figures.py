"""Top-1, top-5 and loss of decided images: sums that several processes add up, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import NonFiniteError
from anchorpatch.runtime.device import to_device

__all__ = ["PatchFigures", "ScaleFigures", "Sum", "count", "figures_of"]

#: A class of probability 0 counts with the smallest number that has a logarithm.
_TINY: Final = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class ScaleFigures:
    """The figures of images of one scale; shares from 0 to 1.

    Attributes:
        images: each counted once.
        patches: that the network saw.
        top1: share of images whose label is the class of the largest sum; None without images.
        top5: share of images whose label is among the five largest; None without images.
        loss: mean over images of -log of the label's mean probability; None without images.
    """

    images: int
    patches: int
    top1: float | None
    top5: float | None
    loss: float | None

    @property
    def mean_patches(self) -> float | None:
        """Patches an image; None without images."""
        return self.patches / self.images if self.images else None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON knows them."""
        return asdict(self)


@dataclass(frozen=True)
class PatchFigures:
    """The figures of a network on patches: by scale, and over all images.

    Attributes:
        images: each counted once.
        patches: that the network saw.
        top1: share of images that are decided right.
        top5: share of images whose label is among the five largest sums.
        loss: mean over images of -log of the label's mean probability.
        by_scale: the same of the images that chose each scale.
    """

    images: int
    patches: int
    top1: float
    top5: float
    loss: float
    by_scale: dict[int, ScaleFigures]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON knows them."""
        by_scale = {str(scale): figures.to_json() for scale, figures in self.by_scale.items()}
        return {**vars(self), "by_scale": by_scale}


class Sum(IntEnum):
    """Columns of what is summed over images and processes."""

    IMAGES, PATCHES, TOP1, TOP5, LOSS, BAD = range(6)


def count(sums: Tensor, labels: NDArray[Any], device: torch.device) -> Tensor:
    """Return the columns of `Sum` for decided images (6,), without their patches.

    Args:
        sums: of their distributions (n, C).
        labels: class index (n,).
        device: of the sums.
    """
    label = to_device(np.asarray(labels, np.int64), device)[:, None]
    own = sums.gather(1, label)
    # The label's place in the order by falling sum; the lower of two equal classes is first.
    before = (sums > own) | ((sums == own) & (torch.arange(sums.shape[1], device=device) < label))
    place = before.sum(1)
    finite = sums.isfinite().all(1)
    # Distributions sum to 1, so the sum over classes is the number of patches.
    loss = -(own[:, 0] / sums.sum(1)).clamp_min(_TINY).log()
    columns = (finite.new_ones(len(label)), finite.new_zeros(len(label)), place < 1, place < 5)
    return torch.stack([*(c.double() for c in columns), loss, (~finite).double()]).sum(1)


def figures_of(sums: Sequence[float]) -> ScaleFigures:
    """Return the figures of the columns of `Sum`.

    Raises:
        NonFiniteError: the network gave NaN or infinity.
    """
    images, patches, top1, top5, loss, bad = sums
    if bad:
        raise NonFiniteError(
            f"the network gave NaN or infinity for {bad:,.0f} of {images:,.0f} images; "
            "use other weights, or no --amp"
        )
    mean = [value / images if images else None for value in (top1, top5, loss)]
    return ScaleFigures(int(images), int(patches), *mean)
