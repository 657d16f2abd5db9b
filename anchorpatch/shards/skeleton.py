"""An HDF5 file laid out in memory, without its large datasets.

HDF5 reacts badly to a disk that fills up: handles that cannot be closed, noise at the end of
the interpreter. So it never sees the disk. It writes its metadata and the small tables into
a `Skeleton`, which stores only the pages that were written; large datasets get their place in
the file and nothing else. Plain file I/O then writes the skeleton's pages, and the pixels at
their offsets.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO, Final

import h5py
import numpy as np

__all__ = ["Skeleton", "open_skeleton", "reserve"]

_PAGE: Final = 1 << 12


class Skeleton(io.RawIOBase):
    r"""A sparse file in memory; as much of one as h5py needs.

    Example:
        >>> skeleton = Skeleton()
        >>> _ = skeleton.seek(1 << 40), skeleton.write(b"far"), skeleton.seek((1 << 40) - 1)
        >>> skeleton.read(4), skeleton.size == (1 << 40) + 3
        (b'\x00far', True)
    """

    def __init__(self) -> None:
        self.size = 0
        self._position = 0
        self._pages: dict[int, bytearray] = {}

    def readable(self) -> bool:
        """Say yes."""
        return True

    def writable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position, also beyond the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Set the size."""
        self.size = self._position if size is None else size
        return self.size

    def readinto(self, buffer: Any) -> int:
        """Read up to the end; what was never written is zero."""
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self.size - self._position))
        done = 0
        while done < n:
            page, start = divmod(self._position + done, _PAGE)
            k = min(n - done, _PAGE - start)
            stored = self._pages.get(page)
            view[done : done + k] = stored[start : start + k] if stored else bytes(k)
            done += k
        self._position += n
        return n

    def write(self, data: Any) -> int:
        """Write at the position."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            page, start = divmod(self._position + done, _PAGE)
            k = min(len(view) - done, _PAGE - start)
            stored = self._pages.setdefault(page, bytearray(_PAGE))
            stored[start : start + k] = view[done : done + k]
            done += k
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def dump(self, file: BinaryIO) -> None:
        """Write the pages into an empty file that already has the size."""
        for page in sorted(self._pages):
            start = page * _PAGE
            if start < self.size:
                file.seek(start)
                file.write(self._pages[page][: self.size - start])


def open_skeleton(skeleton: Skeleton) -> h5py.File:
    """Open a new HDF5 file in memory, whose bytes depend on nothing but what is written to it.

    The format is fixed to that of HDF5 1.10, whatever newer library writes it. Large datasets
    start at multiples of 4 KiB.
    """
    return h5py.File(
        skeleton,
        "w",
        libver=("v110", "v110"),
        track_order=True,
        alignment_threshold=1 << 16,
        alignment_interval=_PAGE,
    )


def reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> int | None:
    """Create a contiguous dataset that has its place in the file, but whose bytes nobody writes.

    Returns:
        Its offset in the file in bytes; None for a dataset without elements.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    group, _, leaf = name.rpartition("/")
    dataset = h5py.h5d.create(
        file.require_group(group).id,
        leaf.encode(),
        h5py.h5t.py_create(np.dtype(dtype)),
        h5py.h5s.create_simple(shape),
        properties,
    )
    offset: int | None = dataset.get_offset()
    return offset
