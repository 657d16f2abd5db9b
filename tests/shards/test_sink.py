from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anchorpatch.errors import StorageError
from anchorpatch.settings import CODECS
from anchorpatch.shards.manifest import FilesDigest, Manifest, ShardEntry, read_manifest
from anchorpatch.shards.sink import ShardSink
from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.writer import ShardWriter
from tests.shards.samples import make_batch, make_header, make_split, split_batch

SIZES = [3, 3, 3, 3, 2]


@contextmanager
def begun(folder: Path, closing: int, codec: str = "raw") -> Iterator[ShardSink]:
    files = FilesDigest(sum(SIZES), "f0" * 32, tuple(f"{i:064x}" for i in range(len(SIZES))))
    manifest = open_manifest(folder, make_header(codec=codec, shard_size=3), files)
    sink = ShardSink(manifest, files.shards, lambda images, **counts: None, closing)
    try:
        yield sink
    finally:
        sink.close()


def put(sink: ShardSink, shard: int, cut: int = 1) -> None:
    """Hand over the images of a shard in two batches, of which the first has ``cut``."""
    assert sink.claim(shard)
    batch = make_batch(SIZES[shard], seed=shard, start=3 * shard)
    parts = list(split_batch(batch, [cut, SIZES[shard] - cut]))
    for part in parts:
        sink.put(
            shard, lambda w, p=part: w.append(p) or 0, len(part.path), 0, last=part is parts[1]
        )


def put_all(sink: ShardSink, cuts: Sequence[int] = (1, 1, 1, 1, 1)) -> None:
    for shard, cut in enumerate(cuts):
        put(sink, shard, cut)
    sink.drain()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What one writer after the other makes, by codec."""
    found = {}
    for codec in CODECS:
        folder = tmp_path_factory.mktemp(codec) / "val"
        make_split(folder, shards=5, per_shard=3, last=2, codec=codec)
        found[codec] = contents(folder)
    return found


@given(
    codec=st.sampled_from(CODECS),
    closing=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 2), min_size=5, max_size=5),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_bytes_do_not_depend_on_the_threads(
    wholes: dict, tmp_path_factory: pytest.TempPathFactory, codec: str, closing: int, cuts: list
) -> None:
    folder = tmp_path_factory.mktemp("out") / "val"
    with begun(folder, closing, codec) as sink:
        put_all(sink, cuts)
    assert contents(folder) == wholes[codec]


@pytest.fixture
def closing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], object]], None]:
    """Let a function see the name of each shard whose close begins."""

    def install(see: Callable[[str], object]) -> None:
        real = ShardWriter.close

        def close(self: ShardWriter, commit: Callable | None = None) -> ShardEntry:
            with self._aborting():
                see(self.path.name)
            return real(self, commit)

        monkeypatch.setattr(ShardWriter, "close", close)

    return install


def test_shards_are_committed_in_order(
    tmp_path: Path, closing: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, there, committed = threading.Event(), threading.Semaphore(0), []

    def see(name: str) -> None:
        there.release()
        assert name != "val-00000.h5" or go.wait(60)

    real = Manifest.commit
    monkeypatch.setattr(
        Manifest, "commit", lambda self, entry: committed.append(entry.name) or real(self, entry)
    )
    closing(see)
    with begun(tmp_path, closing=3) as sink:
        for shard in range(3):
            put(sink, shard)
        for _ in range(3):
            assert there.acquire(timeout=60)
        for name in ("val-00001.h5", "val-00002.h5"):
            while not (tmp_path / name).exists():
                time.sleep(0.01)
        assert committed == []
        go.set()
        sink.drain()
    assert committed == [f"val-0000{i}.h5" for i in range(3)]
    assert [entry.name for entry in read_manifest(tmp_path).entries] == committed


@pytest.mark.parametrize("threads", [1, 3])
def test_a_close_that_fails_is_heard_and_nothing_behind_it_is_committed(
    tmp_path: Path, closing: Callable, threads: int
) -> None:
    def see(name: str) -> None:
        if name == "val-00001.h5":
            raise StorageError("the disk is full")

    closing(see)
    with pytest.raises(StorageError, match="the disk is full"), begun(tmp_path, threads) as sink:
        put_all(sink)
    assert [entry.name for entry in read_manifest(tmp_path).entries] == ["val-00000.h5"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {".manifest.lock", "manifest.json", "val-00000.h5", "val-00002.h5"}


def test_an_error_of_a_closing_thread_is_raised_by_the_next_call(
    tmp_path: Path, closing: Callable
) -> None:
    failed = threading.Event()

    def see(name: str) -> None:
        failed.set()
        raise StorageError("the disk is full")

    closing(see)
    with begun(tmp_path, closing=2) as sink:
        put(sink, 0)
        assert failed.wait(60)
        while sink._error is None:
            time.sleep(0.01)
        assert sink.claim(1)
        with pytest.raises(StorageError, match="the disk is full"):
            sink.put(1, lambda writer: 0, 1, 0, last=False)


@pytest.mark.parametrize("threads", [1, 2])
def test_few_shards_are_closed_at_once(tmp_path: Path, closing: Callable, threads: int) -> None:
    go, begun_to_close = threading.Event(), []

    def see(name: str) -> None:
        begun_to_close.append(name)
        assert go.wait(60)

    closing(see)
    with begun(tmp_path, threads) as sink:
        filler = threading.Thread(target=lambda: [put(sink, shard) for shard in range(4)])
        filler.start()
        filler.join(2)
        assert len(begun_to_close) == threads
        # The rest waits unspooled, but for the shard that is being filled.
        assert sum(bool(writer._spools) for writer in sink._writers.values()) <= threads + 1
        go.set()
        filler.join()
        sink.drain()
    assert [entry.name for entry in read_manifest(tmp_path).entries] == sorted(begun_to_close)
