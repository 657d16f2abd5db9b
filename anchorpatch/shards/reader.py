"""Reading the shards of a split as one: tables in memory, pixels by memory map.

HDF5 is asked once for each shard, where its datasets lie in the file. Pixels then come
straight from the page cache, so any number of threads and forked or spawned workers may read
at once. No handle of h5py stays open.
"""

from __future__ import annotations

import resource
import threading
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anchorpatch.errors import CorruptShard, ShardError, reason_of
from anchorpatch.geometry import source_box
from anchorpatch.settings import SCALES
from anchorpatch.shards.layout import IMAGE_TABLE, PATCH_TABLE, open_shard
from anchorpatch.shards.manifest import read_manifest
from anchorpatch.shards.verify import Survey, check_jpeg, check_size, decode_patch, survey
from anchorpatch.text import counted

#: Attributes of a reader that are columns of the image table.
_IMAGE_COLUMNS: Final = {
    "counts" if name == "count" else name: name for name in ("path", *IMAGE_TABLE)
}

_AGAIN: Final = "run the same extract again with --repair"


class ImagePatches(NamedTuple):
    """The patches of one image, strongest first.

    Attributes:
        scale: side theta of the patches in pixels.
        pixels: uint8 (k, theta, theta, 3).
        corners: top-left (y, x) of each in the crop, int16 (k, 2).
        scores: activation of each, float32 (k,).
    """

    scale: int
    pixels: NDArray[np.uint8]
    corners: NDArray[np.int16]
    scores: NDArray[np.float32]


class ShardReader:
    """All shards of a split's folder.

    Rows of images run from 0 to ``len(reader) - 1`` over all shards, rows of patches from 0
    to ``reader.patch_count(scale) - 1`` for each scale. The results do not depend on the
    codec, but that ``jpeg`` loses some detail.

    Opening costs one ``stat`` per shard. Tables and offsets are read on first use, when each
    shard is checked as `verify` checks it, apart from its checksum and its JPEG patches.

    Args:
        folder: OUT/SPLIT.
        partial: also read a split of which some shards are not made yet.

    Attributes:
        classes: the folders; ``label`` indexes it.
        network_classes: the weights' classes; ``predicted`` and ``branch_class`` index it.
        settings: what the shards were made with.
        label, predicted: int32 (n,).
        scale: chosen theta, uint8 (n,).
        branch_class, branch_prob: of each branch, int32 and float32 (n, 3).
        counts: patches of each image, int32 (n,).
        size: height and width of the source image, int32 (n, 2).
        first: first row of each image among the patches of its scale, int64 (n,).
        path: relative to the split folder, UTF-8 bytes (n,).

    Raises:
        ShardError: no manifest, or shards are missing.
        CorruptShard: a shard is not what the manifest says, or no shard at all.
    """

    def __init__(self, folder: Path | str, *, partial: bool = False) -> None:
        self.folder = Path(folder)
        self._manifest = manifest = read_manifest(self.folder)
        self.header = manifest.header
        self.classes = manifest.header.classes
        self.network_classes = manifest.header.network_classes
        self.settings = manifest.header.settings
        self._entries = manifest.entries
        self._files = [self.folder / entry.name for entry in self._entries]
        for path, entry in zip(self._files, self._entries, strict=True):
            check_size(path, entry.bytes)
        missing = manifest.missing()
        if missing and not partial:
            raise ShardError(
                f"{self.folder}: {len(missing)} of {manifest.shard_count} shards are missing "
                f"(first {manifest.shard_path(missing[0]).name}): run the same extract again"
            )
        counts = {
            "images": [entry.images for entry in self._entries],
            **{f"patches/{s}": [entry.patches[s] for entry in self._entries] for s in SCALES},
        }
        # The first row of each shard in all of a table, and at the end the number of rows.
        self._starts = {table: np.cumsum([0, *n], dtype=np.int64) for table, n in counts.items()}
        self._shards: dict[int, Survey] = {}
        self._columns: dict[str, NDArray[Any]] = {}
        self._prepare()

    def _prepare(self) -> None:
        self._map = lru_cache(_map_limit())(_mapped)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many images there are."""
        return int(self._starts["images"][-1])

    def __repr__(self) -> str:
        return f"ShardReader({str(self.folder)!r}): {counted(len(self), 'image')}"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_map", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def __getattr__(self, name: str) -> NDArray[Any]:
        """Return a column of the image table."""
        if name not in _IMAGE_COLUMNS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._column(f"images/{_IMAGE_COLUMNS[name]}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_IMAGE_COLUMNS})

    @property
    def sha256(self) -> list[str]:
        """SHA-256 of each shard, as the manifest has it."""
        return [entry.sha256 for entry in self._entries]

    @property
    def has_images(self) -> bool:
        """Whether the crop of each image is stored."""
        return self.settings.store_images

    def patch_count(self, scale: int) -> int:
        """Return how many patches of a scale there are."""
        return int(self._starts[f"patches/{scale}"][-1])

    def patches(self, scale: int, rows: ArrayLike) -> NDArray[np.uint8]:
        """Gather the pixels of patches.

        Args:
            scale: 63, 95 or 111.
            rows: of patches (m,), in any order.

        Returns:
            uint8 (m, scale, scale, 3).

        Raises:
            IndexError: a row that is not there.
            CorruptShard: a shard cannot be read.
        """
        index = _rows(rows, self.patch_count(scale))
        out = np.empty((len(index), scale, scale, 3), np.uint8)
        # In the order of the file: of each shard at once, and the disk reads ahead.
        order = np.argsort(index, kind="stable")
        shard, local = _locate(self._starts[f"patches/{scale}"], index[order])
        bounds = [*np.flatnonzero(np.diff(shard, prepend=-1)).tolist(), len(shard)]
        for start, stop in pairwise(bounds):
            rows_of_shard, target = local[start:stop], order[start:stop].tolist()
            self._gather(int(shard[start]), scale, rows_of_shard, out, target)
        return out

    def jpegs(self, scale: int, rows: ArrayLike) -> list[bytes]:
        """Return patches as the JPEG files that codec ``jpeg`` stores, in the order of ``rows``.

        Their headers are checked; the pixels are not decoded.

        Raises:
            IndexError: a row that is not there.
            ShardError: another codec.
            CorruptShard: a shard cannot be read.
        """
        if self.settings.codec != "jpeg":
            raise ShardError(
                f"{self.folder}: expected codec jpeg, found {self.settings.codec}: its patches are "
                "not stored as JPEG files"
            )
        index = _rows(rows, self.patch_count(scale))
        found = []
        for shard, row in zip(*_locate(self._starts[f"patches/{scale}"], index), strict=True):
            data = self._blob(int(shard), scale, int(row))
            try:
                check_jpeg(data, scale)
            except CorruptShard as error:
                raise self._corrupt_patch(int(shard), scale, int(row), error) from error
            found.append(data)
        return found

    def corners(self, scale: int, rows: ArrayLike) -> NDArray[np.int16]:
        """Return the top-left (y, x) of patches in the crop, int16 (m, 2)."""
        return self._patch_column(scale, "corner", rows)

    def source_box(self, scale: int, rows: ArrayLike) -> NDArray[np.float64]:
        """Return where patches lie in the pictures that they were cut from.

        Returns:
            x0, y0, x1, y1 of each, float64 (m, 4), in pixels of the picture as it is looked at
            (after EXIF orientation, as ``size``), neither rounded nor clipped; see
            `anchorpatch.geometry.source_box`.
        """
        size = self.size[self.patch_image(scale, rows)]
        return source_box(size, self.corners(scale, rows), scale, self.settings.crop)

    def scores(self, scale: int, rows: ArrayLike) -> NDArray[np.float32]:
        """Return the activation of patches, float32 (m,)."""
        return self._patch_column(scale, "score", rows)

    def patch_image(self, scale: int, rows: ArrayLike) -> NDArray[np.int64]:
        """Return the image that patches are of, as rows of images, int64 (m,)."""
        return self._patch_column(scale, "image", rows)

    def image_patches(self, i: int) -> ImagePatches:
        """Return the patches of an image."""
        i = int(_rows([i], len(self))[0])
        scale = int(self.scale[i])
        rows = np.arange(self.first[i], self.first[i] + self.counts[i])
        return ImagePatches(
            scale, self.patches(scale, rows), self.corners(scale, rows), self.scores(scale, rows)
        )

    def image(self, i: int) -> NDArray[np.uint8]:
        """Return the crop that AnchorNet saw, uint8 (S, S, 3), S = ``settings.img_size``.

        Raises:
            ShardError: the crops are not stored.
        """
        if not self.has_images:
            raise ShardError(
                f"{self.folder}: the images are not stored: extract with --store-images"
            )
        shard, local = _locate(self._starts["images"], _rows([i], len(self)))
        return np.array(self._pixels(int(shard[0]), "images/pixels")[local[0]])

    def _gather(
        self, shard: int, scale: int, rows: NDArray[Any], out: NDArray[Any], target: list[int]
    ) -> None:
        """Put the patches ``rows`` of one shard into the rows ``target`` of ``out``."""
        if self.settings.codec == "raw":
            pixels = self._pixels(shard, f"patches/{scale}/pixels")
            # Row by row into place: as fast as np.take, and without a second copy.
            for k, row in zip(target, rows.tolist(), strict=True):
                out[k] = pixels[row]
        elif self.settings.codec == "image":
            pixels = self._pixels(shard, "images/pixels")
            everywhere = rows + self._starts[f"patches/{scale}"][shard]
            image = self.patch_image(scale, everywhere) - self._starts["images"][shard]
            corner = self.corners(scale, everywhere)
            for k, i, (y, x) in zip(target, image.tolist(), corner.tolist(), strict=True):
                out[k] = pixels[i, y : y + scale, x : x + scale]
        else:
            for k, row in zip(target, rows.tolist(), strict=True):
                try:
                    out[k] = decode_patch(self._blob(shard, scale, row), scale)
                except CorruptShard as error:
                    raise self._corrupt_patch(shard, scale, row, error) from error

    def _blob(self, shard: int, scale: int, row: int) -> bytes:
        """Return a patch of a shard as its JPEG file."""
        blob = self._pixels(shard, f"patches/{scale}/blob")
        offset = self._shard(shard).blob_offsets[scale]
        return blob[offset[row] : offset[row + 1]].tobytes()

    def _pixels(self, shard: int, name: str) -> NDArray[np.uint8]:
        """Return a large dataset of a shard as a view into the file."""
        return self._shard(shard).view(self._map(self._files[shard]), name)

    def _shard(self, index: int) -> Survey:
        if index not in self._shards:
            self._open(index)
        return self._shards[index]

    def _open(self, index: int) -> dict[str, dict[str, NDArray[Any]]]:
        """Open and check a shard, remember where its pixels lie, and return its tables."""
        try:
            found = survey(self._manifest, self._entries[index])
        except CorruptShard as error:
            raise CorruptShard(f"{error}; {_AGAIN}") from error
        if found.problems:
            raise self._corrupt(index, found.problems[0])
        self._shards[index] = found._replace(tables={})
        return found.tables

    def _corrupt(self, shard: int, problem: str) -> CorruptShard:
        return CorruptShard(f"{self._files[shard]}: {problem}; {_AGAIN}")

    def _corrupt_patch(self, shard: int, scale: int, row: int, error: Exception) -> CorruptShard:
        return self._corrupt(shard, f"patches/{scale}/blob: patch {row}: {error}")

    def _patch_column(self, scale: int, name: str, rows: ArrayLike) -> NDArray[Any]:
        index = _rows(rows, self.patch_count(scale))
        return self._column(f"patches/{scale}/{name}")[index]

    def _column(self, name: str) -> NDArray[Any]:
        if name not in self._columns:
            with self._lock:
                if name not in self._columns:
                    self._load_columns(name.rpartition("/")[0])
        return self._columns[name]

    def _load_columns(self, group: str) -> None:
        """Read a table from all shards, and make its rows count over all of them."""
        schema = {"path": ("S1", ()), **IMAGE_TABLE} if group == "images" else PATCH_TABLE
        tables = [{name: np.empty((0, *shape), dtype) for name, (dtype, shape) in schema.items()}]
        for index, path in enumerate(self._files):
            if index not in self._shards:
                tables.append(self._open(index)[group])
                continue
            with open_shard(path) as file:
                tables.append({name: file[f"{group}/{name}"][:] for name in schema})
        columns = {name: np.concatenate([t[name] for t in tables]) for name in schema}
        shard = np.repeat(np.arange(len(self._files)), np.diff(self._starts[group]))
        if group == "images":
            columns["first"] = columns["first"].astype(np.int64)
            for scale in SCALES:
                chosen = columns["scale"] == scale
                columns["first"][chosen] += self._starts[f"patches/{scale}"][shard[chosen]]
        else:
            columns["image"] = columns["image"] + self._starts["images"][shard]
        for name, column in columns.items():
            column.flags.writeable = False
            self._columns[f"{group}/{name}"] = column


def _mapped(path: Path) -> NDArray[np.uint8]:
    """Return the bytes of a file, mapped into memory.

    Raises:
        CorruptShard: it cannot be mapped.
    """
    try:
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError) as error:
        raise CorruptShard(f"{path}: cannot be mapped: {reason_of(error)}") from error


def _map_limit() -> int:
    """Return how many files a reader keeps mapped.

    A map keeps a file descriptor, and a process may have but 1024 of those on many systems, fewer
    than ImageNet's shards. To raise that limit is not a library's to do: it is the whole
    process's, as `anchorpatch finetune` does it. An array that is in use keeps its map alive. Linux
    grants a process 65,530 maps, which have to do for two readers.
    """
    return max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 32768) // 2)


def _locate(
    starts: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the shard of each row, and the row within it; empty shards hold none."""
    shard = np.searchsorted(starts, rows, side="right") - 1
    return shard, rows - starts[shard]


def _rows(rows: ArrayLike, count: int) -> NDArray[np.int64]:
    index = np.atleast_1d(np.asarray(rows))
    if index.size == 0:
        return np.empty(0, np.int64)
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise IndexError(f"expected whole numbers (m,), got {index.dtype} {index.shape}")
    if index.min() < 0 or index.max() >= count:
        raise IndexError(f"expected rows from 0 to {count - 1}, got {index.min()}..{index.max()}")
    return index.astype(np.int64)
