"""The loader: the same batches whatever the workers, which change nothing and all end."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import resource
import signal
import struct
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch

from anchorpatch import storage
from anchorpatch.errors import AnchorpatchError, ImageError, SettingsError
from anchorpatch.images import folder, loader
from anchorpatch.images.decode import decode
from anchorpatch.images.folder import read_image
from anchorpatch.images.loader import Batch, load_batches
from anchorpatch.images.source import ImageSource, open_source
from anchorpatch.runtime.device import cpu_count
from anchorpatch.settings import CROP, CropSettings
from anchorpatch.signals import STOP_SIGNALS
from tests.images.processes import own_workers, wait_until, workers_alive
from tests.oddities import encoded, make_oddities, picture
from tests.program import Started

pytestmark = pytest.mark.filterwarnings(
    # Python 3.12 warns of forking with threads; `loader` says why it may.
    "ignore:.*multi-threaded.*fork:DeprecationWarning"
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSource, dict[str, str | None]]:
    data = tmp_path_factory.mktemp("odd")
    expected = make_oddities(data / "val" / "class")
    return open_source(data, "val"), expected


def slowly(folder: ImageSource, batches: Sequence[Sequence[int]]) -> list[Batch]:
    """The oracle: one image after the other."""
    wanted = []
    for rows in batches:
        good, pixels, size, bad, damaged = [], [], [], [], []
        for row in rows:
            try:
                decoded = decode((folder.root / folder.path(row)).read_bytes())
            except ImageError as error:
                bad.append((row, error.reason))
                continue
            good.append(row)
            pixels.append(torch.from_numpy(decoded.pixels))
            size.append(decoded.size)
            damaged += [row] * decoded.damaged
        wanted.append(
            Batch(
                np.array(good, np.int64),
                torch.stack(pixels) if pixels else torch.empty(0, 224, 224, 3, dtype=torch.uint8),
                np.array(size, np.int32).reshape(-1, 2),
                bad,
                damaged,
            )
        )
    return wanted


def assert_same(got: list[Batch], wanted: list[Batch]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        for x, y in ((a.index, b.index), (a.pixels.numpy(), b.pixels.numpy()), (a.size, b.size)):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        assert (a.bad, a.damaged) == (b.bad, b.damaged)


@pytest.mark.parametrize(
    ("workers", "shared"), [(0, True), (1, True), (1, False), (2, True), (2, False)]
)
def test_batches_are_those_of_the_oracle(
    small: ImageSource, workers: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shared:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    bad = small.paths.tolist().index(b"a/bad.jpg")
    # Ranges and lists; out of order, repeated; one all bad, one empty.
    batches = [range(4, 9), [20, 0, 3], [bad], range(0), range(9, 13), [3, bad, 2], range(13, 20)]
    got = list(load_batches(small, batches, workers=workers))
    assert_same(got, slowly(small, batches))
    assert got[2].pixels.shape == (0, 224, 224, 3)
    assert wait_until(lambda: workers_alive() == 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_oddities(odd: tuple[ImageSource, dict[str, str | None]], workers: int) -> None:
    folder, expected = odd
    batches = [range(i, min(i + 9, len(folder))) for i in range(0, len(folder), 9)]
    got: dict[str, str | None] = {}
    for batch in load_batches(folder, batches, workers=workers):
        assert len(batch.index) == len(batch.pixels) == len(batch.size)
        got |= {folder.path(int(row)): None for row in batch.index}
        got |= {folder.path(row): reason for row, reason in batch.bad}
    assert got == {f"class/{name}": reason for name, reason in expected.items()}
    assert len(expected) > 60


def test_no_batches(small: ImageSource) -> None:
    assert list(load_batches(small, [], workers=2)) == []


def test_impossible_settings(small: ImageSource) -> None:
    with pytest.raises(SettingsError, match="workers"):
        load_batches(small, [range(3)], workers=-1)


def test_pinning_without_a_gpu_does_nothing(
    small: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (batch,) = load_batches(small, [range(3)], workers=1, pin_memory=True)
    assert len(batch.pixels) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_pinning(small: ImageSource, workers: int) -> None:
    for batch in load_batches(small, [range(3)] * 2, workers=workers, pin_memory=True):
        assert batch.pixels.is_pinned()


def test_an_iterator_made_in_a_thread(small: ImageSource) -> None:
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(lambda: list(load_batches(small, [range(4)], workers=1))).result()
    assert_same(got, slowly(small, [range(4)]))


def test_reading_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"abc")
    assert read_image(str(file)) == b"abc"
    with pytest.raises(ImageError, match="missing"):
        read_image(str(tmp_path / "b.jpg"))
    monkeypatch.setattr(folder, "MAX_BYTES", 2)
    with pytest.raises(ImageError, match="file too large"):
        read_image(str(file))

    def fail_with(number: int) -> None:
        def fail(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "open", fail)

    fail_with(errno.EACCES)
    with pytest.raises(ImageError, match="permission denied"):
        read_image(str(file))
    fail_with(errno.EUCLEAN)
    with pytest.raises(ImageError, match="unreadable: Structure needs cleaning"):
        read_image(str(file))
    fail_with(errno.EMFILE)
    with pytest.raises(OSError, match="Too many open files"):
        read_image(str(file))


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int | None = None
) -> list[str]:
    """Let the opening of files called ``name`` fail; return a list of the failures."""
    real, failures = os.open, []
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))

    def fail(path: str, *arguments: int, **options: int) -> int:
        if os.path.basename(os.fsdecode(path)) == name and len(failures) != times:
            failures.append(name)
            raise OSError(number, os.strerror(number), path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fail)
    return failures


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO])
def test_passing_errors_pass(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    failures = failing(monkeypatch, "a.jpg", number, times=2)
    assert read_image(str(tmp_path / "a.jpg")) == b"abc"
    assert len(failures) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_falters_fails_the_run_and_not_the_image(
    small: ImageSource, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "7.jpg", errno.EIO)
    with pytest.raises(AnchorpatchError) as caught:
        list(load_batches(small, [range(4), range(4, 12), range(12, 20)], workers=workers))
    assert str(caught.value) == (
        f"{small.root}/a/7.jpg: cannot be read: Input/output error (tried 3 times): check the disk "
        "or the network, then run the same command again"
    )
    assert not isinstance(caught.value, ImageError)


def test_damage_is_counted_or_skipped(tmp_path: Path) -> None:
    plain = encoded(picture(), "JPEG")
    start = plain.index(b"\xff\xda") + 200
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "0.jpg").write_bytes(plain[:start] + plain[start + 40 :])
    (tmp_path / "val" / "a" / "1.jpg").write_bytes(plain)
    folder = open_source(tmp_path, "val")
    (kept,) = load_batches(folder, [range(2)], workers=0)
    assert (kept.index.tolist(), kept.bad, kept.damaged) == ([0, 1], [], [0])
    crop = CropSettings(damaged="skip")
    (skipped,) = load_batches(folder, [range(2)], workers=1, crop=crop)
    assert (skipped.index.tolist(), skipped.bad) == ([1], [(0, "damaged")])
    assert skipped.damaged == []


# --- the workers --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_of_the_process_is_changed(small: ImageSource, workers: int) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state(), torch.get_num_threads(), list(warnings.filters)
    handlers = [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT)]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for _ in load_batches(small, [range(3)] * 2, workers=workers):
        assert torch.get_num_threads() == before[1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert list(warnings.filters) == before[2]
    assert [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT)] == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_workers_start_at_once_and_end_with_the_iterator(small: ImageSource) -> None:
    batches = load_batches(small, [range(5)] * 50, workers=2)
    assert workers_alive() == 2
    next(batches)
    batches.close()
    assert wait_until(lambda: workers_alive() == 0)
    unused = load_batches(small, [range(5)] * 50, workers=1)
    assert workers_alive() == 1
    del unused
    assert wait_until(lambda: workers_alive() == 0)


def test_a_killed_worker_is_one_clear_error(small: ImageSource) -> None:
    batches = load_batches(small, [range(20)] * 200, workers=2)
    next(batches)
    victim = own_workers()[0].pid
    assert victim
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(AnchorpatchError, match="a loading worker was killed") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert wait_until(lambda: workers_alive() == 0)


def test_a_worker_killed_in_the_middle_of_an_answer_is_one_clear_error(
    small: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_and_die(connection: Connection, item: tuple[Any, ...]) -> None:
        index, pixels, size, bad, damaged = item
        connection.send((index, pixels.shape, size, bad, damaged, False))
        os.write(connection.fileno(), struct.pack("!i", pixels.nbytes) + bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(loader, "_hand_over", begin_and_die)
    with pytest.raises(AnchorpatchError, match="a loading worker was killed by SIGKILL, probably"):
        list(load_batches(small, [range(3)], workers=2))


@pytest.mark.parametrize("allowed", [0, 3 * 224 * 224 * 3 - 1])
def test_pixels_that_memory_refuses_take_the_connection(small: ImageSource, allowed: int) -> None:
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
    try:
        batches = load_batches(small, [range(3)] * 3, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    (wanted,) = load_batches(small, [range(3)], workers=0)
    got = list(batches)
    assert len(got) == 3
    assert all(torch.equal(batch.pixels, wanted.pixels) for batch in got)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "Too many open files"), RuntimeError("received 0 items of ancdata")],
)
def test_a_parent_out_of_descriptors_says_so(
    small: ImageSource, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(_: Connection) -> int:
        raise error

    monkeypatch.setattr(loader, "recv_handle", refuse)
    with pytest.raises(AnchorpatchError, match="too many open files; raise the limit"):
        list(load_batches(small, [range(3)], workers=1))


CROP_BYTES = CROP * CROP * 3


@pytest.mark.parametrize(
    ("ranks", "room", "ahead"),
    [
        (1, 1 << 30, [16, 3, 0, 16]),  # whole batches, two for each worker
        (1, 16 * CROP_BYTES, [4, 4, 4, 4]),
        (4, 64 * CROP_BYTES, [4, 4, 4, 4]),
        (3, 64 * CROP_BYTES, [5, 5, 5, 1]),
        (100, 1, [1, 1, 1, 1]),
    ],
)
def test_what_is_ahead_is_bounded_for_all_processes_of_a_machine(
    small: ImageSource,
    ranks: int,
    room: int,
    ahead: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(loader, "_ROOM", room)
    ask, asked = loader._Worker.ask, []

    def note(worker: Any, request: Any) -> None:
        asked.append(len(request[0]))
        ask(worker, request)

    monkeypatch.setattr(loader._Worker, "ask", note)
    bad = small.paths.tolist().index(b"a/bad.jpg")
    batches = [range(16), [3, bad, 2], range(0), range(4, 20), [bad] * 3]
    loaded = load_batches(small, iter(batches), workers=2)
    assert asked == ahead
    assert_same(list(loaded), slowly(small, batches))
    assert sum(asked) == sum(map(len, batches))


def test_ranks_of_a_machine_share_its_cores(
    small: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: 128)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    of_each_rank = load_batches(small, [], workers=cpu_count())
    assert workers_alive() == 128 // 8
    of_each_rank.close()
    assert list(of_each_rank) == []


def test_workers_leave_signals_to_the_parent(small: ImageSource) -> None:
    batches = load_batches(small, [range(5)] * 20, workers=2)
    next(batches)
    for child in own_workers():
        assert child.pid
        for number in STOP_SIGNALS:
            os.kill(child.pid, number)
    assert len(list(batches)) == 19


def test_a_signal_is_not_lost_in_a_fork(
    small: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another thread takes it, its handler runs in the fork, and Python ignores errors."""

    class Starting(loader._Worker):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            with contextlib.suppress(KeyError), ThreadPoolExecutor(1) as thread:
                take = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGUSR1})
                thread.submit(take).result()
                thread.submit(signal.raise_signal, signal.SIGUSR1).result()

    def act(number: int, frame: object) -> None:
        raise KeyError

    monkeypatch.setattr(loader, "_Worker", Starting)
    before = signal.signal(signal.SIGUSR1, act)
    try:
        with pytest.raises(KeyError):
            load_batches(small, [range(5)], workers=1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_failing_worker_is_one_clear_error(
    small: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(loader, "decode", fail)
    with pytest.raises(AnchorpatchError) as caught:
        list(load_batches(small, [range(3)], workers=1))
    assert str(caught.value) == "a loading worker failed: MemoryError: no more"
    assert "in fail" in str(caught.value.__cause__)  # --debug shows where


def load_and_end(split: Path, how: str, told: Path) -> None:
    batches = load_batches(open_source(split.parent, split.name), [range(20)] * 1000, workers=2)
    next(batches)
    pids = [child.pid for child in multiprocessing.active_children()]
    try:
        whole = told.with_suffix(".written")
        whole.write_text(json.dumps(pids))
        whole.rename(told)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            sys.exit(3)  # the iterator lives on
        for _ in batches:
            pass
    except KeyboardInterrupt:
        batches.close()
        sys.exit(130)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("how", "number", "status"),
    [
        ("kill", None, -signal.SIGKILL),
        ("interrupt", signal.SIGINT, 130),
        ("exit", None, 3),
    ],
)
def test_no_worker_outlives_its_parent(
    small: ImageSource, tmp_path: Path, how: str, number: int | None, status: int
) -> None:
    told = tmp_path / "pids"
    run = Started(
        load_and_end, small.root, how, told, cwd=tmp_path, env=os.environ, before=os.setsid
    )
    with run as process:
        assert wait_until(told.exists, seconds=60)
        pids = json.loads(told.read_text())
        assert len(pids) == 2
        if number:  # Ctrl-C goes to the whole group
            os.killpg(process.pid, number)
        done = process.wait(timeout=30)
    assert (done.returncode, done.stderr) == (status, "")
    assert wait_until(lambda: not any(is_running(pid) for pid in pids), seconds=3)
