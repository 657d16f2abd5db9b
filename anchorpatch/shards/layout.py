"""The schema of a shard, version 1: every name, type and shape in one place, and who opens one.

::

    SPLIT-00000.h5            attributes: format_version, anchorpatch_version, split, classes,
    │                         network_classes, settings (JSON), weights_sha256, files_sha256
    ├── images/               one row per image, in the order of the sorted relative paths
    │   ├── path              bytes (n,), UTF-8, relative to the split folder
    │   ├── label, predicted  int32 (n,)
    │   ├── scale             uint8 (n,): 63, 95 or 111
    │   ├── branch_class      int32 (n, 3)
    │   ├── branch_prob       float32 (n, 3)
    │   ├── first, count      int32 (n,): the image's rows in patches/SCALE
    │   ├── size              int32 (n, 2): height, width of the source image
    │   └── pixels            uint8 (n, S, S, 3), the crops, with stored images only
    ├── patches/63, 95, 111/  one row per patch, image-major, strongest first
    │   ├── corner            int16 (m, 2): top-left (y, x) in the crop
    │   ├── score             float32 (m,): activation
    │   ├── image             int32 (m,): row in images
    │   ├── pixels            uint8 (m, T, T, 3), codec raw
    │   └── blob, offset      uint8 (bytes,), int64 (m + 1,), codec jpeg
    └── skipped/              images that could not be read
        └── path, reason      bytes (k,), UTF-8

S is the side of the crops, `ShardSettings.img_size`, 224 by default.

All datasets are contiguous and uncompressed, and all strings have a fixed length, so a reader
may map them into memory instead of going through HDF5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from anchorpatch.errors import CorruptShard, ShardError, reason_of
from anchorpatch.settings import SCALES
from anchorpatch.shards.header import ShardHeader, ShardSettings

FORMAT_VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"

#: Columns of a table: type, and shape of one row.
Schema = Mapping[str, tuple[str, tuple[int, ...]]]

#: Columns of ``images/`` but for ``path`` and ``pixels``.
IMAGE_TABLE: Final[Schema] = {
    "label": ("<i4", ()),
    "predicted": ("<i4", ()),
    "scale": ("u1", ()),
    "branch_class": ("<i4", (3,)),
    "branch_prob": ("<f4", (3,)),
    "first": ("<i4", ()),
    "count": ("<i4", ()),
    "size": ("<i4", (2,)),
}

#: Columns of ``patches/T/`` but for the pixels.
PATCH_TABLE: Final[Schema] = {
    "corner": ("<i2", (2,)),
    "score": ("<f4", ()),
    "image": ("<i4", ()),
}


def shard_name(split: str, index: int) -> str:
    """Return the file name of a shard.

    Example:
        >>> shard_name("val", 0)
        'val-00000.h5'
    """
    return f"{split}-{index:05d}.h5"


def encode_text(values: Sequence[str | bytes]) -> NDArray[np.bytes_]:
    """Return strings as fixed-length UTF-8 (k,) that h5py marks as such.

    File names need not be UTF-8: what `os.fsdecode` made of their bytes is undone.
    """
    raw = [v if isinstance(v, bytes) else v.encode("utf-8", "surrogateescape") for v in values]
    length = max((len(value) for value in raw), default=0) or 1
    return np.array(raw, dtype=f"S{length}").astype(h5py.string_dtype("utf-8", length))


def decode_text(value: bytes) -> str:
    """Return one string of `encode_text`."""
    return bytes(value).decode("utf-8", "surrogateescape")


@lru_cache(8)  # all shards of a split have the same classes, of which there may be 21,000
def _decoded(data: bytes, length: int) -> tuple[str, ...]:
    """Return the strings of `encode_text`, given the bytes of the array."""
    return tuple(map(decode_text, np.frombuffer(data, f"S{length}").tolist()))


def write_attributes(file: h5py.File, header: ShardHeader, files_sha256: str) -> None:
    """Write the file attributes.

    A list of 21,000 classes is larger than the 64 KiB of a compact attribute: the file must
    allow dense ones, as HDF5 1.10 and later do.
    """
    file.attrs["format_version"] = np.int32(FORMAT_VERSION)
    for name, text in (
        ("anchorpatch_version", header.version),
        ("split", header.split),
        ("settings", json.dumps(header.settings.to_json())),
        ("weights_sha256", header.weights_sha256),
        ("files_sha256", files_sha256),
    ):
        file.attrs[name] = encode_text([text])[0:1].reshape(())
    file.attrs["classes"] = encode_text(header.classes)
    file.attrs["network_classes"] = encode_text(header.network_classes)


def read_attributes(file: h5py.File) -> tuple[ShardHeader, str]:
    """Return the header of an open shard, and the digest of its files.

    Raises:
        ShardError: the format version is not ours, or the attributes are not a shard's.
        ValueError: the settings are not those of a shard.
    """
    if "format_version" not in file.attrs:
        raise ShardError("expected a shard of anchorpatch, found another HDF5 file")
    version = int(_attribute(file, "format_version", "iu", 0))
    if version != FORMAT_VERSION:
        raise ShardError(
            f"expected format version {FORMAT_VERSION}, found {version}: "
            "read it with the version of anchorpatch that wrote it"
        )

    def text(name: str) -> str:
        return decode_text(_attribute(file, name, "S", 0))

    def texts(name: str) -> tuple[str, ...]:
        found = _attribute(file, name, "S", 1)
        return _decoded(found.tobytes(), found.itemsize)

    header = ShardHeader(
        split=text("split"),
        classes=texts("classes"),
        network_classes=texts("network_classes"),
        settings=ShardSettings.from_json(json.loads(text("settings"))),
        weights_sha256=text("weights_sha256"),
        version=text("anchorpatch_version"),
    )
    return header, text("files_sha256")


def _attribute(file: h5py.File, name: str, kinds: str, axes: int) -> Any:
    """Read an attribute of one of the ``kinds`` of dtype and so many axes.

    Raises:
        ShardError: it is of another type or shape.
    """
    declared = file.attrs.get_id(name)
    if declared.dtype.kind not in kinds or len(declared.shape) != axes:
        raise ShardError(
            f"{name}: expected an attribute as format 1 has it, found {declared.dtype} "
            f"{declared.shape}"
        )
    return file.attrs[name]


def expected_datasets(
    settings: ShardSettings, images: int, patches: Mapping[int, int]
) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Return type and shape of every dataset of a shard; "S" is a string of any fixed length.

    Args:
        settings: of the shard.
        images: how many it holds.
        patches: how many it holds, by scale.

    Example:
        >>> settings = ShardSettings((1, 1, 1), 0.3, (0.1, 0.1, 0.1))
        >>> found = expected_datasets(settings, 2, {63: 5, 95: 0, 111: 0})
        >>> found["images/size"], found["patches/63/pixels"], found["skipped/path"]
        (('<i4', (2, 2)), ('u1', (5, 63, 63, 3)), ('S', (None,)))
    """
    found: dict[str, tuple[str, tuple[int | None, ...]]] = {"images/path": ("S", (images,))}
    for name, (dtype, shape) in IMAGE_TABLE.items():
        found[f"images/{name}"] = dtype, (images, *shape)
    if settings.store_images:
        side = settings.img_size
        found["images/pixels"] = "u1", (images, side, side, 3)
    for scale in SCALES:
        m = patches[scale]
        for name, (dtype, shape) in PATCH_TABLE.items():
            found[f"patches/{scale}/{name}"] = dtype, (m, *shape)
        if settings.codec == "raw":
            found[f"patches/{scale}/pixels"] = "u1", (m, scale, scale, 3)
        elif settings.codec == "jpeg":
            found[f"patches/{scale}/offset"] = "<i8", (m + 1,)
            found[f"patches/{scale}/blob"] = "u1", (None,)
    return found | {f"skipped/{name}": ("S", (None,)) for name in ("path", "reason")}


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


def find_datasets(
    file: h5py.File, expected: Mapping[str, tuple[str, tuple[int | None, ...]]], size: int
) -> dict[str, h5py.Dataset]:
    """Return datasets, of which all that is declared is as the schema says.

    Args:
        file: an open shard.
        expected: type and shape by name, as `expected_datasets` returns them; None stands for any
            length.
        size: of the file in bytes.

    Raises:
        CorruptShard: one is not, or is a link to somewhere else.
        KeyError: there is none.
    """
    found: dict[str, Any] = {"": file}
    for name, (dtype, shape) in expected.items():
        above = ""
        for part in name.split("/"):
            path = f"{above}/{part}".lstrip("/")
            if path not in found:
                found[path] = _member(found[above], part, path)
            above = path
        _check_dataset(found[name], name, dtype, shape, size)
    return {name: found[name] for name in expected}


def _member(group: Any, part: str, path: str) -> Any:
    if not isinstance(group, h5py.Group):
        raise CorruptShard(f"{path}: expected in a group, found in a dataset")
    if group.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
        raise CorruptShard(f"{path}: expected data of this file, found a soft or external link")
    return group[part]


def _check_dataset(
    found: Any, name: str, dtype: str, shape: tuple[int | None, ...], size: int
) -> None:
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


def check_corners(
    crops: NDArray[np.uint8], image: NDArray[Any], corner: NDArray[Any], theta: int
) -> None:
    """Raise IndexError where a patch reaches outside its crop; see `cut_patches`."""
    n, height, width, _ = crops.shape
    limits = ((image, n), (corner[:, 0], height - theta + 1), (corner[:, 1], width - theta + 1))
    if len(image) and any(v.min() < 0 or v.max() >= limit for v, limit in limits):
        raise IndexError(f"a patch of side {theta} reaches outside its {height} x {width} crop")


def cut_patches(
    crops: NDArray[np.uint8], image: NDArray[Any], corner: NDArray[Any], theta: int
) -> NDArray[np.uint8]:
    """Cut patches out of crops; the numpy twin of `anchorpatch.lsp.crop`.

    Args:
        crops: pixels (n, H, W, 3), rows contiguous.
        image: row of ``crops`` for each patch (m,).
        corner: top-left (y, x) of each patch in pixels (m, 2).
        theta: side of the patches in pixels.

    Returns:
        Pixels (m, theta, theta, 3), contiguous.

    Raises:
        IndexError: a patch reaches outside its crop.
    """
    check_corners(crops, image, corner, theta)
    n, height, width, _ = crops.shape
    # A view whose last axis is one row of a patch in bytes: the gather copies whole rows,
    # 1.3 to 1.5 times as fast as slicing patch by patch.
    s = crops.strides
    windows = np.lib.stride_tricks.as_strided(
        crops,
        (n, height - theta + 1, width - theta + 1, theta, theta * 3),
        (s[0], s[1], s[2], s[1], 1),
        writeable=False,
    )
    cut: NDArray[np.uint8] = windows[image, corner[:, 0], corner[:, 1]]
    return cut.reshape(len(image), theta, theta, 3)
