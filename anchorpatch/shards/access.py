"""One shard as a file: checked, its tables read by h5py, its pixels mapped."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from anchorpatch.errors import CorruptShard, ShardError
from anchorpatch.shards.layout import (
    CROP_SIDE,
    IMAGE_TABLE,
    PATCH_TABLE,
    SCALES,
    ShardSettings,
    read_settings,
)
from anchorpatch.shards.manifest import ShardEntry

__all__ = ["Maps", "ShardFile", "check_size", "empty_table", "open_shard", "read_table"]


def check_size(path: Path, expected: int) -> None:
    """Raise CorruptShard unless a shard is there and has its size in bytes."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptShard(f"{path}: missing: run the same extract again") from None
    except OSError as error:
        raise CorruptShard(f"{path}: cannot read: {error.strerror}") from error
    if size != expected:
        raise CorruptShard(
            f"{path}: expected {expected:,} bytes, found {size:,}: run the same extract again"
        )


@contextmanager
def open_shard(path: Path) -> Iterator[h5py.File]:
    """Open a shard, and turn whatever HDF5 says about a damaged one into one line.

    Raises:
        CorruptShard: it is no HDF5 file, or lacks a part.
        ShardError: another format version.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except ShardError:
        raise
    except FileNotFoundError:
        raise CorruptShard(f"{path}: missing: run the same extract again") from None
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error.args[0] if error.args else error).splitlines()[0]
        raise CorruptShard(f"{path}: expected a shard, cannot be read: {reason}") from error


def empty_table(group: str) -> dict[str, NDArray[Any]]:
    """Return the columns of ``images`` or ``patches/T`` without rows."""
    columns = IMAGE_TABLE if group == "images" else PATCH_TABLE
    table = {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in columns.items()}
    return table | ({"path": np.empty(0, "S1")} if group == "images" else {})


def read_table(path: Path, group: str, rows: int) -> dict[str, NDArray[Any]]:
    """Read the columns of ``images`` or ``patches/T``, which must have so many rows.

    Raises:
        CorruptShard: a column is missing, or is not as the schema says.
    """
    table = {}
    with open_shard(path) as file:
        for name, empty in empty_table(group).items():
            column = file[f"{group}/{name}"][:]
            kind = column.dtype.kind == "S" if name == "path" else column.dtype == empty.dtype
            if not kind or column.shape != (rows, *empty.shape[1:]):
                raise CorruptShard(
                    f"{path}: {group}/{name}: expected {rows} rows as format 1 has them, "
                    f"found {column.dtype} {column.shape}"
                )
            table[name] = column
    return table


@dataclass(frozen=True)
class ShardFile:
    """Where the large datasets of a shard lie.

    Attributes:
        settings: what it was made with.
        places: offset in the file in bytes, and shape, of each dataset of pixels.
        blob_offsets: for codec jpeg, where each patch starts in the blob, by scale.
    """

    settings: ShardSettings
    places: Mapping[str, tuple[int, tuple[int, ...]]]
    blob_offsets: Mapping[int, NDArray[np.int64]]

    @classmethod
    def load(cls, path: Path, entry: ShardEntry) -> ShardFile:
        """Look a shard over.

        Raises:
            CorruptShard: a dataset is missing, or not of the shape that the manifest says.
        """
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        blob_offsets = {}
        with open_shard(path) as file:
            settings = read_settings(file)
            if settings.store_images:
                shape = (entry.images, CROP_SIDE, CROP_SIDE, 3)
                places["images/pixels"] = _place(file, "images/pixels", shape)
            for scale in SCALES:
                m = entry.patches[scale]
                if settings.codec == "raw":
                    name = f"patches/{scale}/pixels"
                    places[name] = _place(file, name, (m, scale, scale, 3))
                elif settings.codec == "jpeg":
                    name = f"patches/{scale}/blob"
                    offset = file[f"patches/{scale}/offset"][:]
                    if offset.shape != (m + 1,) or offset[0] != 0 or (np.diff(offset) < 0).any():
                        raise ValueError(f"patches/{scale}/offset does not fit {m} patches")
                    blob_offsets[scale] = offset
                    places[name] = _place(file, name, (int(offset[-1]),))
        return cls(settings, places, blob_offsets)


def _place(file: h5py.File, name: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    dataset = file[name]
    size = int(np.prod(shape))
    offset = dataset.id.get_offset() if size else 0
    if dataset.shape != shape or dataset.dtype != np.uint8:
        raise ValueError(f"{name}: expected uint8 {shape}, found {dataset.dtype} {dataset.shape}")
    if offset is None or offset + size > os.path.getsize(file.filename):
        raise ValueError(f"{name} is not contiguous, or reaches beyond the end of the file")
    return offset, shape


class Maps:
    """Files mapped into memory, each process its own, the longest unused given up first.

    A map keeps a file descriptor, and a process may have but 1024 of those on many systems,
    fewer than ImageNet's shards. An array that is in use keeps its map alive.
    """

    def __init__(self, limit: int | None = None) -> None:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.limit = limit or max(16, min(soft, 8192) // 2)
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._maps: OrderedDict[Path, NDArray[np.uint8]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._maps)

    def get(self, path: Path) -> NDArray[np.uint8]:
        """Return the bytes of a file.

        Raises:
            CorruptShard: it cannot be mapped.
        """
        if self._process != os.getpid():
            self._reset()  # a fork may have copied the lock while a thread held it
        with self._lock:
            found = self._maps.get(path)
            if found is None:
                try:
                    found = np.asarray(np.memmap(path, np.uint8, "r"))
                except (OSError, ValueError) as error:
                    raise CorruptShard(f"{path}: cannot be mapped: {error}") from error
                self._maps[path] = found
                if len(self._maps) > self.limit:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(path)
            return found
