"""Training batches: random resized crop and flip, the same on every machine and after a stop.

Order and augmentation follow from (seed, epoch, row) alone, not from workers, ranks, batches
or what was drawn before. So a run resumes within an epoch by its step number.

A source's pictures may be decoded once and kept in a file that is mapped into memory, the cache:
shrunk to a short side of 256 px or more (never enlarged), which is what the validation transform
leaves of them too. Processes share the pages, so the file is in memory once at most.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from anchorpatch.errors import DataError, ImageError
from anchorpatch.images.decode import Decoded, Picture, decode_picture
from anchorpatch.images.loader import Batch, serve_batches
from anchorpatch.images.source import ImageSource
from anchorpatch.settings import CROP, CropSettings
from anchorpatch.signals import shut_down, waiting_for
from anchorpatch.storage import locked, refusals, write_atomically

#: Longer short sides of cached pictures are shrunk to this, in pixels; see `cache_side`.
SHORT_SIDE: Final = 256

#: Pictures that are decoded at a time for the cache.
_CHUNK: Final = 64


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
        background: color behind transparent pixels.
    """

    size: int = CROP
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
    centered box of an allowed aspect is taken. (``RandomResizedCrop.get_params`` draws from the
    global generator of torch; here the box follows from ``rng`` alone.)
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
    images: ImageSource,
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
        images: the source.
        plan: epoch and rows of each batch, in order.
        crop: the augmentation.
        workers: processes that load; 0 loads in this thread when a batch is asked for.
        cache: decoded pictures of the source; None decodes the files.
        pin_memory: put pixels into page-locked memory, for copies to a GPU.

    Returns:
        Batches whose pixels are uint8 (n, size, size, 3).
    """
    decoder = partial(_training_crop, crop, cache)
    return serve_batches(images, plan, decoder, crop.size, workers=workers, pin_memory=pin_memory)


def _training_crop(
    crop: RandomCrop,
    cache: PictureCache | None,
    read: Callable[[], bytes],
    row: int,
    epoch: int,
) -> Decoded:
    if cache is not None:
        image, damaged = cache[row]
    else:
        image, damaged = decode_picture(read(), crop.background)
    return Decoded(random_crop(image, crop, epoch, row), (image.height, image.width), damaged)


# --- the cache ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PictureCache:
    """Pictures of a source, by row.

    Attributes:
        file: the pixels of all pictures.
        offsets: where each picture begins in the file, int64 (n,).
        shapes: height and width, int32 (n, 2); a picture that could not be decoded has no pixels.
        bad: reason by row of what could not be decoded.
        damaged: rows that were decoded with damage.
        end: bytes of the file that hold pictures.
    """

    file: Path
    offsets: npt.NDArray[np.int64]
    shapes: npt.NDArray[np.int32]
    bad: dict[int, str]
    damaged: frozenset[int]
    end: int

    def __getitem__(self, row: int) -> Picture:
        """Return a picture.

        Raises:
            ImageError: it could not be decoded when the cache was opened.
        """
        if row in self.bad:
            raise ImageError(self.bad[row])
        shape = (*self.shapes[row].tolist(), 3)
        # Mapped for each picture anew: nothing is held that a worker would have to inherit.
        pixels = np.memmap(self.file, np.uint8, "r", int(self.offsets[row]), shape)
        return Picture(Image.fromarray(pixels), row in self.damaged)


def cache_side(crop: CropSettings) -> int:
    """Return the short side of cached pictures for training with crops of a size, in pixels.

    Example:
        >>> cache_side(CropSettings("squash")), cache_side(CropSettings(img_size=256))
        (256, 292)
    """
    return max(SHORT_SIDE, CropSettings(img_size=crop.img_size).resize)


def build_cache(
    images: ImageSource,
    where: Path,
    threads: int,
    background: str = "#ffffff",
    side: int = SHORT_SIDE,
) -> PictureCache:
    """Open the cache of a source; make it first where it is missing.

    Its name carries the digest of the source's paths and sizes: other files, another cache.
    Pictures that could not be decoded, or with damage only, are tried again each time, as their
    files may have been restored at the same size; what can be decoded now gets in.

    Args:
        images: the source.
        where: the folder of caches.
        threads: that decode.
        background: color behind transparent pixels.
        side: to which longer short sides are shrunk, in pixels.

    Raises:
        StorageError: the disk refused.
        DataError: the cache's index is damaged, or the images cannot be read.
    """
    pixels, index = _files(images, where, background, side)
    if index.is_file():
        cache = open_cache(images, where, background, side)
        if not (cache.bad or cache.damaged) or not os.access(where, os.W_OK):
            return cache
    with refusals(where):
        where.mkdir(parents=True, exist_ok=True)
        with locked(where / ".lock"):
            if not index.is_file():
                _make(images, pixels, index, threads, background, side)
            else:
                cache = open_cache(images, where, background, side)
                _add(cache, images, index, threads, background, side)
            return open_cache(images, where, background, side)


def open_cache(
    images: ImageSource, where: Path, background: str = "#ffffff", side: int = SHORT_SIDE
) -> PictureCache:
    """Open the cache of a source as `build_cache` has left it.

    Raises:
        DataError: the cache's index is damaged.
    """
    pixels, index = _files(images, where, background, side)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        shapes = np.array(content["shapes"], np.int32).reshape(-1, 2)
        bad = {int(row): reason for row, reason in content["bad"].items()}
        damaged = frozenset(content["damaged"])
        added = np.array(content["added"], np.int64).reshape(-1, 3)
        rows, shapes = np.arange(len(shapes)), np.concatenate((shapes, added[:, 1:]))
        sizes = shapes.astype(np.int64).prod(1) * 3
        # Of several pictures of a row, the last one counts.
        rows[added[:, 0]] = np.arange(len(rows), len(shapes))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{index}: expected the index of an image cache; remove it") from error
    end = int(sizes.sum())
    if len(rows) != len(images) or not pixels.is_file() or pixels.stat().st_size < end:
        raise DataError(f"{pixels}: expected {end} bytes; remove the cache and run again")
    offsets = np.cumsum(sizes) - sizes
    return PictureCache(pixels, offsets[rows], shapes[rows].astype(np.int32), bad, damaged, end)


def _files(images: ImageSource, where: Path, background: str, side: int) -> tuple[Path, Path]:
    """Return the names of pixels and index."""
    stem = f"{images.split}-{side}-{background[1:]}-{images.digest()[:16]}"
    return where / f"{stem}.pixels", where / f"{stem}.json"


def _make(
    images: ImageSource, pixels: Path, index: Path, threads: int, background: str, side: int
) -> None:
    shapes: list[tuple[int, int]] = []
    bad: dict[int, str] = {}
    damaged: list[int] = []

    def write(file: BinaryIO) -> None:
        for row, item in _pictures(images, range(len(images)), threads, background, side):
            if isinstance(item, str):
                bad[row] = item
                shapes.append((0, 0))
                continue
            file.write(item.image.tobytes())
            shapes.append((item.image.height, item.image.width))
            damaged.extend([row] * item.damaged)

    write_atomically(pixels, write)
    # The index last: where it is, the pixels are whole.
    _write_index(index, {"shapes": shapes, "bad": bad, "damaged": damaged, "added": []})


def _add(
    cache: PictureCache,
    images: ImageSource,
    index: Path,
    threads: int,
    background: str,
    side: int,
) -> None:
    """Add what can be decoded by now to a cache, or without damage.

    At its end, since other runs may have the cache open: nothing moves that they know of.
    """
    content = json.loads(index.read_text(encoding="utf-8"))
    rows, damaged, known = {*cache.bad, *cache.damaged}, set(cache.damaged), len(content["added"])
    with open(cache.file, "r+b") as file:
        file.seek(cache.end)  # what a run that was killed here has left behind is overwritten
        for row, item in _pictures(images, sorted(rows), threads, background, side):
            if isinstance(item, str) or (item.damaged and row in cache.damaged):
                continue
            file.write(item.image.tobytes())
            content["added"].append([row, item.image.height, item.image.width])
            content["bad"].pop(str(row), None)
            if item.damaged:
                damaged.add(row)
            else:
                damaged.discard(row)
        file.flush()
        os.fsync(file.fileno())
    if len(content["added"]) > known:
        _write_index(index, {**content, "damaged": sorted(damaged)})


def _write_index(index: Path, content: dict[str, Any]) -> None:
    write_atomically(index, lambda file: file.write(json.dumps(content).encode()))


def _pictures(
    images: ImageSource, rows: Sequence[int], threads: int, background: str, side: int
) -> Iterator[tuple[int, Picture | str]]:
    """Decode rows in order; a bad image gives its reason. Decoders work without Python's lock."""

    def one(row: int) -> tuple[int, Picture | str]:
        try:
            image, damaged = decode_picture(images.read(row), background)
        except ImageError as error:
            return row, error.reason
        short = min(image.size)
        if short > side:
            w, h = (round(length * side / short) for length in image.size)
            image = image.resize((w, h), Image.Resampling.BILINEAR)
        return row, Picture(image.convert("RGB"), damaged)

    what, pool = "the threads that decode images", ThreadPoolExecutor(max(1, threads))
    try:
        for start in range(0, len(rows), _CHUNK):  # in chunks: memory must not grow with n
            with waiting_for(what):
                pictures = list(pool.map(one, rows[start : start + _CHUNK]))
            yield from pictures
    finally:
        shut_down(pool, what)
