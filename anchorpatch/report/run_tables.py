"""Tables of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anchorpatch.jobs.training.runlog import best_record
from anchorpatch.report.cells import (
    Cell,
    Column,
    Table,
    count,
    decimal,
    named,
    share,
    text,
    written,
)
from anchorpatch.report.collect import Run, number

__all__ = ["epoch_table", "run_table"]


def run_table(runs: Sequence[Run]) -> Table:
    """Return a line for each run: how long, how good, how fast."""
    columns = (
        Column("run", numeric=False),
        Column("epochs"),
        Column("best top-1"),
        Column("at epoch"),
        Column("last val loss"),
        Column("per second", help="images, or patches where a network is trained on patches"),
        Column("hours"),
        Column("peak memory, GB"),
    )
    return Table("Training runs", columns, tuple(map(_run_row, runs)))


def _run_row(run: Run) -> tuple[Cell, ...]:
    last = run.records[-1]
    best = best_record(run.records)
    speeds = [s for record in run.records if (s := _speed(record)) is not None]
    seconds = [s for record in run.records if (s := number(record, "seconds")) is not None]
    memory = [m for record in run.records if (m := number(record, "peak_memory")) is not None]
    planned, done = number(run.config, "epochs"), len(run.records)
    epochs = f"{done} of {planned:.0f}" if planned and planned != done else f"{done}"
    return (
        text(run.name),
        Cell(epochs, done),
        share(number(best, "val", "top1")),
        count(number(best, "epoch")),
        decimal(number(last, "val", "loss"), 3),
        decimal(sorted(speeds)[len(speeds) // 2] if speeds else None, 1),
        decimal(sum(seconds) / 3600 if seconds else None),
        decimal(max(memory) / 1e9 if memory else None),
    )


def epoch_table(run: Run) -> Table:
    """Return a line for each epoch of a run."""
    names = ("epoch", "rate", "train loss", "val loss", "top-1", "top-5", "per second")
    columns = named(*names, "waiting", "minutes", first_numeric=True)
    rows = []
    for record in run.records:
        seconds = number(record, "seconds")
        rows.append(
            (
                count(number(record, "epoch")),
                written(number(record, "lr"), lambda v: f"{v:.3g}"),
                decimal(number(record, "train", "loss"), 4),
                decimal(number(record, "val", "loss"), 4),
                share(number(record, "val", "top1")),
                share(number(record, "val", "top5")),
                decimal(_speed(record), 1),
                share(number(record, "waiting"), 0),
                decimal(None if seconds is None else seconds / 60, 1),
            )
        )
    return Table(f"Epochs of {run.name}", columns, tuple(rows), folded=True)


def _speed(record: Mapping[str, Any]) -> float | None:
    images, patches = (number(record, f"{unit}_per_second") for unit in ("images", "patches"))
    return patches if images is None else images
