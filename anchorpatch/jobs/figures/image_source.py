"""Where figures take their images from: a labelled folder, or the crops that shards store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import DataError, ShardError
from anchorpatch.images.folder import ImageFolder, scan_folder
from anchorpatch.images.loader import load_batches
from anchorpatch.settings import CropSettings
from anchorpatch.shards.layout import decode_text
from anchorpatch.shards.reader import ShardReader

__all__ = ["Crops", "ImageSource"]


class Crops(NamedTuple):
    """Images of a source.

    Attributes:
        rows: of the source (n,), int64; images that cannot be decoded are missing.
        pixels: the 224 px crops that AnchorNet sees, uint8 (n, 224, 224, 3).
        labels: class index (n,), int64.
    """

    rows: NDArray[np.int64]
    pixels: Tensor
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Labelled images, of which any can be read.

    Attributes:
        name: of the folder, for people.
        classes: names of the classes, which labels index.
        labels: class index of each image (n,), int64.
    """

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    _from: ImageFolder | ShardReader
    _workers: int = 0
    _crop: CropSettings | None = None

    @classmethod
    def of_folder(
        cls,
        data: Path,
        split: str,
        *,
        labels: Path | None = None,
        workers: int = 0,
        crop: CropSettings | None = None,
    ) -> ImageSource:
        """Take the images of DATA/SPLIT.

        Args:
            data: folder that holds the split.
            split: name of its folder.
            labels: CSV with the labels of a flat split folder.
            workers: processes that decode.
            crop: how an image becomes a crop; None for the defaults.

        Raises:
            DataError: the folder or the labels are not as expected.
        """
        folder = scan_folder(data, split, labels, allow_empty=True)
        labels_of = folder.labels.astype(np.int64)
        return cls(str(folder.root), folder.classes, labels_of, folder, workers, crop)

    @classmethod
    def of_shards(cls, reader: ShardReader) -> ImageSource:
        """Take the crops that shards store.

        Raises:
            ShardError: they store none.
        """
        if not reader.has_images:
            raise ShardError(
                f"{reader.folder}: the images are not stored: extract with --store-images, or "
                "name the images' folder with --data"
            )
        return cls(str(reader.folder), reader.classes, reader.label.astype(np.int64), reader)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, row: int) -> str:
        """Return an image's path below the split folder."""
        if isinstance(self._from, ImageFolder):
            return self._from.path(row)
        return decode_text(self._from.path[row])

    def pixels(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """Read a few images in this process: the crops, uint8 (n, 224, 224, 3).

        Raises:
            DataError: one of them cannot be decoded.
            CorruptShard: a shard cannot be read.
        """
        source = replace(self, _workers=0)
        crops = list(source.batches(rows, max(1, len(rows))))
        found = crops[0].rows.tolist() if crops else []
        for row in rows:
            if row not in found:
                raise DataError(f"{self.name}/{self.path(row)}: cannot be decoded")
        return crops[0].pixels.numpy()

    def batches(self, rows: Sequence[int], size: int) -> Iterator[Crops]:
        """Read images in the order of their rows; those that cannot be decoded are left out.

        Args:
            rows: of the images.
            size: images in a batch.

        Raises:
            CorruptShard: a shard cannot be read.
        """
        parts = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        if isinstance(self._from, ShardReader):
            for part in parts:
                pixels = torch.from_numpy(np.stack([self._from.image(row) for row in part]))
                found = np.array(part, np.int64)
                yield Crops(found, pixels, self.labels[found])
            return
        workers = min(self._workers, len(parts))
        with closing(load_batches(self._from, parts, workers=workers, crop=self._crop)) as loaded:
            for batch in loaded:
                if len(batch.index):
                    yield Crops(batch.index, batch.pixels, self.labels[batch.index])
