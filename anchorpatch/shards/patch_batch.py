"""What an extraction finds in a batch of images, on its way into a shard."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anchorpatch.settings import CROP, SCALES

__all__ = ["PatchBatch", "check_batch"]


class PatchBatch(NamedTuple):
    """Results for n images, in the order of their paths; patches padded to K rows.

    Attributes:
        path: relative to the split folder, UTF-8, dtype S (n,).
        label: index into the folders' classes, int32 (n,).
        predicted: gamma, index into the network's classes, int32 (n,).
        scale: chosen theta: 63, 95 or 111, uint8 (n,).
        branch_class: Y of each branch, int32 (n, 3).
        branch_prob: P of each branch, float32 (n, 3).
        size: height and width of the source image in pixels, int32 (n, 2).
        pixels: the crops that AnchorNet saw, uint8 (n, 224, 224, 3).
        counts: patches of each image, int32 (n,).
        corners: top-left (y, x) of each patch in pixels, the strongest first, int (n, K, 2).
        scores: activation of each patch, float32 (n, K).
    """

    path: NDArray[np.bytes_]
    label: NDArray[Any]
    predicted: NDArray[Any]
    scale: NDArray[Any]
    branch_class: NDArray[Any]
    branch_prob: NDArray[Any]
    size: NDArray[Any]
    pixels: NDArray[np.uint8]
    counts: NDArray[Any]
    corners: NDArray[Any]
    scores: NDArray[Any]


def check_batch(batch: PatchBatch) -> None:
    """Raise ValueError unless the arrays of a batch fit together."""
    n = len(batch.path)
    wrong = [name for name, array in zip(batch._fields, batch, strict=True) if len(array) != n]
    if wrong:
        raise ValueError(f"expected {n} rows in every array of the batch, not so in {wrong}")
    if batch.pixels.shape[1:] != (CROP, CROP, 3) or batch.pixels.dtype != np.uint8:
        raise ValueError(
            f"expected crops uint8 (n, {CROP}, {CROP}, 3), "
            f"got {batch.pixels.dtype} {batch.pixels.shape}"
        )
    if not np.isin(batch.scale, SCALES).all():
        raise ValueError(f"expected scales of {SCALES}, got {np.unique(batch.scale).tolist()}")
    if n and not 0 <= batch.counts.min() <= batch.counts.max() <= batch.corners.shape[1]:
        raise ValueError(f"expected 0 to {batch.corners.shape[1]} patches an image")
