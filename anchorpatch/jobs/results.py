"""What evaluations find: Tables 3 and 4 of the paper, and the figures of AnchorNet.

Table 3: patches against whole images, accuracy and cost. Table 4: one patch, localized, against
the whole image rescaled to the same size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from anchorpatch.metrics import Figures, PatchFigures
from anchorpatch.networks import asked_text
from anchorpatch.settings import CROP
from anchorpatch.tables import Cell, Column, Table, count, decimal, named, share, text, with_total
from anchorpatch.text import counted


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
        mean_patches: patches per image by preset and scale, over the images that chose the
            scale; "all" over all images. None where no image chose it.
        gmacs: multiply-accumulates of localizing one image, 1e9.
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
        """Return the figures as JSON values."""
        return {"protocol": "anchornet", **asdict(self)}

    def tables(self) -> tuple[Table, ...]:
        """Return the accuracy of each output, and the patches per image of each preset."""
        rows = []
        for output, top1 in self.top1_by_output.items():
            part, _, scale = output.partition("_")
            chosen = self.branch_share.get(scale) if part == "localization" else None
            top5 = self.top5_by_output.get(output)
            rows.append((text(f"{part} {scale} px"), share(top1), share(top5), share(chosen, 1)))
        total = (text("decision (Eq. 7)"), share(self.top1), share(self.top5), share(1.0, 1))
        notes = [
            f"{counted(self.images, 'image')}, {self.skipped:,} skipped; "
            f"{_gmacs(self.gmacs)} GMACs, {decimal(self.images_per_second, 1).text} images/s "
            "without decoding."
        ]
        if self.damaged:
            notes.append(f"Decoded with damage: {self.damaged:,}.")
        columns = named("output", "top-1", "top-5", "chosen for")
        outputs = Table("AnchorNet by output", columns, tuple(rows), (total,), tuple(notes))
        scales = [*self.branch_share, "all"]
        columns = named("preset", *(f"{s} px" if s != "all" else s for s in scales))
        presets = tuple(
            (text(name), *(decimal(means.get(scale)) for scale in scales))
            for name, means in self.mean_patches.items()
        )
        return outputs, Table("Patches per image by preset", columns, presets)


@dataclass(frozen=True)
class Latency:
    """How long decisions on single images take, one after another, with AnchorNet's part.

    Attributes:
        images: that were timed.
        median: milliseconds.
        p95: the 95th percentile, milliseconds.
        images_per_second: at batch size 1.
    """

    images: int
    median: float
    p95: float
    images_per_second: float

    def __str__(self) -> str:
        return f"{decimal(self.median, 1).text} ms ({decimal(self.p95, 1).text})"


@dataclass(frozen=True)
class Speed:
    """Both ways on the same pixels in one run, taking turns.

    Attributes:
        images: of a turn.
        rounds: turns of each way that were timed; the rates are of their medians.
        whole: images per second of the network on whole images.
        patches: images per second of AnchorNet, LSP, cropping and the network on the patches.
        ratio: patches / whole.
        mean_patches: patches per image of these images.
        latency: of single images, by "whole" and "patches".
    """

    images: int
    rounds: int
    whole: float
    patches: float
    ratio: float
    mean_patches: float
    latency: Mapping[str, Latency] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Speed:
        """Return the speed that a result has as JSON."""
        latency = {name: Latency(**value) for name, value in data.get("latency", {}).items()}
        return cls(**{**data, "latency": latency})


@dataclass(frozen=True)
class Table3Row:
    """A line of Table 3; shares from 0 to 1.

    Attributes:
        scale: the side of the whole image, such as "224", in the first row where whole images were
            decided on; "63", "95", "111", or "all" for the images of all scales.
        images: that chose the scale.
        mean_patches: patches per image; None without images, and for whole images.
        gmacs: of the network for one image, as in the paper.
        saved: share of the network's cost for the whole image that this leaves out.
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
        gmacs_whole: of the network for the whole image, 1e9.
        gmacs_anchornet: of localizing one image, 1e9.
        rows: of the table.
        speed: measured; None where it was not.
        left_out: what was not available, and why.
        whole_trained_on: "whole images" or "patches", which the network on whole images was
            trained on; "" where nothing says it.
        notes: how outputs were matched with other classes.
        img_size: side of the whole images in pixels.
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
    notes: tuple[str, ...] = ()
    img_size: int = CROP

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return {"protocol": "patches", **asdict(self)}

    def tables(self) -> tuple[Table, ...]:
        """Return the table: whole images against patches."""
        side = self.img_size
        columns = (
            Column("scale", False, f"{side} is the whole image, all the patches of any scale"),
            Column("images"),
            Column("patches", help="of an image, on average"),
            Column("GMACs", help="of the network for one image, as the paper counts"),
            Column("saved", help=f"of {_gmacs(self.gmacs_whole)} GMACs at {side} px"),
            Column("in all", help=f"GMACs with AnchorNet's {_gmacs(self.gmacs_anchornet)}"),
            Column("saved in all"),
            Column("top-1"),
            Column("top-5"),
        )
        rows = [
            (
                _scale(row.scale),
                count(row.images),
                decimal(row.mean_patches),
                decimal(row.gmacs, 3),
                share(row.saved, 0),
                decimal(row.gmacs_with_anchornet, 3),
                share(row.saved_with_anchornet, 0),
                share(row.top1),
                share(row.top5),
            )
            for row in self.rows
        ]
        notes = [f"{self.network} on {self.shards}; weights: {self.weights}."]
        if self.whole_source:
            asked = asked_text(str(self.whole_weights), self.whole_trained_on)
            notes.append(f"Row {side}: {self.whole_source}; weights: {asked}.")
        if speed := self.speed:
            whole, patches = (decimal(v, 1).text for v in (speed.whole, speed.patches))
            ratio, mean = (decimal(v).text for v in (speed.ratio, speed.mean_patches))
            notes.append(
                f"Speed: {whole} images/s whole, {patches} images/s by AnchorNet, LSP and patches: "
                f"{ratio} times as many ({counted(speed.images, 'image')} of {mean} patches, "
                f"{counted(speed.rounds, 'turn')} each)."
            )
            if speed.latency:
                each = ", ".join(f"{way} {of}" for way, of in speed.latency.items())
                notes.append(f"A single image, median (95th percentile): {each}.")
        notes += [f"{note}." for note in self.notes]
        notes += [f"Left out: {reason}." for reason in self.left_out]
        return (with_total(f"Table 3: {self.network}", columns, rows, notes),)


#: Columns of a row from ``mean_patches`` to ``saved_with_anchornet``.
_Cost = tuple[float | None, float | None, float | None, float | None, float | None]


def table_3_rows(
    figures: PatchFigures,
    whole: Figures | None,
    gmacs: Mapping[int, float],
    anchornet: float,
    weights: Mapping[str, str | None],
    side: int = CROP,
) -> tuple[Table3Row, ...]:
    """Return the lines of Table 3: whole images, where there are any, each scale, and all.

    Args:
        figures: of the network on patches.
        whole: of the network on whole images.
        gmacs: of the network for one input, by its side: that of the whole image and each scale.
        anchornet: GMACs of localizing one image.
        weights: what the network of each row was loaded from; "whole": that for whole images.
        side: of the whole image in pixels.
    """
    at_whole = gmacs[side]

    def saved(spent: float | None) -> float | None:
        return None if spent is None or not at_whole else 1 - spent / at_whole

    def row(scale: str, found: Figures, cost: _Cost, key: str = "") -> Table3Row:
        decided = (found.top1, found.top5, found.loss)
        return Table3Row(scale, found.images, *cost, *decided, weights.get(key or scale))

    def of_patches(scale: str, found: Figures, spent: float) -> Table3Row:
        mean = spent / found.images if found.images else None
        both = None if mean is None else mean + anchornet
        return row(scale, found, (found.mean_patches, mean, saved(mean), both, saved(both)))

    rows, total = [], 0.0
    if whole is not None:
        rows.append(row(str(side), whole, (None, at_whole, None, None, None), "whole"))
    for scale, found in figures.by_scale.items():
        spent = found.patches * gmacs[scale]
        rows.append(of_patches(str(scale), found, spent))
        total += spent
    return (*rows, of_patches("all", figures, total))


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
        other_top1: a patch as large at other places, by their names, such as "center".
    """

    scale: str
    images: int
    rescaled_top1: float | None
    localized_top1: float | None
    rescaled_top5: float | None
    localized_top5: float | None
    other_top1: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Table4:
    """Localizing against rescaling.

    Attributes:
        network: its name.
        shards: folder of the split.
        weights: what the network was loaded from.
        whole_source: where the whole images came from.
        rows: of the table.
        trained_on: "whole images" or "patches"; "" where nothing says it.
        notes: how outputs were matched with other classes.
    """

    network: str
    shards: str
    weights: str
    whole_source: str
    rows: tuple[Table4Row, ...]
    trained_on: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return {"protocol": "rescale", **asdict(self)}

    def tables(self) -> tuple[Table, ...]:
        """Return the table: one patch against the whole image made as small."""
        others = self.rows[-1].other_top1
        columns = (
            Column("scale", False),
            Column("images"),
            Column("-R top-1", help=f"the whole image rescaled ({self.whole_source})"),
            Column("-L top-1", help="the strongest patch"),
            Column("-R top-5"),
            Column("-L top-5"),
            *(Column(f"{name} top-1", help="a patch at other places") for name in others),
        )
        rows = [
            (
                _scale(row.scale),
                count(row.images),
                share(row.rescaled_top1),
                share(row.localized_top1),
                share(row.rescaled_top5),
                share(row.localized_top5),
                *(share(row.other_top1.get(name)) for name in others),
            )
            for row in self.rows
        ]
        asked = asked_text(self.weights, self.trained_on)
        notes = [f"{self.network} on {self.shards}; weights: {asked}."]
        notes += [f"{note}." for note in self.notes]
        return (with_total(f"Table 4: {self.network}", columns, rows, notes),)


def table_4_rows(
    rescaled: Mapping[int, Figures],
    localized: PatchFigures,
    others: Mapping[str, Mapping[int, Figures]] | None = None,
) -> tuple[Table4Row, ...]:
    """Return the lines of Table 4: each scale, and all.

    Args:
        rescaled: figures of the rescaled images by the scale that they chose.
        localized: figures of the strongest patch of the same images.
        others: figures of patches at other places, by name and by scale.
    """
    others, n, rows = others or {}, localized.images, []
    for scale, whole in rescaled.items():
        patch = localized.by_scale[scale]
        decided = (whole.top1, patch.top1, whole.top5, patch.top5)
        other = {name: found[scale].top1 for name, found in others.items()}
        rows.append(Table4Row(str(scale), whole.images, *decided, other))

    def mean(found: Mapping[int, Figures], name: str = "top1") -> float:
        return sum(each.images * (getattr(each, name) or 0.0) for each in found.values()) / n

    decided = (mean(rescaled), localized.top1, mean(rescaled, "top5"), localized.top5)
    other = {name: mean(found) for name, found in others.items()}
    return (*rows, Table4Row("all", n, *decided, other))


def _scale(name: str) -> Cell:
    return Cell(f"{name} px" if name.isdecimal() else name, float(name) if name.isdecimal() else 0)


def _gmacs(value: float) -> str:
    return decimal(value, 3).text
