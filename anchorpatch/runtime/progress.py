"""Progress on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TextIO


class Reporter:
    """Takes note of a job's progress and shows nothing; what a job talks to by default."""

    def start(self, description: str, total: int, done: int = 0, unit: str = "images") -> None:
        """Begin to count up to ``total``; ``done`` of it was done by an earlier run."""

    def advance(self, n: int, **counts: int) -> None:
        """Add ``n`` to the count, and numbers to the further counts beside it."""

    def message(self, text: str) -> None:
        """Say one line."""

    def stop(self) -> None:
        """Take the bar away; also after an error."""


class _Bar(Reporter):
    """A rich progress bar: share, rate, further counts, time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,} {task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(file=stream),
            transient=True,
            speed_estimate_period=30,
        )
        self._counts: Counter[str] = Counter()

    def start(self, description: str, total: int, done: int = 0, unit: str = "images") -> None:
        self._task = self._progress.add_task(description, total=total, completed=done, note="")
        self._unit = unit
        self._progress.start()

    def advance(self, n: int, **counts: int) -> None:
        self._counts.update(counts)
        self._progress.update(self._task, advance=n)
        speed = self._progress.tasks[self._task].speed
        notes = [f"{speed:,.0f} {self._unit}/s"] if speed else []
        notes += [f"{value:,} {name}" for name, value in self._counts.items()]
        self._progress.update(self._task, note=" · ".join(notes))

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._progress.stop()


class _Lines(Reporter):
    """Plain lines, at most one each ``interval`` seconds, no control codes."""

    def __init__(self, stream: TextIO, interval: float = 10.0) -> None:
        self._stream, self._interval = stream, interval
        self._counts: Counter[str] = Counter()

    def start(self, description: str, total: int, done: int = 0, unit: str = "images") -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = self._before = done
        self._began = self._last = time.monotonic()

    def advance(self, n: int, **counts: int) -> None:
        self._counts.update(counts)
        self._done += n
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        self._last = now
        rate = (self._done - self._before) / (now - self._began)
        left = (self._total - self._done) / rate if rate else float("inf")
        notes = [f"{rate:,.1f} {self._unit}/s"]
        notes += [f"{value:,} {name}" for name, value in self._counts.items()]
        notes += [f"{left:,.0f} s left"] if left != float("inf") else []
        self.message(
            f"{self._description}: {self._done:,}/{self._total:,} {self._unit}, {', '.join(notes)}"
        )

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def reporter(stream: TextIO | None = None) -> Reporter:
    """Return the reporter that suits a stream, by default stderr."""
    stream = stream or sys.stderr
    return _Bar(stream) if stream.isatty() else _Lines(stream)
