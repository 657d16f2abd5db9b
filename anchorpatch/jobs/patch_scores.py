"""Accuracy of an ordinary network on patches, and on whole images (section 4.3).

The decision on an image adds the softmax distributions of its patches and takes the class with
the largest sum; equal sums go to the lower class index. Distributions are computed and added in
float64, patch after patch, so that neither the batch size nor the number of processes changes
the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anchorpatch.errors import CorruptShard, DataError, ShardError, WeightsError
from anchorpatch.images.folder import spread_rows
from anchorpatch.jobs.crops import Crops
from anchorpatch.metrics import Accuracy, Figures, PatchFigures, probability_losses
from anchorpatch.networks import Normalization
from anchorpatch.runtime.checkpoint import WeightsMeta
from anchorpatch.runtime.device import exact_float32, to_device
from anchorpatch.runtime.distributed import World
from anchorpatch.settings import SCALES
from anchorpatch.shards.dataset import load_rows
from anchorpatch.shards.layout import MANIFEST_NAME
from anchorpatch.shards.reader import ShardReader
from anchorpatch.text import few

#: Takes rows of images (n,), int64, and their mean distributions (n, C), float64.
Keep: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float64]], None]


def check_classes(reader: ShardReader, meta: WeightsMeta) -> None:
    """Raise DataError unless a network's classes are the folders that the labels index."""
    if reader.classes != meta.classes:
        raise DataError(
            f"{reader.folder}: expected the {len(meta.classes)} classes of the weights of "
            f"{meta.architecture} ({few(meta.classes)}), found {len(reader.classes)} "
            f"({few(reader.classes)}); use weights that were trained on these classes"
        )


def open_shards(shards: Path, split: str) -> ShardReader:
    """Open SHARDS/SPLIT to train or evaluate a network on its patches.

    Raises:
        ShardError: there are no shards, no images in them, or an image has no patch.
        CorruptShard: a shard cannot be read.
    """
    folder = shards / split
    if not (folder / MANIFEST_NAME).is_file():
        raise ShardError(
            f"{folder}: expected shards, found no {MANIFEST_NAME}; make them by "
            f"`anchorpatch extract --split {split} --out {shards}`, or name another --shards"
        )
    reader = ShardReader(folder)
    if not len(reader):
        raise ShardError(f"{folder}: expected shards with images, found none in them")
    check_tables(reader)
    return reader


def check_tables(reader: ShardReader) -> None:
    """Raise unless every image has patches and a label."""
    empty = np.flatnonzero(reader.counts < 1)
    if len(empty):
        raise ShardError(
            f"{reader.folder}: {len(empty):,} of {len(reader):,} images have no patch, the first "
            f"is {reader.path[empty[0]].decode()}; extract them again"
        )
    wrong = np.flatnonzero((reader.label < 0) | (reader.label >= len(reader.classes)))
    if len(wrong):
        raise CorruptShard(
            f"{reader.folder}: {reader.path[wrong[0]].decode()}: expected a label from 0 to "
            f"{len(reader.classes) - 1}, found {reader.label[wrong[0]]}; extract again"
        )


class Distributions:
    """From uint8 pixels (n, H, W, 3) to the softmax distributions (n, C), float64.

    Args:
        module: the network, in evaluation mode and on the device.
        device: of the network.
        meta: the network's classes, and the mean and deviation of its input.
        amp: compute in bfloat16; distributions stay float64.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, meta: WeightsMeta, amp: bool
    ) -> None:
        self.module, self.device, self.meta, self.amp = module, device, meta, amp
        self.normalize = Normalization(meta, device)

    @exact_float32()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Run the network on a batch.

        Raises:
            WeightsError: the network does not give one logit for each class.
        """
        inputs = self.normalize(pixels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.module(inputs)
        expected = (len(pixels), len(self.meta.classes))
        if not isinstance(logits, Tensor) or logits.shape != expected:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise WeightsError(
                f"{self.meta.architecture}: expected logits {expected} of {len(pixels)} inputs, "
                f"found {found}; the network does not fit the classes of the shards"
            )
        return logits.double().softmax(-1)


class Part(NamedTuple):
    """One batch of patches of a scale.

    Attributes:
        scale: side of the patches in pixels.
        rows: of the patches among those of the scale (m,), int64.
        lengths: patches in this batch of each of its images (k,), int64.
        decided: rows of the images whose last patch is here, int64.
        first: index of the first of the k images in the plan.
        open: patches of the last image follow.
    """

    scale: int
    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    decided: NDArray[np.int64]
    first: int
    open: bool


@dataclass(frozen=True)
class ScalePlan:
    """The patches of images of one scale in full batches; an image may lie in several.

    Attributes:
        scale: side of the patches in pixels.
        images: rows of the images (n,), int64.
        first: row of the first patch of each image (n,), int64.
        counts: patches of each image (n,), int64.
        size: patches in a batch.
    """

    scale: int
    images: NDArray[np.int64]
    first: NDArray[np.int64]
    counts: NDArray[np.int64]
    size: int

    @classmethod
    def of(
        cls,
        reader: ShardReader,
        scale: int,
        images: NDArray[np.int64],
        size: int,
        most: int | None,
    ) -> ScalePlan:
        """Plan images of the scale, with so many patches of each at ``most``."""
        counts = reader.counts[images].astype(np.int64)
        if most is not None:
            counts = np.minimum(counts, most)
        return cls(scale, images, reader.first[images], counts, size)

    def __iter__(self) -> Iterator[Part]:
        ends = np.cumsum(self.counts)
        total = int(ends[-1]) if len(ends) else 0
        for a in range(0, total, self.size):
            b = min(a + self.size, total)
            patches = np.arange(a, b)
            image = np.searchsorted(ends, patches, side="right")
            lo, hi = int(image[0]), int(image[-1])
            begins = ends[image] - self.counts[image]
            whole = hi if ends[hi] > b else hi + 1
            yield Part(
                scale=self.scale,
                rows=self.first[image] + patches - begins,
                lengths=np.bincount(image - lo),
                decided=self.images[lo:whole],
                first=lo,
                open=whole == hi,
            )


def added_by_image(probabilities: Tensor, part: Part, carry: Tensor | None) -> Tensor:
    """Return the sum of distributions of each image of a batch (k, C).

    Args:
        probabilities: of the patches (m, C).
        part: says which are of one image.
        carry: sum of the first image's patches that went before (C,), where there are some.
    """
    lengths = part.lengths
    if carry is not None:
        # Put in front, a sum goes on patch by patch as if no batch had ended.
        probabilities = torch.cat((carry[None], probabilities))
        lengths = np.concatenate((lengths[:1] + 1, lengths[1:]))
    return torch.segment_reduce(
        probabilities,
        "sum",
        lengths=to_device(lengths, probabilities.device),
        axis=0,
        unsafe=True,
    )


@torch.inference_mode()
def score_patches(
    networks: Mapping[int, Distributions],
    reader: ShardReader,
    *,
    world: World,
    batch_size: int,
    scales: Sequence[int] = SCALES,
    check: Callable[[], object] = lambda: None,
    keep: Keep | None = None,
    most: int | None = None,
    limit: int | None = None,
    threads: int = 2,
    advance: Callable[[int], object] = lambda images: None,
) -> PatchFigures:
    """Decide on every image by the sum of its patches' distributions.

    Each process takes its share of the images, all patches of an image in one process.

    Args:
        networks: that decides on the patches of each scale, all on one device.
        reader: of the shards.
        world: the processes.
        batch_size: patches in a batch, all of one scale.
        scales: the images that chose one of these are counted.
        check: called between batches, may raise.
        keep: gets the images of this process as they are decided, by scale in order.
        most: take only the strongest patches of each image, so many.
        limit: take only so many images, evenly spread over the split.
        threads: that read patches ahead.
        advance: told how many images were decided.

    Returns:
        The figures of all processes' images.

    Raises:
        DataError: a network knows other classes than the shards.
        ShardError: there is no image, or one without patches.
        CorruptShard: a shard cannot be read.
        WeightsError: the network does not give one logit for each class.
        NonFiniteError: the network gave NaN or infinity.
    """
    for run in networks.values():
        check_classes(reader, run.meta)
    check_tables(reader)
    device = next(iter(networks.values())).device
    taken = spread_rows(len(reader), limit)
    mine = taken[list(world.share(len(taken)))]
    accuracy = Accuracy(device, len(SCALES))
    for j, scale in enumerate(SCALES):
        if scale not in scales:
            continue
        run = networks[scale]
        plan = ScalePlan.of(reader, scale, mine[reader.scale[mine] == scale], batch_size, most)
        carry: Tensor | None = None
        loaded = load_rows(reader, plan, threads=threads, pin_memory=device.type == "cuda")
        with closing(loaded):
            for part, (pixels, _) in loaded:
                check()
                added = added_by_image(run(pixels), part, carry)
                carry = added[-1] if part.open else None
                rows, decided = part.decided, added[: len(part.decided)]
                labels = to_device(reader.label[rows].astype(np.int64), device)
                losses = probability_losses(decided, labels)
                accuracy.update(decided, labels, losses, group=j, patches=len(part.rows))
                if keep is not None and len(rows):
                    totals = plan.counts[part.first : part.first + len(rows), None]
                    keep(rows, decided.cpu().numpy() / totals)
                advance(len(rows))
    total, by_scale = accuracy.figures()
    if not total.images:
        chosen = ", ".join(map(str, scales))
        raise ShardError(
            f"{reader.folder}: expected images of the scales {chosen} px, found none; "
            "choose another --split or --scale"
        )
    of_scales = {s: found for s, found in zip(SCALES, by_scale, strict=True) if s in scales}
    return PatchFigures(**vars(total), by_scale=of_scales)


@torch.inference_mode()
def score_images(
    module: nn.Module,
    batches: Iterable[Crops],
    *,
    device: torch.device,
    meta: WeightsMeta,
    amp: bool = False,
    check: Callable[[], object] = lambda: None,
    keep: Keep | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> Figures:
    """Decide on whole images, each by its own distribution.

    Args:
        module: the network, in evaluation mode and on the device.
        batches: this process's share of the images.
        device: of the network.
        meta: the network's classes, and the mean and deviation of its input.
        amp: compute in bfloat16; distributions stay float64.
        check: called between batches, may raise.
        keep: gets the images of this process as they are decided.
        advance: told how many images were decided.

    Returns:
        The figures of all processes' images; an image counts as one patch.

    Raises:
        WeightsError: the network does not give one logit for each class.
        NonFiniteError: the network gave NaN or infinity.
    """
    run = Distributions(module, device, meta, amp)
    accuracy = Accuracy(device)
    for batch in batches:
        check()
        probabilities = run(batch.pixels)
        labels = to_device(batch.labels, device)
        losses = probability_losses(probabilities, labels)
        accuracy.update(probabilities, labels, losses, patches=len(batch.rows))
        if keep is not None:
            keep(batch.rows, probabilities.cpu().numpy())
        advance(len(batch.rows))
    return accuracy.figures()[0]
