"""Read the labels of images that do not lie in class folders.

Kaggle's ``LOC_val_solution.csv``::

    ImageId,PredictionString
    ILSVRC2012_val_00048981,n03995372 85 1 499 272
    ILSVRC2012_val_00037956,n03481172 131 0 499 254 n03481172 0 33 162 254

and any table of two columns, an image and its class, with or without a header::

    path,label
    ILSVRC2012_val_00048981.JPEG,projectile

Columns are separated by commas, tabs or semicolons. An image is named by its path relative to the
split folder, with or without the extension.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from os.path import splitext
from pathlib import Path
from typing import Final

from anchorpatch.errors import DataError, reason_of

__all__ = ["read_labels"]

_KAGGLE: Final = ["imageid", "predictionstring"]
_SEPARATORS: Final = (",", "\t", ";")


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
    images = _Images(paths, root)
    found: dict[int, tuple[str, int]] = {}
    kaggle, header = False, ""
    for number, (line, row) in enumerate(_rows(file)):
        if len(row) != 2:
            raise DataError(
                f"{file}:{line}: expected 2 fields, an image and its class, separated by a comma, "
                f"tab or semicolon, found {len(row)}"
            )
        name = row[0] if row[0] in images.by_path else row[0].strip()
        index = images.find(name)
        if number == 0 and index is None and not images.is_like_a_path(name):
            kaggle = [field.strip().lower() for field in row] == _KAGGLE
            header = f"; line {line} was taken for the header"
            continue
        label = _kaggle_class(row[1], file, line) if kaggle else row[1].strip()
        if not name or not label:
            raise DataError(f"{file}:{line}: the {'label' if name else 'path'} is empty")
        if index is None:
            raise DataError(
                f"{file}:{line}: there is no image {name!r}; expected paths relative to {root}, "
                f"with or without extension, such as {paths[0]!r}"
            )
        if index in found:
            raise DataError(f"{file}:{line}: {name!r} has a label in line {found[index][1]} too")
        found[index] = label, line
    if missing := [path for i, path in enumerate(paths) if i not in found]:
        raise DataError(
            f"{file}: no label for {len(missing)} of {len(paths)} images in {root}, "
            f"the first is {missing[0]!r}; every image needs a row{header}"
        )
    return [found[i][0] for i in range(len(paths))]


class _Images:
    """The images by path, and by id, which is the path without extension."""

    def __init__(self, paths: Sequence[str], root: Path) -> None:
        self.root, self.paths = root, paths
        self.by_path = {path: i for i, path in enumerate(paths)}
        self._by_id: dict[str, list[int]] = {}
        for i, path in enumerate(paths):
            self._by_id.setdefault(splitext(path)[0], []).append(i)
        self._extensions = {splitext(path)[1].lower() for path in paths}

    def find(self, name: str) -> int | None:
        """Return the row of an image, None where there is none.

        Raises:
            DataError: two images have this id.
        """
        if name in self.by_path:
            return self.by_path[name]
        rows = self._by_id.get(name, [])
        if len(rows) > 1:
            raise DataError(
                f"{self.root}: {self.paths[rows[0]]!r} and {self.paths[rows[1]]!r} have the same "
                f"id {name!r}; name them with their extensions in the labels file"
            )
        return rows[0] if rows else None

    def is_like_a_path(self, name: str) -> bool:
        """Tell whether a name can only be meant as an image's path, not as a header."""
        return "/" in name or splitext(name)[1].lower() in self._extensions - {""}


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
            head = []  # up to the first line that is not blank
            for line in lines:
                head.append(line)
                if line.strip():
                    break
            separator = _separator("".join(head[-1:]))
            reader = csv.reader(chain(head, lines), delimiter=separator, strict=True)
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


def _separator(line: str) -> str:
    """Return what divides a line into two fields, a comma where nothing does.

    Example:
        >>> _separator("a.jpg;cat"), _separator("a.jpg"), _separator("a;b.jpg,cat")
        (';', ',', ',')
    """
    with suppress(csv.Error):  # said with its line number when the file is read
        for separator in _SEPARATORS:
            if [len(row) for row in csv.reader([line], delimiter=separator)] == [2]:
                return separator
    return ","
