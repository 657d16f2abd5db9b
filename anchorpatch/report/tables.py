"""Tables that the page can sort: each cell has its text and what it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from anchorpatch.demo.score import SceneScore
from anchorpatch.figures.coverage_curves import AUC_FIGURES, LABELS, auc_texts
from anchorpatch.jobs.results import AnchorNetFigures, Table3, Table4
from anchorpatch.jobs.training.runlog import best_record
from anchorpatch.report.collect import Run, Split, number
from anchorpatch.text import counted, percent
from anchorpatch.text import decimal as decimal_text

__all__ = [
    "NO_VALUE",
    "Cell",
    "Column",
    "Table",
    "count",
    "coverage_table",
    "decimal",
    "epoch_table",
    "facts_table",
    "fit_table",
    "histogram_table",
    "named",
    "output_table",
    "preset_table",
    "run_table",
    "scale_table",
    "share",
    "shown_value",
    "size_table",
    "skipped_table",
    "table_3",
    "table_4",
    "text",
    "written",
]

NO_VALUE: Final = "–"  # noqa: RUF001 (an en dash)


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: what is shown.
        key: what the column is sorted by; None goes last.
        bar: share from 0 to 1 of a bar behind the text; None without.
    """

    text: str
    key: float | str | None
    bar: float | None = None

    @property
    def long(self) -> bool:
        """Whether it may be broken into lines, if need be within a word such as a checksum."""
        return len(self.text) > 24


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its heading.
        numeric: aligned to the right.
        help: what the heading stands for; shown as a note below the table.
    """

    name: str
    numeric: bool = True
    help: str = ""

    @property
    def long(self) -> bool:
        """Whether it may be broken into lines, as a long cell."""
        return Cell(self.name, None).long


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        columns: their headings.
        rows: that take part in sorting.
        foot: rows of totals, which stay at the end.
        notes: lines below.
        folded: shown on request alone.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    foot: tuple[tuple[Cell, ...], ...] = ()
    notes: tuple[str, ...] = ()
    folded: bool = False
    kind: ClassVar[str] = "table"


def named(*names: str, first_numeric: bool = False) -> tuple[Column, ...]:
    """Return columns of numbers, of which the first is text by default."""
    return tuple(Column(name, numeric=i > 0 or first_numeric) for i, name in enumerate(names))


def text(value: Any) -> Cell:
    """Return a cell of text."""
    return Cell(str(value), str(value))


def count(value: Any) -> Cell:
    """Return a cell of a whole number."""
    return written(value, lambda v: f"{v:,.0f}")


def decimal(value: Any, digits: int = 2) -> Cell:
    """Return a cell of a number with decimals."""
    return written(value, lambda v: decimal_text(v, digits))


def share(value: Any, digits: int = 2) -> Cell:
    """Return a cell of a share from 0 to 1, in per cent."""
    return written(value, lambda v: percent(v, digits))


def shown_value(value: Any) -> str:
    """Write a setting: a list with slashes, as the command line's messages do.

    Example:
        >>> shown_value([24, 10, 8]), shown_value(None), shown_value(True), shown_value(0.3)
        ('24/10/8', 'none', 'yes', '0.3')
    """
    if isinstance(value, (list, tuple)):
        return "/".join(map(shown_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def written(value: Any, form: Callable[[Any], str]) -> Cell:
    """Return a cell of a number written by ``form``; what is no number goes last."""
    if value is None:
        return Cell(NO_VALUE, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return Cell(str(value), None)
    return Cell(form(value), value)


def facts_table(
    caption: str, first: str, rows: Mapping[str, Mapping[str, Any]], *, folded: bool = False
) -> Table:
    """Return a line for each thing, a column for each fact that any of them has.

    Args:
        caption: of the table.
        first: heading of the things' names.
        rows: name -> fact -> value.
        folded: shown on request alone.
    """
    names = list(dict.fromkeys(name for facts in rows.values() for name in facts))
    columns = (
        Column(first, numeric=False),
        *(Column(name.replace("_", " "), numeric=False) for name in names),
    )
    cells = tuple(
        (text(thing), *(text(shown_value(facts.get(name, ""))) for name in names))
        for thing, facts in rows.items()
    )
    return Table(caption, columns, cells, folded=folded)


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


# --- Tables 3 and 4, AnchorNet, Figure 6 --------------------------------------------------


def table_3(table: Table3) -> Table:
    """Return Table 3 of one network: whole images against patches."""
    columns = (
        Column("scale", numeric=False, help="224 is the whole image, all the patches of any scale"),
        Column("images"),
        Column("patches", help="of an image, on average"),
        Column("GMACs", help="of the network for one image, as the paper counts"),
        Column("saved", help=f"of {_gmacs(table.gmacs_whole)} GMACs at 224 px"),
        Column("in all", help=f"GMACs with AnchorNet's {_gmacs(table.gmacs_anchornet)}"),
        Column("saved in all"),
        Column("top-1"),
        Column("top-5"),
    )
    rows = [
        (
            _scale(row.scale),
            count(row.images),
            decimal(row.mean_patches),
            decimal(row.gmacs, 3),
            share(row.saved, 0),
            decimal(row.gmacs_with_anchornet, 3),
            share(row.saved_with_anchornet, 0),
            share(row.top1),
            share(row.top5),
        )
        for row in table.rows
    ]
    notes = [f"Shards {table.shards}; weights {table.weights}."]
    if table.whole_source:
        notes.append(f"Row 224: {table.whole_source}; asked: {table.asked}.")
    if speed := table.speed:
        whole, patches = decimal(speed.whole, 1).text, decimal(speed.patches, 1).text
        ratio, mean = decimal(speed.ratio).text, decimal(speed.mean_patches).text
        notes.append(
            f"Speed: {whole} images/s whole, {patches} images/s by AnchorNet, LSP and patches: "
            f"{ratio} times as many ({counted(speed.images, 'image')} of {mean} patches)."
        )
    notes += [f"Left out: {reason}." for reason in table.left_out]
    return _with_total(f"Table 3: {table.network}", columns, rows, notes)


def table_4(table: Table4) -> Table:
    """Return Table 4 of one network: one patch against the whole image made as small."""
    columns = (
        Column("scale", numeric=False),
        Column("images"),
        Column("-R top-1", help=f"the whole image rescaled ({table.whole_source})"),
        Column("-L top-1", help="the strongest patch"),
        Column("-R top-5"),
        Column("-L top-5"),
    )
    rows = [
        (
            _scale(row.scale),
            count(row.images),
            share(row.rescaled_top1),
            share(row.localized_top1),
            share(row.rescaled_top5),
            share(row.localized_top5),
        )
        for row in table.rows
    ]
    notes = [f"Shards {table.shards}; asked: {table.asked}."]
    return _with_total(f"Table 4: {table.network}", columns, rows, notes)


def output_table(found: AnchorNetFigures) -> Table:
    """Return the accuracy of each output of AnchorNet."""
    columns = named("output", "top-1", "top-5", "chosen for")
    rows = []
    for output, top1 in found.top1_by_output.items():
        part, _, scale = output.partition("_")
        chosen = found.branch_share.get(scale) if part == "localization" else None
        top5 = found.top5_by_output.get(output)
        rows.append((text(f"{part} {scale} px"), share(top1), share(top5), share(chosen, 1)))
    total = (text("decision (Eq. 7)"), share(found.top1), share(found.top5), share(1.0, 1))
    speed = decimal(found.images_per_second, 1).text
    notes = (
        f"{counted(found.images, 'image')}, {found.skipped:,} skipped; "
        f"{_gmacs(found.gmacs)} GMACs, {speed} images/s without decoding.",
    )
    return Table("AnchorNet by output", columns, tuple(rows), (total,), notes)


def preset_table(found: AnchorNetFigures) -> Table:
    """Return the patches of an image by preset."""
    scales = [*found.branch_share, "all"]
    names = [f"{scale} px" if scale != "all" else "all" for scale in scales]
    rows = [
        (text(name), *(decimal(means.get(scale)) for scale in scales))
        for name, means in found.mean_patches.items()
    ]
    return Table("Patches per image by preset", named("preset", *names), tuple(rows))


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


def _with_total(
    caption: str, columns: tuple[Column, ...], rows: Sequence[tuple[Cell, ...]], notes: list[str]
) -> Table:
    body = tuple(row for row in rows if row[0].text != "all")
    foot = tuple(row for row in rows if row[0].text == "all")
    return Table(caption, columns, body, foot, tuple(notes))


def _scale(name: str) -> Cell:
    return Cell(f"{name} px" if name.isdecimal() else name, float(name) if name.isdecimal() else 0)


def _gmacs(value: Any) -> str:
    return decimal(value, 3).text


# --- shards -------------------------------------------------------------------------------


def scale_table(split: Split) -> Table:
    """Return images and patches of a split by scale."""
    facts = split.facts
    columns = named("scale", "images", "share", "patches", "patches per image")
    most = max((found.images for found in facts.scales.values()), default=0)
    rows = tuple(
        (
            Cell(f"{scale} px", scale),
            Cell(f"{found.images:,}", found.images, found.images / most if most else None),
            share(found.images / facts.images if facts.images else None, 1),
            count(found.patches),
            decimal(found.mean_patches),
        )
        for scale, found in facts.scales.items()
    )
    patches = sum(found.patches for found in facts.scales.values())
    total = (
        text("all"),
        count(facts.images),
        share(1.0 if facts.images else None, 1),
        count(patches),
        decimal(patches / facts.images if facts.images else None),
    )
    return Table("Images and patches by chosen scale", columns, rows, (total,))


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


# --- scenes -------------------------------------------------------------------------------


def fit_table(score: SceneScore) -> Table:
    """Return how often patches hit the object, beside what chance gives."""
    rows = tuple(
        (text(name), share(fit.hit, 1), share(fit.covered, 1))
        for name, fit in (
            ("strongest", score.strongest),
            ("random, same scale", score.random),
            ("middle, same scale", score.centre),
        )
    )
    columns = named("patch", "centre in the object's box", "box covered")
    return Table("Patches against the true boxes", columns, rows)


def size_table(score: SceneScore) -> Table:
    """Return the chosen scales by the size of the object."""
    scales = list(next(iter(score.counts.values())))
    most = max(max(row.values()) for row in score.counts.values())
    rows = tuple(
        (
            Cell(size, i),
            *(Cell(f"{n:,}", n, n / most if n else None) for n in row.values()),
            decimal(score.mean_scale[size], 1),
        )
        for i, (size, row) in enumerate(score.counts.items())
    )
    columns = named("object", *(f"{scale} px" for scale in scales), "mean scale, px")
    notes = (f"{counted(score.images, 'image')}.",)
    return Table("Chosen scale by the object's size", columns, rows, notes=notes)
