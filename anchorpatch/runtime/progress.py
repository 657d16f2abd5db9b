"""Progress on stderr, a live bar or plain lines now and then, and what a pipeline waited for."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

_T = TypeVar("_T")


class Reporter:
    """Takes note of a job's progress and shows nothing; what a job talks to by default."""

    def start(self, description: str, total: int, done: int = 0, unit: str = "images") -> None:
        """Begin to count up to ``total``; ``done`` of it was done by an earlier run."""

    @contextmanager
    def counting(self, description: str, total: int, unit: str = "images") -> Iterator[None]:
        """Count up to ``total`` during the block."""
        self.start(description, total, unit=unit)
        try:
            yield
        finally:
            self.stop()

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


class Stopwatch:
    """Measures the time within its ``with`` blocks; any thread may read it meanwhile."""

    def __init__(self) -> None:
        # Seconds of the blocks that have ended, and when the present one began.
        self._state: tuple[float, float | None] = (0.0, None)

    @property
    def seconds(self) -> float:
        """Time within the blocks, that of the present one included."""
        total, since = self._state
        return total if since is None else total + time.monotonic() - since

    def __enter__(self) -> None:
        self._state = self.seconds, time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._state = self.seconds, None


class Waits:
    """How long one thread of a pipeline has waited for each stage.

    Attributes:
        seconds: by stage.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, stage: str, behind: tuple[str, Stopwatch] | None = None) -> Iterator[None]:
        """Count the block as a wait for a stage, but for waits within the block.

        Args:
            stage: that is waited for.
            behind: another stage, and for how long the first one has waited for it so far: such
                waits during the block count as those for the other stage.
        """
        inner, began = sum(self.seconds.values()), time.monotonic()
        other, watch = behind or (stage, Stopwatch())
        before = watch.seconds
        try:
            yield
        finally:
            seconds = time.monotonic() - began - (sum(self.seconds.values()) - inner)
            of_other = min(seconds, watch.seconds - before)
            self.seconds[other] += of_other
            self.seconds[stage] += seconds - of_other

    def each(self, stage: str, items: Iterator[_T]) -> Iterator[_T]:
        """Yield items, each of which is a wait for a stage."""
        while True:
            with self.on(stage):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
            del item  # or it would live on while the next one is waited for
