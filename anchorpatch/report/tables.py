"""Tables of training runs, Figure 6 and shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anchorpatch.figures.coverage_curves import AUC_FIGURES, LABELS, auc_texts
from anchorpatch.report.collect import Run, Split, number
from anchorpatch.tables import (
    NO_VALUE,
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
from anchorpatch.training.run_folder import best_record

# --- training runs ------------------------------------------------------------------------


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


# --- Figure 6 -----------------------------------------------------------------------------


def coverage_table(
    caption: str, summary: Sequence[Mapping[str, Any]], left_out: Sequence[str] = ()
) -> Table:
    """Return the areas under the curves of Figure 6, as `anchorpatch figure coverage` prints them.

    Args:
        caption: of the table.
        summary: rows of the figure's JSON.
        left_out: localizers that took no part, and why.
    """
    columns = (
        Column("localizer", numeric=False),
        Column("covered", help="area under the curve of top-1 by kept area: the larger is better"),
        Column("±", help="standard error over the images, in brackets deviation over the seeds"),
        Column("gain", help="by how much it is better than AnchorNet"),
        Column("masked", help="the same by the area set to 0: the smaller is better"),
        Column("±"),
        Column("gain"),
    )
    rows = []
    for row in summary:
        name = str(row.get("localizer", ""))
        cells = [text(LABELS.get(name, name))]
        for way in ("covered", "masked"):
            auc, error, spread, gain, gain_error = (
                number(row, f"{way}_{name}") for name in AUC_FIGURES
            )
            texts = auc_texts(auc or 0.0, error, spread, gain, gain_error)
            for key, shown in zip((auc, error, gain), texts, strict=True):
                cells.append(Cell(NO_VALUE if key is None else shown, key))
        rows.append(tuple(cells))
    notes = tuple(f"Left out: {reason}." for reason in left_out)
    return Table(caption, columns, tuple(rows), notes=notes)


# --- shards -------------------------------------------------------------------------------


def histogram_table(split: Split) -> Table:
    """Return how many images have how many patches, a column for each scale."""
    longest = max(map(len, split.histogram.values()))
    width = -(-(longest - 1) // 24)  # at most 24 lines
    rows = []
    bins = {
        scale: [sum(n[start : start + width]) for start in range(1, longest, width)]
        for scale, n in split.histogram.items()
    }
    most = max((max(n, default=0) for n in bins.values()), default=0)
    for i, start in enumerate(range(1, longest, width)):
        stop = start + width - 1
        name = f"{start}" if width == 1 else f"{start} to {stop}"
        cells = [
            Cell(f"{n[i]:,}", n[i], n[i] / most if most and n[i] else None) for n in bins.values()
        ]
        rows.append((Cell(name, start), *cells))
    columns = named("patches", *(f"{scale} px" for scale in bins), first_numeric=True)
    caption = "Images by number of patches and chosen scale"
    return Table(caption, columns, tuple(rows), folded=len(rows) > 8)


def skipped_table(split: Split) -> Table:
    """Return the images that could not be read, or the first of them."""
    total = sum(split.facts.skipped.values())
    notes = (
        (f"The first {len(split.skipped):,} of {total:,}.",) if total > len(split.skipped) else ()
    )
    columns = (Column("image", numeric=False), Column("reason", numeric=False))
    rows = tuple((text(path), text(reason)) for path, reason in split.skipped)
    return Table("Skipped images", columns, rows, notes=notes, folded=len(rows) > 8)
