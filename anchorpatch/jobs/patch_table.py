"""What shards know of each patch as one table: for CSV and Parquet, and row by row as JSON."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anchorpatch.classes import ClassNames
from anchorpatch.errors import MissingDependency
from anchorpatch.shards.reader import ShardReader

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
