"""Patches for training: datasets of PyTorch, and batches read ahead of their use.

`PatchDataset` and `BagDataset` are for loops of one's own. Below is what fine-tuning does: which
rows an epoch visits, and reading them.

A batch holds patches of one scale, as their pixels form one array. Order follows from
(seed, epoch) alone, so a run resumes within an epoch by its step number.

Gathering copies memory or decodes JPEG, both without the interpreter's lock, so threads are
enough: no processes, no shared memory, no pickling.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from anchorpatch.errors import SettingsError
from anchorpatch.settings import SCALES
from anchorpatch.shards.reader import ShardReader
from anchorpatch.signals import shut_down, waiting_for

#: What is done to a patch or a label, if anything.
Transform: TypeAlias = Callable[[Any], Any] | None


class _ShardDataset(Dataset[tuple[Any, Any]]):
    """What the datasets below share: a reader, and transforms as torchvision's datasets have."""

    def __init__(
        self, shards: ShardReader | Path | str, transform: Transform, target_transform: Transform
    ) -> None:
        self.reader = shards if isinstance(shards, ShardReader) else ShardReader(shards)
        self.classes = self.reader.classes
        self.transform, self.target_transform = transform, target_transform
        self.labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Return how many items there are."""
        return len(self.labels)

    def _target(self, row: int) -> Any:
        label = int(self.labels[row])
        return label if self.target_transform is None else self.target_transform(label)

    def _patch(self, pixels: NDArray[np.uint8]) -> Any:
        """Return one patch (T, T, 3) as the transform makes it."""
        return self.transform(Image.fromarray(pixels)) if self.transform else pixels


class PatchDataset(_ShardDataset):
    """The patches of one scale, or of all, each with the label of its image.

    An item is a patch, uint8 (T, T, 3), and its label. With a ``transform`` it is as of
    torchvision's datasets: the transform is given an RGB image of Pillow, which transforms of
    torchvision and timm take. Patches of all scales only fit into one batch if the transform brings
    them to one size.

    A `DataLoader` fetches whole batches by one gather, in any number of forked or spawned
    workers.

    Args:
        shards: OUT/SPLIT, or a reader of it.
        scale: 63, 95 or 111; None for all of them, one after another.
        transform: from a `PIL.Image.Image` to what an item has in its place.
        target_transform: from a label to what an item has in its place.

    Attributes:
        reader: of the shards.
        scale: side of the patches in pixels; None for all.
        classes: names that the labels index.
        labels: of the patches, int64 (m,).
        images: row of the image that each patch is of, int64 (m,).
    """

    def __init__(
        self,
        shards: ShardReader | Path | str,
        scale: int | None = None,
        transform: Transform = None,
        target_transform: Transform = None,
    ) -> None:
        if scale is not None and scale not in SCALES:
            raise SettingsError(f"scale: expected one of {SCALES}, got {scale}")
        super().__init__(shards, transform, target_transform)
        self.scale = scale
        self._scales = SCALES if scale is None else (scale,)
        counts = [self.reader.patch_count(s) for s in self._scales]
        self._starts = np.cumsum([0, *counts])
        rows = zip(self._scales, map(np.arange, counts), strict=True)
        self.images = np.concatenate([self.reader.patch_image(s, some) for s, some in rows])
        self.labels = self.reader.label[self.images].astype(np.int64)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        """Return a patch and its label."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Any, Any]]:
        """Return several patches by one gather per scale, as `DataLoader` asks for a batch."""
        index = np.asarray(rows, np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"expected rows from 0 to {len(self) - 1}, got {list(rows)}")
        patches: list[Any] = [None] * len(index)
        of_scale = np.searchsorted(self._starts, index, side="right") - 1
        for k in np.unique(of_scale).tolist():
            places = np.flatnonzero(of_scale == k)
            pixels = self.reader.patches(self._scales[k], index[places] - self._starts[k])
            found = map(self._patch, pixels) if self.transform else torch.from_numpy(pixels)
            for place, patch in zip(places.tolist(), found, strict=True):
                patches[place] = patch
        targets = map(self._target, index.tolist())
        return list(zip(patches, targets, strict=True))


class BagDataset(_ShardDataset):
    """The images of a split, each as the bag of its patches, from the strongest to the weakest.

    An item is a bag and the label of the image. A bag is a tensor uint8 (k, T, T, 3), or with a
    ``transform`` the stacked tensors that it returns for each patch. Bags differ in k and T;
    `collate_bags` makes batches of them.

    Args:
        shards: OUT/SPLIT, or a reader of it.
        max_patches: only so many of the strongest patches of an image.
        transform: from a `PIL.Image.Image` to a tensor.
        target_transform: from a label to what an item has in its place.

    Attributes:
        reader: of the shards.
        classes: names that the labels index.
        labels: of the images, int64 (n,).
    """

    def __init__(
        self,
        shards: ShardReader | Path | str,
        max_patches: int | None = None,
        transform: Transform = None,
        target_transform: Transform = None,
    ) -> None:
        if max_patches is not None and max_patches < 1:
            raise SettingsError(f"max_patches: expected at least 1, got {max_patches}")
        super().__init__(shards, transform, target_transform)
        self.max_patches = max_patches
        self.labels = self.reader.label.astype(np.int64)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        """Return the bag of an image and its label.

        Raises:
            IndexError: a row that is not there.
        """
        pixels = self.reader.image_patches(row).pixels[: self.max_patches]
        if self.transform is None:
            return torch.from_numpy(pixels), self._target(row)
        return torch.stack([self._patch(patch) for patch in pixels]), self._target(row)


class BagBatch(NamedTuple):
    """Bags of n images, put together.

    Attributes:
        groups: patches of one shape each (m, ...), and the bag that each of them is of (m,),
            int64; one group if all patches have the same shape.
        labels: of the images (n,).
        counts: patches of each image (n,), int64.
    """

    groups: list[tuple[Tensor, Tensor]]
    labels: Tensor
    counts: Tensor


def collate_bags(items: Sequence[tuple[Tensor, Any]]) -> BagBatch:
    """Put bags together, as ``collate_fn`` of a `DataLoader` over a `BagDataset`.

    Example:
        >>> bags = [torch.zeros(2, 63, 63, 3), torch.ones(1, 95, 95, 3), torch.ones(3, 63, 63, 3)]
        >>> batch = collate_bags([(bag, label) for label, bag in enumerate(bags)])
        >>> [(tuple(patches.shape), bag.tolist()) for patches, bag in batch.groups]
        [((5, 63, 63, 3), [0, 0, 2, 2, 2]), ((1, 95, 95, 3), [1])]
        >>> batch.labels, batch.counts
        (tensor([0, 1, 2]), tensor([2, 1, 3]))
    """
    bags, targets = zip(*items, strict=True)
    rows: dict[torch.Size, list[int]] = {}
    for row, bag in enumerate(bags):
        rows.setdefault(bag.shape[1:], []).append(row)
    counts = torch.tensor([len(bag) for bag in bags])
    groups = [
        (torch.cat([bags[row] for row in some]), torch.tensor(some).repeat_interleave(counts[some]))
        for some in rows.values()
    ]
    return BagBatch(groups, default_collate(list(targets)), counts)


class Rows(Protocol):
    """Rows of one scale, which `load_rows` reads at once."""

    @property
    def scale(self) -> int:
        """Side of the patches in pixels."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of patches, or of images where whole crops are read (n,)."""


_R = TypeVar("_R", bound=Rows)


class Loaded(NamedTuple):
    """Pixels and labels of a request.

    Attributes:
        pixels: RGB, uint8 (n, scale, scale, 3).
        labels: class index of each one's image, int64 (n,).
    """

    pixels: Tensor
    labels: Tensor


def held_out(paths: NDArray[np.bytes_], share: float) -> NDArray[np.bool_]:
    """Return which images are kept from training (n,): about a share of them, by their paths.

    An image is held out whatever other images there are and however it is extracted. A larger share
    holds out the same images and more.

    Args:
        paths: of the images, relative to the split (n,).
        share: from 0 to 1.
    """
    digests = [hashlib.sha256(path).digest()[:8] for path in paths.tolist()]
    numbers = np.frombuffer(b"".join(digests), ">u8").astype(np.float64)
    return numbers < share * 2.0**64


def visited(
    reader: ShardReader,
    scales: Sequence[int] = SCALES,
    per_image: int | None = None,
    taken: NDArray[np.bool_] | None = None,
) -> dict[int, int]:
    """Return how many patches of each scale an epoch visits, without scales that have none.

    Args:
        reader: of the shards.
        scales: that take part.
        per_image: patches of each image, all where it has fewer; None for every patch.
        taken: images that take part (n,); None for all.
    """
    counts = {scale: reader.patch_count(scale) for scale in scales}
    if per_image is not None or taken is not None:
        of_image = reader.counts if per_image is None else np.minimum(reader.counts, per_image)
        of_image = of_image if taken is None else of_image * taken
        counts = {scale: int(of_image[reader.scale == scale].sum()) for scale in scales}
    return {scale: count for scale, count in counts.items() if count}


def epoch_rows(
    reader: ShardReader,
    rng: np.random.Generator,
    scales: Sequence[int] = SCALES,
    per_image: int | None = None,
    taken: NDArray[np.bool_] | None = None,
) -> dict[int, NDArray[np.int64]]:
    """Draw the patches of an epoch, in random order; see `visited` for the arguments.

    Returns:
        Rows by scale; each row once.
    """
    found = {}
    for scale in visited(reader, scales, per_image, taken):
        rows = np.arange(reader.patch_count(scale))
        if taken is not None:
            rows = rows[taken[reader.patch_image(scale, rows)]]
        if per_image is not None:
            rows = _some_of_each(reader.patch_image(scale, rows), per_image, rng)
        found[scale] = rng.permutation(rows)
    return found


def _some_of_each(
    images: NDArray[np.int64], per_image: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw up to ``per_image`` rows of each image, from the image of each row."""
    order = np.lexsort((rng.random(len(images)), images))
    ordered = images[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    rank = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    kept: NDArray[np.int64] = order[rank < per_image]
    return kept


def batches_of(
    rows: Mapping[int, NDArray[np.int64]], batch_size: int, rng: np.random.Generator
) -> list[tuple[int, NDArray[np.int64]]]:
    """Cut the rows of each scale into the fewest nearly equal batches, and shuffle all of them.

    Example:
        >>> rows = {63: np.arange(5), 95: np.arange(4)}
        >>> batches = batches_of(rows, 4, np.random.default_rng(0))
        >>> sorted((scale, len(batch)) for scale, batch in batches)
        [(63, 2), (63, 3), (95, 4)]
    """
    batches = [
        (scale, batch)
        for scale, found in rows.items()
        for batch in np.array_split(found, -(-len(found) // batch_size))
    ]
    return [batches[i] for i in rng.permutation(len(batches))]


def pieces_of(rows: NDArray[np.int64], pieces: int) -> list[tuple[NDArray[np.int64], int]]:
    """Cut a batch into nearly equal pieces of at least two rows, so that statistics exist.

    Batch normalization cannot normalize a single patch whose map has shrunk to one location,
    and processes that work together must each have something to work on. So where a batch is
    too small, its first piece stands in for those that are missing, and counts for nothing
    there; a single row is taken twice and counts once.

    Args:
        rows: of the batch (n,), n at least 1.
        pieces: how many to return.

    Returns:
        Rows of each piece, and how many of the batch's rows it stands for: these sum to n.

    Example:
        >>> [(piece.tolist(), n) for piece, n in pieces_of(np.arange(5), 3)]
        [([0, 1, 2], 3), ([3, 4], 2), ([0, 1, 2], 0)]
        >>> [(piece.tolist(), n) for piece, n in pieces_of(np.arange(1), 2)]
        [([0, 0], 1), ([0, 0], 0)]
    """
    if len(rows) == 1:
        cut = [(np.repeat(rows, 2), 1)]
    else:
        cut = [(p, len(p)) for p in np.array_split(rows, min(pieces, len(rows) // 2))]
    return cut + [(cut[0][0], 0)] * (pieces - len(cut))


def load_rows(
    reader: ShardReader,
    requests: Iterable[_R],
    *,
    threads: int,
    ahead: int = 2,
    pin_memory: bool = False,
    whole: bool = False,
) -> Generator[tuple[_R, Loaded], None, None]:
    """Read each request, in order, ahead of its use.

    Args:
        reader: of the shards.
        requests: what to read; taken from this thread, ``threads + ahead`` before they are used.
        threads: that read; 0 reads in this thread when a batch is asked for.
        ahead: requests that are read, or wait to be, beside those that the threads work on.
        pin_memory: put the pixels into page-locked memory, for copies to a GPU.
        whole: read the crops of images instead of patches.

    Raises:
        CorruptShard: while iterating: a shard cannot be read.
        ShardError: whole crops are asked for and not stored.
    """
    pin_memory = pin_memory and torch.cuda.is_available()
    waiting = iter(requests)
    if threads == 0:
        for request in waiting:
            yield request, _load(reader, request, pin_memory, whole)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="anchorpatch-read")
    try:
        queue: deque[tuple[_R, Future[Loaded]]] = deque()

        def submit(some: Iterator[_R]) -> None:
            for request in some:
                queue.append((request, pool.submit(_load, reader, request, pin_memory, whole)))

        submit(islice(waiting, threads + ahead))
        while queue:
            request, future = queue.popleft()
            with waiting_for("the threads that read shards"):
                loaded = future.result()
            del future  # or the pixels would live on while they are used
            submit(islice(waiting, 1))
            yield request, loaded
    finally:
        shut_down(pool, "the threads that read shards")


def _load(reader: ShardReader, request: Rows, pin_memory: bool, whole: bool) -> Loaded:
    scale, rows = request.scale, request.rows
    if whole:
        pixels, images = np.stack([reader.image(i) for i in rows.tolist()]), rows
    else:
        pixels, images = reader.patches(scale, rows), reader.patch_image(scale, rows)
    found = torch.from_numpy(pixels)
    labels = torch.from_numpy(reader.label[images].astype(np.int64))
    return Loaded(found.pin_memory() if pin_memory else found, labels)
