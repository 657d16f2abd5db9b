"""An actor of a Ray cluster that makes shards; see `anchorpatch.jobs.extract_ray`."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anchorpatch import __version__, storage
from anchorpatch.errors import AnchorpatchError, DataError, ImageError, ShardError
from anchorpatch.jobs.extract import make_shards
from anchorpatch.jobs.extract_plan import Plan
from anchorpatch.runtime.device import cpu_count, resolve_device, use_threads
from anchorpatch.runtime.progress import Waits
from anchorpatch.shards.manifest import LOCK_NAME, Manifest, ShardEntry
from anchorpatch.shards.splits import open_manifest

#: Name of the folders, but for their ends, in which actors make what they send.
_FOLDERS: Final = "anchorpatch-ray-"


@dataclass(frozen=True)
class Orders:
    """What an actor needs beside the plan.

    Attributes:
        version: of the driver's anchorpatch.
        folder: of the shards; None: they are to be sent.
        token: time of a file in that folder, which tells that it is the driver's.
        probe: rows of some images, and their bytes.
        cpus: cores of the actor.
        threads: for computing.
    """

    version: str
    folder: Path | None
    token: int
    probe: tuple[tuple[int, int], ...]
    cpus: int
    threads: int


class Made(NamedTuple):
    """A shard, or None for an entry where another process makes it.

    Attributes:
        entry: for the manifest.
        data: the file, where it is to be sent.
        waited: seconds that the actor has waited for each stage since it made the last one.
    """

    entry: ShardEntry | None
    data: NDArray[np.uint8] | None
    waited: dict[str, float]


class _Stopped(Exception):
    """The driver wants no more."""


class Actor:
    """Makes shards in a thread, whose pipeline goes on from one to the next.

    Args:
        plan: of the extraction.
        orders: see `Orders`.
    """

    def __init__(self, plan: Plan, orders: Orders) -> None:
        self._plan, self._orders = plan, orders
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._futures: dict[int, Future[Made]] = {}
        self._ready: Future[str] = Future()
        self._error: BaseException | None = None
        self._lock, self._waits, self._told = threading.Lock(), Waits(), dict[str, float]()
        self._folder: Path | None = None
        self._thread = threading.Thread(target=self._work, name="pipeline", daemon=True)
        self._thread.start()

    def prepare(self) -> str:
        """Return the name of the node when the network is there and all is as expected."""
        return self._ready.result()

    def make(self, shard: int) -> Made:
        """Return a shard when it is on disk."""
        with self._lock:
            if self._error is not None:
                raise self._error
            future = self._futures[shard] = Future()
        self._queue.put(shard)
        return future.result()

    def stop(self) -> None:
        """Throw away what is half made, and return when nothing is left of it."""
        self._error = self._error or _Stopped()
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        host = socket.gethostname()
        try:
            with ExitStack() as stack:
                plan, manifest = self._begin(stack)
                localizer = stack.enter_context(plan.localizer())
                self._ready.set_result(host)
                while (shard := self._queue.get()) is not None:
                    shards = chain([shard], iter(self._next, None))
                    hooks = self._waits, self._advance, self._settle
                    make_shards(plan, manifest, shards, lambda: localizer, *hooks)
        except BaseException as error:
            if isinstance(error, AnchorpatchError):
                error = type(error)(f"node {host}: {error}")
            with self._lock:
                self._error = error
            if not self._ready.done():
                self._ready.set_exception(error)
            for future in self._futures.values():
                future.set_exception(error)

    def _next(self) -> int | None:
        """Return the next shard; None where the pipeline is to end: the driver is not so slow."""
        with suppress(queue.Empty):
            return self._queue.get(timeout=0.1)
        return None

    def _begin(self, stack: ExitStack) -> tuple[Plan, Manifest]:
        """Look at this node, and settle what depends on it."""
        plan, orders = self._plan, self._orders
        if orders.version != __version__:
            raise AnchorpatchError(
                f"anchorpatch {__version__} is installed, but {orders.version} gives the orders: "
                "install the same version on all nodes"
            )
        for row, size in orders.probe:
            try:
                found = f"{len(plan.images.read(row)):,} bytes"
            except ImageError as error:
                found = error.reason
            if found != f"{size:,} bytes":
                raise DataError(
                    f"{plan.images.name(row)}: expected {size:,} bytes, found {found}: the images "
                    "must be at the same path on all nodes"
                )
        os.environ["LOCAL_WORLD_SIZE"] = str(max(1, cpu_count() // orders.cpus))
        use_threads(orders.threads)
        plan = replace(plan, device=resolve_device(plan.device.type))
        if orders.folder is None:
            folder = self._folder = stack.enter_context(_temporary_folder())
            return plan, open_manifest(folder, plan.header, plan.files)
        token = None
        with suppress(OSError):
            token = (orders.folder / LOCK_NAME).stat().st_mtime_ns
        if token != orders.token:
            raise ShardError(
                f"{orders.folder}: this is not the output folder of the command: give one that all "
                "nodes share, or use --collect"
            )
        manifest = Manifest(orders.folder, plan.header, plan.files.count, plan.files.sha256)
        return plan, manifest

    def _advance(self, images: int, **counts: int) -> None:
        if self._error is not None:
            raise self._error

    def _settle(self, shard: int, entry: ShardEntry | None) -> None:
        data = None
        if entry is not None and self._folder is not None:
            path = self._folder / entry.name
            data = np.fromfile(path, np.uint8)
            path.unlink()
        now = dict(self._waits.seconds)
        waited = {stage: seconds - self._told.get(stage, 0.0) for stage, seconds in now.items()}
        self._told = now
        self._futures.pop(shard).set_result(Made(entry, data, waited))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Make a folder for the block, and remove those whose process was killed."""
    top = Path(tempfile.gettempdir())
    for path in top.glob(f"{_FOLDERS}*"):
        with suppress(OSError), (path / "lock").open("rb") as file:
            if storage.try_lock(file, wait=False):
                shutil.rmtree(path, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{_FOLDERS}"))
    with storage.locked(folder / "lock"):
        folder = folder.rename(top / folder.name[1:])  # locked before it is seen
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
