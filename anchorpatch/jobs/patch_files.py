"""The patches of shards as pictures and as tables: what `anchorpatch.jobs.export` writes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anchorpatch.classes import ClassNames
from anchorpatch.errors import MissingDependency, SettingsError
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

#: Columns of a table, and their types where it has types.
COLUMNS: Final = {
    "split": "string",
    "path": "string",
    "label": "int32",
    "class": "string",
    "name": "string",
    "predicted": "string",
    "predicted_name": "string",
    "scale": "int32",
    "rank": "int32",
    "y": "int32",
    "x": "int32",
    "score": "float32",
    **dict.fromkeys(("x0", "y0", "x1", "y1"), "float64"),
}


class PatchRows(NamedTuple):
    """The patches of some images, image by image from the strongest to the weakest.

    Attributes:
        image: row in the reader of each patch's image (m,).
        scale: in pixels (m,).
        row: among the patches of its scale (m,).
        rank: 0 is the strongest (m,).
    """

    image: NDArray[np.int64]
    scale: NDArray[np.int64]
    row: NDArray[np.int64]
    rank: NDArray[np.int64]


def rows_of(reader: ShardReader, images: NDArray[np.int64]) -> PatchRows:
    """Return the patches of images, by their rows in the reader (n,)."""
    counts = reader.counts[images].astype(np.int64)
    ranks = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    image = np.repeat(images, counts)
    return PatchRows(
        image, reader.scale[image].astype(np.int64), reader.first[image] + ranks, ranks
    )


def by_scale(rows: PatchRows) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.int64]]]:
    """Yield each scale, which of the patches have it, and their rows among those of the scale."""
    for scale in np.unique(rows.scale).tolist():
        places = np.flatnonzero(rows.scale == scale)
        yield scale, places, rows.row[places]


# --- pictures ----------------------------------------------------------------------------------


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


# --- tables ------------------------------------------------------------------------------------


class PatchTable:
    """Says in columns what shards know of patches.

    Args:
        reader: of the shards.
        names: what classes are called.
    """

    def __init__(self, reader: ShardReader, names: ClassNames) -> None:
        self.reader = reader
        of = names.of(reader.classes, reader.network_classes)
        self._classes = [(name, of.name(name)) for name in reader.classes]
        self._predicted = [(name, of.name(name)) for name in reader.network_classes]

    @property
    def digest(self) -> str:
        """SHA-256 of the names of the classes."""
        return hashlib.sha256(json.dumps([self._classes, self._predicted]).encode()).hexdigest()

    def columns(self, rows: PatchRows) -> dict[str, list[Any]]:
        """Return the columns by their names in `COLUMNS`, as plain values."""
        reader, m = self.reader, len(rows.row)
        corner, score = np.zeros((m, 2), np.int64), np.zeros(m, np.float32)
        box = np.zeros((m, 4))
        for scale, places, of_scale in by_scale(rows):
            corner[places] = reader.corners(scale, of_scale)
            score[places] = reader.scores(scale, of_scale)
            box[places] = reader.source_box(scale, of_scale)
        label = reader.label[rows.image].tolist()
        classes = [self._classes[i] for i in label]
        predicted = [self._predicted[i] for i in reader.predicted[rows.image].tolist()]
        return {
            "split": [reader.header.split] * m,
            "path": [bytes(p).decode(errors="replace") for p in reader.path[rows.image].tolist()],
            "label": label,
            "class": [of for of, _ in classes],
            "name": [name for _, name in classes],
            "predicted": [of for of, _ in predicted],
            "predicted_name": [name for _, name in predicted],
            "scale": rows.scale.tolist(),
            "rank": rows.rank.tolist(),
            "y": corner[:, 0].tolist(),
            "x": corner[:, 1].tolist(),
            # The shortest decimals that are this float32.
            "score": [float(text) for text in score.astype(str).tolist()],
            **{name: box[:, i].tolist() for i, name in enumerate(("x0", "y0", "x1", "y1"))},
        }


def facts_of(columns: Mapping[str, Sequence[Any]], i: int) -> dict[str, Any]:
    """Return what is said of one patch, for JSON."""
    row = {name: values[i] for name, values in columns.items()}
    corner = [row.pop("y"), row.pop("x")]
    box = [row.pop(name) for name in ("x0", "y0", "x1", "y1")]
    return {**row, "corner": corner, "box": box}


def is_csv(path: Path) -> bool:
    """Tell whether a file begins as `write_csv` begins it."""
    with path.open("rb") as file:
        return file.read(1 << 10).startswith(",".join(COLUMNS).encode() + b"\n")


def write_csv(file: BinaryIO, parts: Iterator[dict[str, list[Any]]]) -> None:
    """Write a table part by part."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for columns in parts:
        writer.writerows(zip(*columns.values(), strict=True))
    text.detach()  # writes what it holds, and leaves the file open


def parquet_format() -> tuple[
    Callable[[BinaryIO, Iterator[dict[str, list[Any]]]], None], Callable[[Path], bool]
]:
    """Return what writes a Parquet file, and what tells whether a file is one of ours.

    Raises:
        MissingDependency: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependency(
            "--to parquet needs the package pyarrow, which is not installed: run pip install "
            "'anchorpatch[export]', or use --to csv"
        ) from error
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in COLUMNS.items()])

    def write(file: BinaryIO, parts: Iterator[dict[str, list[Any]]]) -> None:
        with parquet.ParquetWriter(file, schema) as writer:
            for columns in parts:
                writer.write_table(pyarrow.table(columns, schema))

    def is_ours(path: Path) -> bool:
        try:
            return bool(parquet.read_schema(path).equals(schema))
        except (OSError, pyarrow.ArrowInvalid):
            return False

    return write, is_ours
