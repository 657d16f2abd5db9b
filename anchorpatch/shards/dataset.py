"""Patches for training: a dataset of PyTorch, and batches read ahead of their use.

`PatchDataset` is for loops of one's own. Below is what fine-tuning does: which rows an epoch
visits, and reading them.

A batch holds patches of one scale, as their pixels form one array. Order follows from
(seed, epoch) alone, so a run resumes within an epoch by its step number.

Gathering copies memory or decodes JPEG, both without the interpreter's lock, so threads are
enough: no processes, no shared memory, no pickling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from anchorpatch.errors import SettingsError
from anchorpatch.settings import SCALES
from anchorpatch.shards.reader import ShardReader
from anchorpatch.signals import shut_down, waiting_for


class PatchDataset(Dataset[tuple[Tensor, int]]):
    """All patches of one scale, each with the label of its image.

    A `DataLoader` fetches whole batches by one gather, in any number of forked or spawned
    workers.

    Args:
        shards: OUT/SPLIT, or a reader of it.
        scale: 63, 95 or 111.

    Attributes:
        reader: of the shards.
        scale: side of the patches in pixels.
        labels: of the patches, int64 (m,).
        images: row of the image that each patch is of, int64 (m,).
    """

    def __init__(self, shards: ShardReader | Path | str, scale: int) -> None:
        if scale not in SCALES:
            raise SettingsError(f"scale: expected one of {SCALES}, got {scale}")
        self.reader = shards if isinstance(shards, ShardReader) else ShardReader(shards)
        self.scale = scale
        self.images = self.reader.patch_image(scale, np.arange(self.reader.patch_count(scale)))
        self.labels = self.reader.label[self.images].astype(np.int64)

    def __len__(self) -> int:
        """Return how many patches there are."""
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Return a patch, uint8 (T, T, 3), and its label."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return several patches by one gather, as `DataLoader` asks for a batch."""
        pixels = torch.from_numpy(self.reader.patches(self.scale, rows))
        return list(zip(pixels.unbind(0), self.labels[list(rows)].tolist(), strict=True))


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


def visited(
    reader: ShardReader, scales: Sequence[int] = SCALES, per_image: int | None = None
) -> dict[int, int]:
    """Return how many patches of each scale an epoch visits, without scales that have none.

    Args:
        reader: of the shards.
        scales: that take part.
        per_image: patches of each image, all where it has fewer; None for every patch.
    """
    counts = {scale: reader.patch_count(scale) for scale in scales}
    if per_image is not None:
        taken = np.minimum(reader.counts, per_image)
        counts = {scale: int(taken[reader.scale == scale].sum()) for scale in scales}
    return {scale: count for scale, count in counts.items() if count}


def epoch_rows(
    reader: ShardReader,
    rng: np.random.Generator,
    scales: Sequence[int] = SCALES,
    per_image: int | None = None,
) -> dict[int, NDArray[np.int64]]:
    """Draw the patches of an epoch, in random order; see `visited` for the arguments.

    Returns:
        Rows by scale; each row once.
    """
    found = {}
    for scale in visited(reader, scales, per_image):
        rows = np.arange(reader.patch_count(scale))
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
