from __future__ import annotations

import os
import signal
import threading

import pytest

from anchorpatch.runtime.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_other_threads_leave_signals_alone():
    handler, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]
