"""From an image folder to batches of pixels, decoded in worker processes ahead of their use.

The workers are those of a torch DataLoader, started by ``fork`` on Linux. They run Pillow,
numpy and torchvision's JPEG decoder on one thread each, and touch neither CUDA nor HDF5 nor
the parent's OpenMP threads, so that what makes forking a process with threads unsafe does not
reach them. Measured on two busy cores (2026-11-22), two workers have their first batch of 32
after 0.14 s by fork, 5.9 s by a fork server and 5.6 s by spawn, which import torch anew.
Nothing depends on fork: where the platform has another default, that is used.

Work travels to the workers as paths, not as row numbers, so that no worker holds the folder.
Pixels come back through shared memory, or through a pipe where that is too small for them
(containers often have 64 MB).
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anchorpatch.errors import AnchorpatchError, ImageError, SettingsError
from anchorpatch.images.decode import CROP, Decoded, decode
from anchorpatch.images.folder import ImageFolder

__all__ = ["MAX_BYTES", "Batch", "fill_batch", "load_batches", "read_image", "serve_batches"]

#: Files of more bytes are not read: an uncompressed image of `MAX_PIXELS` fits.
MAX_BYTES: Final = 1 << 30

#: What says nothing about the image: the process has run out of something.
_NOT_THE_IMAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

#: Ctrl-C and batch systems signal the whole group of processes. The parent decides what comes of
#: it, and may want the batches that are under way.
_FOR_THE_PARENT: Final = (signal.SIGINT, signal.SIGTERM)

_REASONS: Final = {
    errno.ENOENT: "missing",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EISDIR: "not a regular file",
    errno.ELOOP: "too many links",
    errno.ENXIO: "not a regular file",  # a socket
}


class Batch(NamedTuple):
    """The images of one batch that could be decoded, and those that could not.

    Attributes:
        index: rows of the folder, in the order asked for, int64 (n,).
        pixels: RGB, uint8 (n, 224, 224, 3).
        size: height and width of each source image in pixels, int32 (n, 2).
        bad: row and reason of each image that could not be decoded.
    """

    index: npt.NDArray[np.int64]  # type: ignore[assignment]  # hides tuple.index
    pixels: Tensor
    size: npt.NDArray[np.int32]
    bad: list[tuple[int, str]]


def load_batches(
    folder: ImageFolder,
    batches: Sequence[Sequence[int]],
    *,
    workers: int,
    pin_memory: bool = False,
    prefetch: int = 4,
) -> Generator[Batch, None, None]:
    """Decode batches of a folder's images, in the given order, each once.

    The workers start at once, not with the first ``next``: start them before other threads
    where that can be chosen. Closing the iterator ends them; so does the death of this process,
    whatever its cause.

    Args:
        folder: the images.
        batches: rows of the folder, a sequence for each batch.
        workers: processes that decode. 0 decodes in this thread, when a batch is asked for.
        pin_memory: put the pixels into page-locked memory, for copies to a GPU. Without a GPU
            it does nothing.
        prefetch: batches that each worker is ahead. One of 256 images takes 39 MB.

    Raises:
        SettingsError: ``workers`` is negative or ``prefetch`` below 1.
        AnchorpatchError: while iterating: a worker has died or failed.
    """
    if workers < 0:
        raise SettingsError(f"workers: expected a whole number of at least 0, got {workers}")
    if prefetch < 1:
        raise SettingsError(f"prefetch: expected a whole number of at least 1, got {prefetch}")
    return serve_batches(
        partial(_Images, str(folder.root)),
        _Requests(folder, batches),
        batch_bytes=max(map(len, batches), default=0) * CROP * CROP * 3,
        workers=workers if len(batches) else 0,
        prefetch=prefetch,
        pin_memory=pin_memory,
    )


def serve_batches(
    images: Callable[[bool], Dataset[Any]],
    requests: Iterable[Any],
    *,
    batch_bytes: int,
    workers: int,
    prefetch: int,
    pin_memory: bool,
) -> Generator[Batch, None, None]:
    """Turn each request into a batch, in order, by ``images[request]``; see `load_batches`.

    Args:
        images: makes what a worker holds; told whether batches may travel in shared memory.
        requests: the work of each batch.
        batch_bytes: pixels of the largest batch.
        workers: processes; 0 works in this thread.
        prefetch: batches that each worker is ahead.
        pin_memory: put the pixels into page-locked memory, where there is a GPU.
    """
    pin_memory = pin_memory and torch.cuda.is_available()
    if workers == 0:
        return _in_this_process(images(True), requests, pin_memory)
    shared = _fits_shared_memory(batch_bytes * (workers * prefetch + 2))
    return _in_workers(images(shared), requests, workers, prefetch, pin_memory)


def fill_batch(
    index: npt.NDArray[np.int64],
    paths: npt.NDArray[np.bytes_],
    side: int,
    decode: Callable[[int, str], tuple[npt.NDArray[np.uint8], tuple[int, int]]],
    *,
    shared: bool,
) -> tuple[Any, ...]:
    """Return a `Batch` as a plain tuple; without shared memory its pixels are an array.

    Args:
        index: row of each image (n,).
        paths: its relative path (n,).
        side: of the pixels.
        decode: from row and path to pixels (side, side, 3) and the size of the source; raises
            ImageError for a bad image.
        shared: whether the batch may travel in shared memory.
    """
    n = len(index)
    # Allocated once and filled in place; stacking would copy every image twice.
    pixels = np.empty((n, side, side, 3), np.uint8)
    size = np.empty((n, 2), np.int32)
    good: list[int] = []
    bad: list[tuple[int, str]] = []
    for row, path in zip(index.tolist(), paths.tolist(), strict=True):
        try:
            decoded = decode(row, path.decode())
        except ImageError as error:
            bad.append((row, error.reason))
            continue
        pixels[len(good)], size[len(good)] = decoded
        good.append(row)
    m = len(good)
    kept = torch.from_numpy(pixels[:m]) if shared else pixels[:m]
    return np.array(good, np.int64), kept, size[:m].copy(), bad


def read_image(path: str) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ImageError: it cannot be read: "missing", "permission denied", "not a regular file",
            "file too large" or the system's own words.
        OSError: this process has run out of files or memory.
    """
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise ImageError("not a regular file")
            if info.st_size > MAX_BYTES:
                raise ImageError("file too large")
            return file.read()
    except OSError as error:
        if error.errno in _NOT_THE_IMAGE:
            raise
        raise ImageError(_REASONS.get(error.errno or 0, f"unreadable: {error.strerror}")) from error


class _Request(NamedTuple):
    """The work of one batch: rows (n,) and relative paths (n,)."""

    index: npt.NDArray[np.int64]  # type: ignore[assignment]
    paths: npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class _Requests:
    folder: ImageFolder
    batches: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[_Request]:
        for batch in self.batches:
            index = np.asarray(batch, np.int64)
            yield _Request(index, self.folder.paths[index])


@dataclass(frozen=True)
class _Images(Dataset[Any]):
    """What a worker holds: where the images are."""

    root: str
    shared: bool = True

    def __getitem__(self, request: _Request) -> tuple[Any, ...]:
        """Return the batch of a request."""
        return fill_batch(request.index, request.paths, CROP, self._decode, shared=self.shared)

    def _decode(self, _: int, path: str) -> Decoded:
        return decode(read_image(os.path.join(self.root, path)))


def _unchanged(batch: Any) -> Any:
    return batch


def _as_batch(item: tuple[Any, ...], pin_memory: bool) -> Batch:
    index, pixels, size, bad = item
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels)
    if pin_memory and not pixels.is_pinned():
        pixels = pixels.pin_memory()
    return Batch(index, pixels, size, bad)


def _in_this_process(
    images: Dataset[Any], requests: Iterable[Any], pin_memory: bool
) -> Generator[Batch, None, None]:
    for request in requests:
        with _one_thread():
            item = images[request]
        yield _as_batch(item, pin_memory)


def _in_workers(
    images: Dataset[Any], requests: Iterable[Any], workers: int, prefetch: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Start workers that turn each request into a batch by ``images[request]``."""
    loader = DataLoader(
        images,
        # Without automatic batching each item of the sampler is the work of one batch.
        batch_size=None,
        sampler=requests,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        worker_init_fn=_start_worker,
        # Its own, so that the state of torch's global generator does not depend on loading.
        generator=torch.Generator(),
    )
    return _from_workers(_started(loader), pin_memory)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch at one thread, as in a worker: images are too small to share out.

    On two busy cores, two threads took eight times as long as one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _started(loader: DataLoader[Any]) -> Any:
    """Start the workers of a loader and return its iterator."""
    with _signals_for_workers(), warnings.catch_warnings():
        # More workers than cores is the caller's choice; that forking is safe here is said
        # above (Python 3.12 warns where there are threads).
        warnings.simplefilter("ignore")
        return iter(loader)


@contextlib.contextmanager
def _signals_for_workers() -> Iterator[None]:
    """Start workers that only their parent stops, and keep torch from reporting deaths by signal.

    torch's handler of SIGCHLD raises RuntimeError wherever the main thread happens to be. The
    iterator notices a dead worker by itself, within 5 seconds, in ``next``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and torch sets none either
        return
    handler = signal.getsignal(signal.SIGCHLD)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _start_worker(_: int) -> None:
    for number in _FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_PARENT)
    warnings.simplefilter("ignore")
    # libjpeg writes "Corrupt JPEG data: ..." without a file name through the progress bar.
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Wait, without polling, until the parent is gone, however it ended.

    DataLoader's own watchdog asks for the parent's id every 5 seconds, and not while a worker
    is busy or cannot get rid of a result; a process started by a fork server never sees that
    id change.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _from_workers(iterator: Any, pin_memory: bool) -> Generator[Batch, None, None]:
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except AnchorpatchError:
                raise
            except Exception as error:
                raise AnchorpatchError(_what_failed(error)) from error
            yield _as_batch(item, pin_memory)
            del item  # or it would live on while the next one is waited for
    finally:
        # Done by its __del__ too, but a traceback may keep it alive.
        iterator._shutdown_workers()


def _what_failed(error: Exception) -> str:
    if _is_of_a_dead_worker(error):
        return (
            "a loading worker was killed, most likely for want of memory or shared memory "
            f"({_last_line(error)}); use fewer workers or smaller batches, and run again"
        )
    return f"a loading worker failed: {_last_line(error)}"


def _is_of_a_dead_worker(error: Exception) -> bool:
    if str(error).startswith("Caught "):  # the worker lived to report it
        return False
    # The worker that filled shared memory hands it over by a connection. Where it dies over
    # that, the connection may be gone before the system counts the worker among the dead.
    if isinstance(error, (ConnectionError, EOFError)):
        return True
    return "exited unexpectedly" in str(error) or "is killed by signal" in str(error)


def _last_line(error: Exception) -> str:
    # An error that a worker has raised carries the worker's traceback as its message.
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _fits_shared_memory(size: int) -> bool:
    try:
        info = os.statvfs("/dev/shm")
    except OSError:  # another system, which keeps shared memory elsewhere
        return True
    return size < info.f_bavail * info.f_frsize
