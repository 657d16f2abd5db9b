from __future__ import annotations

import os
import signal
import threading

import pytest

from anchorpatch.runtime.signals import StopRequested, StopSignals
from anchorpatch.waits import STOP_SIGNALS


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
