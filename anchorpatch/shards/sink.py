"""The writing end of the pipeline: a thread that fills shards, and some that close them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO, Final

from anchorpatch.errors import ShardBusy
from anchorpatch.shards.manifest import Manifest, ShardEntry
from anchorpatch.shards.writer import ShardWriter
from anchorpatch.signals import shut_down, waiting_for

#: Batches between decoding and the disk: enough to keep every stage busy.
_IN_FLIGHT: Final = 3

#: Threads that close shards, and so the most shards that are being closed. Each hashes and writes
#: 1 to 1.5 GB/s.
_CLOSING: Final = 2


class ShardSink:
    """Writes batches behind the caller's back and passes errors on at the next call.

    Shards are committed in the order in which they were begun, and none behind one that failed.

    Args:
        manifest: gets the entry of each shard that is done.
        digests: of each shard's part of the file list.
        advance: called with the images of each batch that a shard has taken, and the keywords
            ``patches`` and ``skipped``.
        closing: threads that close shards.
        commit: called with each shard that is done and its entry in place of `Manifest.commit`.

    Attributes:
        manifest: as of the last claim.
    """

    def __init__(
        self,
        manifest: Manifest,
        digests: Sequence[str],
        advance: Callable[..., object],
        closing: int = _CLOSING,
        commit: Callable[[int, ShardEntry], object] | None = None,
    ) -> None:
        self.manifest, self._digests, self._advance = manifest, digests, advance
        self._commit = commit or (lambda shard, entry: self.manifest.commit(entry))
        self._filling = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._closing, self._most = ThreadPoolExecutor(closing, "closing"), closing
        self._queue: deque[tuple[int, int, Future[int]]] = deque()
        self._ends: deque[Future[None]] = deque()
        self._writers: dict[int, ShardWriter] = {}
        self._spools: list[BinaryIO] = []
        self._error: BaseException | None = None

    def claim(self, shard: int) -> bool:
        """Begin a shard, so that no other process does.

        Returns:
            False for a shard that another process is writing, or has made meanwhile.

        Raises:
            ManifestMismatch: another run has replaced the folder's inputs meanwhile.
            StorageError: the disk refuses.
        """
        path, digest = self.manifest.shard_path(shard), self._digests[shard]
        # What the last claim has seen costs no look at the manifest.
        if self.manifest.has(shard) or self._refreshed().has(shard):
            return False
        try:
            writer = ShardWriter(
                path, self.manifest.header, files_sha256=digest, spools=self._spools
            )
        except ShardBusy:
            return False
        self._writers[shard] = writer
        if self._refreshed().has(shard):
            self._writers.pop(shard).abort()
            return False
        return True

    def _refreshed(self) -> Manifest:
        self.manifest = self.manifest.refreshed()
        return self.manifest

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
        self._queue.append(
            (images, skipped, self._submit(self._filling, self._fill, shard, write, last))
        )
        while len(self._queue) > _IN_FLIGHT:
            self._pop()
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Wait until everything is on disk."""
        while self._queue:
            self._pop()
        with waiting_for("the threads that close shards"):
            for end in self._ends:
                end.result()

    def close(self) -> None:
        """End the threads. Shards that are not finished leave nothing behind."""
        shut_down(self._filling, "the thread that writes shards")
        shut_down(self._closing, "the threads that close shards")
        for writer in self._writers.values():
            writer.abort()
        for spool in self._spools:
            with suppress(OSError):  # what it could not flush is not wanted any more
                spool.close()

    def _pop(self) -> None:
        images, skipped, written = self._queue.popleft()
        with waiting_for("the thread that writes shards"):
            patches = written.result()
        self._advance(images, patches=patches, skipped=skipped)

    def _submit(self, pool: ThreadPoolExecutor, *work: Any) -> Future[Any]:
        def note(done: Future[Any]) -> None:
            if not done.cancelled():
                self._error = self._error or done.exception()

        future = pool.submit(*work)
        future.add_done_callback(note)
        return future

    def _fill(self, shard: int, write: Callable[[ShardWriter], int], last: bool) -> int:
        if self._error is not None:  # or a shard would be closed that lacks a batch
            raise self._error
        patches = write(self._writers[shard])
        if last:
            while len(self._ends) >= self._most:
                self._ends.popleft().result()
            before = self._ends[-1] if self._ends else None
            self._ends.append(self._submit(self._closing, self._end, shard, before))
        return patches

    def _end(self, shard: int, before: Future[None] | None) -> None:
        def commit(entry: ShardEntry) -> None:
            if before is not None:
                before.result()
            self._commit(shard, entry)

        self._writers[shard].close(commit)
        del self._writers[shard]
