"""Accuracy against cost as curves: whole images of several sizes, patches, and stopping early."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from anchorpatch.errors import DataError, reason_of
from anchorpatch.jobs.tradeoff import Dynamic, DynamicRow

#: Way -> color (Okabe and Ito's) and mark.
_LOOKS: Final = {"whole": ("#000000", "s"), "fixed": ("#0072b2", "o"), "dynamic": ("#d55e00", "")}


class Curve(NamedTuple):
    """Points of one way to decide.

    Attributes:
        name: in the legend.
        way: "whole", "fixed" or "dynamic".
        in_all: costs include AnchorNet's.
        points: GMACs per image, and top-1 as a share.
    """

    name: str
    way: str
    in_all: bool
    points: tuple[tuple[float, float], ...]


def tradeoff_curves(result: Dynamic) -> tuple[Curve, ...]:
    """Return the curves of a result: in all, and of patches without AnchorNet's cost too."""

    def points(rows: Sequence[DynamicRow], in_all: bool) -> tuple[tuple[float, float], ...]:
        costs = (r.gmacs_with_anchornet if in_all else r.gmacs for r in rows)
        return tuple(sorted((c, r.top1 or 0.0) for c, r in zip(costs, rows, strict=True)))

    whole, fixed = ([r for r in result.rows if r.way == way] for way in ("whole", "fixed"))
    glance = f", glance {result.glance} px" if result.glance else ""
    curves = [Curve("whole image, by size", "whole", True, points(whole, True))] if whole else []
    for in_all, note in ((True, ""), (False, ", without AnchorNet's cost")):
        dynamic = tuple((of_all if in_all else own, top1) for _, own, of_all, top1 in result.curve)
        curves.append(
            Curve(f"fixed number of patches{note}", "fixed", in_all, points(fixed, in_all))
        )
        curves.append(Curve(f"stopping early{glance}{note}", "dynamic", in_all, dynamic))
    return tuple(curves)


def tradeoff_figure(results: Sequence[Dynamic]) -> Figure:
    """Draw top-1 against GMACs per image, a panel for each result."""
    figure = Figure(figsize=(6.4 * len(results), 5.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    lines: dict[str, Line2D] = {}
    for axes, result in zip(panels, results, strict=True):
        for curve in tradeoff_curves(result):
            color, mark = _LOOKS[curve.way]
            (lines[curve.name],) = axes.plot(
                *zip(*curve.points, strict=True),
                color=color,
                marker=mark,
                markersize=5,
                markerfacecolor=color if curve.in_all else "white",
                linestyle="-" if curve.in_all else (0, (4, 2)),
                linewidth=1.8 if curve.way == "dynamic" else 1.3,
            )
        axes.set_title(result.network)
        axes.set_xlabel("GMACs per image")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}")
    panels[0].set_ylabel("top-1 (%)")
    # Below the panels, where no curve can lie under it.
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": 2}
    figure.legend(list(lines.values()), list(lines), fontsize=8, frameon=False, **where)
    return figure


def tradeoff_facts(results: Sequence[Dynamic]) -> dict[str, Any]:
    """Return what the figure shows, as JSON values."""
    return {
        "figure": "tradeoff",
        "title": "Accuracy against cost",
        "caption": "Top-1 against GMACs per image: whole images of several sizes, fixed numbers of "
        "patches, and patches until the network is sure. Dashed: without AnchorNet's cost.",
        "settings": {
            "networks": [result.network for result in results],
            "shards": [result.shards for result in results],
            "weights": [result.weights for result in results],
        },
    }


def tradeoff_csv(results: Sequence[Dynamic]) -> str:
    """Return every point as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("network", "shards", "way", "with_anchornet", "gmacs", "top1"))
    for result in results:
        for curve in tradeoff_curves(result):
            fixed = (result.network, result.shards, curve.way, int(curve.in_all))
            writer.writerows((*fixed, *(f"{v:.6g}" for v in point)) for point in curve.points)
    return text.getvalue()


def read_dynamic(path: Path) -> Dynamic:
    """Read what ``anchorpatch evaluate NETWORK --protocol dynamic --result FILE`` wrote.

    Raises:
        DataError: the file is missing, damaged, or another result.
    """
    try:
        data = json.loads(path.read_bytes())
        if isinstance(data, dict) and data.get("protocol") == "dynamic":
            return Dynamic.from_json(data)
        found = f"one of protocol {data['protocol']!r}" if "protocol" in data else "other JSON"
    except OSError as error:
        found = f"none that can be read ({reason_of(error)})"
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        found = f"a damaged or other file ({reason_of(error)})"
    raise DataError(
        f"{path}: expected a result of `anchorpatch evaluate NETWORK --protocol dynamic --result "
        f"FILE`, found {found}"
    )
