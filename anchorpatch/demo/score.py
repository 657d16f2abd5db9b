"""How well the patches of scenes fit the objects, which are known there; what photographs show.

A patch *hits* when its center pixel lies in the object's box. *Covered* is the share of the box's
area inside the patch. Both are given for the strongest patch of each image and, as a measure of
chance, for patches of the same scale that know nothing: a random location of the grid (the exact
expectation, no sampling) and the grid's middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anchorpatch.classes import ClassNames, match_classes
from anchorpatch.demo.scene_folder import read_boxes
from anchorpatch.demo.scenes import SIZES
from anchorpatch.errors import DataError
from anchorpatch.lsp import grid_size
from anchorpatch.settings import SCALES, STRIDE
from anchorpatch.shards.reader import ShardReader
from anchorpatch.tables import Cell, Table, barred, decimal, named, share, text
from anchorpatch.text import counted, percent

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PatchFit:
    """How one kind of patch fits the objects, over all images.

    Attributes:
        hit: share of images whose patch has its center in the object's box.
        covered: mean share of the box that lies in the patch.
    """

    hit: float
    covered: float


@dataclass(frozen=True)
class SceneScore:
    """What `score_scenes` found.

    Attributes:
        images: how many.
        top1: share of images whose predicted class is their label; None where the network's
            classes are not the folders.
        strongest: the strongest patch of each image.
        random: a random patch of the same scale, expected.
        center: the middle patch of the same scale.
        counts: images by the object's size and the chosen scale.
        mean_scale: mean chosen scale in pixels by the object's size; None without such images.
        matched: share of images that chose the scale of their size: small 63, medium 95,
            large 111.
        ordered: of all pairs of images with objects of different size, the share in which the
            larger object has the larger scale, equal scales counting one half (0.5 is chance);
            None where all objects have one size.
        grows: whether the mean chosen scale rises from each size to the next.
    """

    images: int
    top1: float | None
    strongest: PatchFit
    random: PatchFit
    center: PatchFit
    counts: dict[str, dict[int, int]]
    mean_scale: dict[str, float | None]
    matched: float
    ordered: float | None
    grows: bool

    def tables(self) -> tuple[Table, Table]:
        """Return how well patches fit, beside chance, and the chosen scales by object size."""
        fits = tuple(
            (text(name), share(fit.hit, 1), share(fit.covered, 1))
            for name, fit in (
                ("strongest", self.strongest),
                ("random, same scale", self.random),
                ("middle, same scale", self.center),
            )
        )
        most = max(max(row.values()) for row in self.counts.values())
        sizes = tuple(
            (
                Cell(size, i),
                *(barred(n, most) for n in row.values()),
                decimal(self.mean_scale[size], 1),
            )
            for i, (size, row) in enumerate(self.counts.items())
        )
        notes = [
            f"{counted(self.images, 'image')}; the mean scale "
            f"{'grows' if self.grows else 'does not grow'} with the object; "
            f"{percent(self.matched, 1)} of the images chose the scale of their size."
        ]
        if self.ordered is not None:
            notes.append(
                "Of two objects of different size the larger has the larger scale in "
                f"{percent(self.ordered, 1)} (chance 50 %, equal scales count one half)."
            )
        scales = (f"{scale} px" for scale in next(iter(self.counts.values())))
        return (
            Table(
                "Patches against the true boxes",
                named("patch", "center in the object's box", "box covered"),
                fits,
            ),
            Table(
                "Chosen scale by the object's size",
                named("object", *scales, "mean scale, px"),
                sizes,
                notes=tuple(notes),
            ),
        )


@dataclass(frozen=True)
class PhotoScore:
    """What AnchorNet makes of photographs, whose classes may be unknown.

    Attributes:
        images: how many.
        labelled: how many of them have a label that is one of the network's classes.
        top1: share of the labelled ones that are predicted as their label; None without any.
        predicted: by class of the network, images that are predicted as it, and the mean
            probability of the chosen branch; the most frequent first.
    """

    images: int
    labelled: int
    top1: float | None
    predicted: dict[str, dict[str, float]]

    def table(self, names: ClassNames) -> Table:
        """Return the predicted classes, and the accuracy where something says it."""
        most = max(int(row["images"]) for row in self.predicted.values())
        rows = tuple(
            (text(names.shown(of)), barred(int(row["images"]), most), share(row["probability"], 1))
            for of, row in self.predicted.items()
        )
        note = "No image has a label that is a class of the weights: accuracy is unknown."
        if self.top1 is not None:
            known = f"{self.labelled:,} of {counted(self.images, 'image')}"
            note = f"Top-1 of AnchorNet, on {known} with labels that it knows: "
            note += f"{percent(self.top1, 1)}."
        columns = named("predicted", "images", "mean probability")
        return Table("Predicted classes", columns, rows, notes=(note,))


def score_photos(shards_folder: Path) -> PhotoScore:
    """Count what the images of a split are predicted as, and how often rightly.

    Raises:
        DataError: there are no images.
        ShardError: the shards cannot be read.
    """
    reader = ShardReader(shards_folder)
    if not len(reader):
        raise DataError(f"{shards_folder}: expected patches of photographs, found no image")
    outputs = match_classes(reader.classes, reader.network_classes)
    truth = np.array([-1 if i is None else i for i in outputs])[reader.label]
    known, predicted = truth >= 0, reader.predicted
    branch = np.searchsorted(SCALES, reader.scale)
    probability = reader.branch_prob[np.arange(len(reader)), branch]
    counts = np.bincount(predicted, minlength=len(reader.network_classes))
    return PhotoScore(
        images=len(reader),
        labelled=int(known.sum()),
        top1=float((predicted == truth)[known].mean()) if known.any() else None,
        predicted={
            reader.network_classes[of]: {
                "images": int(counts[of]),
                "probability": float(probability[predicted == of].mean()),
            }
            for of in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
        },
    )


def score_scenes(shards_folder: Path, boxes_csv: Path) -> SceneScore:
    """Compare the patches of a split with the true boxes.

    Args:
        shards_folder: OUT/SPLIT, extracted from scenes.
        boxes_csv: of the same scenes.

    Raises:
        DataError: the table is missing, or lacks an image of the shards; or there are no images.
        ShardError: the shards cannot be read.
    """
    reader = ShardReader(shards_folder)
    if not len(reader):
        raise DataError(f"{shards_folder}: expected patches of scenes, found no image")
    sizes, boxes = _truth(reader, boxes_csv)
    scale = reader.scale.astype(np.int64)
    corner = np.zeros((len(reader), 2), np.int64)
    for theta in SCALES:
        chose = scale == theta
        corner[chose] = reader.corners(theta, reader.first[chose])
    branch = np.searchsorted(SCALES, scale)
    side = reader.settings.img_size
    grid = np.array([grid_size(side, side, theta)[0] for theta in SCALES])
    middle = (grid // 2 * STRIDE)[branch]
    table = np.zeros((len(SIZES), len(SCALES)), np.int64)
    np.add.at(table, (sizes, branch), 1)
    means = [float(scale[sizes == s].mean()) if table[s].any() else None for s in range(len(SIZES))]
    there = [mean for mean in means if mean is not None]
    return SceneScore(
        images=len(reader),
        top1=float((reader.label == reader.predicted).mean())
        if reader.classes == reader.network_classes
        else None,
        strongest=_fit(corner[:, None], scale, boxes),
        random=_random_fit(scale, boxes, grid),
        center=_fit(middle[:, None, None].repeat(2, 2), scale, boxes),
        counts={
            size: dict(zip(SCALES, row, strict=True))
            for size, row in zip(SIZES, table.tolist(), strict=True)
        },
        mean_scale=dict(zip(SIZES, means, strict=True)),
        matched=float((sizes == branch).mean()),
        ordered=_ordered(table),
        grows=len(there) > 1 and all(a < b for a, b in pairwise(there)),
    )


def _truth(reader: ShardReader, boxes_csv: Path) -> tuple[Ints, Ints]:
    """Return the index of each object's size (n,) and its box (n, 4) in the crop."""
    known = read_boxes(boxes_csv)
    sizes, boxes = [], []
    for path in reader.path.tolist():
        key = f"{reader.header.split}/{path.decode()}"
        if key not in known:
            raise DataError(
                f"{boxes_csv}: expected a box for {key}, found none: the shards are of other images"
            )
        size, box = known[key]
        sizes.append(list(SIZES).index(size))
        boxes.append(box.in_crop(reader.settings.crop))
    return np.array(sizes, np.int64), np.array(boxes, np.int64)


def _axes(corner: Ints, scale: Ints, boxes: Ints) -> tuple[Floats, Floats]:
    """Compare patches with boxes along y and x.

    Args:
        corner: top-left (y, x) of m patches of each image (n, m, 2).
        scale: side of the patches (n,).
        boxes: x0, y0, x1, y1 (n, 4).

    Returns:
        Whether the center is inside along each axis, and the covered share of the box's
        extent, both (n, m, 2).
    """
    low, high = boxes[:, None, [1, 0]], boxes[:, None, [3, 2]]
    side = scale[:, None, None]
    middle = corner + side // 2
    inside = (low <= middle) & (middle < high)
    overlap = np.minimum(corner + side, high) - np.maximum(corner, low)
    return inside.astype(np.float64), overlap.clip(min=0) / (high - low)


def _fit(corner: Ints, scale: Ints, boxes: Ints) -> PatchFit:
    inside, covered = _axes(corner, scale, boxes)
    return PatchFit(float(inside.prod(2).mean()), float(covered.prod(2).mean()))


def _random_fit(scale: Ints, boxes: Ints, grid: Ints) -> PatchFit:
    """Return the mean over all locations: the rows' mean times the columns', as both part.

    ``grid`` is the number of locations along each axis, by branch.
    """
    hit, covered = np.zeros(len(scale)), np.zeros(len(scale))
    for theta, locations in zip(SCALES, grid, strict=True):
        chose = scale == theta
        steps = np.arange(locations) * STRIDE
        diagonal = np.broadcast_to(steps[:, None], (int(chose.sum()), len(steps), 2))
        inside, share = _axes(diagonal, scale[chose], boxes[chose])
        hit[chose], covered[chose] = inside.mean(1).prod(1), share.mean(1).prod(1)
    return PatchFit(float(hit.mean()), float(covered.mean()))


def _ordered(table: Ints) -> float | None:
    """Return the share of pairs of different size whose scales are in the same order."""
    good = pairs = 0.0
    for smaller, larger in combinations(table, 2):
        products = np.outer(smaller, larger)
        good += np.triu(products, 1).sum() + np.trace(products) / 2
        pairs += products.sum()
    return float(good / pairs) if pairs else None
