"""Labels of images that do not lie in class folders, and lists of images: text files of users.

Of labels: Kaggle's ``LOC_val_solution.csv``::

    ImageId,PredictionString
    ILSVRC2012_val_00048981,n03995372 85 1 499 272
    ILSVRC2012_val_00037956,n03481172 131 0 499 254 n03481172 0 33 162 254

and any table of two columns, an image and its class, with or without a header::

    path,label
    ILSVRC2012_val_00048981.JPEG,projectile

Columns are separated by commas, tabs or semicolons. An image is named by its path relative to the
split folder, with or without the extension.

A list has an image per line, with its class or without; the class is then the name of the
image's folder::

    photos/cat/0001.jpg
    photos/0002.jpg,dog
"""

from __future__ import annotations

import codecs
import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from os.path import splitext
from pathlib import Path
from typing import Final

from anchorpatch.errors import DataError, reason_of

#: What an image's name ends with, in any case.
EXTENSIONS: Final = (
    *(".jpg", ".jpeg", ".jpe", ".jfif"),
    *(".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
)

#: Header of Kaggle's labels file, and what may divide the columns of any.
_KAGGLE: Final = ["imageid", "predictionstring"]
_SEPARATORS: Final = (",", "\t", ";")

#: First words of a list's header.
_HEADERS: Final = ("path", "file", "image")


def read_list(file: Path, *, subset: bool = False) -> tuple[list[str], list[str | None]]:
    """Read a list of images: a path per line, and the class of each or of none.

    A path and its class are separated by the last comma, tab, semicolon or space of the line. A
    line that ends as an image's name does is a path alone. Paths are relative to the working
    directory.

    Args:
        file: the list, UTF-8; ``-`` for stdin.
        subset: lines may be without a label, which is None, where others have one.

    Returns:
        The paths as they stand there, and the labels; no labels where no line has one.

    Raises:
        DataError: the file cannot be read, has a malformed line, or names an image twice. The
            message has ``file:line``.
    """
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {reason_of(error)}; check --files") from error
    lines: dict[str, int] = {}
    labels: list[str] = []
    for number, raw in enumerate(data.removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            line = raw.decode().strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:{number}: not UTF-8: {error.reason}; rename it") from error
        if not line:
            continue
        path, label = _path_and_label(line)
        if path is None:
            if not lines and line.replace("_", "").lower().startswith(_HEADERS):
                continue
            raise DataError(
                f"{file}:{number}: expected path or path,label with the path of an image "
                f"({', '.join(EXTENSIONS)}), found {line[:200]!r}"
            )
        # As it is written, but for what says nothing: links may lead anywhere from "a/..".
        path = re.sub(r"/(\./)*/*", "/", path.removeprefix("./"))
        if path in lines:
            raise DataError(f"{file}:{number}: {path!r} is in line {lines[path]} too")
        if labels and bool(label) != bool(labels[0]) and not subset:
            first = next(iter(lines.values()))
            raise DataError(
                f"{file}:{number}: expected {'a' if labels[0] else 'no'} label, as in line "
                f"{first}; --only-labelled leaves images without a label out"
            )
        lines[path] = number
        labels.append(label)
    if not lines:
        raise DataError(f"{file}: expected a path of an image per line, found none")
    return list(lines), [label or None for label in labels] if any(labels) else []


def _path_and_label(line: str) -> tuple[str | None, str]:
    r"""Return the path of a line and its label, which may be empty; None where there is no path.

    Example:
        >>> _path_and_label("a, b.jpg"), _path_and_label("b.png\t7"), _path_and_label("x,y")
        (('a, b.jpg', ''), ('b.png', '7'), (None, ''))
    """
    if line.lower().endswith(EXTENSIONS):
        return line, ""
    for separator in (*_SEPARATORS, " "):
        path, found, label = line.rpartition(separator)
        with suppress(csv.Error):  # a quoted path
            path = next(csv.reader([path], strict=True))[0] if path.startswith('"') else path
        if found and path.strip().lower().endswith(EXTENSIONS):
            return path.strip(), label.strip().strip('"')
    return None, ""


def read_labels(
    file: Path, paths: Sequence[str], root: Path, *, subset: bool = False
) -> list[str | None]:
    """Return the class name of each image.

    Args:
        file: the labels file, UTF-8.
        paths: the images, relative to ``root``.
        root: the split folder, for messages.
        subset: images may be without a label, which is None.

    Raises:
        DataError: the file cannot be read, has a malformed row, names an image twice or one
            that does not exist, or leaves one out. The message has ``file:line``.
    """
    # By id, which is the path without extension, and by path.
    images: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        images.setdefault(splitext(path)[0], []).append(i)
    images |= {path: [i] for i, path in enumerate(paths)}
    extensions = {splitext(path)[1].lower() for path in paths}
    found: dict[int, tuple[str, int]] = {}
    kaggle, header = False, ""
    for number, (line, row) in enumerate(_rows(file)):
        if len(row) != 2:
            raise DataError(
                f"{file}:{line}: expected 2 fields, an image and its class, separated by a comma, "
                f"tab or semicolon, found {len(row)}"
            )
        name = row[0] if row[0] in images else row[0].strip()
        index, *others = images.get(name, (None,))
        if others:
            raise DataError(
                f"{root}: {paths[index or 0]!r} and {paths[others[0]]!r} have the same id "
                f"{name!r}; name them with their extensions in the labels file"
            )
        is_path = "/" in name or splitext(name)[1].lower() in extensions
        if number == 0 and index is None and not is_path:
            kaggle = [field.strip().lower() for field in row] == _KAGGLE
            # Of a subset nobody would miss an image whose name is mistyped.
            if subset and not kaggle and not name.replace("_", "").lower().startswith(_HEADERS):
                raise DataError(
                    f"{file}:{line}: expected a header such as path,label or an image, found "
                    f"{name!r}, which is not in {root}"
                )
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
            raise DataError(
                f"{file}:{line}: {name!r} already has a label in line {found[index][1]} too"
            )
        found[index] = label, line
    missing = [path for i, path in enumerate(paths) if i not in found]
    if missing and not subset:
        raise DataError(
            f"{file}: no label for {len(missing)} of {len(paths)} images in {root}, "
            f"the first is {missing[0]!r}; every image needs a row, unless --only-labelled leaves "
            f"the others out{header}"
        )
    return [found[i][0] if i in found else None for i in range(len(paths))]


def _kaggle_class(boxes: str, file: Path, line: int) -> str:
    """Return the class of ``CLASS x1 y1 x2 y2 [CLASS x1 y1 x2 y2 ...]``."""
    tokens = boxes.split()
    numbers = [token for i, token in enumerate(tokens) if i % 5]
    if not tokens or len(tokens) % 5 or not all(token.isdecimal() for token in numbers):
        raise DataError(
            f"{file}:{line}: expected a class and four whole numbers per box, found {boxes!r}"
        )
    return tokens[0]


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank with the number of their last line."""
    try:
        text = file.read_text("utf-8-sig")  # spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error.reason}; save it as UTF-8 CSV") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {reason_of(error)}; check --labels") from error
    first = next((line for line in io.StringIO(text) if line.strip()), "")
    reader = csv.reader(io.StringIO(text), delimiter=_separator(first), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not CSV: {error}") from error


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
