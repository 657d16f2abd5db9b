"""Accuracy of an ordinary network on patches, and on whole images (section 4.3).

The decision on an image adds the softmax distributions of its patches and takes the class with
the largest sum; equal sums go to the lower class index. Distributions are computed and added in
float64, patch after patch, so that neither the batch size nor the number of processes changes
the figures.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anchorpatch.classes import ClassNames
from anchorpatch.errors import SettingsError, ShardError, StorageError, WeightsError
from anchorpatch.jobs.crops import Crops
from anchorpatch.jobs.localizer import Localized
from anchorpatch.lsp import crop
from anchorpatch.metrics import Accuracy, Figures, PatchFigures, probability_losses
from anchorpatch.networks import Normalization
from anchorpatch.runtime.checkpoint import WeightsMeta
from anchorpatch.runtime.device import exact_float32, to_device
from anchorpatch.runtime.distributed import World, sum_ranks
from anchorpatch.shards.dataset import load_rows
from anchorpatch.shards.reader import ShardReader
from anchorpatch.storage import refusals, write_atomically

#: Classes that the file of predictions names for each image.
_TOP: Final = 5

#: Takes rows of images (n,), int64, and their mean distributions (n, C), float64.
Keep: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float64]], None]


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
        images: row of each patch's image (m,), int64.
        at: number of each patch among those of its image, from 0 (m,), int64.
        lengths: patches in this batch of each of its images (k,), int64.
        decided: rows of the images whose last patch is here, int64.
        counts: all patches of each of the decided images, int64.
        open: patches of the last of the k images follow.
    """

    scale: int
    rows: NDArray[np.int64]
    images: NDArray[np.int64]
    at: NDArray[np.int64]
    lengths: NDArray[np.int64]
    decided: NDArray[np.int64]
    counts: NDArray[np.int64]
    open: bool


def _parts(
    reader: ShardReader, scale: int, images: NDArray[np.int64], size: int, most: int | None
) -> Iterator[Part]:
    """Yield the patches of images of one scale in full batches; an image may lie in several.

    Args:
        reader: of the shards.
        scale: side of the patches in pixels.
        images: rows of the images (n,).
        size: patches in a batch.
        most: patches of each image at most.
    """
    counts = reader.counts[images].astype(np.int64)
    if most is not None:
        counts = np.minimum(counts, most)
    first, ends = reader.first[images], np.cumsum(counts)
    total = int(counts.sum())
    for a in range(0, total, size):
        b = min(a + size, total)
        patches = np.arange(a, b)
        image = np.searchsorted(ends, patches, side="right")
        lo, hi = int(image[0]), int(image[-1])
        begins = ends[image] - counts[image]
        whole = slice(lo, hi if ends[hi] > b else hi + 1)
        yield Part(
            scale=scale,
            rows=first[image] + patches - begins,
            images=images[image],
            at=patches - begins,
            lengths=np.bincount(image - lo),
            decided=images[whole],
            counts=counts[whole],
            open=whole.stop == hi,
        )


def each_part(
    networks: Mapping[int, Distributions],
    reader: ShardReader,
    images: NDArray[np.int64],
    batch_size: int,
    most: int | None = None,
) -> Iterator[tuple[Part, Tensor]]:
    """Yield batches of patches with their distributions (m, C); see `score_patches`."""
    device = next(iter(networks.values())).device
    for scale, run in networks.items():
        plan = _parts(reader, scale, images[reader.scale[images] == scale], batch_size, most)
        loaded = load_rows(reader, plan, threads=2, pin_memory=device.type == "cuda")
        with closing(loaded):
            for part, (pixels, _) in loaded:
                yield part, run(pixels)


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
    on_device = to_device(lengths, probabilities.device)
    return torch.segment_reduce(probabilities, "sum", lengths=on_device, axis=0, unsafe=True)


@torch.inference_mode()
def score_patches(
    networks: Mapping[int, Distributions],
    reader: ShardReader,
    images: NDArray[np.int64],
    *,
    batch_size: int,
    check: Callable[[], object] = lambda: None,
    keep: Keep | None = None,
    most: int | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> PatchFigures:
    """Decide on every image by the sum of its patches' distributions.

    Args:
        networks: for the classes of the shards, by the scale of the patches that they decide on,
            all on one device; images that chose another scale are passed over.
        reader: of the shards.
        images: rows of this process's images, int64.
        batch_size: patches in a batch, all of one scale.
        check: called between batches, may raise.
        keep: gets the images of this process as they are decided, by scale in order.
        most: take only the strongest patches of each image, so many.
        advance: told how many images were decided.

    Returns:
        The figures of all processes' images.

    Raises:
        ShardError: there is no image of these scales.
        CorruptShard: a shard cannot be read.
        WeightsError: the network does not give one logit for each class.
        NonFiniteError: the network produced NaN or infinity.
    """
    device = next(iter(networks.values())).device
    accuracy = Accuracy(device, len(networks))
    groups = {scale: j for j, scale in enumerate(networks)}
    carry: Tensor | None = None
    for part, probabilities in each_part(networks, reader, images, batch_size, most):
        check()
        added = added_by_image(probabilities, part, carry)
        carry = added[-1] if part.open else None
        rows, decided = part.decided, added[: len(part.decided)]
        labels = to_device(reader.label[rows].astype(np.int64), device)
        losses = probability_losses(decided, labels)
        group = groups[part.scale]
        accuracy.update(decided, labels, losses, group=group, patches=len(part.rows))
        if keep is not None and len(rows):
            keep(rows, decided.cpu().numpy() / part.counts[:, None])
        advance(len(rows))
    total, by_scale = accuracy.figures()
    if not total.images:
        raise ShardError(
            f"{reader.folder}: expected images of the scales {', '.join(map(str, networks))} px, "
            "found none; choose another --split or --scale"
        )
    return PatchFigures(**vars(total), by_scale=dict(zip(networks, by_scale, strict=True)))


@torch.inference_mode()
def score_images(
    run: Distributions,
    batches: Iterable[Crops],
    *,
    check: Callable[[], object] = lambda: None,
    advance: Callable[[int], object] = lambda images: None,
) -> Figures:
    """Decide on whole images, each by its own distribution.

    Args:
        run: the network.
        batches: this process's share of the images.
        check: called between batches, may raise.
        advance: told how many images were decided.

    Returns:
        The figures of all processes' images; an image counts as one patch.

    Raises:
        WeightsError: the network does not give one logit for each class.
        NonFiniteError: the network produced NaN or infinity.
    """
    accuracy = Accuracy(run.device)
    for batch in batches:
        check()
        probabilities = run(batch.pixels)
        labels = to_device(batch.labels, run.device)
        losses = probability_losses(probabilities, labels)
        accuracy.update(probabilities, labels, losses, patches=len(batch.rows))
        advance(len(batch.rows))
    return accuracy.figures()[0]


def sum_localized(
    networks: Mapping[int, Distributions], found: Localized, pixels: Tensor, batch_size: int
) -> Tensor:
    """Return the sum of the distributions of the patches that AnchorNet found in each image.

    Args:
        networks: by the scale of the patches that they decide on.
        found: in the images.
        pixels: of the images, uint8 (n, S, S, 3).
        batch_size: patches in a batch.

    Returns:
        float64 (n, C), on the device of the pixels.
    """
    classes, device = len(next(iter(networks.values())).meta.classes), pixels.device
    sums = torch.zeros(len(pixels), classes, dtype=torch.float64, device=device)
    for scale, run in networks.items():
        _, *of_patches = found.of_scale(scale)
        images, corners = (to_device(of_each, device) for of_each in of_patches)
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            distributions = run(crop(pixels, images[part], corners[part], scale))
            sums.index_add_(0, images[part], distributions.to(device))
    return sums


# --- the decisions as a file ---------------------------------------------------------------


class Predictions:
    """Collects mean distributions, each image from one process, and writes them in path order.

    Args:
        path: of the file: .csv to read, .npz for programs.
        reader: of the shards.
        classes: of the network that decides; the first are those of the shards.
        names: what classes are called.
        device: which the processes exchange tensors on.

    Raises:
        SettingsError: the suffix is neither .csv nor .npz.
        StorageError: the file's folder cannot be made or written to, or the path is a folder.
    """

    def __init__(
        self,
        path: Path,
        reader: ShardReader,
        classes: Sequence[str],
        names: ClassNames,
        device: torch.device,
    ) -> None:
        # Before the work, and not after it.
        if path.suffix.lower() not in (".csv", ".npz"):
            raise SettingsError(
                f"--predictions {path}: expected a file that ends with .csv or .npz, "
                f"found {path.suffix or 'no suffix'}"
            )
        with refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            what = "it is a folder" if path.is_dir() else f"{path.parent} is not writable"
            raise StorageError(f"{path}: cannot write: {what}: choose another --predictions")
        n = len(reader)
        self.path, self._reader, self._device = path, reader, device
        self._classes, self._names = np.array(classes, np.str_), names
        self._csv = path.suffix.lower() == ".csv"
        self._top = np.zeros((n, min(_TOP, len(classes))), np.int32)
        self._best = np.zeros(self._top.shape, np.float64)
        self._all = np.zeros((0 if self._csv else n, len(classes)), np.float32)

    def keep(self, rows: NDArray[np.int64], probabilities: NDArray[np.float64]) -> None:
        """Note images (n,) and their mean distributions (n, C)."""
        # Stable: of equal probabilities the lower class goes first, as in the decision.
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : self._top.shape[1]]
        self._top[rows] = order
        self._best[rows] = np.take_along_axis(probabilities, order, 1)
        if not self._csv:
            self._all[rows] = probabilities

    def write(self, world: World) -> None:
        """Gather what the processes have and write the file; all of them must call this.

        Raises:
            StorageError: the disk refuses.
        """
        # Every image is one process's, and zero elsewhere: the sum is the whole.
        top, best, every = (
            sum_ranks(torch.from_numpy(array).to(self._device)).cpu().numpy()
            for array in (self._top, self._best, self._all)
        )
        if not world.is_main:
            return
        reader = self._reader
        rows = np.flatnonzero(best[:, 0])  # the best class of an image has a share above 0
        names = self._classes
        columns: dict[str, Any] = {
            "path": np.array([path.decode() for path in reader.path[rows].tolist()], np.str_),
            "label": reader.label[rows],
            "scale": reader.scale[rows],
            "patches": reader.counts[rows],
        }
        if self._csv:
            columns["label"] = names[columns["label"]]
            columns |= {f"class{k}": names[top[rows, k - 1]] for k in range(1, top.shape[1] + 1)}
            for k, of_rank in enumerate(best[rows].T, 1):
                columns[f"probability{k}"] = [f"{p:.6g}" for p in of_rank]
            # Where classes have other names, these stand behind.
            for key in ("label", *(f"class{k}" for k in range(1, top.shape[1] + 1))):
                spoken = [self._names.name(of) for of in columns[key].tolist()]
                if any(spoken):
                    columns[f"{key}_name"] = [name or "" for name in spoken]
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
            write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))
            return
        columns |= {
            "top5": top[rows],
            "top5_probability": best[rows].astype(np.float32),
            "probabilities": every[rows],
            "classes": names,
        }
        write_atomically(self.path, lambda file: np.savez(file, **columns))
