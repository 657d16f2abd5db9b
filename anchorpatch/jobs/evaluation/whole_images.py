"""The whole images that shards were made from: the 224 px crops that AnchorNet saw."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anchorpatch.errors import DataError
from anchorpatch.images.folder import ImageFolder
from anchorpatch.images.loader import load_batches
from anchorpatch.jobs.evaluation.patch_scores import ImageBatch
from anchorpatch.settings import CROP
from anchorpatch.shards.batches import load_rows
from anchorpatch.shards.reader import ShardReader

__all__ = ["WholeImages", "find_whole_images"]


class _Crops(NamedTuple):
    """Whole crops for `load_rows`: rows of images (n,), int64."""

    rows: NDArray[np.int64]
    scale: int = CROP


@dataclass(frozen=True)
class WholeImages:
    """The crop of every image of the shards, in their order.

    Attributes:
        reader: of the shards.
        folder: the images' files; None where the shards hold the crops.
    """

    reader: ShardReader
    folder: ImageFolder | None = None

    @property
    def source(self) -> str:
        """Where the crops come from, for people."""
        return f"the images in {self.folder.root}" if self.folder else "the stored crops"

    def batches(
        self, rows: NDArray[np.int64], size: int, *, workers: int = 0, pin_memory: bool = False
    ) -> Generator[ImageBatch, None, None]:
        """Read crops in batches.

        Args:
            rows: of the images (n,), int64.
            size: images in a batch.
            workers: processes that decode files; crops are read by threads.
            pin_memory: put the pixels into page-locked memory, for copies to a GPU.

        Raises:
            DataError: a file cannot be decoded.
            CorruptShard: a shard cannot be read.
        """
        labels = self.reader.label.astype(np.int64)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        if self.folder is None:
            requests = [_Crops(part) for part in parts]
            loaded = load_rows(self.reader, requests, threads=2, pin_memory=pin_memory)
            with closing(loaded):
                for request, (pixels, _) in loaded:
                    yield ImageBatch(request.rows, pixels, labels[request.rows])
            return
        decoded = load_batches(
            self.folder,
            [part.tolist() for part in parts],
            workers=workers,
            crop=self.reader.settings.crop,
            pin_memory=pin_memory,
        )
        with closing(decoded):
            for batch in decoded:
                if batch.bad:
                    row, reason = batch.bad[0]
                    raise DataError(
                        f"{self.folder.root / self.folder.path(row)}: expected the image that "
                        f"the shards were made from, cannot be read ({reason}); restore it, or "
                        "leave the whole images out with --no-whole"
                    )
                yield ImageBatch(batch.index, batch.pixels, labels[batch.index])


def find_whole_images(reader: ShardReader, data: Path, split: str) -> WholeImages | str:
    """Return the crops of the shards, else the files below DATA/SPLIT by the same paths.

    Returns:
        A sentence for people where there is neither.
    """
    if reader.has_images:
        return WholeImages(reader)
    root = data / split
    without = f"{reader.folder} holds no whole images"
    advice = "extract with --store-images, or name the images' folder with --data"
    if not root.is_dir():
        return f"{without}, and there is no folder {root}: {advice}"
    missing = [path for path in reader.path.tolist() if not (root / path.decode()).exists()]
    if missing:
        return (
            f"{without}, and {len(missing):,} of its {len(reader):,} images are not in {root}, "
            f"such as {missing[0].decode()}: {advice}"
        )
    sizes = np.zeros(len(reader), np.int64)
    folder = ImageFolder(root, split, reader.path, reader.label, sizes, reader.classes)
    return WholeImages(reader, folder)
