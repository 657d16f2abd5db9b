"""Training batches: random resized crop and flip, the same on every machine and after a stop.

Order and augmentation follow from (seed, epoch, row) alone, not from workers, ranks, batches
or what was drawn before. So a run resumes within an epoch by its step number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from anchorpatch.images.cache import PictureCache
from anchorpatch.images.decode import Decoded, Picture, decode_picture
from anchorpatch.images.folder import ImageFolder
from anchorpatch.images.loader import fill_batch, read_image
from anchorpatch.images.workers import Batch, serve_batches

__all__ = ["RandomCrop", "epoch_order", "load_training_batches", "random_box", "random_crop"]

_PREFETCH = 2


@dataclass(frozen=True)
class RandomCrop:
    """Random resized crop and horizontal flip, as ImageNet is usually trained on today.

    The paper follows He et al. [2016], who crop a fixed size out of an image that was resized to
    a random short side of 256 to 480 px.

    Attributes:
        size: side of the result in pixels.
        min_area: smallest share of the picture's area; the largest is all of it.
        aspect: smallest and largest width over height.
        flip: random horizontal flip (p = 0.5).
        seed: of the run.
        background: colour behind transparent pixels.
    """

    size: int = 224
    min_area: float = 0.08
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    seed: int = 0
    background: str = "#ffffff"


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
    return serve_batches(
        _Crops(str(folder.root), crop, cache),
        _Requests(folder, plan),
        batch_bytes=256 * crop.size**2 * 3,
        workers=workers,
        prefetch=_PREFETCH,
        pin_memory=pin_memory,
    )


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
class _Crops:
    """What a worker holds."""

    root: str
    crop: RandomCrop
    cache: PictureCache | None

    def __getitem__(self, request: _Request) -> tuple[Any, ...]:
        """Return the batch of a request."""
        decode = partial(self._crop, request.epoch)
        return fill_batch(request.rows, request.paths, self.crop.size, decode)

    def _crop(self, epoch: int, row: int, path: str) -> Decoded:
        image, damaged = self._picture(row, path)
        size = image.height, image.width
        return Decoded(random_crop(image, self.crop, epoch, row), size, damaged)

    def _picture(self, row: int, path: str) -> Picture:
        if self.cache is not None:
            return self.cache[row]
        return decode_picture(read_image(os.path.join(self.root, path)), self.crop.background)
