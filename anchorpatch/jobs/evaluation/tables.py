"""Tables 3 and 4 of the paper: what an ordinary network makes of patches.

Table 3: patches against whole images, accuracy and cost. Table 4: one patch, localised, against
the whole image rescaled to the same size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from anchorpatch.jobs.evaluation.network_speed import Speed
from anchorpatch.jobs.metrics import Figures, PatchFigures
from anchorpatch.networks import asked_text

__all__ = [
    "WHOLE",
    "Costs",
    "Table3",
    "Table3Row",
    "Table4",
    "Table4Row",
    "table_3_rows",
    "table_4_rows",
]

#: Side of the whole image in pixels.
WHOLE: Final = 224


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one input, 1e9.

    Attributes:
        network: of the network, by the side of its input in pixels; 224 is there.
        anchornet: of localising one image.
    """

    network: Mapping[int, float]
    anchornet: float


@dataclass(frozen=True)
class Table3Row:
    """A line of Table 3; shares from 0 to 1.

    Attributes:
        scale: "224", "63", "95", "111", or "all" for the images of all scales.
        images: that chose the scale.
        mean_patches: patches an image; None without images, and for whole images.
        gmacs: of the network for one image, as in the paper.
        saved: share of the network's cost at 224 px that this leaves out.
        gmacs_with_anchornet: the same with AnchorNet's own cost.
        saved_with_anchornet: the same with AnchorNet's own cost.
        top1: share of images that are decided right.
        top5: share of images whose label is among the five best.
        loss: mean over images of -log of the label's mean probability.
        weights: what the network that decided was loaded from; None where there were several.
    """

    scale: str
    images: int
    mean_patches: float | None
    gmacs: float | None
    saved: float | None
    gmacs_with_anchornet: float | None
    saved_with_anchornet: float | None
    top1: float | None
    top5: float | None
    loss: float | None
    weights: str | None = None


@dataclass(frozen=True)
class Table3:
    """A network on patches and on whole images.

    Attributes:
        network: its name.
        shards: folder of the split.
        weights: what the network on patches was loaded from, or the three of them.
        whole_weights: what the network on whole images was loaded from; None without.
        whole_source: where the whole images came from; None without.
        gmacs_whole: of the network at 224 px, 1e9.
        gmacs_anchornet: of localising one image, 1e9.
        rows: of the table.
        speed: measured; None where it was not.
        left_out: what could not be had, and why.
        whole_trained_on: "whole images" or "patches", which the network on whole images was
            trained on; "" where nothing says it.
    """

    network: str
    shards: str
    weights: str
    whole_weights: str | None
    whole_source: str | None
    gmacs_whole: float
    gmacs_anchornet: float
    rows: tuple[Table3Row, ...]
    speed: Speed | None
    left_out: tuple[str, ...]
    whole_trained_on: str = ""

    @property
    def asked(self) -> str:
        """Which network was asked about whole images."""
        return asked_text(str(self.whole_weights), self.whole_trained_on)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON knows it."""
        return {"protocol": "patches", **asdict(self)}


@dataclass(frozen=True)
class Table4Row:
    """A scale of Table 4; shares from 0 to 1, None without images.

    Attributes:
        scale: "63", "95", "111", or "all" for the images of all scales.
        images: that chose the scale.
        rescaled_top1: -R, the whole image made as small.
        localized_top1: -L, the patch with the largest activation.
        rescaled_top5: the same for the five best.
        localized_top5: the same for the five best.
    """

    scale: str
    images: int
    rescaled_top1: float | None
    localized_top1: float | None
    rescaled_top5: float | None
    localized_top5: float | None


@dataclass(frozen=True)
class Table4:
    """Localising against rescaling.

    Attributes:
        network: its name.
        shards: folder of the split.
        weights: what the network was loaded from.
        whole_source: where the whole images came from.
        rows: of the table.
        trained_on: "whole images" or "patches"; "" where nothing says it.
    """

    network: str
    shards: str
    weights: str
    whole_source: str
    rows: tuple[Table4Row, ...]
    trained_on: str = ""

    @property
    def asked(self) -> str:
        """Which network was asked."""
        return asked_text(self.weights, self.trained_on)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON knows it."""
        return {"protocol": "rescale", **asdict(self)}


def table_3_rows(
    figures: PatchFigures, whole: Figures | None, costs: Costs
) -> tuple[Table3Row, ...]:
    """Return the lines of Table 3: whole images, where there are any, each scale, and all.

    Args:
        figures: of the network on patches.
        whole: of the network on whole images.
        costs: of the network for each scale and for 224 px, and of AnchorNet.
    """
    rows = [] if whole is None else [_whole_row(whole, costs)]
    spent = 0.0
    for scale, found in figures.by_scale.items():
        total = found.patches * costs.network[scale]
        rows.append(_patch_row(str(scale), found, total, costs))
        spent += total
    return (*rows, _patch_row("all", figures, spent, costs))


def _whole_row(whole: Figures, costs: Costs) -> Table3Row:
    gmacs = costs.network[WHOLE]
    return Table3Row(
        str(WHOLE), whole.images, None, gmacs, None, None, None, whole.top1, whole.top5, whole.loss
    )


def _patch_row(scale: str, found: Figures, total: float, costs: Costs) -> Table3Row:
    """Return a line on ``found.images`` whose patches cost ``total`` in all."""
    whole = costs.network[WHOLE]
    gmacs = total / found.images if found.images else None
    both = None if gmacs is None else gmacs + costs.anchornet
    return Table3Row(
        scale=scale,
        images=found.images,
        mean_patches=found.mean_patches,
        gmacs=gmacs,
        saved=_saved(gmacs, whole),
        gmacs_with_anchornet=both,
        saved_with_anchornet=_saved(both, whole),
        top1=found.top1,
        top5=found.top5,
        loss=found.loss,
    )


def _saved(gmacs: float | None, whole: float) -> float | None:
    return None if gmacs is None or not whole else 1 - gmacs / whole


def table_4_rows(rescaled: Mapping[int, Figures], localized: PatchFigures) -> tuple[Table4Row, ...]:
    """Return the lines of Table 4: each scale, and all.

    Args:
        rescaled: figures of the rescaled images by the scale that they chose.
        localized: figures of the strongest patch of the same images.
    """
    rows = [
        Table4Row(str(scale), r.images, r.top1, found.top1, r.top5, found.top5)
        for scale, r in rescaled.items()
        for found in (localized.by_scale[scale],)
    ]
    n = localized.images
    top1 = sum(r.images * (r.top1 or 0.0) for r in rescaled.values()) / n
    top5 = sum(r.images * (r.top5 or 0.0) for r in rescaled.values()) / n
    return (*rows, Table4Row("all", n, top1, localized.top1, top5, localized.top5))
