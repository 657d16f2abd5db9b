"""From a source of images to batches of pixels, decoded in worker processes ahead of their use.

Work travels to the workers as the places of images, not as row numbers, so that no worker holds
the source.

The workers are started by ``fork`` on Linux. They run Pillow, numpy, simplejpeg and torch on one
thread each, and touch neither CUDA nor HDF5 nor the parent's OpenMP threads, so that what makes
forking a process with threads unsafe does not reach them. Measured on two busy cores
(2026-11-22), two workers have their first batch of 32 after 0.14 s by fork, 5.9 s by a fork server
and 5.6 s by spawn, which import torch anew. Nothing depends on fork: where the platform has
another default, that is used.

Each worker answers on a connection of its own, from the thread that did the work: pixels in
anonymous memory whose descriptor is handed over, or, where the system refuses that, through the
connection itself. Nothing is looked at ahead that may be different when it is needed, a failure
travels as words, and the death of a worker ends the connection, also in the middle of an answer.
A torch DataLoader promises none of this: what the thread of its queue cannot hand over (shared
memory or descriptors have run out) is dropped with a traceback on the worker's stderr, and is
waited for without end.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import multiprocessing
import os
import queue
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, cycle, islice
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from multiprocessing.reduction import recv_handle, send_handle
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anchorpatch.errors import AnchorpatchError, ImageError, SettingsError, reason_of
from anchorpatch.images.decode import Decoded, decode, size_for_nvjpeg
from anchorpatch.images.source import ImageSource
from anchorpatch.runtime.distributed import environment_number
from anchorpatch.settings import CropSettings
from anchorpatch.signals import STOP_SIGNALS, StopSignals, waiting_for

if TYPE_CHECKING:
    from anchorpatch.images.nvjpeg import NvJpeg

#: Pixels that the workers of all processes of a machine may be ahead, in bytes: 7,000 crops.
_ROOM: Final = 1 << 30

#: Pieces that each worker is ahead: one in hand, and one that waits to be taken.
_AHEAD: Final = 2

#: Files that a worker leaves as they are, in bytes per byte of their crop's pixels.
_LARGEST_FILE: Final = 4

#: Seconds that a worker may take to die once it is killed.
_KILL_TIME: Final = 5.0


class Batch(NamedTuple):
    """The images of one batch that could be decoded, and those that could not.

    Attributes:
        index: rows of the source, in the order asked for, int64 (n,).
        pixels: RGB, uint8 (n, S, S, 3), S = 224 by default.
        size: height and width of each source image in pixels, int32 (n, 2).
        bad: row and reason of each image that could not be decoded.
        damaged: rows of the images in ``index`` that were decoded with damage.
    """

    index: npt.NDArray[np.int64]  # type: ignore[assignment]  # hides tuple.index
    pixels: Tensor
    size: npt.NDArray[np.int32]
    bad: list[tuple[int, str]]
    damaged: list[int]


#: A part of a `Batch`, whose pixels are an array.
Piece = tuple[
    npt.NDArray[np.int64],
    npt.NDArray[np.uint8],
    npt.NDArray[np.int32],
    list[tuple[int, str]],
    list[int],
]

#: The pieces of each batch. Who has joined a list of them clears it, since it takes up memory.
Pieces = Generator[list[Piece], None, None]

#: What a piece is made from: rows (n,), places of the images (n,), and the epoch.
_Request = tuple[npt.NDArray[np.int64], npt.NDArray[Any], int]

#: What makes pixels, given what reads the image, the row and the epoch.
Decoder = Callable[[Callable[[], bytes], int, int], Decoded]


def load_batches(
    images: ImageSource,
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    crop: CropSettings | None = None,
    pin_memory: bool = False,
    nvjpeg: NvJpeg | None = None,
) -> Generator[Batch, None, None]:
    """Decode batches of a source's images, in the given order, each once.

    Args:
        images: the source.
        batches: rows of the source, a sequence for each batch; see `serve_batches`.
        workers: processes that decode. 0 decodes in this thread, when a batch is asked for.
        crop: how an image becomes a crop; None for the defaults.
        pin_memory: see `serve_batches`.
        nvjpeg: decodes most JPEGs, in this process, instead of the workers, which then only read
            them. It has ``crop`` too.
    """
    requests = ((0, np.asarray(rows, np.int64)) for rows in batches)
    crop = crop or CropSettings()
    side, decoder = crop.img_size, partial(_crop, crop, nvjpeg is not None)
    if nvjpeg is not None:
        return nvjpeg.batches(_pieces_of(images, requests, decoder, side, workers, packed=True))
    return serve_batches(images, requests, decoder, side, workers=workers, pin_memory=pin_memory)


def _crop(
    crop: CropSettings, leave: bool, read: Callable[[], bytes], row: int, epoch: int
) -> Decoded:
    """Decode an image, or leave a file as it is that nvJPEG will decode."""
    data = read()
    most = _LARGEST_FILE * crop.img_size**2 * 3
    if leave and len(data) <= most and (size := size_for_nvjpeg(data)) is not None:
        return Decoded(np.frombuffer(data, np.uint8), size)
    return decode(data, crop)


def serve_batches(
    images: ImageSource,
    batches: Iterable[tuple[int, npt.NDArray[np.int64]]],
    decoder: Decoder,
    side: int,
    *,
    workers: int,
    pin_memory: bool,
) -> Generator[Batch, None, None]:
    """Make batches of pixels from a source's images, in the given order.

    The workers start at once, not with the first ``next``: start them before other threads
    where that can be chosen. Closing the iterator ends them; so does the death of this process,
    whatever its cause.

    What the workers of all processes of a machine (LOCAL_WORLD_SIZE) are ahead takes at most
    1 GiB. Where it would take more, several workers make a batch, each a piece of it.

    Args:
        images: the source.
        batches: epoch and rows of each batch (n,). It is drawn from as the workers need work.
        decoder: from what reads an image, its row and the epoch to pixels (side, side, 3); raises
            ImageError for a bad image. The workers hold it.
        side: of the pixels.
        workers: processes; 0 works in this thread.
        pin_memory: put the pixels into page-locked memory, for copies to a GPU, when a batch is
            handed out. torch locks powers of two, 64 MiB for 256 images, so that batches which
            are only ahead are left out. Without a GPU it does nothing.

    Raises:
        SettingsError: ``workers`` is negative.
        DataError: while iterating: the disk or network does not answer.
        AnchorpatchError: while iterating: a worker has died or failed.
    """
    pin_memory = pin_memory and torch.cuda.is_available()
    return _each_joined(_pieces_of(images, batches, decoder, side, workers), pin_memory)


def _pieces_of(
    images: ImageSource,
    batches: Iterable[tuple[int, npt.NDArray[np.int64]]],
    decoder: Decoder,
    side: int,
    workers: int,
    *,
    packed: bool = False,
) -> Pieces:
    """As `serve_batches`, but yield the pieces of each batch; ``packed``: as `unpacked` takes."""
    if workers < 0:
        raise SettingsError(f"workers: expected a whole number of at least 0, got {workers}")
    load = partial(_load, images.reader, decoder, side, packed)
    requests = ((rows, images.places_of(rows), epoch) for epoch, rows in batches)
    if workers == 0:
        return _in_this_process(load, requests)
    room = _ROOM // max(1, environment_number("LOCAL_WORLD_SIZE", 1))
    largest = side * side * 3 * (_LARGEST_FILE if packed else 1)
    todo = _pieces(requests, max(1, room // (_AHEAD * workers * largest)))
    pool = _Pool(load, workers)
    pending: deque[tuple[_Worker, bool]] = deque()
    for (request, last), worker in zip(
        islice(todo, _AHEAD * workers), cycle(pool.workers), strict=False
    ):
        worker.ask(request)
        pending.append((worker, last))
    return _from_workers(pool, pending, todo)


def _pieces(requests: Iterable[_Request], size: int) -> Iterator[tuple[_Request, bool]]:
    """Cut requests into pieces of at most ``size`` images; tell of each whether it is the last."""
    for rows, places, epoch in requests:
        for start in range(0, max(1, len(rows)), size):
            stop = start + size
            yield (rows[start:stop], places[start:stop], epoch), stop >= len(rows)


def _load(
    read_at: Callable[[Any], bytes], decoder: Decoder, side: int, packed: bool, request: _Request
) -> Piece:
    index, places, epoch = request
    n = len(index)
    # Allocated once and filled in place; stacking would copy every image twice.
    pixels = np.empty((0 if packed else n, side, side, 3), np.uint8)
    size = np.empty((n, 2), np.int32)
    parts: list[npt.NDArray[np.uint8]] = []
    good: list[int] = []
    bad: list[tuple[int, str]] = []
    damaged: list[int] = []
    for row, place in zip(index.tolist(), places.tolist(), strict=True):
        try:
            decoded = decoder(partial(read_at, place), row, epoch)
        except ImageError as error:
            bad.append((row, error.reason))
            continue
        m = len(good)
        if packed:
            parts.append(decoded.pixels)
        else:
            pixels[m] = decoded.pixels
        size[m] = decoded.size
        good.append(row)
        if decoded.damaged:
            damaged.append(row)
    m = len(good)
    # Files have one axis, pixels three.
    lengths = np.array([len(part) if part.ndim == 1 else 0 for part in parts], np.int64)
    found = (
        np.concatenate([lengths.view(np.uint8), *map(np.ravel, parts)]) if packed else pixels[:m]
    )
    return np.array(good, np.int64), found, size[:m].copy(), bad, damaged


def unpacked(piece: Piece, side: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield what a packed piece holds of each image: a file (bytes,) or pixels (side, side, 3)."""
    index, packed, *_ = piece
    at = 8 * len(index)
    for length in packed[:at].view(np.int64).tolist():
        end = at + (length or side * side * 3)
        yield packed[at:end] if length else packed[at:end].reshape(side, side, 3)
        at = end


def _each_joined(pieces_of_batches: Pieces, pin_memory: bool) -> Generator[Batch, None, None]:
    with contextlib.closing(pieces_of_batches):
        for pieces in pieces_of_batches:
            batch = _joined(pieces, pin_memory)
            pieces.clear()
            yield batch
            del batch  # or it would live on while the next one is waited for


def _joined(pieces: Sequence[Piece], pin_memory: bool) -> Batch:
    """Return a batch; where its pixels must be copied, that takes 20 us of CPU time per image."""
    indices, arrays, sizes, bad, damaged = zip(*pieces, strict=True)
    parts = [torch.from_numpy(array) for array in arrays]
    pixels = parts[0]
    if pin_memory or len(parts) > 1:
        shape = (sum(map(len, parts)), *pixels.shape[1:])
        joined = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
        pixels = torch.cat(parts, out=joined)
    return Batch(
        np.concatenate(indices), pixels, np.concatenate(sizes), [*chain(*bad)], [*chain(*damaged)]
    )


# --- in this process --------------------------------------------------------------------------


def _in_this_process(load: Callable[[_Request], Piece], requests: Iterable[_Request]) -> Pieces:
    for request in requests:
        # Images are too small to share out: on two busy cores, two threads took eight times as
        # long as one.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            piece = load(request)
        finally:
            torch.set_num_threads(threads)
        pieces = [piece]
        del piece
        yield pieces


# --- the parent's side ------------------------------------------------------------------------


def _from_workers(
    pool: _Pool,
    pending: deque[tuple[_Worker, bool]],
    todo: Iterator[tuple[_Request, bool]],
) -> Pieces:
    pieces: list[Piece] = []
    try:
        while pending:
            worker, last = pending.popleft()
            pieces.append(worker.answer())
            for request, last_of_next in islice(todo, 1):
                worker.ask(request)
                pending.append((worker, last_of_next))
            if last:
                yield pieces
                pieces = []
    finally:
        pool.close()


class _Pool:
    """The workers of one loader; they end with it, or with this process."""

    def __init__(self, load: Callable[[_Request], Piece], workers: int) -> None:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self.workers: list[_Worker] = []
        # At exit, this is before multiprocessing waits for its children, which ignore SIGTERM.
        self.close = Finalize(self, _kill, (self.workers,), exitpriority=0)
        # Blocked until the worker ignores them. One that another thread has taken is noted, as
        # Python ignores what is raised in the midst of a fork, and comes again behind it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with StopSignals() as stop, warnings.catch_warnings():
                # That forking is safe here is said above (Python 3.12 warns of threads).
                warnings.simplefilter("ignore")
                for _ in range(workers):
                    self.workers.append(_Worker(context, load))
            if stop.received:
                signal.raise_signal(stop.received)
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _kill(workers: list[_Worker]) -> None:
    """End workers, which hold nothing of value."""
    for worker in workers:
        worker.process.kill()
    while workers:
        workers.pop().end()


class _Worker:
    """A process that answers requests in their order, as its parent sees it."""

    def __init__(self, context: Any, load: Callable[[_Request], Piece]) -> None:
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(load, theirs), daemon=True)
        try:
            self.process.start()
        except OSError as error:
            raise AnchorpatchError(
                f"cannot start a loading worker: {reason_of(error)}; use fewer --workers"
            ) from error
        finally:
            theirs.close()  # the worker's death is then the end of the connection

    def ask(self, request: _Request) -> None:
        with contextlib.suppress(ConnectionError):  # `answer` will say so
            self._connection.send(request)

    def answer(self) -> Piece:
        try:
            with waiting_for(f"images from a loading worker (process {self.process.pid})"):
                found = self._connection.recv()
                if isinstance(found, AnchorpatchError):
                    raise found
                index, shape, size, bad, damaged, in_memory = found
                pixels = self._mapped(shape) if in_memory else self._received(shape)
        except (EOFError, ConnectionError) as error:
            raise AnchorpatchError(self._what_killed()) from error
        except (OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno is None:  # the end of half an answer
                raise AnchorpatchError(self._what_killed()) from error
            raise AnchorpatchError(
                f"cannot receive a batch from a loading worker: {_reason(error)}"
            ) from error
        return index, pixels, size, bad, damaged

    def _mapped(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        descriptor = recv_handle(self._connection)
        try:
            memory = mmap.mmap(descriptor, int(np.prod(shape)))
        finally:
            os.close(descriptor)
        return np.frombuffer(memory, np.uint8).reshape(shape)

    def _received(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        pixels = np.empty(shape, np.uint8)
        if pixels.nbytes:
            self._connection.recv_bytes_into(pixels.data.cast("B"))
        return pixels

    def _what_killed(self) -> str:
        self.process.join(_KILL_TIME)
        status = self.process.exitcode
        if status is None or status >= 0:
            return f"a loading worker ended unexpectedly (exit status {status}); run again"
        how = f"a loading worker was killed by {signal.Signals(-status).name}"
        if -status != signal.SIGKILL:
            return f"{how}; run again with --workers 0 to see where"
        return f"{how}, probably out of memory; use fewer --workers or a smaller --batch-size"

    def end(self) -> None:
        self._connection.close()
        with waiting_for("a loading worker to end"):
            self.process.join(_KILL_TIME)


def _reason(error: BaseException) -> str:
    # Where a descriptor that another process sends is one too many, Python says "ancdata".
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "ancdata" in str(error):
        return "too many open files; raise the limit (ulimit -n) or use fewer --workers"
    return f"{type(error).__name__}: {error}".rstrip(": ")


# --- the worker's side ------------------------------------------------------------------------


def _serve(load: Callable[[_Request], Piece], connection: Connection) -> None:
    _settle()
    requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(connection, requests), daemon=True).start()
    while True:
        request = requests.get()
        try:
            piece = load(request)
        except Exception as error:
            known = isinstance(error, AnchorpatchError)
            text = str(error) if known else f"a loading worker failed: {_reason(error)}"
            failure = AnchorpatchError(text)
            failure.__cause__ = error  # --debug shows its traceback
            connection.send(ExceptionWithTraceback(failure, None))
        else:
            _hand_over(connection, piece)


def _settle() -> None:
    """Use one thread, silence stderr, and ignore signals: what comes of those the parent decides.

    Ctrl-C and batch systems signal the whole group of processes, and the parent may want the
    batches that are under way.
    """
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    warnings.simplefilter("ignore")
    # libjpeg writes "Corrupt JPEG data: ..." without a file name through the progress bar.
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _take_in(connection: Connection, requests: queue.SimpleQueue[_Request]) -> None:
    """Take requests in at once, so that the parent never waits to get rid of one."""
    try:
        while True:
            requests.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def _die_with_parent() -> None:
    """Wait, without polling, until the parent is gone, however it ended."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _hand_over(connection: Connection, piece: Piece) -> None:
    index, pixels, size, bad, damaged = piece
    descriptor = _in_memory(pixels)
    connection.send((index, pixels.shape, size, bad, damaged, descriptor is not None))
    if descriptor is not None:
        send_handle(connection, descriptor, 0)
        os.close(descriptor)
    elif pixels.nbytes:
        connection.send_bytes(pixels.data.cast("B"))


def _in_memory(pixels: npt.NDArray[np.uint8]) -> int | None:
    """Return a descriptor of anonymous memory that holds the pixels; None if refused.

    It is not in /dev/shm, which containers often limit to 64 MB. Writing, unlike touching
    mapped pages, reports a limit (``ulimit -f``) as an error.
    """
    if not pixels.nbytes or not hasattr(os, "memfd_create"):
        return None
    try:
        descriptor = os.memfd_create("anchorpatch")
    except OSError:
        return None
    try:
        left = pixels.data.cast("B")
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
