"""The writing end of the pipeline: one thread that fills shards in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from anchorpatch.errors import ShardBusy
from anchorpatch.runtime.progress import Reporter
from anchorpatch.shards.manifest import Manifest
from anchorpatch.shards.writer import ShardWriter
from anchorpatch.signals import shut_down, waiting_for

#: Batches between decoding and the disk: enough to keep every stage busy.
_IN_FLIGHT = 3


class _Work(NamedTuple):
    patches: Future[int]
    images: int
    skipped: int


class ShardSink:
    """Writes batches behind the caller's back and passes errors on at the next call.

    Args:
        manifest: gets the entry of each shard that is done.
        digests: of each shard's part of the file list.
        reporter: is told what is on disk.

    Attributes:
        manifest: as of the last claim.
    """

    def __init__(self, manifest: Manifest, digests: Sequence[str], reporter: Reporter) -> None:
        self.manifest, self._digests, self._reporter = manifest, digests, reporter
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._queue: deque[_Work] = deque()
        self._writers: dict[int, ShardWriter] = {}
        self._failed = False

    def claim(self, shard: int) -> bool:
        """Begin a shard, so that no other process does.

        Returns:
            False for a shard that another process is writing, or has made meanwhile.

        Raises:
            ManifestMismatch: another run has replaced the folder's inputs meanwhile.
            StorageError: the disk refuses.
        """
        path, header = self.manifest.shard_path(shard), self.manifest.header
        try:
            writer = ShardWriter(path, header, files_sha256=self._digests[shard])
        except ShardBusy:
            return False
        self._writers[shard] = writer
        self.manifest = self.manifest.refreshed()
        if self.manifest.has(shard):
            self._writers.pop(shard).abort()
            return False
        return True

    def put(
        self,
        shard: int,
        write: Callable[[ShardWriter], int],
        images: int,
        skipped: int,
        *,
        last: bool,
    ) -> None:
        """Hand a batch over; wait while too many are on their way.

        Args:
            shard: index of the shard that the batch belongs to, which must have been claimed.
            write: adds the batch to the shard's writer and returns its number of patches.
            images: of the batch, the skipped ones included.
            skipped: of the batch.
            last: the shard is done with this batch.
        """
        patches = self._thread.submit(self._write, shard, write, last)
        self._queue.append(_Work(patches, images, skipped))
        while len(self._queue) > _IN_FLIGHT:
            self._pop()

    def drain(self) -> None:
        """Wait until everything is on disk."""
        while self._queue:
            self._pop()

    def close(self) -> None:
        """End the thread. Shards that are not finished leave nothing behind."""
        shut_down(self._thread, "the thread that writes shards")
        for writer in self._writers.values():
            writer.abort()

    def _pop(self) -> None:
        work = self._queue.popleft()
        with waiting_for("the thread that writes shards"):
            patches = work.patches.result()
        self._reporter.advance(work.images, patches=patches, skipped=work.skipped)

    def _write(self, shard: int, write: Callable[[ShardWriter], int], last: bool) -> int:
        if self._failed:  # or a shard would be closed that lacks a batch
            return 0
        self._failed = True
        writer = self._writers[shard]
        patches = write(writer)
        if last:
            writer.close(self.manifest.commit)
            del self._writers[shard]
        self._failed = False
        return patches
