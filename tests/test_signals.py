"""Waits end: each in a process of its own, as signals are a process's. Below, what notes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor

import pytest

from anchorpatch import signals
from anchorpatch.errors import AnchorpatchError
from anchorpatch.signals import (
    STOP_SIGNALS,
    StopRequested,
    StopSignals,
    answers,
    shut_down,
    waiting_for,
)

HEAD = """
import ctypes, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from anchorpatch import signals
signals._LAST_GRACE = 0.2
signals.watch_waits(patience=float(sys.argv[1]))
def stop(number, frame):
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
"""

#: Held up in C, where Python runs no handlers and a signal ends no wait.
IN_C = """
mutex = ctypes.create_string_buffer(256)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
signal.signal(signal.SIGTERM, lambda *_: None)  # it may run before the lock is asked for
with signals.waiting_for("a device", grace=0.2):
    print("waits", flush=True)
    lock(mutex)
"""

#: A handler that only takes note.
NOTED = """
before = signal.signal(signal.SIGTERM, lambda n, f: signal.signal(n, stop))
with signals.waiting_for("a peer", grace=0.2):
    print("waits", flush=True)
    threading.Event().wait()
"""

#: The end of the interpreter, which joins the threads of pools.
AT_EXIT = """
pool = ThreadPoolExecutor(1)
pool.submit(threading.Event().wait)
try:
    print("waits", flush=True)
    threading.Event().wait()
finally:
    signals._GRACE = 0.2
    signals.ending()
"""


@pytest.mark.parametrize(
    ("code", "status", "what"),
    [
        (IN_C, 143, "ended by SIGTERM while waiting for a device; run the same command again"),
        (NOTED, 7, ""),
        (AT_EXIT, -15, ""),
    ],
    ids=["in C", "noted", "at exit"],
)
def test_one_signal_ends_a_wait(code: str, status: int, what: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HEAD + code, "600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.count("\n") == bool(what)
    assert errors.startswith(f"anchorpatch: {what}" if what else "")


def test_a_long_wait_is_reported_with_its_rank() -> None:
    code = """
said = threading.Event()
class Stderr:
    def write(self, text): sys.stdout.write(text); said.set()
    def flush(self): sys.stdout.flush()
sys.stderr = Stderr()
with signals.waiting_for("something else"), signals.waiting_for("a lock"):
    said.wait()
"""
    result = subprocess.run(
        [sys.executable, "-c", HEAD + code, "0"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"RANK": "1", "WORLD_SIZE": "2"},
    )
    assert result.stdout.startswith("anchorpatch: rank 1: still waiting for a lock (")


def test_marks_are_taken_away() -> None:
    with pytest.raises(KeyError), waiting_for("a key"):
        raise KeyError
    assert not signals._waits[threading.get_ident()]


def test_shutting_down_drops_what_has_not_begun() -> None:
    pool, begun, go_on = ThreadPoolExecutor(1), threading.Event(), threading.Event()
    first = pool.submit(lambda: (begun.set(), go_on.wait()))
    begun.wait()
    second = pool.submit(int)
    threading.Timer(0.01, go_on.set).start()
    shut_down(pool, "a pool")
    assert first.done()
    assert second.cancelled()


def test_answers_stop_with_words_where_a_process_dies() -> None:
    def lost() -> Iterator[int]:
        yield 1
        raise BrokenExecutor

    items = answers(lost(), "the processes that count")
    assert next(items) == 1
    with pytest.raises(AnchorpatchError, match="one of the processes that count was killed, prob"):
        next(items)
    assert list(answers(iter("ab"), "letters")) == ["a", "b"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_second_acts(number: signal.Signals):
    class Acted(Exception):
        pass

    def act(_number: int, _frame: object) -> None:
        raise Acted

    before = signal.signal(number, act)
    try:
        with StopSignals() as stop:
            assert stop.received == 0
            os.kill(os.getpid(), number)
            assert stop.received == number
            with pytest.raises(Acted):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is act
    finally:
        signal.signal(number, before)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_a_block_that_may_be_interrupted():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with StopSignals() as stop:
            with stop.interrupting():
                pass
            with pytest.raises(StopRequested), stop.interrupting():
                signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM
            with pytest.raises(StopRequested), stop.interrupting():
                pytest.fail("the signal came before the block")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_signals_alone():
    handler, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]
