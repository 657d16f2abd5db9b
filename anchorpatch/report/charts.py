"""Training runs as tables, and as curves: SVG with the page's colors, light or dark.

Matplotlib draws with stand-in colors; each is then replaced by a variable of the page's style.
Lines differ in color (Okabe and Ito's, apart for the color-blind too), in dashes and in marks.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final
from unicodedata import east_asian_width

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from anchorpatch.figures.canvas import drawable
from anchorpatch.figures.tradeoff import tradeoff_curves
from anchorpatch.jobs.tradeoff import Dynamic
from anchorpatch.metrics import OUTPUTS
from anchorpatch.report.collect import Run
from anchorpatch.tables import (
    Cell,
    Column,
    Table,
    count,
    decimal,
    named,
    number,
    share,
    text,
    written,
)
from anchorpatch.text import clean
from anchorpatch.training.run_folder import best_record

#: Stand-in color -> the variable of style.css that takes its place.
_INK: Final = "#a20001"
_RULE: Final = "#a20002"
_PAPER: Final = "#a20003"
_HUES: Final = tuple(f"#a1000{i}" for i in range(1, 8))
_VARIABLES: Final = {
    _INK: "var(--ink)",
    _RULE: "var(--rule)",
    _PAPER: "var(--paper)",
    **{hue: f"var(--line{i})" for i, hue in enumerate(_HUES, 1)},
}

_MARKS: Final = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: Final[tuple[Any, ...]] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

#: Marks along a line, however many epochs it has.
_MOST_MARKS: Final = 12

#: Runs that one comparison can tell apart.
_MOST_RUNS: Final = len(_HUES)

_RC: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "font.family": ["sans-serif"],
    "axes.edgecolor": _RULE,
    "axes.facecolor": _PAPER,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "figure.facecolor": _PAPER,
    "grid.color": _RULE,
    "grid.linewidth": 0.5,
    "legend.edgecolor": _PAPER,
    "legend.facecolor": _PAPER,
    "legend.labelcolor": _INK,
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.color": _RULE,
    "ytick.labelcolor": _INK,
}


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: in the legend.
        points: epoch and value; epochs without a value are left out.
        hue: index of the color, 0 to 6; None for the color of the text.
        dash: index of the dashes, 0 to 3.
        mark: index of the mark, 0 to 6.
        hollow: the marks are not filled.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    hue: int | None = None
    dash: int = 0
    mark: int = 0
    hollow: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of lines over epochs, or over something else.

    Attributes:
        title: a few words.
        series: its lines, each with a point at least.
        share: whether values are shares from 0 to 1, written in percent.
        over: what the lines run over.
    """

    title: str
    series: tuple[Series, ...]
    share: bool = False
    over: str = "epoch"

    @property
    def description(self) -> str:
        """Say in words where each line begins and ends, for those who cannot see it."""
        ends = [
            f"{line.name}: {self._text(line.points[0][1])} at {self._at(line.points[0][0])}, "
            f"{self._text(line.points[-1][1])} at {self._at(line.points[-1][0])}"
            for line in self.series
        ]
        return f"{self.title} by {self.over}. {'; '.join(ends)}."

    def _at(self, place: float) -> str:
        return f"epoch {place:g}" if self.over == "epoch" else f"{place:.3g} {self.over}"

    def _text(self, value: float) -> str:
        return f"{value:.1%}" if self.share else f"{value:.4g}"


def run_charts(run: Run) -> list[Chart]:
    """Return the charts of a run that have something to show: loss, top-1, learning rate."""
    loss = (
        *_series(run, "training", ("train", "loss"), hue=0, mark=0),
        *_series(run, "validation", ("val", "loss"), hue=1, dash=1, mark=1),
    )
    charts = [Chart("Loss", loss), Chart("Top-1 on validation images", _top1(run), share=True)]
    charts.append(Chart("Learning rate", _series(run, "rate", ("lr",), hue=2, mark=3)))
    return [chart for chart in charts if chart.series]


def comparison(runs: Sequence[Run]) -> Chart | None:
    """Return top-1 of the first runs in one chart; None of fewer than two."""
    lines = tuple(
        line
        for i, run in enumerate(runs[:_MOST_RUNS])
        for line in _series(run, run.name, ("val", "top1"), hue=i, dash=i % len(_DASHES), mark=i)
    )
    if len(lines) < 2:
        return None
    which = "all runs" if len(runs) <= _MOST_RUNS else f"the first {_MOST_RUNS} of {len(runs)} runs"
    return Chart(f"Top-1 on validation images, {which}", lines, share=True)


def tradeoff_chart(result: Dynamic) -> Chart:
    """Return top-1 of a network over its cost."""
    looks = {"whole": (None, 1), "fixed": (0, 0), "dynamic": (1, 3)}
    lines = []
    for curve in tradeoff_curves(result):
        hue, mark = looks[curve.way]
        other = not curve.in_all
        lines.append(Series(curve.name, curve.points, hue, int(other), mark, hollow=other))
    return Chart(f"Top-1 of {result.network}", tuple(lines), share=True, over="GMACs per image")


def draw(chart: Chart, key: str, width: float = 3.6, height: float = 2.9) -> str:
    """Draw a chart as an <svg> element.

    Args:
        chart: what is drawn.
        key: differs for each chart of a page: what the names inside the SVG begin with.
        width: in inches; the page scales it.
        height: in inches.
    """
    with matplotlib.rc_context({**_RC, "svg.hashsalt": key}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        lines = [_line(axes, series) for series in chart.series]
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.set_xlabel(chart.over)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=chart.over == "epoch"))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4))
        if chart.share:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g}%"))
        if len(lines) > 1:
            names = [_short(series.name) for series in chart.series]
            columns = 2 if max(map(len, names)) > 14 or len(names) in (2, 4) else 3
            figure.legend(
                lines,
                names,
                loc="outside upper left",
                ncols=columns,
                fontsize=8,
                handlelength=3.2,
                borderpad=0,
                columnspacing=1.4,
            )
        file = io.StringIO()
        # The browser draws the letters; matplotlib only measures them.
        with drawable(figure):
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _themed(file.getvalue(), key)


def _top1(run: Run) -> tuple[Series, ...]:
    """Return top-1, and of AnchorNet that of each output too, the color telling the scale."""
    outputs: list[Series] = []
    for i, output in enumerate(OUTPUTS):
        part, scale = output.split("_")
        other = part == "attention"
        keys, look = ("val", "top1_by_output", output), {"hue": i % 3, "mark": i % 3}
        outputs += _series(run, f"{part} {scale}", keys, dash=int(other), hollow=other, **look)
    name = "decision (Eq. 7)" if outputs else "top-1"
    return (*_series(run, name, ("val", "top1"), mark=3), *outputs)


def _series(run: Run, name: str, keys: tuple[str, ...], **look: Any) -> tuple[Series, ...]:
    """Return the line of a value, or nothing where no epoch has it."""
    points = []
    for record in run.records:
        epoch, value = number(record, "epoch"), number(record, *keys)
        if epoch is not None and value is not None:
            points.append((epoch, value))
    return (Series(name, tuple(points), **look),) if points else ()


def _line(axes: Any, series: Series) -> Line2D:
    color = _INK if series.hue is None else _HUES[series.hue]
    epochs, values = zip(*series.points, strict=True)
    line: Line2D
    (line,) = axes.plot(
        epochs,
        values,
        color=color,
        linestyle=_DASHES[series.dash],
        linewidth=2.2 if series.hue is None else 1.5,
        marker=_MARKS[series.mark],
        markersize=4.5,
        markerfacecolor=_PAPER if series.hollow else color,
        markeredgecolor=color,
        markevery=max(1, len(epochs) // _MOST_MARKS),
        zorder=3 if series.hue is None else 2,
    )
    return line


def _short(name: str, most: int = 30) -> str:
    """Shorten a name in its middle to so many letters, of which Chinese ones take two."""
    name = shown = clean(name)
    for kept in range(len(name) - 1, 0, -1):
        if sum(2 if east_asian_width(c) in "WF" else 1 for c in shown) <= most:
            break
        shown = f"{name[: ceil(kept / 2)]}…{name[len(name) - kept // 2 :]}"
    return str(shown)


def _themed(svg: str, key: str) -> str:
    """Return the bare <svg>: the page's colors, names of its own, the size left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    svg = re.sub(r'\b(id=")', rf"\1{key}-", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{key}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # before matplotlib 3.9
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    return re.sub("#a[12]000[1-7]", lambda found: _VARIABLES[found[0]], svg)


# --- tables -------------------------------------------------------------------------------


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
