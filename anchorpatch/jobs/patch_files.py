"""The patches of shards as picture files: their bytes, and names that no two of them share."""

from __future__ import annotations

import io
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anchorpatch.errors import SettingsError
from anchorpatch.jobs.patch_table import PatchRows, by_scale, rows_of
from anchorpatch.shards.reader import ShardReader
from anchorpatch.shards.writer import encode_jpeg
from anchorpatch.signals import shut_down, waiting_for

#: Images whose patches are encoded at a time.
_BLOCK: Final = 16

#: Blocks that wait to be used beside the one that is made. One thread makes them, besides the one
#: that uses them: two take turns with the interpreter's lock, and are no faster.
_AHEAD: Final = 4

#: Of zlib: 0.6 times as long as Pillow's default of 6, for files that are 4 % larger.
_PNG_LEVEL: Final = 1

_JPEG_QUALITY: Final = 95

_T = TypeVar("_T")


class Block(NamedTuple):
    """Some images, their patches, and the picture file of each patch."""

    images: NDArray[np.int64]
    rows: PatchRows
    files: list[bytes]


class Pictures:
    """Turns the patches of images into picture files, in a thread ahead of their use.

    Args:
        reader: of the shards.
        picture: "png" or "jpg"; patches that the shards store as JPEG are copied as "jpg".
        quality: of JPEG files that are made, 1 to 100; None for 95.

    Raises:
        SettingsError: a quality is given for patches that are copied.
    """

    def __init__(self, reader: ShardReader, picture: str, quality: int | None) -> None:
        self._reader, self._picture, self._quality = reader, picture, quality
        self._copied = picture == "jpg" and reader.settings.codec == "jpeg"
        if self._copied and quality is not None:
            raise SettingsError(
                f"--quality: the patches of {reader.folder} are stored as JPEG of quality "
                f"{reader.settings.jpeg_quality} and copied as they are: leave it out"
            )

    def of(self, images: NDArray[np.int64], use: Callable[[Block], _T]) -> Iterator[_T]:
        """Yield what ``use`` makes of some of the images after another; the thread calls it."""

        def work(some: NDArray[np.int64]) -> _T:
            rows = rows_of(self._reader, some)
            return use(Block(some, rows, self._files(rows)))

        pool = ThreadPoolExecutor(1, thread_name_prefix="anchorpatch-export")
        try:
            queue: deque[Future[_T]] = deque()
            for start in range(0, len(images), _BLOCK):
                queue.append(pool.submit(work, images[start : start + _BLOCK]))
                if len(queue) > _AHEAD:
                    yield _result(queue)
            while queue:
                yield _result(queue)
        finally:
            shut_down(pool, "the thread that encodes patches")

    def _files(self, rows: PatchRows) -> list[bytes]:
        files = [b""] * len(rows.row)
        for scale, places, of_scale in by_scale(rows):
            found: Iterable[bytes] = (
                self._reader.jpegs(scale, of_scale)
                if self._copied
                else map(self._encoded, self._reader.patches(scale, of_scale))
            )
            for place, data in zip(places.tolist(), found, strict=True):
                files[place] = data
        return files

    def _encoded(self, pixels: NDArray[np.uint8]) -> bytes:
        if self._picture == "jpg":
            return encode_jpeg(pixels, self._quality or _JPEG_QUALITY)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=_PNG_LEVEL)
        return buffer.getvalue()


def _result(queue: deque[Future[_T]]) -> _T:
    with waiting_for("the thread that encodes patches"):
        return queue.popleft().result()


def class_folders(classes: Sequence[str]) -> list[str]:
    """Return a folder's name for each class: the class, unless a labels file has odd ones.

    Example:
        >>> class_folders(["cat", "50% dog"]), class_folders(["and/or", ".."])
        (['cat', '50% dog'], ['and%2For', '%2E%2E'])
    """
    if not any("/" in name or name in (".", "..") for name in classes):
        return list(classes)
    plain = [name.replace("%", "%25").replace("/", "%2F") for name in classes]
    return [_not_dots(name) for name in plain]


def _not_dots(name: str) -> str:
    """Return a name of a file: the system has others for ``.`` and ``..``."""
    return name.replace(".", "%2E") if name in (".", "..") else name


def picture_names(reader: ShardReader) -> NDArray[np.bytes_]:
    """Return what the files of each image's patches begin with, below the folder of its class.

    It is the path without the class's folder and without the extension. Images of one class that
    would share it keep the extension. Where the paths do not begin with classes, as with a labels
    file, they stay whole, without the folders that all of them share if they are absolute.

    Returns:
        UTF-8, bytes (n,).
    """
    paths = [bytes(path) for path in reader.path.tolist()]
    classes = [name.encode() + b"/" for name in reader.classes]
    labels = reader.label.tolist()
    if paths and all(path.startswith(b"/") for path in paths):
        first, last = min(paths), max(paths)
        shared = first[: first.rindex(b"/") + 1]
        while not last.startswith(shared):
            shared = shared[: shared.rindex(b"/", 0, -1) + 1]
        paths = [path.removeprefix(shared) for path in paths]
    if all(path.startswith(classes[of]) for path, of in zip(paths, labels, strict=True)):
        paths = [path[len(classes[of]) :] for path, of in zip(paths, labels, strict=True)]
    whole = [
        "/".join(_not_dots(part) or "%" for part in os.fsdecode(path).split("/")).encode()
        for path in paths
    ]
    names = [os.path.splitext(path)[0] for path in whole]
    while True:
        keys = list(zip(labels, names, strict=True))
        counts = Counter(keys)
        shared_names = [i for i, key in enumerate(keys) if counts[key] > 1 and names[i] != whole[i]]
        if not shared_names:
            return np.array(names, np.bytes_)
        for i in shared_names:
            names[i] = whole[i]
