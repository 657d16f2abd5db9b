"""The loader: the same batches whatever the workers, and no process left behind."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.queues
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from anchorpatch.errors import AnchorpatchError, ImageError, SettingsError
from anchorpatch.images import loader
from anchorpatch.images.decode import decode
from anchorpatch.images.folder import ImageFolder, scan_folder
from anchorpatch.images.loader import Batch, load_batches, read_image
from tests.oddities import encoded, make_oddities, picture

pytestmark = pytest.mark.filterwarnings(
    # Python 3.12 warns of forking with threads; `loader` says why it may.
    "ignore:.*multi-threaded.*fork:DeprecationWarning"
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageFolder, dict[str, str | None]]:
    data = tmp_path_factory.mktemp("odd")
    expected = make_oddities(data / "val" / "class")
    return scan_folder(data, "val"), expected


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    data = tmp_path_factory.mktemp("small")
    for label in ("a", "b"):
        (data / "val" / label).mkdir(parents=True)
        for i in range(10):
            file = data / "val" / label / f"{i}.jpg"
            file.write_bytes(encoded(picture(60 + i, 50, i), "JPEG"))
    (data / "val" / "a" / "bad.jpg").write_bytes(b"no")
    return scan_folder(data, "val")


def slowly(folder: ImageFolder, batches: Sequence[Sequence[int]]) -> list[Batch]:
    """The oracle: one image after the other."""
    wanted = []
    for rows in batches:
        good, pixels, size, bad = [], [], [], []
        for row in rows:
            try:
                decoded = decode((folder.root / folder.path(row)).read_bytes())
            except ImageError as error:
                bad.append((row, error.reason))
                continue
            good.append(row)
            pixels.append(torch.from_numpy(decoded.pixels))
            size.append(decoded.size)
        wanted.append(
            Batch(
                np.array(good, np.int64),
                torch.stack(pixels) if pixels else torch.empty(0, 224, 224, 3, dtype=torch.uint8),
                np.array(size, np.int32).reshape(-1, 2),
                bad,
            )
        )
    return wanted


def assert_same(got: list[Batch], wanted: list[Batch]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        for x, y in ((a.index, b.index), (a.pixels.numpy(), b.pixels.numpy()), (a.size, b.size)):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        assert a.bad == b.bad


def own_workers() -> list[multiprocessing.process.BaseProcess]:
    # joblib keeps processes of its own for later, which other tests may have started.
    children = multiprocessing.active_children()
    return [child for child in children if not type(child).__name__.startswith("Loky")]


def workers_alive() -> int:
    return len(own_workers())


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "pipe"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_those_of_the_oracle(
    small: ImageFolder, workers: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_fits_shared_memory", lambda _: shared)
    bad = small.paths.tolist().index(b"a/bad.jpg")
    # Ranges and lists; out of order, repeated; one all bad, one empty.
    batches = [range(4, 9), [20, 0, 3], [bad], range(0), range(9, 13), [3, bad, 2], range(13, 20)]
    got = list(load_batches(small, batches, workers=workers, prefetch=1))
    assert_same(got, slowly(small, batches))
    assert got[2].pixels.shape == (0, 224, 224, 3)
    assert wait_until(lambda: workers_alive() == 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_oddities(odd: tuple[ImageFolder, dict[str, str | None]], workers: int) -> None:
    folder, expected = odd
    batches = [range(i, min(i + 9, len(folder))) for i in range(0, len(folder), 9)]
    got: dict[str, str | None] = {}
    for batch in load_batches(folder, batches, workers=workers):
        assert len(batch.index) == len(batch.pixels) == len(batch.size)
        got |= {folder.path(int(row)): None for row in batch.index}
        got |= {folder.path(row): reason for row, reason in batch.bad}
    assert got == {f"class/{name}": reason for name, reason in expected.items()}
    assert len(expected) > 60


def test_no_batches(small: ImageFolder) -> None:
    assert list(load_batches(small, [], workers=2)) == []


@pytest.mark.parametrize("option", ["workers", "prefetch"])
def test_impossible_settings(small: ImageFolder, option: str) -> None:
    with pytest.raises(SettingsError, match=option):
        load_batches(
            small,
            [range(3)],
            workers=-1 if option == "workers" else 1,
            prefetch=0 if option == "prefetch" else 1,
        )


def test_pinning_without_a_gpu_does_nothing(
    small: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (batch,) = load_batches(small, [range(3)], workers=1, pin_memory=True)
    assert len(batch.pixels) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_pinning(
    small: ImageFolder, workers: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_fits_shared_memory", lambda _: shared)
    for batch in load_batches(small, [range(3)] * 2, workers=workers, pin_memory=True):
        assert batch.pixels.is_pinned()


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_of_the_process_is_changed(small: ImageFolder, workers: int) -> None:
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


def test_workers_start_at_once_and_end_with_the_iterator(small: ImageFolder) -> None:
    batches = load_batches(small, [range(5)] * 50, workers=2)
    assert workers_alive() == 2
    next(batches)
    batches.close()
    assert wait_until(lambda: workers_alive() == 0)
    unused = load_batches(small, [range(5)] * 50, workers=1)
    assert workers_alive() == 1
    del unused
    assert wait_until(lambda: workers_alive() == 0)


def test_a_killed_worker_is_one_clear_error(small: ImageFolder) -> None:
    batches = load_batches(small, [range(20)] * 200, workers=2, prefetch=1)
    next(batches)
    victim = own_workers()[0].pid
    assert victim
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(AnchorpatchError, match="a loading worker was killed") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    assert wait_until(lambda: workers_alive() == 0)


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, BrokenPipeError])
def test_a_worker_that_dies_while_it_hands_over_a_batch_counts_as_killed(
    small: ImageFolder, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    # Which trace a death leaves first is a matter of microseconds.
    def lose_connection(*_: object, **__: object) -> None:
        raise error

    batches = load_batches(small, [range(3)], workers=1)
    monkeypatch.setattr(multiprocessing.queues.Queue, "get", lose_connection)
    with pytest.raises(AnchorpatchError, match="a loading worker was killed"):
        list(batches)


def test_workers_leave_signals_to_the_parent(small: ImageFolder) -> None:
    batches = load_batches(small, [range(5)] * 20, workers=2, prefetch=1)
    next(batches)
    for child in own_workers():
        assert child.pid
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    assert len(list(batches)) == 19


def test_a_failing_worker_is_one_clear_error(
    small: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: bytes) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(loader, "decode", fail)
    with pytest.raises(AnchorpatchError) as caught:
        list(load_batches(small, [range(3)], workers=1))
    assert str(caught.value) == "a loading worker failed: MemoryError: no more"


SCRIPT = """
import multiprocessing, os, signal, sys
from pathlib import Path
from anchorpatch.images.folder import scan_folder
from anchorpatch.images.loader import load_batches
folder = scan_folder(Path(sys.argv[1]), "val")
batches = load_batches(folder, [range(20)] * 1000, workers=2)
next(batches)
pids = [child.pid for child in multiprocessing.active_children()]
try:
    print(*pids, flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    for batch in batches:
        pass
except KeyboardInterrupt:
    batches.close()
    sys.exit(130)
"""


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
    ],
)
def test_no_worker_outlives_its_parent(
    small: ImageFolder, how: str, number: int | None, status: int
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(small.root.parent), how]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        if number:  # Ctrl-C goes to the whole group
            os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert errors == ""
    assert wait_until(lambda: not any(is_running(pid) for pid in pids), seconds=3)


def test_an_iterator_made_in_a_thread(small: ImageFolder) -> None:
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(lambda: list(load_batches(small, [range(4)], workers=1))).result()
    assert_same(got, slowly(small, [range(4)]))


def test_reading_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"abc")
    assert read_image(str(file)) == b"abc"
    with pytest.raises(ImageError, match="missing"):
        read_image(str(tmp_path / "b.jpg"))
    monkeypatch.setattr(loader, "MAX_BYTES", 2)
    with pytest.raises(ImageError, match="file too large"):
        read_image(str(file))

    def fail_with(number: int) -> None:
        def fail(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "open", fail)

    for number, reason in [
        (errno.EACCES, "permission denied"),
        (errno.EIO, "unreadable: Input/output error"),
    ]:
        fail_with(number)
        with pytest.raises(ImageError) as caught:
            read_image(str(file))
        assert caught.value.reason == reason
    fail_with(errno.EMFILE)
    with pytest.raises(OSError, match="Too many open files"):
        read_image(str(file))


def test_small_shared_memory_is_noticed(
    small: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def full(size: int) -> bool:
        asked.append(size)
        return False

    monkeypatch.setattr(loader, "_fits_shared_memory", full)
    (batch,) = load_batches(small, [range(8)], workers=1, prefetch=2)
    assert asked == [8 * 224 * 224 * 3 * 4]
    assert len(batch.pixels) == 8
    monkeypatch.undo()
    assert loader._fits_shared_memory(0)
    assert not loader._fits_shared_memory(1 << 60)
