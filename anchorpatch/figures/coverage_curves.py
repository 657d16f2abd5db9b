"""The curves of Figure 6, from what a network was right about."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from anchorpatch.storage import write_atomically
from anchorpatch.text import counted, decimal

#: Localizers with weights of their own.
PEERS: Final = ("bagnet33", "bagnet77", "saccader")

#: All localizers of Figure 6 with the names that tables show, in the order of the summary.
LABELS: Final = {
    "anchornet": "AnchorNet",
    "branch63": "branch 63 px alone",
    "branch95": "branch 95 px alone",
    "branch111": "branch 111 px alone",
    "bagnet33": "BagNet-33",
    "bagnet77": "BagNet-77",
    "saccader": "Saccader",
    "gradcam": "Grad-CAM",
    "sobel": "Sobel energy",
    "centre": "centre",
    "random": "random",
}

LOCALIZERS: Final = tuple(LABELS)

#: Figures of a `Series` that the summary has, each as "covered_" and as "masked_".
AUC_FIGURES: Final = ("auc", "auc_error", "auc_spread", "gain", "gain_error")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Top-1 by area, one way; shares from 0 to 1.

    Attributes:
        top1: of each area (A,).
        spread: standard deviation over seeds (A,); None with one seed.
        auc: area under the curve, by the trapezoid rule.
        auc_error: standard error of ``auc`` over the images; None with one image.
        auc_spread: standard deviation of ``auc`` over seeds; None with one seed.
        gain: by how much ``auc`` is better than AnchorNet's; None without AnchorNet.
        gain_error: standard error of ``gain``, image by image.
    """

    top1: tuple[float, ...]
    spread: tuple[float, ...] | None
    auc: float
    auc_error: float | None
    auc_spread: float | None
    gain: float | None
    gain_error: float | None

    @property
    def beats_anchornet(self) -> bool:
        """Whether it is better than AnchorNet by more than two standard errors."""
        return bool(self.gain and self.gain_error and self.gain > 2 * self.gain_error)

    @property
    def texts(self) -> tuple[str, str, str]:
        """The cells of a table, see `auc_texts`."""
        return auc_texts(*(getattr(self, name) for name in AUC_FIGURES))


@dataclass(frozen=True)
class Curve:
    """A localizer's two curves. Areas run from 0 to 1, so that all share their ends.

    Attributes:
        localizer: of `LOCALIZERS`.
        covered: everything but the area is set to 0; a larger area under the curve is better.
        masked: the area is set to 0; a smaller area under the curve is better.
    """

    localizer: str
    covered: Series
    masked: Series


@dataclass(frozen=True)
class CoverageResult:
    """All curves of Figure 6.

    Attributes:
        network: name of the network that decides.
        source: folder of the images.
        images: decided on.
        areas: from 0 to 1 (A,).
        curves: one for each localizer.
        weights: what each network was loaded from.
        anchornet_sha256: of AnchorNet's weights.
        left_out: localizers that could not be had, and why.
        settings: of the comparison, as JSON values.
    """

    network: str
    source: str
    images: int
    areas: tuple[float, ...]
    curves: tuple[Curve, ...]
    weights: Mapping[str, str]
    anchornet_sha256: str
    left_out: tuple[str, ...]
    settings: Mapping[str, Any]

    def curve(self, localizer: str) -> Curve:
        """Return the curve of a localizer.

        Raises:
            KeyError: it took no part.
        """
        return {curve.localizer: curve for curve in self.curves}[localizer]

    def winners(self) -> tuple[str, ...]:
        """Return a sentence for each localizer that beats AnchorNet by two standard errors."""
        return tuple(
            f"{LABELS[curve.localizer]} is better than AnchorNet by {way} area: {series.texts[2]}"
            for curve in self.curves
            for way, series in (("covered", curve.covered), ("masked", curve.masked))
            if series.beats_anchornet
        )

    def summary(self) -> list[dict[str, Any]]:
        """Return the areas under the curves, a flat record for each localizer."""
        return [
            {
                "localizer": curve.localizer,
                **{f"covered_{name}": getattr(curve.covered, name) for name in AUC_FIGURES},
                **{f"masked_{name}": getattr(curve.masked, name) for name in AUC_FIGURES},
            }
            for curve in self.curves
        ]

    def points(self) -> list[dict[str, Any]]:
        """Return every point of every curve, a flat record each."""
        return [
            {
                "localizer": curve.localizer,
                "area": area,
                "covered_top1": curve.covered.top1[i],
                "masked_top1": curve.masked.top1[i],
                "covered_spread": curve.covered.spread[i] if curve.covered.spread else None,
                "masked_spread": curve.masked.spread[i] if curve.masked.spread else None,
            }
            for curve in self.curves
            for i, area in enumerate(self.areas)
        ]

    title = "Accuracy by covered and by masked area"

    @property
    def caption(self) -> str:
        """A few sentences on what is seen and how it came about."""
        parts = [
            f"Top-1 of {self.network} on {counted(self.images, 'image')} of {self.source}, by the "
            "share of each image that a localizer chose: left with all else set to 0, right with "
            "the choice set to 0. All are compared at the same areas, to the pixel. The numbers "
            "are areas under the curves: left the larger is better, right the smaller."
        ]
        if any(curve.covered.spread for curve in self.curves):
            parts.append(
                f"Random: mean of {self.settings['seeds']} seeds, and a band of one standard "
                "deviation."
            )
        if winners := self.winners():
            parts.append(f"By more than two standard errors, {'; '.join(winners)}.")
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON, as a report reads it."""
        facts = asdict(self)
        facts["weights_sha256"] = facts.pop("anchornet_sha256")
        return {
            "figure": "coverage",
            "number": 6,
            "title": self.title,
            "caption": self.caption,
            **facts,
            "winners": list(self.winners()),
            "summary": self.summary(),
        }


def auc_texts(
    auc: float,
    auc_error: float | None,
    auc_spread: float | None,
    gain: float | None,
    gain_error: float | None,
) -> tuple[str, str, str]:
    """Write the figures of a `Series`: area, its errors, gain.

    Example:
        >>> auc_texts(0.5, 0.0544, 0.01, -0.00001, 0.0037)
        ('0.5000', '± 0.0544 (0.0100)', '+0.0000 ± 0.0037')
    """
    errors = "" if auc_error is None else f"± {decimal(auc_error, 4)}"
    if auc_spread is not None:
        errors += f" ({decimal(auc_spread, 4)})"
    better = (
        "-" if gain is None else f"{decimal(gain, 4, sign=True)} ± {decimal(gain_error or 0, 4)}"
    )
    return decimal(auc, 4), errors, better


def write_points(result: CoverageResult, path: Path) -> None:
    """Write every point of every curve as CSV, whole or not at all.

    Raises:
        StorageError: the disk refused.
    """
    points = result.points()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(points[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def curves_of(
    localizers: list[str], right: NDArray[np.bool_], areas: tuple[float, ...]
) -> tuple[Curve, ...]:
    """Return the curves from what the network was right about.

    Args:
        localizers: names (L,); several of one name are seeds of it.
        right: of each localizer, way (covered, masked), area and image (L, 2, A, n).
        areas: from 0 to 1 (A,).

    Example:
        >>> right = np.array([[[[False], [True], [True]], [[True], [True], [False]]]])
        >>> (curve,) = curves_of(["centre"], right, (0.0, 0.5, 1.0))
        >>> curve.covered.auc, curve.masked.auc
        (0.75, 0.75)
    """
    counted = right.astype(np.float64)
    at = torch.tensor(areas, dtype=torch.float64)[:, None]
    # The mean of the images' areas under the curve is the area under their mean curve.
    under = torch.trapezoid(torch.from_numpy(counted), at, dim=2).numpy()  # (L, 2, n)
    seeds = {name: [i for i, n in enumerate(localizers) if n == name] for name in localizers}
    anchornet = under[seeds["anchornet"]].mean(0) if "anchornet" in seeds else (None, None)
    return tuple(
        Curve(
            name,
            _series(counted[rows, 0], under[rows, 0], anchornet[0], 1.0),
            _series(counted[rows, 1], under[rows, 1], anchornet[1], -1.0),
        )
        for name, rows in seeds.items()
    )


def _series(right: Floats, under: Floats, anchornet: Floats | None, sign: float) -> Series:
    """Summarize one way: ``right`` (seeds, A, n), ``under`` (seeds, n), AnchorNet's (n,)."""
    several = len(right) > 1
    by_seed, of_images = right.mean(-1), under.mean(0)
    better = None if anchornet is None else sign * (of_images - anchornet)
    return Series(
        top1=tuple(by_seed.mean(0).tolist()),
        spread=tuple(by_seed.std(0, ddof=1).tolist()) if several else None,
        auc=float(of_images.mean()),
        auc_error=_error(of_images),
        auc_spread=float(under.mean(-1).std(ddof=1)) if several else None,
        gain=None if better is None else float(better.mean()),
        gain_error=None if better is None else _error(better),
    )


def _error(of_images: Floats) -> float | None:
    """Return the standard error of a mean over images (n,)."""
    n = len(of_images)
    return float(of_images.std(ddof=1) / np.sqrt(n)) if n > 1 else None
