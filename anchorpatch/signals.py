"""Signals that ask a run to stop, and waits that they end.

`StopSignals` notes a signal for the moment at which stopping is safe.

Python runs the handler of a signal between two instructions of the main thread. A main thread
that is held up in C++ (an all-reduce with a process that hangs, a copy from a GPU), or by a
thread that is held up, does not get there. So waits for another process, thread, lock or device
are marked with `waiting_for`, and a thread that `watch_waits` starts looks at the marks: it
reports waits that take long, and ends the process where a wait outlives a stop signal.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from anchorpatch.errors import AnchorpatchError

if TYPE_CHECKING:
    from concurrent.futures import Executor

#: What asks a run to stop: Ctrl-C, ``kill``, a closed terminal, and what batch systems send
#: ahead of the end of a job (``sbatch --signal=USR1@60``).
STOP_SIGNALS: Final = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if name in signal.Signals.__members__
)

#: Seconds that a wait may go on after a stop signal.
_GRACE: Final = 10.0

#: Seconds from the second signal, which `watch_waits` sends, to the end of the process.
_LAST_GRACE: Final = 3.0

_T = TypeVar("_T")


class StopRequested(Exception):
    """A signal has come within `StopSignals.interrupting`."""


class StopSignals:
    """Notes `STOP_SIGNALS` within a ``with`` block instead of raising at any line.

    A second signal of the same kind acts at once, for whoever does not want to wait. Signals
    that are ignored stay so: ``nohup`` ignores SIGHUP.

    Attributes:
        received: number of the signal, 0 while there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}
        self._raises = False

    def __enter__(self) -> StopSignals:
        # Python lets only the main thread set handlers; elsewhere signals are not ours.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal end the block: for waits, and for work that may be thrown away.

        Raises:
            StopRequested: a signal has come, before the block or within.
        """
        self._raises = True
        try:
            if self.received:
                raise StopRequested
            yield
        finally:
            self._raises = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])
        if self._raises:
            self._raises = False
            raise StopRequested


# --- waits --------------------------------------------------------------------------------------


class _Wait(NamedTuple):
    what: str
    since: float
    grace: float


_waits: dict[int, list[_Wait]] = {}


@contextmanager
def waiting_for(what: str, grace: float = _GRACE) -> Iterator[None]:
    """Mark the block as a wait of this thread.

    Args:
        what: completes "waiting for ...".
        grace: seconds that the wait may go on after a stop signal.
    """
    mine = _waits.setdefault(threading.get_ident(), [])
    mine.append(_Wait(what, time.monotonic(), grace))
    try:
        yield
    finally:
        mine.pop()


def ending() -> None:
    """Mark what is left of the main thread as a wait: Python joins all threads before it exits.

    A signal then has its default effect.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    _waits[threading.get_ident()] = [_Wait("threads to end", time.monotonic(), _GRACE)]


def shut_down(pool: Executor, what: str) -> None:
    """End a pool of threads: tasks that have not begun are dropped, others are waited for."""
    with waiting_for(what):
        pool.shutdown(cancel_futures=True)


def answers(found: Iterable[_T], what: str) -> Iterator[_T]:
    """Yield what the processes of a pool find, as each is waited for.

    Args:
        found: by the processes.
        what: they are.

    Raises:
        AnchorpatchError: one of them has died.
    """
    from concurrent.futures import BrokenExecutor  # slow to import

    items = iter(found)
    while True:
        try:
            with waiting_for(what):
                item = next(items)
        except StopIteration:
            return
        except BrokenExecutor as error:
            raise AnchorpatchError(
                f"one of {what} was killed, probably out of memory; use fewer --jobs"
            ) from error
        yield item


def watch_waits(patience: float = 60.0) -> None:
    """Start to look at the waits of this process. Call it once, from the main thread.

    A wait of any thread that lasts longer than ``patience`` seconds is reported on stderr. A
    wait of the main thread that goes on for its ``grace`` after a signal of `STOP_SIGNALS` gets
    the signal once more, in case a handler only took note of the first one. If that does not
    help, the process exits with status 128 + signal, as after a SIGKILL.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Written to when a signal arrives, whatever the main thread is busy with.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading, patience), name="waits", daemon=True).start()


def _watch(signals: int, patience: float) -> None:
    main = threading.main_thread().ident
    asked, when, nudged = 0, 0.0, 0.0
    reported: dict[int, tuple[_Wait, float]] = {}
    while True:
        if select.select([signals], [], [], 0.2 if asked else 1.0)[0]:
            for number in os.read(signals, 64):
                if number in STOP_SIGNALS and not asked:
                    asked, when = number, time.monotonic()
        now = time.monotonic()
        for thread, waits in list(_waits.items()):
            if not waits:
                continue
            wait = waits[-1]
            known, next_time = reported.get(thread, (wait, wait.since + patience))
            if known is not wait:
                next_time = wait.since + patience
            if now >= next_time:
                _say(f"still waiting for {wait.what} ({now - wait.since:.0f} s)")
                next_time = now + (now - wait.since)  # less and less often
            reported[thread] = wait, next_time
        of_main = _waits.get(main or 0)
        if not (asked and of_main):
            continue
        wait = of_main[-1]
        if not nudged and now - max(wait.since, when) > wait.grace:
            nudged = now
            signal.pthread_kill(main or 0, asked)
        elif nudged and now - max(wait.since, nudged) > _LAST_GRACE:
            _say(
                f"ended by {signal.Signals(asked).name} while waiting for {wait.what}; "
                "run the same command again"
            )
            os._exit(128 + asked)


def _say(text: str) -> None:
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    who = "anchorpatch: " if rank is None else f"anchorpatch: rank {rank}: "
    with suppress(OSError, ValueError, AttributeError):  # stderr may be closed
        print(who + text, file=sys.stderr, flush=True)
