"""Worker processes: they change nothing, and none is left behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
import subprocess
import sys
import warnings
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch

from anchorpatch.errors import AnchorpatchError
from anchorpatch.images import loader, workers
from anchorpatch.images.folder import ImageFolder
from anchorpatch.images.loader import load_batches
from anchorpatch.images.workers import serve_batches
from anchorpatch.signals import STOP_SIGNALS
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


def test_a_worker_killed_in_the_middle_of_an_answer_is_one_clear_error(
    small: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_and_die(connection: Connection, item: tuple[Any, ...]) -> None:
        index, pixels, size, bad, damaged = item
        connection.send((index, pixels.shape, size, bad, damaged, False))
        os.write(connection.fileno(), struct.pack("!i", pixels.nbytes) + bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers, "_hand_over", begin_and_die)
    with pytest.raises(AnchorpatchError, match="a loading worker was killed by SIGKILL, probably"):
        list(load_batches(small, [range(3)], workers=2))


@pytest.mark.parametrize("allowed", [0, 3 * 224 * 224 * 3 - 1])
def test_pixels_that_memory_refuses_take_the_connection(small: ImageFolder, allowed: int) -> None:
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
    small: ImageFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(_: Connection) -> int:
        raise error

    monkeypatch.setattr(workers, "recv_handle", refuse)
    with pytest.raises(AnchorpatchError, match="too many open files; raise the limit"):
        list(load_batches(small, [range(3)], workers=1))


@pytest.mark.parametrize(
    ("ranks", "room", "taken"), [("1", 1 << 30, 8), ("4", 6 * 1000, 2), ("2", 9 * 1000, 4)]
)
def test_what_is_under_way_is_bounded_for_all_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, ranks: str, room: int, taken: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(workers, "_IN_FLIGHT", room)
    asked: list[int] = []
    requests = (asked.append(i) or i for i in range(100))
    batches = serve_batches(
        Numbers(), requests, batch_bytes=1000, workers=2, prefetch=4, pin_memory=False
    )
    assert len(asked) == taken
    assert [next(batches).index.item() for _ in range(3)] == [0, 1, 2]
    assert len(asked) == taken + 3
    batches.close()


class Numbers:
    def __getitem__(self, request: int) -> tuple[Any, ...]:
        pixels, size = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 2), np.int32)
        return np.array([request]), pixels, size, [], []


def test_workers_leave_signals_to_the_parent(small: ImageFolder) -> None:
    batches = load_batches(small, [range(5)] * 20, workers=2, prefetch=1)
    next(batches)
    for child in own_workers():
        assert child.pid
        for number in STOP_SIGNALS:
            os.kill(child.pid, number)
    assert len(list(batches)) == 19


def test_a_failing_worker_is_one_clear_error(
    small: ImageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(loader, "decode", fail)
    with pytest.raises(AnchorpatchError) as caught:
        list(load_batches(small, [range(3)], workers=1))
    assert str(caught.value) == "a loading worker failed: MemoryError: no more"
    assert "in fail" in str(caught.value.__cause__)  # --debug shows where


SCRIPT = """
import multiprocessing, os, signal, sys
from pathlib import Path
from anchorpatch.images.folder import scan_folder
from anchorpatch.images.loader import load_batches
from anchorpatch.signals import STOP_SIGNALS
from tests.images.processes import own_workers, wait_until, workers_alive
folder = scan_folder(Path(sys.argv[1]), "val")
batches = load_batches(folder, [range(20)] * 1000, workers=2)
next(batches)
pids = [child.pid for child in multiprocessing.active_children()]
try:
    print(*pids, flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "exit":
        sys.exit(3)  # the iterator lives on
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
        ("exit", None, 3),
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
