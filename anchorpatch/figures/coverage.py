"""Figure 6: what a network makes of the part of an image that a localizer chose, or left.

An image is decided on twice for each localizer and area: with everything but the area set to 0,
and with the area set to 0. All localizers are compared at the same areas, to the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import DataError, SettingsError, WeightsError
from anchorpatch.figures.coverage_curves import (
    LABELS,
    LOCALIZERS,
    PEERS,
    CoverageResult,
    Curve,
    Series,
    curves_of,
)
from anchorpatch.figures.localizers import (
    Localize,
    See,
    anchornet_localizers,
    centre,
    chance,
    edges,
    gradcam,
    mask_of_area,
    peer,
    pixel_positions,
)
from anchorpatch.images.folder import without_images
from anchorpatch.jobs.crops import Crops, ImageSource
from anchorpatch.jobs.patch_scores import Distributions
from anchorpatch.networks import (
    Network,
    asked_text,
    load_checkpoint,
    load_for_whole_images,
    load_network,
)
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.runtime.device import exact_float32, keep_freed_memory, resolve_device, to_device
from anchorpatch.runtime.progress import Reporter

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        amp: let the network compute in bfloat16.

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
    amp: bool = False

    def __post_init__(self) -> None:
        if not self.areas or any(a >= b for a, b in pairwise(self.all_areas)):
            raise SettingsError(f"areas: expected rising shares between 0 and 1, got {self.areas}")
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


def measure_coverage(
    source: ImageSource, config: CoverageConfig, progress: Reporter | None = None
) -> CoverageResult:
    """Measure the curves of Figure 6.

    Args:
        source: labelled images of the network's classes.
        config: what is compared.
        progress: is told what is done.

    Raises:
        DataError: no image can be decoded.
        SettingsError: none of the localizers can be had.
        WeightsError: weights cannot be had, read or used, or are of other classes.
        NonFiniteError: a network gave NaN or infinity.
    """
    report = progress or Reporter()
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    anchornet = load_weights(config.anchornet_weights)
    network = _network(config, source, report)
    see = See(anchornet, device)
    localizers, weights, left_out = _localizers(config, network, device)
    if not localizers:
        raise SettingsError(f"no localizer is left: {'; '.join(left_out)}")
    scored = _Scores(config, network, localizers, device, report)
    rows = np.arange(len(source))
    if config.images is not None and config.images < len(rows):
        rows = np.sort(np.random.default_rng(config.seed).permutation(len(rows))[: config.images])
    if absent := without_images(source.labels[rows], source.classes):
        report.message(absent)
    size = config.batch_size or (32 if device.type == "cpu" else 256)
    # Deciding on one batch in every way may take a minute: each decision counts.
    report.start("measuring coverage", len(rows) * scored.decisions, unit="decisions")
    try:
        for crops in source.batches(rows.tolist(), size):
            scored.add(see, crops)
    finally:
        report.stop()
    return CoverageResult(
        network=config.network,
        source=source.name,
        images=scored.images,
        areas=config.all_areas,
        curves=scored.curves(source.name),
        weights={config.network: network.source, "anchornet": str(anchornet.path), **weights},
        anchornet_sha256=anchornet.sha256,
        left_out=tuple(left_out),
        settings={
            "iou_threshold": config.iou_threshold,
            "seeds": config.seeds,
            "seed": config.seed,
            "precision": "bfloat16" if config.amp else "float32",
            "asked": asked_text(network.source, network.trained_on),
        },
    )


def _network(config: CoverageConfig, source: ImageSource, report: Reporter) -> Network:
    """Load the network that decides, for the classes of the images."""
    name, message = config.network, report.message
    if config.weights is not None:
        return load_network(name, source.classes, config.weights, message)
    return load_for_whole_images(name, source.classes, config.runs, message, option="--weights")


def _localizers(
    config: CoverageConfig, network: Network, device: torch.device
) -> tuple[list[tuple[str, Localize]], dict[str, str], list[str]]:
    """Return the localizers with their names, random ones once a seed; what they are from."""
    threshold = config.iou_threshold
    known: dict[str, list[Localize]] = {
        name: [localize] for name, localize in anchornet_localizers(threshold).items()
    }
    known["sobel"], known["centre"] = [edges(threshold)], [centre]
    known["random"] = [chance(seed, threshold) for seed in range(config.seeds)]
    weights, left_out = {}, []
    for name, path in _peer_files(config).items():
        if name not in config.localizers:
            continue
        if path is None:
            left_out.append(
                f"{LABELS[name]}: no {config.runs / name / 'best.safetensors'}; "
                f"`anchorpatch train --arch {name}` makes it"
            )
            continue
        known[name] = [peer(load_checkpoint(path), device)]
        weights[name] = str(path)
    module = network.module.eval().to(device).to(memory_format=torch.channels_last)
    try:
        if "gradcam" in config.localizers:
            known["gradcam"] = [gradcam(module, network.meta, device)]
    except SettingsError as error:
        left_out.append(f"{LABELS['gradcam']}: {error}")
    chosen = [name for name in LOCALIZERS if name in config.localizers and name in known]
    return [(name, localize) for name in chosen for localize in known[name]], weights, left_out


def _peer_files(config: CoverageConfig) -> dict[str, Path | None]:
    """Return the weights file of each peer, None where there is none."""
    files: dict[str, Path | None] = dict.fromkeys(PEERS)
    if config.peers is None:
        for name in PEERS:
            path = config.runs / name / "best.safetensors"
            files[name] = path if path.is_file() else None
        return files
    for path in config.peers:
        name = load_weights(path, None).meta.architecture
        if name not in PEERS:
            raise WeightsError(
                f"{path}: expected weights of {', '.join(PEERS)}, found {name}; name a file that "
                "`anchorpatch train --arch` wrote"
            )
        files[name] = path
    return files


class _Scores:
    """Which images the network is right about: of each localizer, way and area."""

    def __init__(
        self,
        config: CoverageConfig,
        network: Network,
        localizers: list[tuple[str, Localize]],
        device: torch.device,
        report: Reporter,
    ) -> None:
        self.config, self.localizers, self.device = config, localizers, device
        self.report = report
        self.decide = Distributions(network.module, device, network.meta, config.amp)
        self.right: list[NDArray[np.bool_]] = []  # a batch each: (localizers, 2, areas, n)
        self.images = 0

    @property
    def decisions(self) -> int:
        """How often each image is decided on: whole, black, and in each way."""
        return 2 + 2 * len(self.localizers) * len(self.config.areas)

    @exact_float32()
    def add(self, see: See, crops: Crops) -> None:
        """Decide on a batch in every way."""
        seen = see(crops.rows, crops.pixels)
        labels = to_device(crops.labels, self.device)
        whole = self._right(seen.pixels, labels)
        black = self._right(torch.zeros_like(seen.pixels), labels)
        right = []
        for _, localize in self.localizers:
            positions = pixel_positions(localize(seen))
            covered, masked = [black], [whole]
            for area in self.config.areas:
                mask = mask_of_area(positions, area)[..., None]
                covered.append(self._right(seen.pixels * mask, labels))
                masked.append(self._right(seen.pixels * ~mask, labels))
            right.append(np.stack([[*covered, whole], [*masked, black]]))
        self.right.append(np.stack(right))
        self.images += len(labels)

    @torch.inference_mode()
    def _right(self, pixels: Tensor, labels: Tensor) -> NDArray[np.bool_]:
        """Return whether each image is decided right (n,); equal classes go to the lower one."""
        found: NDArray[np.bool_] = (self.decide(pixels).argmax(1) == labels).cpu().numpy()
        self.report.advance(len(found))
        return found

    def curves(self, source: str) -> tuple[Curve, ...]:
        """Return the curves of all images so far.

        Raises:
            DataError: no image could be decoded.
        """
        if not self.images:
            raise DataError(f"{source}: none of the chosen images can be decoded")
        names = [name for name, _ in self.localizers]
        return curves_of(names, np.concatenate(self.right, -1), self.config.all_areas)


# --- drawing ------------------------------------------------------------------------------


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
