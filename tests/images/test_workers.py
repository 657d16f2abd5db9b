"""Worker processes: they change nothing, and none is left behind."""

from __future__ import annotations

import multiprocessing
import multiprocessing.queues
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from anchorpatch.errors import AnchorpatchError
from anchorpatch.images import loader, workers
from anchorpatch.images.folder import ImageFolder
from anchorpatch.images.loader import load_batches
from tests.images.processes import own_workers, wait_until, workers_alive

pytestmark = pytest.mark.filterwarnings(
    # Python 3.12 warns of forking with threads; `workers` says why it may.
    "ignore:.*multi-threaded.*fork:DeprecationWarning"
)


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
from tests.images.processes import own_workers, wait_until, workers_alive
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


def test_small_shared_memory_is_noticed(
    small: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def full(size: int) -> bool:
        asked.append(size)
        return False

    monkeypatch.setattr(workers, "_fits_shared_memory", full)
    (batch,) = load_batches(small, [range(8)], workers=1, prefetch=2)
    assert asked == [8 * 224 * 224 * 3 * 4]
    assert len(batch.pixels) == 8
    monkeypatch.undo()
    assert workers._fits_shared_memory(0)
    assert not workers._fits_shared_memory(1 << 60)
