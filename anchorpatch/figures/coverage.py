"""Figure 6: accuracy by covered and by masked area."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from anchorpatch.jobs.figures.coverage_curves import LABELS, CoverageResult, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["coverage_figure"]


class _Look(NamedTuple):
    """How a localizer is drawn: apart by colour, dash and mark, each enough by itself."""

    color: str
    dash: str
    mark: str


#: Colours of Okabe and Ito's, with greys; AnchorNet and its branches are solid.
_LOOKS: Final = {
    "anchornet": _Look("#000000", "-", "o"),
    "branch63": _Look("#56b4e9", "-", "v"),
    "branch95": _Look("#0072b2", "-", "^"),
    "branch111": _Look("#009e73", "-", "s"),
    "bagnet33": _Look("#e69f00", "--", "P"),
    "bagnet77": _Look("#b8860b", "--", "X"),
    "saccader": _Look("#d55e00", "--", "D"),
    "gradcam": _Look("#cc79a7", "--", "*"),
    "sobel": _Look("#777777", ":", "h"),
    "centre": _Look("#444444", ":", "p"),
    "random": _Look("#999999", "-.", "."),
}

#: In inches.
_SIZE: Final = (12.0, 4.6)


def coverage_figure(result: CoverageResult) -> Figure:
    """Draw both panels: on the left only the area is kept, on the right it is set to 0.

    The legends name the localizers from the best to the worst with their areas under the curve;
    bands are one standard deviation over seeds.
    """
    figure = Figure(figsize=_SIZE, dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, result, "covered")
    _panel(right, result, "masked")
    # Once both are drawn: the panels share the axis, and a limit ends its growth.
    left.set_ylim(bottom=0)
    left.set_ylabel(f"top-1 of {result.network} (%)")
    return figure


def _panel(axes: Axes, result: CoverageResult, way: str) -> None:
    covered = way == "covered"
    series: dict[str, Series] = {c.localizer: getattr(c, way) for c in result.curves}
    best_first = sorted(series, key=lambda name: series[name].auc, reverse=covered)
    x = 100 * np.array(result.areas)
    for rank, name in enumerate(best_first):
        look, one = _LOOKS[name], series[name]
        y = 100 * np.array(one.top1)
        bold = name == "anchornet"
        axes.plot(
            x,
            y,
            color=look.color,
            linestyle=look.dash,
            marker=look.mark,
            markersize=6 if bold else 5,
            linewidth=2.4 if bold else 1.3,
            label=f"{LABELS[name]}  {one.auc:.3f}",
            zorder=3 + len(series) - rank + 20 * bold,
        )
        if one.spread is not None:
            deviation = 100 * np.array(one.spread)
            axes.fill_between(x, y - deviation, y + deviation, color=look.color, alpha=0.3, lw=0)
    axes.set_xlim(0, 100)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("covered area (%)" if covered else "masked area (%)")
    axes.set_title("only the chosen area is kept" if covered else "the chosen area is set to 0")
    # Beside the panel, where no curve can lie under it.
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        fontsize=8,
        title="area under the curve",
        title_fontsize=8,
        frameon=False,
    )
