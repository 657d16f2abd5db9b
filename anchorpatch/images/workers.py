"""Worker processes that turn requests into batches of pixels, ahead of their use.

The workers are those of a torch DataLoader, started by ``fork`` on Linux. They run Pillow,
numpy and torchvision's JPEG decoder on one thread each, and touch neither CUDA nor HDF5 nor
the parent's OpenMP threads, so that what makes forking a process with threads unsafe does not
reach them. Measured on two busy cores (2026-11-22), two workers have their first batch of 32
after 0.14 s by fork, 5.9 s by a fork server and 5.6 s by spawn, which import torch anew.
Nothing depends on fork: where the platform has another default, that is used.

Pixels come back through shared memory, or through a pipe where that is too small for them
(containers often have 64 MB).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anchorpatch.errors import AnchorpatchError

__all__ = ["Batch", "serve_batches"]

#: Ctrl-C and batch systems signal the whole group of processes. The parent decides what comes of
#: it, and may want the batches that are under way.
_FOR_THE_PARENT: Final = (signal.SIGINT, signal.SIGTERM)


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
