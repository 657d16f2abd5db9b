"""Figure 5: what the attention branches weigh, and the heatmap of the decided class beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

from anchorpatch.classes import ClassNames
from anchorpatch.figures.canvas import Font, fitted, rounded
from anchorpatch.figures.examples import Choice, Example, ShownImages, looking, spread
from anchorpatch.jobs.crops import CropSource
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import SCALES, STRIDE
from anchorpatch.storage import to_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Choice):
    """What Figure 5 shows.

    Attributes:
        count: images to show.
    """

    limit: int = 100
    count: int = 4


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
        examples: images to show.
    """

    config: AttentionConfig
    examples: tuple[AttentionExample, ...]

    name, number = "attention", 5
    title = "Attention maps and class heatmaps of the three branches"
    columns = ("image", "class", "predicted", "scale", "S max 63", "95", "111 px")

    @property
    def caption(self) -> str:
        """One or two sentences on what is seen and how it came about."""
        return (
            f"{len(self.examples)} of {self.survey} that were looked at: "
            "on the left the spatial attention S of each branch, as a multiple of uniform "
            "attention, and on the right the heatmap M of the decided class, its evidence at each "
            "location. A location is drawn at the center of the patch it sees; the frame marks "
            "the branch that localizes the image."
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What is shown, as JSON without pixels."""
        return {"images": [example.to_json() for example in self.examples]}

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a line for each image, in the order of `columns`."""
        for example in self.examples:
            image, attention = example.image, (f"{s.max():.3g}" for s in example.attention)
            names = self.shown(image.label), self.shown(image.predicted)
            yield image.path, *names, f"{image.scale} px", *attention


def find_attention(
    source: CropSource,
    weights: Weights,
    config: AttentionConfig,
    reporter: Reporter | None = None,
) -> AttentionExamples:
    """Choose images, spread over scales and classes, and compute their maps.

    Raises:
        DataError: no image can be decoded.
        SettingsError: no image or class has a name that was asked for.
    """
    with looking(source, weights, config, reporter) as (localizer, survey):
        found, labels = survey.found, survey.labels
        chosen = list(range(len(survey)))
        if not config.images:
            chosen = spread(chosen, config.count, found.scale.__getitem__, labels.__getitem__)
        images = survey.examples(chosen)
        pixels = torch.from_numpy(np.stack([image.pixels for image in images]))
        decided = torch.from_numpy(found.predicted[chosen].astype(np.int64))
        maps = localizer.maps(pixels, decided[:, None])
    examples = tuple(
        AttentionExample(
            image=image,
            branch_class=tuple(survey.network[c] for c in found.branch_class[i]),
            branch_prob=tuple(found.branch_prob[i].tolist()),
            attention=tuple(branch[k] for branch in maps.attention),
            heatmaps=tuple(branch[k, 0] for branch in maps.heatmaps),
        )
        for k, (i, image) in enumerate(zip(chosen, images, strict=True))
    )
    return AttentionExamples(config, survey, examples)


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

#: Colors of M, as a share of the largest of its map.
_EVIDENCE: Final = Normalize(-1, 1)

#: Colors of S, evenly perceived, and of M, which has a sign.
_SEQUENTIAL: Final = "viridis"
_SIGNED: Final = "RdBu_r"


def map_extent(height: int, width: int, theta: int) -> tuple[float, float, float, float]:
    """Return where a map lies on its image, as `imshow` takes it: left, right, bottom, top.

    Location (h, w) sees the pixels [8h, 8h + theta) x [8w, 8w + theta) and is drawn as a cell of
    8 px around their center, (8h + theta / 2, 8w + theta / 2); the image begins at 0.

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

    S is colored by its multiple of uniform attention, on a logarithmic scale; M by its share of
    the strongest evidence in its own map, blue where it speaks against the class. The branch that
    localizes the image is framed.
    """
    rows = len(result.examples)
    width = _COLUMNS * (_SIDE + _GAP) + _GAP
    height = _TITLE + rows * (_SIDE + _CAPTION) + _BARS
    figure = Figure(figsize=(width, height), dpi=100)
    # In inches: matplotlib's layouts let captions move panels.
    grid = {
        "left": _GAP / width,
        "right": 1 - _GAP / width,
        "top": 1 - _TITLE / height,
        "bottom": (_BARS + _CAPTION) / height,
        "wspace": _GAP / _SIDE,
        "hspace": _CAPTION / _SIDE,
    }
    panels = figure.subplots(rows, _COLUMNS, squeeze=False, gridspec_kw=grid)
    weight = _attention_norm([s for example in result.examples for s in example.attention])
    for axes, example in zip(panels, result.examples, strict=True):
        _row(axes, example, weight, result.config.class_names)
    for axis, scale, kind in zip(
        panels[0, 1:], SCALES * 2, ["attention S"] * 3 + ["heatmap M"] * 3, strict=True
    ):
        axis.set_title(f"{kind}, {scale} px", fontsize=10)

    def bar(column: int, norm: Normalize, colors: str, label: str, **options: Any) -> Colorbar:
        """Add a color bar below three columns, two thirds as wide."""
        left = _GAP + column * (_SIDE + _GAP) + (3 * _SIDE + 2 * _GAP) / 6
        place = (left / width, (_BARS - 0.24) / height, (2 * _SIDE + 4 / 3 * _GAP) / width)
        added = Colorbar(
            figure.add_axes((*place, 0.14 / height)),
            ScalarMappable(norm, colors),
            orientation="horizontal",
            alpha=_OPACITY,
            **options,
        )
        added.set_label(label, fontsize=10)
        return added

    weights = bar(1, weight, _SEQUENTIAL, "S, as a multiple of uniform attention", extend="both")
    exponent = round(log2(weight.vmax or 2))
    powers = range(-exponent, exponent + 1)
    weights.set_ticks([2.0**p for p in powers])
    weights.set_ticklabels([str(2**p) if p >= 0 else f"1/{2**-p}" for p in powers])
    weights.minorticks_off()
    bar(4, _EVIDENCE, _SIGNED, "M of the decided class, as a share of the largest |M| of its map")
    note = "framed: the branch\nthat localizes\nthe image"
    place = (_GAP / width, (_BARS - 0.08) / height)
    figure.text(*place, note, fontsize=_SMALL, va="top", linespacing=1.3)
    return figure


def _row(
    axes: Sequence[Axes], example: AttentionExample, weight: Normalize, called: ClassNames
) -> None:
    image = example.image
    axes[0].imshow(image.pixels, extent=_edges(image.pixels))
    names = [("", *called.parts(image.label))]
    if image.predicted != image.label:
        names.append(("predicted ", *called.parts(image.predicted)))
    _caption(axes[0], names)
    for j, scale in enumerate(SCALES):
        chosen = scale == image.scale
        attention, heatmap = example.attention[j], example.heatmaps[j]
        largest = float(np.abs(heatmap).max())
        _overlay(axes[1 + j], image.pixels, attention, scale, weight, _SEQUENTIAL)
        _overlay(axes[4 + j], image.pixels, heatmap / (largest or 1), scale, _EVIDENCE, _SIGNED)
        name = called.parts(example.branch_class[j])[0]  # a panel has no room for the id
        words = ("", name, f" {example.branch_prob[j]:.0%}")
        _caption(axes[1 + j], [words], chosen=chosen)
        _caption(axes[4 + j], [("largest |M| ", rounded(largest), "")], chosen=chosen)


def _edges(pixels: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Return where an image lies, as `imshow` takes it: left, right, bottom, top."""
    height, width = pixels.shape[:2]
    return 0, width, height, 0


def _overlay(
    axis: Axes,
    pixels: NDArray[np.uint8],
    values: NDArray[np.float32],
    theta: int,
    norm: Normalize,
    colors: str,
) -> None:
    """Lay a map over the image in gray, each location where its patch is centered."""
    gray, edges = np.asarray(Image.fromarray(pixels).convert("L")), _edges(pixels)
    axis.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=edges)
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
    axis.set(xlim=edges[:2], ylim=edges[2:])


def _caption(axis: Axes, lines: Sequence[tuple[str, str, str]], *, chosen: bool = False) -> None:
    """Write below a panel, and frame the one of the branch that localizes the image.

    A line is a name that may be shortened, with what stands before and behind it.
    """
    face, width = Font(ceil(_SMALL * 100 / 72), bold=chosen), int(_SIDE * 100) - 4
    text = "\n".join(fitted(name, width, face, start=a, end=b) for a, name, b in lines)
    axis.set_xlabel(
        text.replace("$", r"\$"),  # else matplotlib reads it as mathematics
        fontsize=_SMALL,
        labelpad=4,
        fontweight="bold" if chosen else "normal",
    )
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(linewidth=2.5 if chosen else 0.5, color="black")


def _attention_norm(maps: Sequence[NDArray[np.float32]]) -> Normalize:
    """Return the colors of S: uniform attention in the middle, a power of two at the ends."""
    strong = float(np.percentile(np.concatenate([s.ravel() for s in maps]), 99.5))
    limit = 2.0 ** min(4, max(1, ceil(log2(max(1, strong)))))
    return LogNorm(1 / limit, limit, clip=True)
