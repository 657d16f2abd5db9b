"""Discover the images of a split and their labels.

Two layouts: ``DATA/SPLIT/CLASS/*`` as torchvision's ImageFolder reads it, and ImageNet's flat
validation folder ``DATA/SPLIT/*.JPEG`` with a labels file: Kaggle's ``LOC_val_solution.csv``::

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
import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os.path import splitext
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from anchorpatch.errors import DataError, SettingsError, TooManyBadImages, reason_of
from anchorpatch.storage import patiently
from anchorpatch.text import counted, few, nearest

#: What an image's name ends with, in any case.
EXTENSIONS: Final = (
    *(".jpg", ".jpeg", ".jpe", ".jfif"),
    *(".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
)

_EXTENSIONS: Final = frozenset(extension.encode() for extension in EXTENSIONS)
_LAYOUT: Final = "expected DATA/SPLIT/CLASS/*.jpg"

#: Header of Kaggle's labels file, and what may divide the columns of any.
_KAGGLE: Final = ["imageid", "predictionstring"]
_SEPARATORS: Final = (",", "\t", ";")


@dataclass(frozen=True, eq=False)
class ImageSource:
    """The images of one split, sorted by the bytes of their paths.

    Paths are one array of bytes and not a list of strings: a list of 1.3 million objects would
    be copied into every forked worker as their reference counts change.

    Attributes:
        root: the split folder.
        split: its name.
        paths: UTF-8, relative to ``root``, with slashes, ``S`` (n,).
        labels: index into ``classes``, int32 (n,).
        sizes: bytes of each file, int64 (n,); 0 for what is not a regular file.
        classes: names of the classes, sorted by their bytes.
        ignored: files that were passed over, by extension: not images by their names, or images
            outside the class folders. Hidden files are not counted.
    """

    root: Path
    split: str
    paths: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    ignored: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> str:
        """Return the path of image ``i`` relative to `root`."""
        return bytes(self.paths[i]).decode()

    def limited(self, limit: int | None) -> ImageSource:
        """Return the folder of the images that ``--limit`` takes; the classes stay."""
        rows = spread_rows(len(self), limit)
        return replace(
            self, paths=self.paths[rows], labels=self.labels[rows], sizes=self.sizes[rows]
        )

    def passed_over(self) -> str | None:
        """Name what was passed over; None where there is nothing."""
        if not self.ignored:
            return None
        found = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        counts = few([f"{count:,} {name}" for name, count in found], 5)
        return (
            f"{self.root}: {counted(sum(self.ignored.values()), 'file')} passed over ({counts}); "
            f"images are {', '.join(EXTENSIONS)}"
        )

    def too_many_bad(
        self, bad: int, of: int, max_bad: float, details: str = ""
    ) -> TooManyBadImages:
        """Return the error of a run that found more unreadable images than it may.

        Args:
            bad: unreadable images.
            of: all that were to be read.
            max_bad: share of them that is accepted.
            details: more to say, with what leads to it.
        """
        return TooManyBadImages(
            f"{self.root}: {bad} of {of} images cannot be read, more than --max-bad "
            f"{max_bad:.2%}{details}; fix or remove the files, or raise --max-bad"
        )

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """Return the SHA-256 of path, label and size of the images ``start`` to ``stop``.

        It depends on nothing else: not on the machine, where the folder lies, or the other
        images.
        """
        rows = slice(*slice(start, stop).indices(len(self)))
        digest = hashlib.sha256()
        for i in range(rows.start, rows.stop, 1 << 16):  # not a million objects at a time
            paths = self.paths[i : min(i + (1 << 16), rows.stop)].tolist()
            # No path holds a NUL, so it is plain where each ends.
            digest.update(b"".join(path + b"\0" for path in paths))
        digest.update(self.labels[rows].astype("<i4").tobytes())
        digest.update(self.sizes[rows].astype("<i8").tobytes())
        return digest.hexdigest()


def spread_rows(count: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Return the rows of a sorted list that ``--limit`` takes, evenly spread over the list.

    The list is sorted by class, so every class gets its share of the limit; the choice depends on
    the two numbers alone.

    Args:
        count: rows of the list.
        limit: how many to take at most; None for all.

    Example:
        >>> spread_rows(10, 4).tolist(), spread_rows(3, None).tolist()
        ([0, 2, 5, 7], [0, 1, 2])
    """
    taken = count if limit is None else min(limit, count)
    return np.arange(taken, dtype=np.int64) * count // max(taken, 1)


def without_images(labels: npt.NDArray[np.integer], classes: Sequence[str]) -> str | None:
    """Name the classes that none of some images has; None where each class has one.

    Args:
        labels: index of each image's class (n,).
        classes: names of the classes.

    Example:
        >>> without_images(np.array([0, 2]), ("ant", "bee", "cat", "dog"))
        '2 of 4 classes have no image among the 2 images taken: bee, dog'
    """
    absent = np.setdiff1d(np.arange(len(classes)), labels)
    if not len(absent):
        return None
    have = "has" if len(absent) == 1 else "have"
    return (
        f"{len(absent):,} of {counted(len(classes), 'class')} {have} no image among the "
        f"{counted(len(labels), 'image')} taken: {few([classes[i] for i in absent])}"
    )


def scan_folder(
    data: Path,
    split: str,
    labels: Path | None = None,
    *,
    classes: Sequence[str] | None = None,
    classes_of: str = "train",
    allow_empty: bool = False,
) -> ImageSource:
    """Find the images of a split.

    Without ``labels`` every folder below the split is a class, and images may lie in folders
    below it. Links are followed. Hidden files and folders and files with other extensions are
    passed over. Anything with an image's extension counts, even a folder, a pipe or a dangling
    link: that becomes a skipped image with its reason when it is read.

    The classes of another split than train are those of DATA/train where they include all of the
    split's, so that the indices agree; the split may then lack images of some of them.

    Args:
        data: the folder that holds the splits.
        split: name of the split's folder.
        labels: Kaggle's ``LOC_val_solution.csv`` or a CSV of ``path,label`` for images that do
            not lie in class folders.
        classes: the classes, in their order; None to find them.
        classes_of: what has these ``classes``, for messages.
        allow_empty: accept class folders without images.

    Raises:
        DataError: the folder or the labels file is not as expected.
        SettingsError: the split is no name of a folder.
    """
    data = Path(data)
    root = data / split
    _check_layout(data, split)
    if labels is None:
        names = _class_names(root)
        listings = [_listing(root, name) for name in names]
        if not any(listing.paths for listing in listings):
            raise DataError(_why_no_images(root, names, listings))
        label_of = [listing.name for listing in listings for _ in listing.paths]
    else:
        listings = [_listing(root, "")]
        if not listings[0].paths:
            what = listings[0].describe()
            raise DataError(f"{root}: no image, {what}; {', '.join(EXTENSIONS)} expected")
        paths = [path.decode() for path in listings[0].paths]
        label_of = _read_labels(Path(labels), paths, root)
    present = set(label_of)
    if classes is None and split != "train" and (data / "train").is_dir():
        of_train = _class_names(data / "train")
        classes = of_train if present.issubset(of_train) else None
    if classes is None:
        empty = [listing for listing in listings if not listing.paths]
        if empty and not allow_empty:
            found = few([listing.describe() for listing in empty], 5)
            raise DataError(
                f"{root}: {len(empty)} of {len(listings)} class folders are empty ({found}); "
                f"add images ({', '.join(EXTENSIONS)}), remove the folders, or accept them with "
                "--allow-empty"
            )
        classes = sorted(present.union(listing.name for listing in empty), key=str.encode)
    elif unknown := sorted(present.difference(classes), key=str.encode):
        raise DataError(
            f"{labels or root}: expected only the {len(classes):,} classes of {classes_of}, found "
            f"{len(unknown):,} more ({few(unknown, 5)}); rename or remove them"
        )
    index = {name: i for i, name in enumerate(classes)}
    array = np.array([path for listing in listings for path in listing.paths], dtype=np.bytes_)
    order = np.argsort(array, kind="stable")
    values = np.array([index[name] for name in label_of], np.int32)
    sizes = np.array([size for listing in listings for size in listing.sizes], np.int64)
    loose = _loose(root) if labels is None else ()
    ignored = Counter(f"{extension} outside the class folders" for extension in loose)
    for listing in listings:
        ignored.update(listing.others)
    return ImageSource(
        root, split, array[order], values[order], sizes[order], tuple(classes), dict(ignored)
    )


def _loose(folder: Path) -> list[str]:
    """Return the extensions of the images that lie directly in a folder."""
    found = [splitext(entry.name)[1].lower() for entry in _entries(os.fsencode(folder))]
    return [extension.decode() for extension in found if extension in _EXTENSIONS]


@dataclass
class _Listing:
    """What lies below one folder; paths are relative to the split folder."""

    name: str
    paths: list[bytes]
    sizes: list[int]
    others: Counter[str]

    def describe(self) -> str:
        """Say why there is no image here."""
        if self.others:
            return f"{self.name or 'only'}: other files: {few(sorted(self.others), 5)}"
        return f"{self.name}: empty" if self.name else "it is empty"


def _listing(root: Path, name: str) -> _Listing:
    """List the images below ``root/name``: one scan per folder, one stat per image."""
    listing = _Listing(name, [], [], Counter())
    info = patiently(root / name, (root / name).stat)
    _walk(os.fsencode(root), os.fsencode(name), listing, ((info.st_dev, info.st_ino),))
    _check_names(root, listing.paths)
    return listing


def _walk(top: bytes, below: bytes, listing: _Listing, above: tuple[tuple[int, int], ...]) -> None:
    folder = os.path.join(top, below) if below else top
    prefix = below + b"/" if below else b""
    for entry in _entries(folder):
        name = entry.name
        extension = name[name.rfind(b".") :].lower() if b"." in name else b""
        if extension in _EXTENSIONS:
            listing.paths.append(prefix + name)
            listing.sizes.append(_size(entry))
        elif _is_folder(entry):
            # A link may lead back to a folder that we are in.
            info = patiently(entry.path, entry.stat)
            here = (info.st_dev, info.st_ino)
            if here not in above:
                _walk(top, prefix + name, listing, (*above, here))
        else:
            listing.others[_printable(extension or name)] += 1


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    """Return what a folder holds, but for what is hidden."""

    def read() -> list[os.DirEntry[bytes]]:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(b".")]

    try:
        return patiently(folder, read)
    except OSError as error:
        raise DataError(f"{_printable(folder)}: cannot be listed: {reason_of(error)}") from error


def _size(entry: os.DirEntry[bytes]) -> int:
    try:
        info = patiently(entry.path, entry.stat)
    except OSError:  # a dangling link, or gone since
        return 0
    return info.st_size if stat.S_ISREG(info.st_mode) else 0


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return patiently(entry.path, entry.is_dir)
    except OSError:  # a link to itself
        return False


def _class_names(root: Path) -> list[str]:
    """Return the folders directly below ``root``, sorted by their bytes."""
    names = [entry.name for entry in _entries(os.fsencode(root)) if _is_folder(entry)]
    _check_names(root, names)
    return [name.decode() for name in sorted(names)]


def _check_layout(data: Path, split: str) -> None:
    """Raise the most helpful error where there is no folder DATA/SPLIT."""
    # The name of a split is one of files too, which must not end up elsewhere.
    if "/" in split or split in (".", ".."):
        raise SettingsError(f"--split: expected the name of a folder below --data, got {split!r}")
    if not data.is_dir():
        what = "is not a folder" if data.exists() else "no such folder"
        raise DataError(f"{data}: {what}; {_LAYOUT}: give DATA with --data")
    if split and (data / split).is_dir():
        return
    splits = _class_names(data)
    if not splits:
        raise DataError(f"{data}: no folder for split {split!r}, nor any other; {_LAYOUT}")
    if any(_loose(data / name) for name in splits[:10]):
        here = data.absolute()
        raise DataError(
            f"{data}: no folder for split {split!r}, but class folders with images "
            f"({few(splits, 5)}): it looks like a split itself; "
            f"did you mean --data {here.parent} --split {here.name}?"
        )
    near = nearest(split, splits)
    hint = f"did you mean --split {near}?" if near else "choose one with --split"
    there = f"there are {few(splits, 5)}; {hint}"
    raise DataError(f"{data}: no folder for split {split!r}; {there}")


def _why_no_images(root: Path, names: Sequence[str], listings: Sequence[_Listing]) -> str:
    if _loose(root):
        return (
            f"{root}: images lie directly in it, not in class folders; "
            f"{_LAYOUT}, or say which class each has with --labels FILE"
        )
    if not names:
        return f"{root}: no class folder and no image; {_LAYOUT}"
    found = few([listing.describe() for listing in listings], 5)
    return f"{root}: no image in its {len(names)} class folders ({found}); {_LAYOUT}"


def _check_names(root: Path, names: Sequence[bytes]) -> None:
    try:
        b"\n".join(names).decode()
    except UnicodeDecodeError as error:
        # The name around the first bad byte; a line break inside it only shortens the message.
        start = error.object.rfind(b"\n", 0, error.start) + 1
        name = error.object[start:].split(b"\n", 1)[0]
        raise DataError(f"{root}: the name {_printable(name)} is not UTF-8; rename it") from None


def _printable(name: bytes) -> str:
    """Return a name that may hold anything, on one line."""
    text = name.decode(errors="backslashreplace")
    return text if text.isprintable() else repr(text)


# --- the labels file ------------------------------------------------------------------------------


def _read_labels(file: Path, paths: Sequence[str], root: Path) -> list[str]:
    """Return the class name of each image.

    Args:
        file: the labels file, UTF-8.
        paths: the images, relative to ``root``.
        root: the split folder, for messages.

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
    if missing := [path for i, path in enumerate(paths) if i not in found]:
        raise DataError(
            f"{file}: no label for {len(missing)} of {len(paths)} images in {root}, "
            f"the first is {missing[0]!r}; every image needs a row{header}"
        )
    return [found[i][0] for i in range(len(paths))]


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
