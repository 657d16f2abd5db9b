"""One shard as a file: opened and checked in one way by all who read it, its pixels mapped."""

from __future__ import annotations

import io
import math
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from anchorpatch.errors import CorruptShard, ShardError, reason_of
from anchorpatch.settings import CROP, SCALES
from anchorpatch.shards.layout import (
    MANIFEST_NAME,
    ShardHeader,
    expected_datasets,
    read_attributes,
    shard_name,
)

if TYPE_CHECKING:
    from anchorpatch.shards.manifest import Manifest, ShardEntry

__all__ = [
    "Maps",
    "ShardFile",
    "Survey",
    "check_size",
    "decode_patch",
    "open_shard",
    "read_table",
    "stored_paths",
    "survey",
]

_Table = dict[str, NDArray[Any]]


def check_size(path: Path, expected: int) -> None:
    """Raise CorruptShard unless a shard is there and has its size in bytes."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptShard(f"{path}: missing: run the same extract again") from None
    except OSError as error:
        raise CorruptShard(f"{path}: cannot read: {reason_of(error)}") from error
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
        # Through a file of Python's, as HDF5 would lock it: shards never change, many network
        # filesystems have no locks, and a process may have the file open in another way too.
        with path.open("rb") as raw, h5py.File(raw, "r") as file:
            yield file
    except ShardError as error:
        raise type(error)(f"{path}: {error}") from error
    except FileNotFoundError:
        raise CorruptShard(f"{path}: missing") from None
    except Exception as error:  # h5py raises nearly anything, by the damage
        raise CorruptShard(
            f"{path}: expected a shard, cannot be read: {reason_of(error)}"
        ) from error


@dataclass(frozen=True)
class ShardFile:
    """Where the large datasets of a shard lie.

    Attributes:
        places: offset in the file in bytes, and shape, of each dataset of pixels.
        blob_offsets: for codec jpeg, where each patch starts in the blob, by scale.
    """

    places: Mapping[str, tuple[int, tuple[int, ...]]]
    blob_offsets: Mapping[int, NDArray[np.int64]]

    def view(self, file: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """Return a large dataset as a view into the bytes of the file."""
        offset, shape = self.places[name]
        return file[offset : offset + math.prod(shape)].reshape(shape)


class Survey(NamedTuple):
    """What a shard holds beside the pixels, and what is wrong with it.

    Attributes:
        file: where the pixels lie.
        tables: columns of ``images`` and ``patches/T``, by group.
        problems: what was expected and what was found; nothing of the shard may be used
            unless this is empty.
    """

    file: ShardFile
    tables: dict[str, _Table]
    problems: list[str]


def survey(manifest: Manifest, entry: ShardEntry) -> Survey:
    """Open a shard and check all of it but the pixels, first what is declared, then the values.

    What HDF5 declares is never trusted: a dataset may be a link to another file, or claim more
    bytes than there are. Takes some milliseconds; nothing larger than the file is allocated.

    Args:
        manifest: of the split.
        entry: of the shard.

    Raises:
        CorruptShard: a dataset is missing, or not stored as the schema says.
        ShardError: another format version.
    """
    with open_shard(manifest.folder / entry.name) as file:
        header, files_sha256 = read_attributes(file)
        expected = expected_datasets(header.settings, entry.images, entry.patches)
        names = dict.fromkeys(name.rpartition("/")[0] for name in expected)
        groups = {name: _group(file, name) for name in names}
        found = {
            name: _find(groups[name.rpartition("/")[0]], name, *like, entry.bytes)
            for name, like in expected.items()
        }
        tables: dict[str, _Table] = {"images": {}, **{f"patches/{s}": {} for s in SCALES}}
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        offsets: dict[int, NDArray[np.int64]] = {}
        for name, dataset in found.items():
            group, _, column = name.rpartition("/")
            if column in ("pixels", "blob"):
                places[name] = dataset.id.get_offset() or 0, dataset.shape
            elif column == "offset":
                offsets[int(group.rpartition("/")[2])] = dataset[:]
            elif group in tables:
                tables[group][column] = dataset[:]
        skipped = len(found["skipped/path"])
    problems = _header_problems(manifest, entry, header, files_sha256, skipped)
    problems += _image_problems(tables["images"], header)
    for scale in SCALES:
        problems += _patch_problems(tables["images"], tables[f"patches/{scale}"], scale)
    for scale, offset in offsets.items():
        size = places[f"patches/{scale}/blob"][1][0]
        if offset[0] != 0 or offset[-1] != size or (offset[1:] < offset[:-1]).any():
            problems.append(
                f"patches/{scale}/offset: expected to rise from 0 to {size}, the bytes of the "
                "blob, found others"
            )
    return Survey(ShardFile(places, offsets), tables, problems)


def stored_paths(path: Path) -> list[bytes]:
    """Return the paths in a shard that may not be what the manifest says, the skipped ones too.

    Raises:
        ShardError: they cannot be read.
    """
    with open_shard(path) as file:
        size = path.stat().st_size
        groups = [_group(file, name) for name in ("images", "skipped")]
        found = [_find(group, f"{group.name}/path", "S", (None,), size) for group in groups]
        return [stored for dataset in found for stored in dataset[:].tolist()]


def read_table(path: Path, group: str, columns: Iterable[str]) -> _Table:
    """Read ``images`` or ``patches/T`` of a shard that `survey` found to be in order.

    Raises:
        CorruptShard: it cannot be read any more.
    """
    with open_shard(path) as file:
        return {name: file[f"{group}/{name}"][:] for name in columns}


def _member(group: h5py.Group, name: str) -> Any:
    """Return a member of a group that is stored in it, and not linked from somewhere else."""
    if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise CorruptShard(
            f"{group.name.lstrip('/')}/{name}: expected data of this file, found a soft or "
            "external link"
        )
    return group[name]


def _group(file: h5py.File, name: str) -> h5py.Group:
    found = file
    for part in name.split("/"):
        found = _member(found, part)
        if not isinstance(found, h5py.Group):
            raise CorruptShard(f"{name}: expected a group, found a dataset")
    return found


def _find(
    group: h5py.Group, name: str, dtype: str, shape: tuple[int | None, ...], size: int
) -> h5py.Dataset:
    """Return a dataset, of which all that is declared is as the schema says.

    Args:
        group: that it is in.
        name: of the dataset, from the root of the file.
        dtype: its type in the file; "S" for strings of any fixed length.
        shape: its shape; None stands for any length.
        size: of the file in bytes.

    Raises:
        CorruptShard: it is not.
        KeyError: there is none.
    """
    found = _member(group, name.rpartition("/")[2])
    if not isinstance(found, h5py.Dataset):
        raise CorruptShard(f"{name}: expected a dataset, found a group")
    alike = found.shape is not None and len(found.shape) == len(shape)
    alike = alike and all(b in (None, a) for a, b in zip(found.shape, shape, strict=True))
    if dtype == "S":
        alike = alike and found.dtype.kind == "S"
    else:
        alike = alike and found.id.get_type().equal(h5py.h5t.py_create(np.dtype(dtype)))
    if not alike:
        rows = "any number of" if shape[0] is None else f"{shape[0]}"
        raise CorruptShard(
            f"{name}: expected {rows} rows as format 1 has them, found {found.dtype} {found.shape}"
        )
    created = found.id.get_create_plist()
    if created.get_layout() != h5py.h5d.CONTIGUOUS or created.get_external_count():
        raise CorruptShard(
            f"{name}: expected one contiguous piece of this file, found a chunked, compact, "
            "virtual or external dataset"
        )
    needed = math.prod(found.shape) * found.dtype.itemsize
    offset = found.id.get_offset() if needed else 0
    if offset is None or offset + needed > size:
        raise CorruptShard(f"{name} is not in the file, or reaches beyond its end")
    return found


def _header_problems(
    manifest: Manifest, entry: ShardEntry, header: ShardHeader, files_sha256: str, skipped: int
) -> list[str]:
    problems = [
        f"its {name} are not those of {MANIFEST_NAME}"
        for name in ("split", "classes", "network_classes", "settings", "weights_sha256")
        if getattr(header, name) != getattr(manifest.header, name)
    ]
    if files_sha256 != entry.files_sha256:
        problems.append(f"its file list is not that of {MANIFEST_NAME}")
    number = entry.name.rpartition("-")[2].partition(".")[0]
    # `verify` names a shard that is none of the split.
    if number.isdecimal() and shard_name(manifest.header.split, int(number)) == entry.name:
        start, stop = manifest.shard_range(int(number))
        if entry.images + skipped != stop - start:
            problems.append(
                f"expected {stop - start} images and skipped images, found {entry.images} + "
                f"{skipped}"
            )
    return problems


def _image_problems(images: _Table, header: ShardHeader) -> Iterator[str]:
    for name, classes in (
        ("label", header.classes),
        ("predicted", header.network_classes),
        ("branch_class", header.network_classes),
    ):
        if ((images[name] < 0) | (images[name] >= len(classes))).any():
            yield f"images/{name}: expected 0 to {len(classes) - 1}, found others"
    if not np.isin(images["scale"], SCALES).all():
        yield f"images/scale: expected {SCALES}, found others"
    probability = images["branch_prob"]
    if not ((probability >= 0) & (probability <= 1)).all():
        yield "images/branch_prob: expected 0 to 1, found others"
    if (images["size"] < 1).any():
        yield "images/size: expected at least 1 px, found others"
    paths = images["path"]
    if (paths[1:] <= paths[:-1]).any():
        yield "images/path: expected each once, in order, found others"


def _patch_problems(images: _Table, patches: _Table, scale: int) -> Iterator[str]:
    rows = np.flatnonzero(images["scale"] == scale)
    count, first = images["count"][rows].astype(np.int64), images["first"][rows]
    m = len(patches["image"])
    if (first != np.cumsum(count) - count).any() or (count < 1).any() or count.sum() != m:
        yield f"images/first, images/count: expected to divide {m} patches of {scale} px"
    elif (patches["image"] != np.repeat(rows, count)).any():
        yield f"patches/{scale}/image: expected the image whose slice it is, found others"
    corner, score = patches["corner"], patches["score"]
    if ((corner < 0) | (corner > CROP - scale)).any():
        yield f"patches/{scale}/corner: expected 0 to {CROP - scale}, found others"
    if not np.isfinite(score).all():
        yield f"patches/{scale}/score: expected numbers, found NaN or infinity"
    same_image = patches["image"][1:] == patches["image"][:-1]
    if (same_image & (score[1:] > score[:-1])).any():
        yield f"patches/{scale}/score: expected the strongest first, found others"


def decode_patch(data: bytes, scale: int) -> NDArray[np.uint8]:
    """Decode a JPEG patch of a shard, uint8 (scale, scale, 3), if it says it is one.

    Raises:
        CorruptShard: it is damaged, or of another size or mode.
    """
    expected = f"expected a JPEG file, RGB of {scale} x {scale} px, found"
    try:
        # Not Image.open: that refuses large pictures with errors and warnings of its own.
        with JpegImageFile(io.BytesIO(data)) as image:
            found, (width, height) = image.mode, image.size
            if (found, width, height) == ("RGB", scale, scale):
                return np.asarray(image)
    except Exception as error:  # Pillow raises nearly anything, by the damage
        raise CorruptShard(
            f"{expected} {len(data):,} bytes that are none: {reason_of(error)}"
        ) from error
    raise CorruptShard(f"{expected} {found} of {width} x {height} px")


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
                    raise CorruptShard(f"{path}: cannot be mapped: {reason_of(error)}") from error
                self._maps[path] = found
                if len(self._maps) > self.limit:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(path)
            return found
