"""The patches of one scale as a dataset of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from anchorpatch.errors import SettingsError
from anchorpatch.settings import SCALES
from anchorpatch.shards.reader import ShardReader

__all__ = ["PatchDataset"]


class PatchDataset(Dataset[tuple[Tensor, int]]):
    """All patches of one scale, each with the label of its image.

    A `DataLoader` fetches whole batches by one gather, in any number of forked or spawned
    workers.

    Args:
        shards: OUT/SPLIT, or a reader of it.
        scale: 63, 95 or 111.

    Attributes:
        reader: of the shards.
        scale: side of the patches in pixels.
        labels: of the patches, int64 (m,).
        images: row of the image that each patch is of, int64 (m,).
    """

    def __init__(self, shards: ShardReader | Path | str, scale: int) -> None:
        if scale not in SCALES:
            raise SettingsError(f"scale: expected one of {SCALES}, got {scale}")
        self.reader = shards if isinstance(shards, ShardReader) else ShardReader(shards)
        self.scale = scale
        self.images = self.reader.patch_image(scale, np.arange(self.reader.patch_count(scale)))
        self.labels = self.reader.label[self.images].astype(np.int64)

    def __len__(self) -> int:
        """Return how many patches there are."""
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Return a patch, uint8 (T, T, 3), and its label."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return several patches by one gather, as `DataLoader` asks for a batch."""
        pixels = torch.from_numpy(self.reader.patches(self.scale, rows))
        return list(zip(pixels.unbind(0), self.labels[list(rows)].tolist(), strict=True))
