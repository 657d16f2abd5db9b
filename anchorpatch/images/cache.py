"""A folder's pictures, decoded once and kept in a file that is mapped into memory.

Pictures are shrunk to a short side of 256 px (never enlarged), which is what the validation
transform leaves of them too. Processes share the pages, so the file is in memory once at most.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from anchorpatch.errors import DataError, ImageError, StorageError, reason_of
from anchorpatch.images.folder import ImageFolder
from anchorpatch.images.loader import read_image
from anchorpatch.images.picture import decode_picture
from anchorpatch.storage import write_atomically
from anchorpatch.waits import shut_down, waiting_for

__all__ = ["SHORT_SIDE", "PictureCache", "build_cache"]

#: Longer short sides are shrunk to this, in pixels.
SHORT_SIDE: Final = 256

_CHUNK: Final = 64


@dataclass(frozen=True, eq=False)
class PictureCache:
    """Pictures of a folder, by row.

    Attributes:
        file: the pixels, row after row.
        offsets: where each picture begins in the file, int64 (n + 1,); a picture that could
            not be decoded takes no bytes.
        shapes: height and width, int32 (n, 2).
        bad: reason by row of what could not be decoded.
    """

    file: Path
    offsets: npt.NDArray[np.int64]
    shapes: npt.NDArray[np.int32]
    bad: dict[int, str]

    def __getitem__(self, row: int) -> Image.Image:
        """Return a picture.

        Raises:
            ImageError: it could not be decoded when the cache was made.
        """
        if row in self.bad:
            raise ImageError(self.bad[row])
        shape = (*self.shapes[row].tolist(), 3)
        # Mapped for each picture anew: nothing is held that a worker would have to inherit.
        pixels = np.memmap(self.file, np.uint8, "r", int(self.offsets[row]), shape)
        return Image.fromarray(pixels)


def build_cache(folder: ImageFolder, where: Path, threads: int) -> PictureCache:
    """Open the cache of a folder, and make it first where it is missing.

    Its name carries the digest of the folder's paths and sizes: other files, another cache.

    Raises:
        StorageError: the disk refused.
        DataError: the cache's index is damaged.
    """
    stem = f"{folder.split}-{SHORT_SIDE}-{folder.digest()[:16]}"
    pixels, index = where / f"{stem}.pixels", where / f"{stem}.json"
    if not index.is_file():
        try:
            where.mkdir(parents=True, exist_ok=True)
            _write(folder, pixels, index, threads)
        except OSError as error:
            raise StorageError(
                f"{where}: the image cache could not be written: {reason_of(error)}; "
                "free space, choose another folder, or run without --image-cache"
            ) from error
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        shapes = np.array(content["shapes"], np.int32).reshape(-1, 2)
        bad = {int(row): reason for row, reason in content["bad"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{index}: expected the index of an image cache; remove it") from error
    offsets = np.concatenate(([0], np.cumsum(shapes.astype(np.int64).prod(1) * 3)))
    if len(shapes) != len(folder) or not pixels.is_file() or pixels.stat().st_size != offsets[-1]:
        raise DataError(f"{pixels}: expected {offsets[-1]} bytes; remove the cache and run again")
    return PictureCache(pixels, offsets, shapes, bad)


def _write(folder: ImageFolder, pixels: Path, index: Path, threads: int) -> None:
    shapes: list[tuple[int, int]] = []
    bad: dict[int, str] = {}
    temporary = pixels.with_name(f".{pixels.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for row, item in enumerate(_pictures(folder, threads)):
                if isinstance(item, str):
                    bad[row] = item
                    shapes.append((0, 0))
                else:
                    file.write(item.tobytes())
                    shapes.append((item.height, item.width))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, pixels)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    # The index last: where it is, the pixels are whole.
    document: dict[str, Any] = {"shapes": shapes, "bad": bad}
    write_atomically(index, lambda file: file.write(json.dumps(document).encode()))


def _pictures(folder: ImageFolder, threads: int) -> Iterator[Image.Image | str]:
    """Decode in order; a bad image gives its reason. Pillow works without Python's lock."""

    def one(row: int) -> Image.Image | str:
        try:
            picture = decode_picture(read_image(os.path.join(folder.root, folder.path(row))))
        except ImageError as error:
            return error.reason
        short = min(picture.size)
        if short > SHORT_SIDE:
            w, h = (round(side * SHORT_SIDE / short) for side in picture.size)
            picture = picture.resize((w, h), Image.Resampling.BILINEAR)
        return picture.convert("RGB")

    what, pool = "the threads that decode images", ThreadPoolExecutor(max(1, threads))
    try:
        for start in range(0, len(folder), _CHUNK):  # in chunks: memory must not grow with n
            rows = range(start, min(start + _CHUNK, len(folder)))
            with waiting_for(what):
                pictures = list(pool.map(one, rows))
            yield from pictures
    finally:
        shut_down(pool, what)
