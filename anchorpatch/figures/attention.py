"""Figure 5: what the attention branches weigh, and the heatmap of the decided class beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log2
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from anchorpatch.errors import SettingsError
from anchorpatch.figures.canvas import fitted, font, rounded
from anchorpatch.figures.examples import Choice, Example, LookedAt, ShownImages, look_at, spread
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.runtime.device import resolve_device
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import CROP, PRESETS, SCALES, STRIDE
from anchorpatch.storage import to_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class AttentionConfig:
    """What Figure 5 shows.

    Attributes:
        choice: the images to look at.
        count: images to show.
        device: auto, cpu or cuda.

    Raises:
        SettingsError: a value that no figure could use.
    """

    choice: Choice = field(default_factory=lambda: Choice(limit=100))
    count: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise SettingsError(f"count: expected at least one image, got {self.count}")


@dataclass(frozen=True, eq=False)
class AttentionExample:
    """One image with the maps of the three branches, in the order of `SCALES`.

    Attributes:
        image: the image and AnchorNet's decision.
        branch_class: name of the class that each branch predicts.
        branch_prob: its probability.
        attention: S of each branch times H * W (H, W): 1 is the uniform weight.
        heatmaps: M of each branch for the decided class (H, W).
    """

    image: Example
    branch_class: tuple[str, ...]
    branch_prob: tuple[float, ...]
    attention: tuple[NDArray[np.float32], ...]
    heatmaps: tuple[NDArray[np.float32], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the image as JSON, with the extremes of its maps."""
        branches = [
            {
                "scale": scale,
                "predicted": self.branch_class[j],
                "probability": self.branch_prob[j],
                "attention_max": float(self.attention[j].max()),
                "attention_at": _place(self.attention[j]),
                "heatmap_max": float(self.heatmaps[j].max()),
                "heatmap_at": _place(self.heatmaps[j]),
            }
            for j, scale in enumerate(SCALES)
        ]
        return {**to_json(self.image), "branches": branches}


@dataclass(frozen=True, eq=False)
class AttentionExamples(ShownImages):
    """Images with their attention maps and class heatmaps.

    Attributes:
        config: what was asked for.
        examples: images to show.
    """

    config: AttentionConfig
    examples: tuple[AttentionExample, ...]

    name, number = "attention", 5
    title = "Attention maps and class heatmaps of the three branches"

    @property
    def caption(self) -> str:
        """One or two sentences on what is seen and how it came about."""
        return (
            f"{len(self.examples)} of {self.looked} that were looked at: "
            "on the left the spatial attention S of each branch, as a multiple of uniform "
            "attention, and on the right the heatmap M of the decided class, its evidence at each "
            "location. A location is drawn at the centre of the patch it sees; the frame marks "
            "the branch that localizes the image."
        )

    def to_json(self) -> dict[str, Any]:
        """Return what the figure shows as JSON, without pixels."""
        return self.record(
            self.config.choice,
            {"count": self.config.count},
            images=[example.to_json() for example in self.examples],
        )


def find_attention(
    source: ImageSource,
    weights: Weights,
    config: AttentionConfig,
    reporter: Reporter | None = None,
) -> AttentionExamples:
    """Choose images, spread over scales and classes, and compute their maps.

    Args:
        source: of the images.
        weights: of AnchorNet.
        config: what to show.
        reporter: takes the progress.

    Raises:
        DataError: no image can be decoded.
        SettingsError: no image or class has a name that was asked for.
    """
    rows = config.choice.rows(source)
    device = resolve_device(config.device)
    with Localizer(weights, PRESETS["figure"], device, batch_size=64) as localizer:
        survey = look_at(source, weights, localizer, rows, reporter or Reporter())
        chosen = list(range(len(survey)))
        if not config.choice.images:
            found, labels = survey.found, survey.labels
            chosen = spread(
                chosen, config.count, lambda i: int(found.scale[i]), lambda i: int(labels[i])
            )
        images = survey.examples(chosen)
        pixels = torch.from_numpy(np.stack([image.pixels for image in images]))
        decided = torch.from_numpy(survey.found.predicted[chosen].astype(np.int64))
        maps = localizer.maps(pixels, decided[:, None])
    examples = tuple(
        AttentionExample(
            image=image,
            branch_class=tuple(survey.network[c] for c in survey.found.branch_class[i]),
            branch_prob=tuple(survey.found.branch_prob[i].tolist()),
            attention=tuple(branch[k] for branch in maps.attention),
            heatmaps=tuple(branch[k, 0] for branch in maps.heatmaps),
        )
        for k, (i, image) in enumerate(zip(chosen, images, strict=True))
    )
    return AttentionExamples(LookedAt.of(survey, weights), config, examples)


def _place(values: NDArray[np.float32]) -> list[int]:
    """Return the location (h, w) of the largest value, the first in row-major order."""
    return [int(i) for i in np.unravel_index(values.argmax(), values.shape)]


# --- drawing ------------------------------------------------------------------------------

#: An image, and S and M of three branches.
_COLUMNS: Final = 7

#: Side of an image, space between images, room above and below them, in inches.
_SIDE: Final = 1.9
_GAP: Final = 0.1
_TITLE: Final = 0.3
_CAPTION: Final = 0.42
_BARS: Final = 0.75

#: Size of the type below the panels, in points.
_SMALL: Final = 9

#: How much of the map covers the image.
_OPACITY: Final = 0.65

#: The image: left, right, bottom, top.
_EDGES: Final = (0, CROP, CROP, 0)

#: Colours of M, as a share of the largest of its map.
_EVIDENCE: Final = Normalize(-1, 1)

#: Colours of S, evenly perceived, and of M, which has a sign.
_SEQUENTIAL: Final = "viridis"
_SIGNED: Final = "RdBu_r"


def map_extent(height: int, width: int, theta: int) -> tuple[float, float, float, float]:
    """Return where a map lies on its image, as `imshow` takes it: left, right, bottom, top.

    Location (h, w) sees the pixels [8h, 8h + theta) x [8w, 8w + theta) and is drawn as a cell of
    8 px around their centre, (8h + theta / 2, 8w + theta / 2); the image's edges are 0 and 224.

    Args:
        height: locations H of the map.
        width: locations W of the map.
        theta: receptive field in pixels.

    Example:
        >>> map_extent(21, 21, 63), map_extent(15, 15, 111)
        ((27.5, 195.5, 195.5, 27.5), (51.5, 171.5, 171.5, 51.5))
    """
    first = (theta - STRIDE) / 2
    return first, first + STRIDE * width, first + STRIDE * height, first


def attention_figure(result: AttentionExamples) -> Figure:
    """Draw Figure 5: a row for each image, S of the three branches, then M of the decided class.

    S is coloured by its multiple of uniform attention, on a logarithmic scale; M by its share of
    the strongest evidence in its own map, blue where it speaks against the class. The branch that
    localizes the image is framed.

    Args:
        result: from `anchorpatch.figures.attention.find_attention`.
    """
    page = _Page(len(result.examples))
    maps = [s for example in result.examples for s in example.attention]
    weight = _attention_norm(maps)
    for row, example in enumerate(result.examples):
        _row([page.axes(row, column) for column in range(_COLUMNS)], example, weight)
    for column, scale in enumerate(SCALES * 2):
        kind = "attention S" if column < len(SCALES) else "heatmap M"
        page.figure.axes[1 + column].set_title(f"{kind}, {scale} px", fontsize=10)
    _attention_bar(page.bar(1), weight)
    bar = Colorbar(
        page.bar(4), ScalarMappable(_EVIDENCE, _SIGNED), orientation="horizontal", alpha=_OPACITY
    )
    bar.set_label("M of the decided class, as a share of the largest |M| of its map", fontsize=10)
    page.note("framed: the branch\nthat localizes\nthe image")
    return page.figure


class _Page:
    """Places panels of one size in rows; matplotlib's layouts let captions move them."""

    def __init__(self, rows: int) -> None:
        self.width = _COLUMNS * (_SIDE + _GAP) + _GAP
        self.height = _TITLE + rows * (_SIDE + _CAPTION) + _BARS
        self.figure = Figure(figsize=(self.width, self.height))

    def axes(self, row: int, column: int) -> Axes:
        """Add the panel of a row and a column."""
        left = _GAP + column * (_SIDE + _GAP)
        top = _TITLE + row * (_SIDE + _CAPTION)
        return self._axes(left, top, _SIDE, _SIDE)

    def bar(self, column: int) -> Axes:
        """Add room for the colour bar of three columns, below all rows."""
        width = 3 * _SIDE + 2 * _GAP
        left = _GAP + column * (_SIDE + _GAP)
        return self._axes(left + width / 6, self.height - _BARS + 0.1, width * 2 / 3, 0.14)

    def note(self, text: str) -> None:
        """Write into the lower left corner."""
        place = (_GAP / self.width, (_BARS - 0.08) / self.height)
        self.figure.text(*place, text, fontsize=_SMALL, va="top", linespacing=1.3)

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )


def _row(axes: Sequence[Axes], example: AttentionExample, weight: Normalize) -> None:
    image = example.image
    axes[0].imshow(image.pixels, extent=_EDGES)
    names = [("", image.label, "")]
    if image.predicted != image.label:
        names.append(("predicted ", image.predicted, ""))
    _caption(axes[0], names)
    for j, scale in enumerate(SCALES):
        chosen = scale == image.scale
        attention, heatmap = example.attention[j], example.heatmaps[j]
        largest = float(np.abs(heatmap).max())
        _overlay(axes[1 + j], image.pixels, attention, scale, weight, _SEQUENTIAL)
        _overlay(axes[4 + j], image.pixels, heatmap / (largest or 1), scale, _EVIDENCE, _SIGNED)
        words = ("", example.branch_class[j], f" {example.branch_prob[j]:.0%}")
        _caption(axes[1 + j], [words], chosen=chosen)
        _caption(axes[4 + j], [("largest |M| ", rounded(largest), "")], chosen=chosen)


def _overlay(
    axis: Axes,
    pixels: NDArray[np.uint8],
    values: NDArray[np.float32],
    theta: int,
    norm: Normalize,
    colors: str,
) -> None:
    """Lay a map over the image in grey, each location where its patch is centred."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=_EDGES)
    left, right, bottom, top = map_extent(values.shape[0], values.shape[1], theta)
    # Not imshow, which before matplotlib 3.11 moves a small map by up to a pixel.
    axis.pcolormesh(
        np.linspace(left, right, values.shape[1] + 1),
        np.linspace(top, bottom, values.shape[0] + 1),
        values,
        cmap=colors,
        norm=norm,
        alpha=_OPACITY,
        rasterized=True,  # in a PDF, viewers show seams between cells that are drawn one by one
    )
    axis.set(xlim=_EDGES[:2], ylim=_EDGES[2:])


def _caption(axis: Axes, lines: Sequence[tuple[str, str, str]], *, chosen: bool = False) -> None:
    """Write below a panel, and frame the one of the branch that localizes the image.

    A line is a name that may be shortened, with what stands before and behind it.
    """
    face, width = font(ceil(_SMALL * 100 / 72), bold=chosen), int(_SIDE * 100) - 4
    text = "\n".join(fitted(name, width, face, start=a, end=b) for a, name, b in lines)
    axis.set_xlabel(
        _plain(text), fontsize=_SMALL, labelpad=4, fontweight="bold" if chosen else "normal"
    )
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(linewidth=2.5 if chosen else 0.5, color="black")


def _attention_norm(maps: Sequence[NDArray[np.float32]]) -> Normalize:
    """Return the colours of S: uniform attention in the middle, a power of two at the ends."""
    strong = float(np.percentile(np.concatenate([s.ravel() for s in maps]), 99.5))
    limit = 2.0 ** min(4, max(1, ceil(log2(max(1, strong)))))
    return LogNorm(1 / limit, limit, clip=True)


def _attention_bar(axes: Axes, weight: Normalize) -> None:
    bar = Colorbar(
        axes,
        ScalarMappable(weight, _SEQUENTIAL),
        orientation="horizontal",
        extend="both",
        alpha=_OPACITY,
    )
    exponent = round(log2(weight.vmax or 2))
    powers = range(-exponent, exponent + 1)
    bar.set_ticks([2.0**p for p in powers])
    bar.set_ticklabels([str(2**p) if p >= 0 else f"1/{2**-p}" for p in powers])
    bar.minorticks_off()
    bar.set_label("S, as a multiple of uniform attention", fontsize=10)


def _plain(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics."""
    return text.replace("$", r"\$")
