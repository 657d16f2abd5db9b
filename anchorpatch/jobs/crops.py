"""What jobs read: the shards of a split, and whole images.

Whole images are the crops that AnchorNet sees, as shards store them or decoded again.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from anchorpatch.errors import DataError, ShardError
from anchorpatch.images.loader import load_batches
from anchorpatch.images.source import ImageSource, open_source, source_of
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import CropSettings
from anchorpatch.shards.dataset import load_rows
from anchorpatch.shards.layout import MANIFEST_NAME, decode_text
from anchorpatch.shards.reader import ShardReader


def open_shards(shards: Path, split: str) -> ShardReader:
    """Open SHARDS/SPLIT to train or evaluate a network on its patches.

    Raises:
        ShardError: there are no shards, or no images in them.
        CorruptShard: a shard cannot be read, or its tables are not as they must be.
    """
    folder = shards / split
    if not (folder / MANIFEST_NAME).is_file():
        raise ShardError(
            f"{folder}: expected shards, found no {MANIFEST_NAME}; create them with "
            f"`anchorpatch extract --split {split} --out {shards}`, or pass another --shards"
        )
    reader = ShardReader(folder)
    if not len(reader):
        raise ShardError(f"{folder}: expected shards with images, found none in them")
    _ = reader.counts  # opens and checks every shard, before anything is computed
    return reader


class Crops(NamedTuple):
    """Whole images.

    Attributes:
        rows: of the source (n,), int64.
        pixels: uint8 (n, S, S, 3), of the side of the source's crops, or rescaled.
        labels: class index (n,), int64.
        size: height and width of each picture that a crop is of, in pixels (n, 2), int32.
    """

    rows: NDArray[np.int64]
    pixels: Tensor
    labels: NDArray[np.int64]
    size: NDArray[np.int32]

    def rescaled(self, side: int, interpolation: str = "bilinear") -> Crops:
        """Return the images in another size; see `rescaled`."""
        return self._replace(pixels=rescaled(self.pixels, side, interpolation))


def rescaled(pixels: Tensor, side: int, interpolation: str = "bilinear") -> Tensor:
    """Return images in another size, antialiased.

    Args:
        pixels: uint8 (n, S, S, 3).
        side: in pixels.
        interpolation: as timm and torchvision call it; "lanczos", which torch lacks, is bicubic
            here.

    Returns:
        uint8 (n, side, side, 3).
    """
    how = InterpolationMode({"lanczos": "bicubic"}.get(interpolation, interpolation))
    images = pixels.permute(0, 3, 1, 2)
    resized: Tensor = v2.functional.resize(images, [side, side], how, antialias=True)
    return resized.permute(0, 2, 3, 1)


class _Stored(NamedTuple):
    """Crops for `load_rows`: their side, and rows of images (n,), int64."""

    scale: int
    rows: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CropSource:
    """Labelled whole images, of which any can be read.

    Attributes:
        name: the folder of the images or shards.
        classes: names of the classes, which labels index.
        labels: class index of each image (n,), int64.
        images: the images' files; None where shards store the crops.
        reader: of the shards that were made from the images; None for a folder alone.
        crop: how a file becomes a crop, or became the stored one.
        workers: processes that decode files.
    """

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    images: ImageSource | None = None
    reader: ShardReader | None = None
    crop: CropSettings = field(default_factory=CropSettings)
    workers: int = 0

    @classmethod
    def of_folder(
        cls,
        data: Path,
        split: str,
        *,
        labels: Path | None = None,
        workers: int = 0,
        crop: CropSettings | None = None,
        files: Path | None = None,
        only_labelled: bool = False,
        report: Reporter | None = None,
    ) -> CropSource:
        """Take the images of DATA/SPLIT.

        Args:
            data: folder that holds the split.
            split: name of its folder.
            labels: CSV with the labels of a flat split folder.
            workers: processes that decode.
            crop: how an image becomes a crop; None for the defaults.
            files: list of images to take instead.
            only_labelled: leave out images without a label.
            report: as of `open_source`.

        Raises:
            DataError: the folder or the labels are not as expected.
        """
        images = open_source(
            data,
            split,
            labels,
            files=files,
            only_labelled=only_labelled,
            allow_empty=True,
            report=report,
        )
        labels_of, crop = images.labels.astype(np.int64), crop or CropSettings()
        name = str(images.root if files is None else files)
        return cls(name, images.classes, labels_of, images, crop=crop, workers=workers)

    @classmethod
    def of_shards(
        cls,
        reader: ShardReader,
        data: Path | None = None,
        *,
        split: str = "",
        workers: int = 0,
        report: Reporter | None = None,
    ) -> CropSource:
        """Take the images that shards were made from: the crops that they store, else the files.

        Args:
            reader: of the shards.
            data: the files lie below DATA/SPLIT by the same paths; None for stored crops alone.
            split: name of the split's folder.
            workers: processes that decode files.
            report: as of `open_source`.

        Raises:
            ShardError: no crops are stored, and ``data`` is None.
            DataError: no crops are stored, and not all of the files are there.
        """
        labels, crop = reader.label.astype(np.int64), reader.settings.crop
        if reader.has_images:
            return cls(str(reader.folder), reader.classes, labels, reader=reader, crop=crop)
        without = f"{reader.folder} holds no whole images"
        advice = "extract with --store-images, or give the image folder with --data"
        if data is None:
            raise ShardError(f"{without}: {advice}")
        try:
            images, missing = source_of(
                data, split, reader.path, reader.label, reader.classes, report
            )
        except DataError as error:
            raise DataError(f"{without}, and {error}: {advice}") from error
        if missing:
            raise DataError(
                f"{without}, and {len(missing):,} of its {len(reader):,} images are not in "
                f"{images.root}, such as {missing[0]}: {advice}"
            )
        return cls(str(images.root), reader.classes, labels, images, reader, crop, workers)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def description(self) -> str:
        """Where the crops come from, as messages and tables say it."""
        return f"the images in {self.images.root}" if self.images else "the stored crops"

    def path(self, row: int) -> str:
        """Return an image's path below the split folder."""
        if self.images is not None:
            return self.images.path(row)
        assert self.reader is not None
        return decode_text(self.reader.path[row])

    def read(self, rows: Sequence[int]) -> Crops:
        """Read a few images in this process, in the order of ``rows``.

        Raises:
            DataError: one of them cannot be decoded.
            CorruptShard: a shard cannot be read.
        """
        source = replace(self, workers=0)
        crops = list(source.batches(rows, max(1, len(rows))))
        found = crops[0].rows.tolist() if crops else []
        for row in rows:
            if row not in found:
                raise DataError(f"{self.name}/{self.path(row)}: cannot be decoded")
        return crops[0]

    def batches(
        self, rows: Sequence[int] | NDArray[np.int64], size: int, *, pin_memory: bool = False
    ) -> Generator[Crops, None, None]:
        """Read images in the order of their rows.

        Images of a folder alone that cannot be decoded are left out; shards have patches of each
        of their images, that must be available.

        Args:
            rows: of the images.
            size: images in a batch.
            pin_memory: put the pixels into page-locked memory, for copies to a GPU.

        Raises:
            DataError: an image that shards were made from cannot be decoded, or has another size.
            CorruptShard: a shard cannot be read.
        """
        wanted = np.asarray(rows, np.int64)
        parts = [wanted[i : i + size] for i in range(0, len(wanted), size)]
        if self.images is None:
            assert self.reader is not None
            requests = (_Stored(self.crop.img_size, part) for part in parts)
            stored = load_rows(self.reader, requests, threads=2, pin_memory=pin_memory, whole=True)
            with closing(stored):
                for request, (pixels, _) in stored:
                    sizes = self.reader.size[request.rows]
                    yield Crops(request.rows, pixels, self.labels[request.rows], sizes)
            return
        decoded = load_batches(
            self.images,
            [part.tolist() for part in parts],
            workers=min(self.workers, len(parts)),
            crop=self.crop,
            pin_memory=pin_memory,
        )
        with closing(decoded):
            for batch in decoded:
                if batch.bad and self.reader is not None:
                    row, reason = batch.bad[0]
                    raise DataError(
                        f"{self.images.name(row)}: expected the image that "
                        f"the shards were made from, cannot be read ({reason}); restore it, or "
                        "leave the whole images out with --no-whole"
                    )
                if self.reader is not None:
                    self._check_sizes(batch.index, batch.size)
                if len(batch.index):
                    labels = self.labels[batch.index]
                    yield Crops(batch.index, batch.pixels, labels, batch.size)

    def _check_sizes(self, rows: NDArray[np.int64], sizes: NDArray[np.int32]) -> None:
        """Raise DataError where a file is not the image that the shards were made from.

        Names such as 00000.jpg are those of other images in other archives too.
        """
        assert self.images is not None
        assert self.reader is not None
        expected = self.reader.size[rows]
        for k in np.flatnonzero((expected != sizes).any(1))[:1].tolist():
            (height, width), (found_height, found_width) = expected[k].tolist(), sizes[k].tolist()
            raise DataError(
                f"{self.images.name(int(rows[k]))}: expected the image that the shards were made "
                f"from, of {width} x {height} px, found one of {found_width} x {found_height} px; "
                "name its folder or archive with --data, or leave the whole images out with "
                "--no-whole"
            )
