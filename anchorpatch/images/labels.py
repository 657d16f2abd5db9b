"""Read the labels of images that do not lie in class folders.

Kaggle's ``LOC_val_solution.csv``::

    ImageId,PredictionString
    ILSVRC2012_val_00048981,n03995372 85 1 499 272
    ILSVRC2012_val_00037956,n03481172 131 0 499 254 n03481172 0 33 162 254

and plain CSV, whose header may be left out::

    path,label
    ILSVRC2012_val_00048981.JPEG,projectile
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from os.path import splitext
from pathlib import Path
from typing import Final

from anchorpatch.errors import DataError, reason_of

__all__ = ["read_labels"]

_KAGGLE: Final = ["imageid", "predictionstring"]
_PLAIN: Final = ["path", "label"]


def read_labels(file: Path, paths: Sequence[str], root: Path) -> list[str]:
    """Return the class name of each image.

    Args:
        file: the labels file, UTF-8.
        paths: the images, relative to ``root``.
        root: the split folder, for messages.

    Raises:
        DataError: the file cannot be read, has a malformed row, names an image twice or one
            that does not exist, or leaves one out. The message has ``file:line``.
    """
    rows = _rows(file)
    kaggle, names = False, _by_name(paths)
    found: dict[int, tuple[str, int]] = {}
    for number, (line, row) in enumerate(rows):
        header = [field.strip().lower() for field in row] if number == 0 else []
        if header == _KAGGLE:
            kaggle, names = True, _by_id(paths, root)
            continue
        if header == _PLAIN:
            continue
        if len(row) != 2:
            raise DataError(f"{file}:{line}: expected 2 fields, found {len(row)}")
        name = row[0] if row[0] in names else row[0].strip()
        label = _kaggle_class(row[1], file, line) if kaggle else row[1].strip()
        if not name or not label:
            raise DataError(f"{file}:{line}: the {'label' if name else 'path'} is empty")
        index = names.get(name)
        if index is None:
            hint = "ids without extension" if kaggle else f"paths relative to {root}"
            raise DataError(f"{file}:{line}: there is no image {name!r}; expected {hint}")
        if index in found:
            raise DataError(f"{file}:{line}: {name!r} has a label in line {found[index][1]} too")
        found[index] = label, line
    if missing := [path for i, path in enumerate(paths) if i not in found]:
        raise DataError(
            f"{file}: no label for {len(missing)} of {len(paths)} images in {root}, "
            f"the first is {missing[0]!r}; every image needs a row"
        )
    return [found[i][0] for i in range(len(paths))]


def _by_name(paths: Sequence[str]) -> dict[str, int]:
    return {path: i for i, path in enumerate(paths)}


def _by_id(paths: Sequence[str], root: Path) -> dict[str, int]:
    """Index the images by their paths without extension, which is what Kaggle calls an id."""
    ids: dict[str, int] = {}
    for i, path in enumerate(paths):
        name = splitext(path)[0]
        if name in ids:
            raise DataError(
                f"{root}: {paths[ids[name]]!r} and {path!r} have the same id {name!r}; "
                "label them by a CSV of path,label"
            )
        ids[name] = i
    return ids


def _kaggle_class(boxes: str, file: Path, line: int) -> str:
    """Return the class of ``CLASS x1 y1 x2 y2 [CLASS x1 y1 x2 y2 ...]``."""
    tokens = boxes.split()
    numbers = [token for i, token in enumerate(tokens) if i % 5]
    if not tokens or len(tokens) % 5 or not all(token.isdecimal() for token in numbers):
        raise DataError(
            f"{file}:{line}: expected a class and four whole numbers a box, found {boxes!r}"
        )
    return tokens[0]


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank with the number of their last line."""
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            try:
                for row in reader:
                    if row:
                        yield reader.line_num, row
            except csv.Error as error:
                raise DataError(f"{file}:{reader.line_num}: not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error.reason}; save it as UTF-8 CSV") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {reason_of(error)}; check --labels") from error
