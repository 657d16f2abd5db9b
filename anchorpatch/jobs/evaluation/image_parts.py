"""Full batches of patches of one scale, in which an image may lie in several batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.runtime.device import to_device
from anchorpatch.shards.reader import ShardReader

__all__ = ["Part", "ScalePlan", "added_by_image"]


class Part(NamedTuple):
    """One batch of patches of a scale.

    Attributes:
        scale: side of the patches in pixels.
        rows: of the patches among those of the scale (m,), int64.
        lengths: patches in this batch of each of its images (k,), int64.
        decided: rows of the images whose last patch is here, int64.
        first: index of the first of the k images in the plan.
        open: patches of the last image follow.
    """

    scale: int
    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    decided: NDArray[np.int64]
    first: int
    open: bool


@dataclass(frozen=True)
class ScalePlan:
    """The patches of images of one scale in full batches; an image may lie in several.

    Attributes:
        scale: side of the patches in pixels.
        images: rows of the images (n,), int64.
        first: row of the first patch of each image (n,), int64.
        counts: patches of each image (n,), int64.
        size: patches in a batch.
    """

    scale: int
    images: NDArray[np.int64]
    first: NDArray[np.int64]
    counts: NDArray[np.int64]
    size: int

    @classmethod
    def of(
        cls,
        reader: ShardReader,
        scale: int,
        images: NDArray[np.int64],
        size: int,
        most: int | None,
    ) -> ScalePlan:
        """Plan images of the scale, with so many patches of each at ``most``."""
        counts = reader.counts[images].astype(np.int64)
        if most is not None:
            counts = np.minimum(counts, most)
        return cls(scale, images, reader.first[images], counts, size)

    def __iter__(self) -> Iterator[Part]:
        ends = np.cumsum(self.counts)
        total = int(ends[-1]) if len(ends) else 0
        for a in range(0, total, self.size):
            b = min(a + self.size, total)
            patches = np.arange(a, b)
            image = np.searchsorted(ends, patches, side="right")
            lo, hi = int(image[0]), int(image[-1])
            begins = ends[image] - self.counts[image]
            whole = hi if ends[hi] > b else hi + 1
            yield Part(
                scale=self.scale,
                rows=self.first[image] + patches - begins,
                lengths=np.bincount(image - lo),
                decided=self.images[lo:whole],
                first=lo,
                open=whole == hi,
            )


def added_by_image(probabilities: Tensor, part: Part, carry: Tensor | None) -> Tensor:
    """Return the sum of distributions of each image of a batch (k, C).

    Args:
        probabilities: of the patches (m, C).
        part: says which are of one image.
        carry: sum of the first image's patches that went before (C,), where there are some.
    """
    lengths = part.lengths
    if carry is not None:
        # Put in front, a sum goes on patch by patch as if no batch had ended.
        probabilities = torch.cat((carry[None], probabilities))
        lengths = np.concatenate((lengths[:1] + 1, lengths[1:]))
    return torch.segment_reduce(
        probabilities,
        "sum",
        lengths=to_device(lengths, probabilities.device),
        axis=0,
        unsafe=True,
    )
