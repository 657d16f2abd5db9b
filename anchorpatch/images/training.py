"""Training batches: random resized crop and flip, the same on every machine and after a stop.

Order and augmentation follow from (seed, epoch, row) alone, not from workers, ranks, batches
or what was drawn before. So a run resumes within an epoch by its step number.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from anchorpatch.errors import ImageError
from anchorpatch.images.cache import PictureCache
from anchorpatch.images.folder import ImageFolder
from anchorpatch.images.loader import (
    Batch,
    _as_batch,
    _fits_shared_memory,
    _from_workers,
    _one_thread,
    _start_worker,
    _started,
    _unchanged,
    read_image,
)
from anchorpatch.images.picture import decode_picture

__all__ = ["RandomCrop", "epoch_order", "load_training_batches", "random_box", "random_crop"]

_PREFETCH = 2


@dataclass(frozen=True)
class RandomCrop:
    """The augmentation of He et al. [2016]: a random part of the picture, perhaps mirrored.

    Attributes:
        size: side of the result in pixels.
        min_area: smallest share of the picture's area; the largest is all of it.
        aspect: smallest and largest width over height.
        flip: mirror every second picture.
        seed: of the run.
    """

    size: int = 224
    min_area: float = 0.08
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    seed: int = 0


def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order in which an epoch visits n rows."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def random_box(
    rng: np.random.Generator, width: int, height: int, crop: RandomCrop
) -> tuple[int, int, int, int]:
    """Draw a box (left, top, right, bottom) in pixels, as torchvision's RandomResizedCrop.

    Up to ten tries find a box of random area and aspect inside the picture; then the largest
    centred box of an allowed aspect is taken.
    """
    low, high = (math.log(ratio) for ratio in crop.aspect)
    for _ in range(10):
        area = width * height * rng.uniform(crop.min_area, 1.0)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, crop.aspect[0]), crop.aspect[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + max(w, 1), top + max(h, 1)


def random_crop(
    picture: Image.Image, crop: RandomCrop, epoch: int, row: int
) -> npt.NDArray[np.uint8]:
    """Crop, resize (antialiased bilinear) and perhaps mirror one picture.

    Returns:
        RGB, uint8 (size, size, 3).
    """
    rng = np.random.default_rng((crop.seed, epoch, row))
    box = random_box(rng, *picture.size, crop)
    result = picture.resize((crop.size, crop.size), Image.Resampling.BILINEAR, box=box)
    if crop.flip and rng.random() < 0.5:
        result = result.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(result.convert("RGB"))


def load_training_batches(
    folder: ImageFolder,
    plan: Iterable[tuple[int, npt.NDArray[np.int64]]],
    crop: RandomCrop,
    *,
    workers: int,
    cache: PictureCache | None = None,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Load batches of augmented pictures.

    The workers live as long as the plan, which may go over many epochs.

    Args:
        folder: the images.
        plan: epoch and rows of each batch, in order.
        crop: the augmentation.
        workers: processes that load; 0 loads in this thread when a batch is asked for.
        cache: decoded pictures of the folder; None decodes the files.
        pin_memory: put pixels into page-locked memory, for copies to a GPU.

    Returns:
        Batches whose pixels are uint8 (n, size, size, 3).
    """
    pin_memory = pin_memory and torch.cuda.is_available()
    requests = _Requests(folder, plan)
    if workers == 0:
        return _in_this_process(_Crops(str(folder.root), crop, cache, True), requests, pin_memory)
    shared = _fits_shared_memory(256 * crop.size**2 * 3 * (workers * _PREFETCH + 2))
    loader = DataLoader(
        _Crops(str(folder.root), crop, cache, shared),
        batch_size=None,
        sampler=requests,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=_PREFETCH,
        pin_memory=pin_memory,
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    return _from_workers(_started(loader), pin_memory)


class _Request(NamedTuple):
    """The work of one batch: epoch, rows (n,) and relative paths (n,)."""

    epoch: int
    rows: npt.NDArray[np.int64]
    paths: npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class _Requests:
    folder: ImageFolder
    plan: Iterable[tuple[int, npt.NDArray[np.int64]]]

    def __iter__(self) -> Iterator[_Request]:
        for epoch, rows in self.plan:
            yield _Request(epoch, rows, self.folder.paths[rows])


@dataclass(frozen=True)
class _Crops(Dataset[Any]):
    """What a worker holds."""

    root: str
    crop: RandomCrop
    cache: PictureCache | None
    shared: bool

    def __getitem__(self, request: _Request) -> tuple[Any, ...]:
        """Return a `Batch` as a plain tuple; without shared memory its pixels are an array."""
        n, side = len(request.rows), self.crop.size
        pixels = np.empty((n, side, side, 3), np.uint8)
        size = np.empty((n, 2), np.int32)
        good: list[int] = []
        bad: list[tuple[int, str]] = []
        for row, path in zip(request.rows.tolist(), request.paths.tolist(), strict=True):
            try:
                picture = self._picture(row, path)
                pixels[len(good)] = random_crop(picture, self.crop, request.epoch, row)
            except ImageError as error:
                bad.append((row, error.reason))
                continue
            size[len(good)] = picture.height, picture.width
            good.append(row)
        m = len(good)
        kept = torch.from_numpy(pixels[:m]) if self.shared else pixels[:m]
        return np.array(good, np.int64), kept, size[:m].copy(), bad

    def _picture(self, row: int, path: bytes) -> Image.Image:
        if self.cache is not None:
            return self.cache[row]
        return decode_picture(read_image(os.path.join(self.root, path.decode())))


def _in_this_process(
    crops: _Crops, requests: _Requests, pin_memory: bool
) -> Generator[Batch, None, None]:
    for request in requests:
        with _one_thread():
            item = crops[request]
        yield _as_batch(item, pin_memory)
