"""Figure 6: what a network makes of the part of an image that a localizer chose, or left.

An image is decided on twice for each localizer and area: with everything but the area set to 0,
and with the area set to 0. All localizers are compared at the same areas, to the pixel.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.classes import AS_NAMED, Matching
from anchorpatch.errors import DataError, SettingsError, WeightsError
from anchorpatch.figures.localizers import (
    PLAIN,
    Localize,
    See,
    Seen,
    chance,
    gradcam,
    mask_of_area,
    peer,
    pixel_positions,
)
from anchorpatch.images.source import without_images
from anchorpatch.jobs.crops import CropSource
from anchorpatch.jobs.patch_scores import Distributions
from anchorpatch.networks import Network, asked_text, load_checkpoint, load_for_whole_images
from anchorpatch.runtime.checkpoint import load_weights, read_meta
from anchorpatch.runtime.device import exact_float32, keep_freed_memory, resolve_device, to_device
from anchorpatch.runtime.progress import Reporter
from anchorpatch.tables import NO_VALUE, Cell, Column, Table, number, text
from anchorpatch.tables import decimal as decimal_cell
from anchorpatch.text import counted, decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


#: Localizers with weights of their own.
PEERS: Final = ("bagnet33", "bagnet77", "saccader")


class _Look(NamedTuple):
    """How a localizer is shown: each of color, dash and mark is enough by itself."""

    label: str
    color: str
    dash: str
    mark: str


#: All localizers of Figure 6, in the order of the summary. The colors are Okabe and Ito's, with
#: grays; AnchorNet and its branches are solid.
LOOKS: Final = {
    "anchornet": _Look("AnchorNet", "#000000", "-", "o"),
    "branch63": _Look("branch 63 px alone", "#56b4e9", "-", "v"),
    "branch95": _Look("branch 95 px alone", "#0072b2", "-", "^"),
    "branch111": _Look("branch 111 px alone", "#009e73", "-", "s"),
    "bagnet33": _Look("BagNet-33", "#e69f00", "--", "P"),
    "bagnet77": _Look("BagNet-77", "#b8860b", "--", "X"),
    "saccader": _Look("Saccader", "#d55e00", "--", "D"),
    "gradcam": _Look("Grad-CAM", "#cc79a7", "--", "*"),
    "sobel": _Look("Sobel energy", "#777777", ":", "h"),
    "center": _Look("center", "#444444", ":", "p"),
    "random": _Look("random", "#999999", "-.", "."),
}

LOCALIZERS: Final = tuple(LOOKS)

#: Fields of a `Series` that the summary has, each as "covered_" and as "masked_".
AUC_FIGURES: Final = ("auc", "auc_error", "auc_spread", "gain", "gain_error")


@dataclass(frozen=True)
class CoverageConfig:
    """What is compared, and on what.

    Attributes:
        network: name of the network that decides.
        runs: folder of training runs.
        weights: of the network: a file or "default"; None for the first of
            RUNS/NETWORK-baseline/best.safetensors, the pretrained set, if it is for the images'
            classes, and RUNS/NETWORK/best.safetensors.
        anchornet_weights: of AnchorNet.
        peers: weights of BagNets and Saccader; None for those that lie in RUNS.
        localizers: of `LOCALIZERS`.
        areas: shares of the image, rising, between 0 and 1.
        iou_threshold: T of Algorithm 1, for localizers whose patches may not overlap.
        seeds: number of random localizers.
        images: that are decided on, at random by ``seed``; None for all.
        seed: of the choice of images.
        batch_size: images in a batch; None for 32 on CPU and 256 on a GPU.
        device: auto, cpu or cuda.
        engine: of AnchorNet, for CPUs: auto, torch or openvino.
        amp: let the network compute in bfloat16.
        matching: of the outputs of the network's weights with the classes of the images.

    Raises:
        SettingsError: a value outside its range.
    """

    network: str
    anchornet_weights: Path
    runs: Path = Path("runs")
    weights: str | Path | None = None
    peers: tuple[Path, ...] | None = None
    localizers: tuple[str, ...] = LOCALIZERS
    areas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    iou_threshold: float = 0.3
    seeds: int = 5
    images: int | None = 500
    seed: int = 0
    batch_size: int | None = None
    device: str = "auto"
    engine: str = "auto"
    amp: bool = False
    matching: Matching = AS_NAMED

    def __post_init__(self) -> None:
        if not self.areas or any(a >= b for a, b in pairwise(self.all_areas)):
            raise SettingsError(
                f"areas: expected increasing shares between 0 and 1, got {self.areas}"
            )
        unknown = [name for name in self.localizers if name not in LOCALIZERS]
        if unknown or not self.localizers:
            raise SettingsError(
                f"localizers: expected some of {', '.join(LOCALIZERS)}, got "
                f"{', '.join(unknown) or 'none'}"
            )
        if self.seeds < 1:
            raise SettingsError(f"seeds: expected at least 1, got {self.seeds}")

    @property
    def all_areas(self) -> tuple[float, ...]:
        """The areas with both ends, at which all localizers agree."""
        return (0.0, *self.areas, 1.0)


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

    @property
    def ways(self) -> tuple[tuple[str, Series], tuple[str, Series]]:
        """Both curves with their names."""
        return ("covered", self.covered), ("masked", self.masked)


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
        left_out: localizers that was not available, and why.
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

    def winners(self) -> tuple[str, ...]:
        """Return a sentence for each localizer that beats AnchorNet by two standard errors."""
        return tuple(
            f"{LOOKS[curve.localizer].label} is better than AnchorNet by {way} area: "
            f"{_gain(series.gain, series.gain_error)}"
            for curve in self.curves
            for way, series in curve.ways
            if series.beats_anchornet
        )

    def summary(self) -> list[dict[str, Any]]:
        """Return the areas under the curves, a flat record for each localizer."""
        return [
            {
                "localizer": curve.localizer,
                **{
                    f"{way}_{name}": getattr(series, name)
                    for way, series in curve.ways
                    for name in AUC_FIGURES
                },
            }
            for curve in self.curves
        ]

    def csv(self) -> str:
        """Return every point of every curve as CSV."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        values = [f"{way}_{value}" for value in ("top1", "spread") for way in ("covered", "masked")]
        writer.writerow(("localizer", "area", *values))
        for curve in self.curves:
            none = (None,) * len(self.areas)
            series = (curve.covered, curve.masked)
            columns = [*(way.top1 for way in series), *(way.spread or none for way in series)]
            for area, *point in zip(self.areas, *columns, strict=True):
                writer.writerow((curve.localizer, area, *point))
        return file.getvalue()

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
        if note := self.settings.get("note"):
            parts.append(f"{note}.")
        if winners := self.winners():
            parts.append(f"By more than two standard errors, {'; '.join(winners)}.")
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON, as a report reads it."""
        facts = asdict(self)
        return {
            "figure": "coverage",
            "number": 6,
            "title": self.title,
            "caption": self.caption,
            "weights_sha256": facts.pop("anchornet_sha256"),
            **facts,
            "winners": list(self.winners()),
            "summary": self.summary(),
        }


def measure_coverage(
    source: CropSource, config: CoverageConfig, progress: Reporter | None = None
) -> CoverageResult:
    """Measure the curves of Figure 6.

    Raises:
        DataError: no image can be decoded.
        SettingsError: none of the localizers can be had.
        WeightsError: weights cannot be had, read or used, or are of other classes.
        NonFiniteError: a network produced NaN or infinity.
    """
    report = progress or Reporter()
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    anchornet = load_weights(config.anchornet_weights)
    name, classes, say = config.network, source.classes, report.message
    side = source.crop.img_size
    options: dict[str, Any] = {"option": "--weights", "matching": config.matching}
    network = load_for_whole_images(name, classes, config.runs, say, config.weights, **options)
    see = See(anchornet, device, config.iou_threshold, config.engine, side=side)
    localizers, weights, left_out = _localizers(config, network, device, side)
    if not localizers:
        raise SettingsError(f"no localizer is left: {'; '.join(left_out)}")
    decide = Distributions(network.module, device, network.meta, config.amp)
    rows = np.arange(len(source))
    if config.images is not None and config.images < len(rows):
        rows = np.sort(np.random.default_rng(config.seed).permutation(len(rows))[: config.images])
    if absent := without_images(source.labels[rows], source.classes):
        say(absent)

    def right(pixels: Tensor, labels: Tensor) -> NDArray[np.bool_]:
        """Return whether each image is decided right (n,); equal classes go to the lower one."""
        with torch.inference_mode():
            found: NDArray[np.bool_] = (decide(pixels).argmax(1) == labels).cpu().numpy()
        report.advance(len(found))
        return found

    size = config.batch_size or (32 if device.type == "cpu" else 256)
    batches = []
    # Deciding on one batch in every way may take a minute: each decision counts.
    ways = 2 + 2 * len(localizers) * len(config.areas)
    with report.counting("measuring coverage", len(rows) * ways, unit="decisions"):
        for crops in source.batches(rows.tolist(), size):
            with exact_float32():
                seen = see(crops.rows, crops.pixels)
                labels = to_device(crops.labels, device)
                shown = _shown(seen, [localize for _, localize in localizers], config.areas)
                batches.append(np.stack([right(pixels, labels) for pixels in shown]))
    if not batches:
        raise DataError(f"{source.name}: none of the chosen images can be decoded")
    black, whole, *parts = np.concatenate(batches, -1)
    middle = np.reshape(parts, (len(localizers), len(config.areas), 2, -1))
    decided = [
        [[black, *by_area[:, 0], whole], [whole, *by_area[:, 1], black]] for by_area in middle
    ]
    names = [name for name, _ in localizers]
    return CoverageResult(
        network=config.network,
        source=source.name,
        images=len(whole),
        areas=config.all_areas,
        curves=curves_of(names, np.array(decided), config.all_areas),
        weights={config.network: network.source, "anchornet": str(anchornet.path), **weights},
        anchornet_sha256=anchornet.sha256,
        left_out=tuple(left_out),
        settings={
            "iou_threshold": config.iou_threshold,
            "seeds": config.seeds,
            "seed": config.seed,
            "precision": "bfloat16" if config.amp else "float32",
            "asked": asked_text(network.source, network.trained_on),
            "note": network.note,
        },
    )


def _localizers(
    config: CoverageConfig, network: Network, device: torch.device, side: int
) -> tuple[list[tuple[str, Localize]], dict[str, str], list[str]]:
    """Return the localizers with their names, random ones once a seed; what they are from."""
    wanted = config.localizers
    known = {name: [localize] for name, localize in PLAIN.items()}
    known["random"] = [partial(chance, seed) for seed in range(config.seeds)]
    best = {name: config.runs / name / "best.safetensors" for name in PEERS if name in wanted}
    peers = config.peers
    if peers is None:
        peers = tuple(path for path in best.values() if path.is_file())
    weights = {}
    for path in peers:
        name = read_meta(path).architecture
        if name not in PEERS:
            raise WeightsError(
                f"{path}: expected weights of {', '.join(PEERS)}, found {name}; name a file that "
                "`anchorpatch train --arch` wrote"
            )
        if name in wanted:
            known[name], weights[name] = [peer(load_checkpoint(path), device)], str(path)
    left_out = [
        f"{LOOKS[name].label}: no {path}; `anchorpatch train --arch {name}` makes it"
        for name, path in best.items()
        if name not in known
    ]
    module = network.module.eval().to(device).to(memory_format=torch.channels_last)
    try:
        if "gradcam" in wanted:
            known["gradcam"] = [gradcam(module, network.meta, device, side)]
    except SettingsError as error:
        left_out.append(f"{LOOKS['gradcam'].label}: {error}")
    chosen = [name for name in LOCALIZERS if name in wanted and name in known]
    return [(name, localize) for name in chosen for localize in known[name]], weights, left_out


def _shown(seen: Seen, localizers: Sequence[Localize], areas: Sequence[float]) -> Iterator[Tensor]:
    """Yield a batch as it is decided on: black, whole; by localizer and area covered, masked."""
    yield torch.zeros_like(seen.pixels)
    yield seen.pixels
    for localize in localizers:
        positions = pixel_positions(localize(seen))
        for area in areas:
            mask = mask_of_area(positions, area)[..., None]
            yield seen.pixels * mask
            yield seen.pixels * ~mask


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
        >>> (curve,) = curves_of(["center"], right, (0.0, 0.5, 1.0))
        >>> curve.covered.auc, curve.masked.auc
        (0.75, 0.75)
    """
    decided = right.astype(np.float64)
    at = torch.tensor(areas, dtype=torch.float64)[:, None]
    # The mean of the images' areas under the curve is the area under their mean curve.
    under = torch.trapezoid(torch.from_numpy(decided), at, dim=2).numpy()  # (L, 2, n)
    seeds = {name: [i for i, n in enumerate(localizers) if n == name] for name in localizers}
    anchornet = under[seeds["anchornet"]].mean(0) if "anchornet" in seeds else (None, None)
    return tuple(
        Curve(
            name,
            _series(decided[rows, 0], under[rows, 0], anchornet[0], 1.0),
            _series(decided[rows, 1], under[rows, 1], anchornet[1], -1.0),
        )
        for name, rows in seeds.items()
    )


def _series(
    right: NDArray[np.float64],
    under: NDArray[np.float64],
    anchornet: NDArray[np.float64] | None,
    sign: float,
) -> Series:
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


def _error(of_images: NDArray[np.float64]) -> float | None:
    """Return the standard error of a mean over images (n,)."""
    n = len(of_images)
    return float(of_images.std(ddof=1) / np.sqrt(n)) if n > 1 else None


# --- showing ------------------------------------------------------------------------------


def coverage_table(
    caption: str, summary: Sequence[Mapping[str, Any]], left_out: Sequence[str] = ()
) -> Table:
    """Return the areas under the curves, as `anchorpatch figure coverage` prints them.

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
        cells = [text(LOOKS[name].label if name in LOOKS else name)]
        for way in ("covered", "masked"):
            auc, error, spread, gain, gain_error = (
                number(row, f"{way}_{field}") for field in AUC_FIGURES
            )
            seeds = "" if spread is None else f" ({decimal(spread, 4)})"
            cells += [
                decimal_cell(auc, 4),
                Cell(NO_VALUE if error is None else f"± {decimal(error, 4)}{seeds}", error),
                Cell(NO_VALUE if gain is None else _gain(gain, gain_error), gain),
            ]
        rows.append(tuple(cells))
    notes = tuple(f"Left out: {reason}." for reason in left_out)
    return Table(caption, columns, tuple(rows), notes=notes)


def _gain(gain: float | None, error: float | None) -> str:
    return f"{decimal(gain or 0, 4, sign=True)} ± {decimal(error or 0, 4)}"


def coverage_figure(result: CoverageResult) -> Figure:
    """Draw both panels: on the left only the area is kept, on the right it is set to 0.

    The legends name the localizers from the best to the worst with their areas under the curve;
    bands are one standard deviation over seeds.
    """
    figure = Figure(figsize=(12.0, 4.6), dpi=150, layout="constrained")
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
        look, one = LOOKS[name], series[name]
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
            label=f"{look.label}  {one.auc:.3f}",
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
