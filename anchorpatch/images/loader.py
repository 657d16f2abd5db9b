"""From an image folder to batches of pixels, decoded in worker processes ahead of their use.

Work travels to the workers as paths, not as row numbers, so that no worker holds the folder.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from anchorpatch.errors import ImageError, SettingsError, reason_of
from anchorpatch.images.decode import Decoded, decode
from anchorpatch.images.folder import ImageFolder
from anchorpatch.images.workers import Batch, serve_batches
from anchorpatch.settings import CROP, CropSettings
from anchorpatch.storage import patiently

__all__ = ["MAX_BYTES", "fill_batch", "load_batches", "read_image"]

#: Files of more bytes are not read: an uncompressed image of `MAX_PIXELS` fits.
MAX_BYTES: Final = 1 << 30

#: What says nothing about the image: the process has run out of something.
_NOT_THE_IMAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

_REASONS: Final = {
    errno.ENOENT: "missing",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EISDIR: "not a regular file",
    errno.ELOOP: "too many links",
    errno.ENXIO: "not a regular file",  # a socket
}


def load_batches(
    folder: ImageFolder,
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    batch_size: int | None = None,
    crop: CropSettings | None = None,
    pin_memory: bool = False,
    prefetch: int = 4,
) -> Generator[Batch, None, None]:
    """Decode batches of a folder's images, in the given order, each once.

    The workers start at once, not with the first ``next``: start them before other threads
    where that can be chosen. Closing the iterator ends them; so does the death of this process,
    whatever its cause.

    Args:
        folder: the images.
        batches: rows of the folder, a sequence for each batch. Without ``batch_size`` it must be a
            sequence too, else it may be an iterator, which is drawn from as the workers need work.
        workers: processes that decode. 0 decodes in this thread, when a batch is asked for.
        batch_size: images of the largest batch.
        crop: how an image becomes a crop; None for the defaults.
        pin_memory: put the pixels into page-locked memory, for copies to a GPU, when a batch is
            handed out. torch locks powers of two, 64 MiB for 256 images, so that batches which
            are only ahead are left out. Without a GPU it does nothing.
        prefetch: batches that each worker is ahead, fewer where those of all the processes of
            this machine would take more than 8 GiB. One of 256 images takes 39 MB.

    Raises:
        SettingsError: ``workers`` is negative or ``prefetch`` below 1.
        DataError: while iterating: the disk or network does not answer.
        AnchorpatchError: while iterating: a worker has died or failed.
    """
    if workers < 0:
        raise SettingsError(f"workers: expected a whole number of at least 0, got {workers}")
    if prefetch < 1:
        raise SettingsError(f"prefetch: expected a whole number of at least 1, got {prefetch}")
    if batch_size is None:
        batch_size = max(map(len, batches), default=0)
    return serve_batches(
        _Images(str(folder.root), crop or CropSettings()),
        _Requests(folder, batches),
        batch_bytes=batch_size * CROP * CROP * 3,
        workers=workers if batch_size else 0,
        prefetch=prefetch,
        pin_memory=pin_memory,
    )


def fill_batch(
    index: npt.NDArray[np.int64],
    paths: npt.NDArray[np.bytes_],
    side: int,
    decode: Callable[[int, str], Decoded],
) -> tuple[Any, ...]:
    """Return a `Batch` as a plain tuple whose pixels are an array.

    Args:
        index: row of each image (n,).
        paths: its relative path (n,).
        side: of the pixels.
        decode: from row and path to pixels (side, side, 3) and the size of the source; raises
            ImageError for a bad image.
    """
    n = len(index)
    # Allocated once and filled in place; stacking would copy every image twice.
    pixels = np.empty((n, side, side, 3), np.uint8)
    size = np.empty((n, 2), np.int32)
    good: list[int] = []
    bad: list[tuple[int, str]] = []
    damaged: list[int] = []
    for row, path in zip(index.tolist(), paths.tolist(), strict=True):
        try:
            decoded = decode(row, path.decode())
        except ImageError as error:
            bad.append((row, error.reason))
            continue
        pixels[len(good)], size[len(good)], flawed = decoded
        good.append(row)
        if flawed:
            damaged.append(row)
    m = len(good)
    return np.array(good, np.int64), pixels[:m], size[:m].copy(), bad, damaged


def read_image(path: str) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ImageError: it cannot be read: "missing", "permission denied", "not a regular file",
            "file too large" or the system's own words.
        DataError: the disk or network does not answer, which is no fault of the image.
        OSError: this process has run out of files or memory.
    """

    def read() -> bytes:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise ImageError("not a regular file")
            if info.st_size > MAX_BYTES:
                raise ImageError("file too large")
            return file.read()

    try:
        return patiently(path, read)
    except OSError as error:
        if error.errno in _NOT_THE_IMAGE:
            raise
        raise ImageError(
            _REASONS.get(error.errno or 0, f"unreadable: {reason_of(error)}")
        ) from error


class _Request(NamedTuple):
    """The work of one batch: rows (n,) and relative paths (n,)."""

    index: npt.NDArray[np.int64]  # type: ignore[assignment]
    paths: npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class _Requests:
    folder: ImageFolder
    batches: Iterable[Sequence[int]]

    def __iter__(self) -> Iterator[_Request]:
        for batch in self.batches:
            index = np.asarray(batch, np.int64)
            yield _Request(index, self.folder.paths[index])


@dataclass(frozen=True)
class _Images:
    """What a worker holds: where the images are, and how they become crops."""

    root: str
    crop: CropSettings

    def __getitem__(self, request: _Request) -> tuple[Any, ...]:
        """Return the batch of a request."""
        return fill_batch(request.index, request.paths, CROP, self._decode)

    def _decode(self, _: int, path: str) -> Decoded:
        return decode(read_image(os.path.join(self.root, path)), self.crop)
