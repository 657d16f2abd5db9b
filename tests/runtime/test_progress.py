from __future__ import annotations

import io

import pytest

from anchorpatch.runtime import progress
from anchorpatch.runtime.progress import Stopwatch, Waits, _Bar, _Lines, reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_have_no_control_codes_and_count_what_came_before() -> None:
    stream = io.StringIO()
    lines = reporter(stream)
    assert isinstance(lines, _Lines)
    lines = _Lines(stream, interval=0)
    lines.start("extract val", total=100, done=40)
    lines.advance(20, patches=50, skipped=1)
    lines.advance(20, patches=51, skipped=0)
    lines.message("a message")
    lines.stop()
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("extract val: 60/100 images, ")
    assert ", 101 patches, 1 skipped, " in second
    assert second.endswith(" s left")
    assert third == "a message"
    assert stream.getvalue().isprintable() or set(stream.getvalue()) & set("\x1b\r") == set()


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("anchorpatch.runtime.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    lines = _Lines(stream, interval=10)
    lines.start("extract val", total=1000)
    for _ in range(30):
        now[0] += 1
        lines.advance(10)
    assert [line.split(", ")[1] for line in stream.getvalue().splitlines()] == ["10.0 images/s"] * 3


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    bar = reporter(stream)
    assert isinstance(bar, _Bar)
    bar.start("extract val", total=100, done=40)
    bar.advance(60, patches=7)
    bar.message("a [message] with brackets")
    bar.stop()
    assert "a [message] with brackets" in stream.getvalue()
    assert "100/100" in stream.getvalue()


def test_waits_count_once_for_the_innermost_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    waits, network = Waits(), Stopwatch()

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    with waits.on("decoding"):
        pass_time(1)
        with waits.on("writing"):
            pass_time(2)
        pass_time(4)
    with network:
        pass_time(8)  # while nobody waits
        with waits.on("writing", behind=("network", network)):
            pass_time(16)
    with waits.on("writing", behind=("network", network)):
        pass_time(32)
        with network:
            pass_time(64)
    items = waits.each("decoding", (pass_time(128) for _ in range(2)))
    for _ in items:
        pass_time(256)
    assert waits.seconds == {"decoding": 5 + 2 * 128, "writing": 2 + 32, "network": 16 + 64}
    assert network.seconds == 8 + 16 + 64
