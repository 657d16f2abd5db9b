"""What evaluations find: Tables 3 and 4 of the paper, and the figures of AnchorNet.

Table 3: patches against whole images, accuracy and cost. Table 4: one patch, localised, against
the whole image rescaled to the same size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from anchorpatch.networks import asked_text

__all__ = ["AnchorNetFigures", "Speed", "Table3", "Table3Row", "Table4", "Table4Row"]


@dataclass(frozen=True)
class AnchorNetFigures:
    """The figures of AnchorNet on a split; accuracies and shares from 0 to 1.

    Attributes:
        images: evaluated, each once.
        skipped: that could not be decoded.
        loss: sum of the six cross-entropies.
        top1: by the decision of Eq. 7.
        top5: gamma first, then the classes by their mean probability.
        top1_by_output: by output, such as "localization_63".
        top5_by_output: the same.
        branch_share: images by chosen scale.
        mean_patches: patches of an image by preset and scale, over the images that chose the
            scale; "all" over all images. None where no image chose it.
        gmacs: multiply-accumulates of localising one image, 1e9.
        images_per_second: of network, decision and heatmaps, without decoding and LSP.
        damaged: images that were decoded with damage.
        ignored: files of the folder that were passed over, by extension.
    """

    images: int
    skipped: int
    loss: float
    top1: float
    top5: float
    top1_by_output: dict[str, float]
    top5_by_output: dict[str, float]
    branch_share: dict[str, float]
    mean_patches: dict[str, dict[str, float | None]]
    gmacs: float
    images_per_second: float
    damaged: int = 0
    ignored: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON knows it."""
        return {"protocol": "anchornet", **asdict(self)}


@dataclass(frozen=True)
class Speed:
    """Both ways on the same pixels in one run, taking turns.

    Attributes:
        images: of a turn.
        rounds: turns of each way that were timed; the rates are of their medians.
        whole: images a second of the network on whole images.
        patches: images a second of AnchorNet, LSP, cropping and the network on the patches.
        ratio: patches / whole.
        mean_patches: patches an image of these images.
    """

    images: int
    rounds: int
    whole: float
    patches: float
    ratio: float
    mean_patches: float


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
