"""Accuracy against cost, read from looks: a curve, fixed numbers of patches, and what is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from anchorpatch.jobs.looks import LookCosts, Looks
from anchorpatch.networks import asked_text
from anchorpatch.settings import CROP
from anchorpatch.tables import Cell, Column, Table, decimal, share, text
from anchorpatch.text import percent

#: Resamples of the images for intervals, and how many are drawn at once.
_RESAMPLES: Final = 1000
_AT_ONCE: Final = 50

#: Points of the curve that a result keeps.
_POINTS: Final = 64

#: Looks after which a table says how many images stop; later ones are one column.
_SHOWN: Final = 4


@dataclass(frozen=True)
class DynamicRow:
    """A point of accuracy against cost; shares from 0 to 1.

    Attributes:
        way: "whole" images of a size, "fixed" numbers of patches, or "dynamic".
        setting: side of the image in pixels, most patches by scale, or threshold of confidence.
        images: that were decided on.
        mean_patches: per image.
        gmacs: of the network, per image.
        gmacs_with_anchornet: the same with AnchorNet's, for the images whose patches it localized.
        top1: share of images that are decided right.
        top5: share of images whose label is among the five best.
        threshold: of confidence; None for other ways.
        budget: GMACs in all that were asked for, where a threshold was calibrated for it.
        calibrated: what the threshold costs the images that it was calibrated on.
        stopped: share of images that stop after each look, from the first; the glance is one.
        images_per_second: at the batch size, measured; None where it was not.
        images_per_second_single: of images one by one.
        latency_median: of a single image, in milliseconds.
        latency_p95: the 95th percentile.
    """

    way: str
    setting: str
    images: int
    mean_patches: float
    gmacs: float
    gmacs_with_anchornet: float
    top1: float | None
    top5: float | None
    threshold: float | None = None
    budget: float | None = None
    calibrated: float | None = None
    stopped: tuple[float, ...] = ()
    images_per_second: float | None = None
    images_per_second_single: float | None = None
    latency_median: float | None = None
    latency_p95: float | None = None


@dataclass(frozen=True)
class Saving:
    """What stopping early saves at the top-1 of a fixed number of patches.

    Shares from 0 to 1, with the 95 % intervals of resampled images; None where the curve does not
    reach this top-1.

    Attributes:
        fixed: most patches by scale.
        top1: with these.
        gmacs: of the network with these.
        saved: share of it.
        low: end of the interval.
        high: end of the interval.
        saved_with_anchornet: share of the cost with AnchorNet's.
        low_with_anchornet: end of the interval.
        high_with_anchornet: end of the interval.
    """

    fixed: str
    top1: float
    gmacs: float
    saved: float | None
    low: float | None
    high: float | None
    saved_with_anchornet: float | None
    low_with_anchornet: float | None
    high_with_anchornet: float | None


@dataclass(frozen=True)
class Calibration:
    """What thresholds were calibrated on.

    Attributes:
        images: how many.
        source: which, in words.
        holdout: share of the training images that the network's run held out; None for weights that
            are no run's.
    """

    images: int
    source: str
    holdout: float | None


@dataclass(frozen=True)
class Dynamic:
    """A network that stops when it is sure, beside fixed numbers of patches and whole images.

    Attributes:
        network: its name.
        shards: folder of the split.
        weights: what the network on patches was loaded from, or the three of them.
        whole_weights: what the network on whole images was loaded from; None without.
        whole_source: where the whole images came from; None without.
        confidence: how it was measured.
        glance: side of the whole image at the first look; None without one.
        gmacs_anchornet: of localizing one image, 1e9.
        rows: points of each way, from the most to the least costly of whole images, and from the
            least costly on of the others.
        savings: against each fixed number.
        curve: threshold, GMACs of the network and in all, and top-1 of further points.
        calibration: of the rows with a budget; None without.
        left_out: what was not available, and why.
        whole_trained_on: as of `anchorpatch.jobs.results.Table3`.
        notes: how outputs were matched with other classes.
        img_size: side of the whole images in pixels.
    """

    network: str
    shards: str
    weights: str
    whole_weights: str | None
    whole_source: str | None
    confidence: str
    glance: int | None
    gmacs_anchornet: float
    rows: tuple[DynamicRow, ...]
    savings: tuple[Saving, ...]
    curve: tuple[tuple[float, float, float, float], ...]
    calibration: Calibration | None
    left_out: tuple[str, ...]
    whole_trained_on: str = ""
    notes: tuple[str, ...] = ()
    img_size: int = CROP

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {"protocol": "dynamic", **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Dynamic:
        """Return a result that was written as JSON.

        Raises:
            KeyError: a field is missing.
            TypeError: a field has another type.
        """
        fields = {name: value for name, value in data.items() if name != "protocol"}
        calibration = fields["calibration"]
        fields |= {
            "rows": tuple(
                DynamicRow(**{**row, "stopped": tuple(row["stopped"])}) for row in fields["rows"]
            ),
            "savings": tuple(Saving(**row) for row in fields["savings"]),
            "curve": tuple((*map(float, point),) for point in fields["curve"]),
            "calibration": None if calibration is None else Calibration(**calibration),
            **{name: tuple(map(str, fields[name])) for name in ("left_out", "notes")},
        }
        return cls(**fields)

    def tables(self) -> tuple[Table, ...]:
        """Return the points, and what is saved."""
        timed = any(row.images_per_second is not None for row in self.rows)
        asked = any(row.budget is not None for row in self.rows)
        columns = [
            Column("looks", False, "whole image at a side in px, K by scale, or threshold"),
            Column("patches", help="of an image, on average"),
            Column("GMACs", help="of the network for one image"),
            Column(
                "in all", help=f"GMACs with AnchorNet's {decimal(self.gmacs_anchornet, 3).text}"
            ),
            *([Column("asked", help="GMACs in all, the budget")] if asked else []),
            Column("top-1"),
            Column("top-5"),
            Column(
                "stopped after", help="1, 2, ... looks: images in %, the last for all later ones"
            ),
        ]
        if timed:
            columns += [
                Column("images/s"),
                Column("one by one", help="images/s at batch size 1"),
                Column("ms", help="of a single image, median and 95th percentile"),
            ]
        rows = [self._cells(row, asked, timed) for row in self.rows]
        sure = {"max": "largest probability", "margin": "margin", "entropy": "entropy"}
        first = f" after a glance at the whole image at {self.glance} px" if self.glance else ""
        notes = [
            f"{self.network} on {self.shards}; weights: {self.weights}.",
            f"Dynamic: patches, strongest first{first}, until the {sure[self.confidence]} of the "
            "mean softmax reaches the threshold.",
        ]
        if self.whole_source:
            which = asked_text(str(self.whole_weights), self.whole_trained_on)
            notes.append(f"Whole images: {self.whole_source}; weights: {which}.")
        if self.calibration:
            notes.append(f"Thresholds for budgets: calibrated on {self.calibration.source}.")
        notes += [f"{note}." for note in self.notes]
        notes += [f"Left out: {reason}." for reason in self.left_out]
        caption = f"Accuracy against cost: {self.network}"
        points = Table(caption, tuple(columns), tuple(rows), notes=tuple(notes))
        return (points, self._savings()) if self.savings else (points,)

    def _cells(self, row: DynamicRow, asked: bool, timed: bool) -> tuple[Cell, ...]:
        name = f"{row.setting} px" if row.way == "whole" else row.setting
        stopped = [*row.stopped[:_SHOWN], sum(row.stopped[_SHOWN:])]
        shown = "/".join(f"{100 * part:.0f}" for part in stopped if row.stopped)
        cells = [
            text(f"{row.way} {name}"),
            decimal(row.mean_patches if row.way != "whole" else None),
            decimal(row.gmacs, 3),
            decimal(row.gmacs_with_anchornet, 3),
            *([decimal(row.budget, 3)] if asked else []),
            share(row.top1),
            share(row.top5),
            text(shown or "-"),
        ]
        if timed:
            both = None if row.latency_median is None else row.latency_p95
            latency = "-" if both is None else f"{row.latency_median:,.1f} ({both:,.1f})"
            rates = (row.images_per_second, row.images_per_second_single)
            cells += [*(decimal(rate, 1) for rate in rates), text(latency)]
        return tuple(cells)

    def _savings(self) -> Table:
        columns = (
            Column("fixed K", False),
            Column("top-1"),
            Column("GMACs"),
            Column("saved", help="of these at equal top-1 by stopping early, with 95 % interval"),
            Column("saved in all", help="the same with AnchorNet's"),
        )

        def cell(saved: float | None, low: float | None, high: float | None) -> Cell:
            if saved is None or low is None or high is None:
                return Cell("not reached", None)
            return Cell(f"{percent(saved, 0)} ({percent(low, 0)} to {percent(high, 0)})", saved)

        rows = tuple(
            (
                text(s.fixed),
                share(s.top1),
                decimal(s.gmacs, 3),
                cell(s.saved, s.low, s.high),
                cell(s.saved_with_anchornet, s.low_with_anchornet, s.high_with_anchornet),
            )
            for s in self.savings
        )
        note = f"Intervals: {_RESAMPLES:,} resamples of the images."
        return Table("Saved by stopping early", columns, rows, notes=(note,))


def row_of(
    way: str, setting: str, looks: Looks, taken: NDArray[np.int64], costs: LookCosts
) -> DynamicRow:
    """Return what images cost that stop after so many looks, and how often they are right."""
    image, last = np.arange(len(taken)), taken - 1
    network, every = (spent[image, last].mean() for spent in looks.spent(costs))
    place = looks.place[image, last]
    stopped = np.bincount(last, minlength=looks.place.shape[1])
    return DynamicRow(
        way,
        setting,
        len(taken),
        float((taken - looks.glance).mean()),
        float(network),
        float(every),
        float((place < 1).mean()),
        float((place < 5).mean()),
        stopped=tuple((stopped / len(taken)).tolist()),
    )


def curve_of(looks: Looks, costs: LookCosts) -> tuple[tuple[float, float, float, float], ...]:
    """Return threshold, GMACs of the network and in all, and top-1 of some points."""
    grid = looks.curve()
    rows = [
        (t, row_of("dynamic", "", looks, looks.stops(t), costs))
        for t in grid[np.unique(np.linspace(0, len(grid) - 1, _POINTS).round().astype(int))]
    ]
    return tuple((float(t), r.gmacs, r.gmacs_with_anchornet, r.top1 or 0.0) for t, r in rows)


def fixed_numbers(most: Mapping[int, int], looks: Looks) -> dict[str, NDArray[np.int64]]:
    """Return looks at each image (n,) with fixed numbers of patches, by these numbers.

    The numbers have the proportions of K: of 24, 10 and 8 they are 1/1/1, 2/1/1, 3/2/1, 4/2/2,
    6/3/2, 8/4/3, 12/5/4, 16/7/6 and 24/10/8, or fewer where no image has more patches.

    Args:
        most: K by scale.
        looks: at the patches of the images.
    """
    found: dict[str, NDArray[np.int64]] = {}
    largest = max(most.values())
    for k in (*(k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if k < largest), largest):
        numbers = {scale: ceil(k * n / largest) for scale, n in most.items()}
        taken = looks.fixed(numbers)
        found["/".join(map(str, numbers.values()))] = taken
        if (taken == looks.counts).all():
            break
    return found


def savings(
    looks: Looks, alone: Looks, costs: LookCosts, fixed: Mapping[str, NDArray[np.int64]]
) -> tuple[Saving, ...]:
    """Return what stopping saves at the top-1 of fixed numbers of patches, with intervals.

    That is the cost at which the curve first reaches this top-1, between its points on a line. The
    intervals cover 95 % of resamples of the images.

    Args:
        looks: that stop when they are confident.
        alone: that are taken in fixed numbers.
        costs: of both.
        fixed: looks at each image (n,), by their name.
    """
    n = len(looks.counts)
    image, grid = np.arange(n), looks.curve()
    taken = np.stack([looks.stops(t) for t in grid], 1) - 1  # (n, T)
    right = (np.take_along_axis(looks.place, taken, 1) < 1).astype(np.float32)
    spent = [np.take_along_axis(s, taken, 1).astype(np.float32) for s in looks.spent(costs)]
    of_fixed = [
        np.stack([alone.place[image, t - 1] < 1, *(s[image, t - 1] for s in alone.spent(costs))], 1)
        for t in fixed.values()
    ]
    references = np.concatenate(of_fixed, 1).astype(np.float32)  # (n, 3 a reference)
    rng, means = np.random.default_rng(0), []
    for start in range(0, _RESAMPLES, _AT_ONCE):
        weights = rng.multinomial(n, np.full(n, 1 / n), _AT_ONCE).astype(np.float32) / n
        if start == 0:  # the images themselves go first
            weights[0] = 1 / n
        means.append([weights @ array for array in (right, *spent, references)])
    top1, network, every, found = (np.concatenate(arrays) for arrays in zip(*means, strict=True))
    rows = []
    for name, (of_top1, *of_costs) in zip(fixed, np.split(found.T, len(fixed)), strict=True):
        reached = top1 >= of_top1[:, None] - 1e-6
        first = np.where(reached.any(1), reached.argmax(1), len(grid) - 1)
        before = np.maximum(first - 1, 0)
        at = np.arange(len(first))
        step = np.maximum(top1[at, first] - top1[at, before], 1e-9)
        part = np.clip((of_top1 - top1[at, before]) / step, 0, 1)
        shares = []
        for total, of_fixed_cost in zip((network, every), of_costs, strict=True):
            cost = total[at, before] + part * (total[at, first] - total[at, before])
            saved = 1 - cost / of_fixed_cost
            shares.append((float(saved[0]), *np.quantile(saved[1:], (0.025, 0.975)).tolist()))
        if not reached[0].any():
            shares = [(None, None, None)] * 2
        rows.append(Saving(name, float(of_top1[0]), float(of_costs[0][0]), *shares[0], *shares[1]))
    return tuple(rows)
