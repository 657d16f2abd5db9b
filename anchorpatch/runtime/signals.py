"""Signals that ask a run to stop, noted for the moment at which stopping is safe."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from anchorpatch.waits import STOP_SIGNALS

__all__ = ["StopRequested", "StopSignals"]


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
