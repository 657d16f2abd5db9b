"""Dynamic inference: look at an image patch by patch, and stop when the network is sure.

The strongest patch comes first. After each look, the mean of the softmax distributions so far is
the decision. `score_looks` computes every patch once and notes what each look would decide, and how
confidently; what any threshold costs and how often it is right is then read from that table.
`look_until_sure` really stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import DataError
from anchorpatch.jobs.crops import Crops
from anchorpatch.jobs.localizer import Localized
from anchorpatch.jobs.patch_scores import Distributions, each_part
from anchorpatch.lsp import crop
from anchorpatch.metrics import places
from anchorpatch.networks import Network
from anchorpatch.runtime.device import to_device
from anchorpatch.runtime.distributed import sum_ranks
from anchorpatch.shards.dataset import held_out
from anchorpatch.shards.reader import ShardReader

#: How finely `Looks.curve` divides the thresholds.
_GRID: Final = 256


def confidence(means: Tensor, measure: str) -> Tensor:
    """Return how sure a network is of each decision, from 0 to 1.

    Args:
        means: distributions over the classes (n, C).
        measure: one of `anchorpatch.settings.CONFIDENCES`. "max": the largest probability.
            "margin": its distance to the second. "entropy": 1 minus the entropy, as a share of that
            of a uniform distribution.

    Returns:
        (n,), of the same type.

    Example:
        >>> means = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
        >>> [confidence(means, m).tolist() for m in ("max", "margin")]
        [[0.75, 0.5, 1.0], [0.5, 0.0, 1.0]]
        >>> [round(c, 3) for c in confidence(means, "entropy").tolist()]
        [0.189, 0.0, 1.0]
    """
    classes = means.shape[1]
    if measure == "max" or classes == 1:
        return means.amax(1)
    if measure == "margin":
        best = means.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]
    entropy: Tensor = torch.special.entr(means).sum(1)
    return (1 - entropy / math.log(classes)).clamp(0, 1)


@dataclass(frozen=True)
class LookCosts:
    """What looks cost, in GMACs.

    Attributes:
        patch: of the network for a patch, by its side in pixels.
        anchornet: of localizing the patches of an image.
        glance: of the network for the first look at the whole image, where there is one.
    """

    patch: Mapping[int, float]
    anchornet: float
    glance: float = 0.0


@dataclass(frozen=True, eq=False)
class Looks:
    """What each look at n images decides; L is the largest number of looks at one of them.

    Attributes:
        scale: chosen theta of each image (n,).
        counts: looks there are at each image (n,), at least 1.
        confidence: after each look (n, L), from 0 to 1; 0 behind the last.
        place: of the label in the order of falling probability, from 0 (n, L).
        predicted: class index (n, L), int32.
        glance: the first look is at the whole image, and not at a patch.
    """

    scale: NDArray[np.uint8]
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    place: NDArray[np.int32]
    predicted: NDArray[np.int32]
    glance: bool = False

    def stops(self, threshold: float) -> NDArray[np.int64]:
        """Return after how many looks each image stops: when its confidence reaches a threshold.

        A threshold of 0 stops after the first look. At 1 all looks are taken, also where
        probabilities round to 1.
        """
        sure = (self.confidence >= threshold) & (threshold < 1)
        sure |= np.arange(1, sure.shape[1] + 1) >= self.counts[:, None]
        taken: NDArray[np.int64] = sure.argmax(1) + 1
        return taken

    def fixed(self, most: Mapping[int, int]) -> NDArray[np.int64]:
        """Return the looks at each image with so many at most, by scale."""
        limits = np.array([most[scale] for scale in self.scale.tolist()], np.int64)
        return np.minimum(limits, self.counts)

    def of_scales(self, scales: Sequence[int]) -> Looks:
        """Return the looks at the images that chose one of these scales."""
        kept = np.isin(self.scale, scales)
        arrays: dict[str, Any] = {k: v[kept] for k, v in vars(self).items() if k != "glance"}
        return replace(self, **arrays)

    def spent(self, costs: LookCosts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the GMACs that are spent after each look: the network's, and all (n, L) each."""
        looks = np.arange(1, self.confidence.shape[1] + 1)
        each = np.array([costs.patch[scale] for scale in self.scale.tolist()])[:, None]
        patches = looks - self.glance
        network = costs.glance * self.glance + each * patches
        return network, network + costs.anchornet * (patches > 0)

    def threshold_for(self, costs: LookCosts, budget: float) -> tuple[float, float]:
        """Return the largest threshold whose mean cost is within a budget, and that cost.

        Args:
            costs: of looks.
            budget: GMACs per image, in all. Below the cost of the first looks: that cost, at 0.
        """
        _, spent = self.spent(costs)
        more = np.arange(1, spent.shape[1]) < self.counts[:, None]  # a look follows
        # An image goes on where no confidence so far reaches the threshold.
        highest = np.maximum.accumulate(self.confidence, 1)[:, :-1][more]
        order = np.argsort(highest, kind="stable")
        highest = highest[order]
        total = np.cumsum(np.diff(spent, axis=1)[more][order]) / len(self.counts)
        # At 1 all go on, and right below it those that are not wholly sure.
        thresholds = np.unique(np.append(highest, (np.nextafter(1.0, 0.0), 1.0)))
        below = np.searchsorted(highest, thresholds)
        below[-1] = len(highest)
        means = spent[:, 0].mean() + np.append(0.0, total)[below]
        best = int(np.searchsorted(means, budget + 1e-12, side="right")) - 1
        if best < 0:
            return 0.0, float(means[0])
        return float(thresholds[best]), float(means[best])

    def curve(self) -> NDArray[np.float64]:
        """Return thresholds from 0 to 1 that divide the looks evenly, in order."""
        inside = np.arange(self.confidence.shape[1]) < self.counts[:, None]
        shares = np.quantile(self.confidence[inside], np.linspace(0, 1, _GRID))
        return np.unique(np.concatenate(([0.0], shares, [1.0])).clip(0, 1))


class _Table:
    """Collects what looks decide, of the images of all processes.

    Args:
        labels: class index of each image (n,).
        scale: chosen theta of each (n,).
        counts: its looks (n,).
        measure: of `confidence`.
        glance: as of `Looks`.
    """

    def __init__(
        self,
        labels: NDArray[np.int32] | NDArray[np.int64],
        scale: NDArray[np.uint8],
        counts: NDArray[np.int64],
        measure: str,
        glance: bool = False,
    ) -> None:
        shape = len(counts), int(counts.max(initial=1))
        sure, place, predicted = (np.zeros(shape, k) for k in (np.float64, np.int32, np.int32))
        self.looks = Looks(scale, counts, sure, place, predicted, glance)
        self._labels, self._measure = labels.astype(np.int64), measure

    def add(self, images: NDArray[np.int64], at: NDArray[np.int64], means: Tensor) -> None:
        """Note what looks decide.

        Args:
            images: row of each look's image (m,).
            at: number of the look, from 0 (m,).
            means: distributions so far (m, C).
        """
        labels = to_device(self._labels[images], means.device)
        looks = self.looks
        looks.confidence[images, at] = confidence(means, self._measure).cpu().numpy()
        looks.place[images, at] = places(means, labels).cpu().numpy()
        looks.predicted[images, at] = means.argmax(1).cpu().numpy()

    def gathered(self, device: torch.device) -> Looks:
        """Return the table of all processes, each of which has noted its own images."""
        names = ("confidence", "place", "predicted")
        arrays: dict[str, Any] = {
            name: sum_ranks(torch.from_numpy(getattr(self.looks, name)).to(device)).cpu().numpy()
            for name in names
        }
        return replace(self.looks, **arrays)


def running_sums(
    probabilities: Tensor, at: NDArray[np.int64], begun: Tensor | None = None
) -> Tensor:
    """Return the sum of distributions after each look, patch by patch (m, C).

    Args:
        probabilities: of patches (m, C), image by image, in the order of their looks.
        at: number of each patch among those of its image, from 0 (m,).
        begun: what is added to before the first patch of each image that begins here or goes on
            here (images, C); None for nothing.
    """
    sums = probabilities.clone()
    first = np.flatnonzero((at == 0) | (np.arange(len(at)) == 0))
    if begun is not None:
        sums[to_device(first, sums.device)] += begun
    offset = np.arange(len(at)) - np.repeat(first, np.diff(np.append(first, len(at))))
    for k in range(1, int(offset.max(initial=0)) + 1):
        rows = to_device(np.flatnonzero(offset == k), sums.device)
        sums[rows] += sums[rows - 1]
    return sums


@torch.inference_mode()
def score_looks(
    networks: Mapping[int, Distributions],
    reader: ShardReader,
    images: NDArray[np.int64],
    mine: NDArray[np.int64],
    *,
    batch_size: int,
    measure: str,
    glances: Iterable[Tensor] | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> tuple[Looks, Looks]:
    """Note what each look at the patches of shards decides.

    Args:
        networks: by the scale of the patches that they decide on, all on one device.
        reader: of the shards.
        images: rows of all images (n,), each of one of these scales.
        mine: those of this process, in the order of their scales.
        batch_size: patches in a batch, all of one scale.
        measure: of `confidence`.
        glances: distributions of the whole images ``mine`` (k, C), in any batches, which are the
            first look.
        advance: told how many images were decided.

    Returns:
        The looks at all processes' images with the glance, and those at the patches alone; the same
        without a glance.

    Raises:
        AnchorpatchError: as `anchorpatch.jobs.patch_scores.score_patches`.
    """
    device = next(iter(networks.values())).device
    labels, scale = reader.label[images], reader.scale[images]
    counts = reader.counts[images].astype(np.int64)
    row_of = np.full(len(reader), -1, np.int64)
    row_of[images] = np.arange(len(images))
    alone = _Table(labels, scale, counts, measure)
    whole = alone if glances is None else _Table(labels, scale, counts + 1, measure, True)
    glance = _rows_of(glances) if glances is not None else None
    carry: Tensor | None = None
    first_looks: Tensor | None = None
    for part, probabilities in each_part(networks, reader, mine, batch_size):
        image = row_of[part.images]
        sums = running_sums(probabilities, part.at, _begun(part.at, carry, probabilities))
        means = sums / to_device(part.at + 1.0, device)[:, None]
        alone.add(image, part.at, means)
        if glance is not None:
            begins = np.flatnonzero(part.at == 0)
            fresh = torch.stack([next(glance) for _ in begins]) if len(begins) else sums[:0]
            whole.add(image[begins], np.zeros(len(begins), np.int64), fresh)
            kept = [] if first_looks is None or part.at[0] == 0 else [first_looks[-1:]]
            first_looks = torch.cat([*kept, fresh])
            of = np.cumsum((part.at == 0) | (np.arange(len(image)) == 0)) - 1
            both = sums + first_looks[to_device(of, device)]
            whole.add(image, part.at + 1, both / to_device(part.at + 2.0, device)[:, None])
        carry = sums[-1] if part.open else None
        advance(len(part.decided))
    return whole.gathered(device), alone.gathered(device)


def _begun(at: NDArray[np.int64], carry: Tensor | None, like: Tensor) -> Tensor | None:
    """Return what the images of a batch begin with: the first, perhaps, with earlier patches."""
    if carry is None:
        return None
    begun = like.new_zeros(int((at == 0).sum()) + (at[0] != 0), like.shape[1])
    begun[0] = carry
    return begun


def _rows_of(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch


@torch.inference_mode()
def score_localized(
    networks: Mapping[int, Distributions],
    batches: Iterable[tuple[Crops, Localized]],
    *,
    batch_size: int,
    measure: str,
    glance: Callable[[Tensor], Tensor] | None = None,
) -> list[Looks]:
    """Note what each look at the patches that AnchorNet finds decides, batch by batch.

    Args:
        networks: as for `score_looks`.
        batches: whole images, and what was found in them.
        batch_size: patches in a batch.
        measure: of `confidence`.
        glance: gives distributions (n, C) of whole images, uint8 (n, S, S, 3): the first look.

    Returns:
        The looks at the images of each batch.
    """
    tables = []
    for crops, found in batches:
        counts = found.counts.astype(np.int64)
        begun = None if glance is None else glance(crops.pixels)
        first = int(begun is not None)
        table = _Table(crops.labels, found.scale, counts + first, measure, bool(first))
        if begun is not None:
            table.add(np.arange(len(counts)), np.zeros(len(counts), np.int64), begun)
        for scale, run in networks.items():
            rows, image, corners = found.of_scale(scale)
            if not len(rows):
                continue
            pixels, device = crops.pixels.to(run.device), run.device
            where = (torch.split(to_device(a, device), batch_size) for a in (image, corners))
            cut = (crop(pixels, of, corner, scale) for of, corner in zip(*where, strict=True))
            probabilities = torch.cat([run(patches) for patches in cut])
            at = np.concatenate([np.arange(n) for n in counts[rows]])
            of_rows = None if begun is None else begun[to_device(rows, device)]
            sums = running_sums(probabilities, at, of_rows)
            table.add(image, at + first, sums / to_device(at + 1.0 + first, device)[:, None])
        tables.append(table.looks)
    return tables


def not_trained_on(
    networks: Iterable[Network], paths: NDArray[np.bytes_], where: str, otherwise: str
) -> tuple[NDArray[np.int64], float | None]:
    """Return the images of a training split that tell how sure networks are of others.

    Args:
        networks: whose runs held images out, or that no run of ours has trained.
        paths: of the images, relative to the split (n,).
        where: the split lies, for messages.
        otherwise: what a user can do without such images.

    Returns:
        Their rows (k,), and the share that was held out; None where all are taken, as the weights
        are from elsewhere.

    Raises:
        DataError: a network was trained on all of them, or none is held out.
    """
    shares = []
    for network in networks:
        if network.holdout == 0:
            raise DataError(
                f"{network.source}: was trained on all images of {where}, of which it is too sure: "
                f"fine-tune it with --holdout 0.05, {otherwise}"
            )
        shares += [] if network.holdout is None else [network.holdout]
    if not shares:
        return np.arange(len(paths)), None
    rows = np.flatnonzero(held_out(paths, min(shares)))
    if not len(rows):
        raise DataError(f"{where}: none of its images is held out; use a larger --holdout")
    return rows, min(shares)


def joined(tables: Iterable[Looks]) -> Looks:
    """Return the looks at the images of several tables, of which there is at least one."""
    tables = list(tables)
    width = max(table.confidence.shape[1] for table in tables)

    def wide(name: str) -> NDArray[np.float64]:
        arrays = [getattr(table, name) for table in tables]
        return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in arrays])

    scale, counts = (np.concatenate([getattr(t, n) for t in tables]) for n in ("scale", "counts"))
    place, predicted = (wide(name).astype(np.int32) for name in ("place", "predicted"))
    return Looks(scale, counts, wide("confidence"), place, predicted, tables[0].glance)


@torch.inference_mode()
def look_until_sure(
    networks: Mapping[int, Distributions],
    found: Localized,
    pixels: Tensor,
    batch_size: int,
    threshold: float,
    measure: str,
    begun: Tensor | None = None,
) -> tuple[Tensor, NDArray[np.int64]]:
    """Look at the patches of images until the network is sure; the others are not computed.

    Args:
        networks: by the scale of the patches that they decide on.
        found: in the images.
        pixels: of the images, uint8 (n, S, S, 3).
        batch_size: patches in a batch.
        threshold: of confidence, as for `Looks.stops`.
        measure: of `confidence`.
        begun: distributions of a first look at the whole images (n, C), none of which is sure.

    Returns:
        Mean distributions, float64 (n, C), on the device of the pixels, and patches looked at (n,).
    """
    classes, device = len(next(iter(networks.values())).meta.classes), pixels.device
    sums = torch.zeros(len(pixels), classes, dtype=torch.float64, device=device)
    taken, first = np.zeros(len(pixels), np.int64), 0
    if begun is not None:
        sums, first = sums + begun, 1
    going = np.arange(len(pixels))
    for k in range(int(found.counts.max(initial=0))):
        going = going[found.counts[going] > k]
        for scale, run in networks.items():
            rows = going[found.scale[going] == scale]
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                image, corners = (
                    to_device(a.astype(np.int64), device) for a in (part, found.corners[part, k])
                )
                sums[image] += run(crop(pixels, image, corners, scale)).to(device)
        taken[going] += 1
        if threshold < 1 and len(going):
            means = sums[to_device(going, device)] / (k + 1 + first)
            going = going[(confidence(means, measure) < threshold).cpu().numpy()]
    looks = to_device(taken + first, device)
    return sums / looks[:, None], taken
