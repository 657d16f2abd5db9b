"""Discover the images of a split and their labels.

Two layouts: ``DATA/SPLIT/CLASS/*`` as torchvision's ImageFolder reads it, and ImageNet's flat
validation folder ``DATA/SPLIT/*.JPEG`` with a labels file (`anchorpatch.images.labels`).
"""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from anchorpatch.errors import DataError, reason_of
from anchorpatch.images.labels import read_labels

__all__ = ["EXTENSIONS", "ImageFolder", "scan_folder", "spread_rows"]

#: What an image's name ends with, in any case.
EXTENSIONS: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

_EXTENSIONS: Final = frozenset(extension.encode() for extension in EXTENSIONS)
_LAYOUT: Final = "expected DATA/SPLIT/CLASS/*.jpg"


@dataclass(frozen=True, eq=False)
class ImageFolder:
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
    """

    root: Path
    split: str
    paths: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> str:
        """Return the path of image ``i`` relative to `root`."""
        return bytes(self.paths[i]).decode()

    def limited(self, limit: int | None) -> ImageFolder:
        """Return the folder of the images that ``--limit`` takes; the classes stay."""
        rows = spread_rows(len(self), limit)
        return replace(
            self, paths=self.paths[rows], labels=self.labels[rows], sizes=self.sizes[rows]
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


def scan_folder(data: Path, split: str, labels: Path | None = None) -> ImageFolder:
    """Find the images of a split.

    Without ``labels`` every folder below the split is a class, and images may lie in folders
    below it. Links are followed. Hidden files and folders and files with other extensions are
    passed over. Anything with an image's extension counts, even a folder, a pipe or a dangling
    link: that becomes a skipped image with its reason when it is read.

    Args:
        data: the folder that holds the splits.
        split: name of the split's folder.
        labels: Kaggle's ``LOC_val_solution.csv`` or a CSV of ``path,label`` for images that do
            not lie in class folders. The classes are those of DATA/train where they include
            all of the file's, so that the indices agree with it; else the file's own.

    Raises:
        DataError: the folder or the labels file is not as expected.
    """
    root = Path(data) / split
    _check_layout(Path(data), split)
    if labels is not None:
        return _labelled(Path(data), root, split, Path(labels))
    names = _class_names(root)
    listings = [_listing(root, name) for name in names]
    if not any(listing.paths for listing in listings):
        raise DataError(_why_no_images(root, names, listings))
    if empty := [listing for listing in listings if not listing.paths]:
        found = _some([listing.describe() for listing in empty])
        raise DataError(
            f"{root}: {len(empty)} of {len(names)} class folders hold no image ({found}); "
            f"add images ({', '.join(EXTENSIONS)}) or remove the folders"
        )
    counts = [len(listing.paths) for listing in listings]
    return _folder(
        root,
        split,
        [path for listing in listings for path in listing.paths],
        np.repeat(np.arange(len(names), dtype=np.int32), counts),
        [size for listing in listings for size in listing.sizes],
        tuple(names),
    )


def _labelled(data: Path, root: Path, split: str, file: Path) -> ImageFolder:
    listing = _listing(root, "")
    if not listing.paths:
        raise DataError(f"{root}: no image, {listing.describe()}; {', '.join(EXTENSIONS)} expected")
    label_of = read_labels(file, [path.decode() for path in listing.paths], root)
    train = data / "train"
    classes = _class_names(train) if train.is_dir() else []
    if not set(label_of).issubset(classes):
        classes = sorted(set(label_of), key=str.encode)
    index = {name: i for i, name in enumerate(classes)}
    values = np.array([index[label] for label in label_of], np.int32)
    return _folder(root, split, listing.paths, values, listing.sizes, tuple(classes))


def _folder(
    root: Path,
    split: str,
    paths: list[bytes],
    labels: npt.NDArray[np.int32],
    sizes: list[int],
    classes: tuple[str, ...],
) -> ImageFolder:
    array = np.array(paths, dtype=np.bytes_)
    order = np.argsort(array, kind="stable")
    return ImageFolder(
        root, split, array[order], labels[order], np.array(sizes, np.int64)[order], classes
    )


@dataclass
class _Listing:
    """What lies below one folder; paths are relative to the split folder."""

    name: str
    paths: list[bytes]
    sizes: list[int]
    others: set[bytes]

    def describe(self) -> str:
        """Say why there is no image here."""
        if self.others:
            return f"{self.name or 'only'}: other files: {_some(_names(self.others))}"
        return f"{self.name}: empty" if self.name else "it is empty"


def _listing(root: Path, name: str) -> _Listing:
    """List the images below ``root/name``: one scan a folder, one stat an image."""
    listing = _Listing(name, [], [], set())
    info = os.stat(root / name)
    _walk(os.fsencode(root), os.fsencode(name), listing, ((info.st_dev, info.st_ino),))
    _check_names(root, listing.paths)
    return listing


def _walk(top: bytes, below: bytes, listing: _Listing, above: tuple[tuple[int, int], ...]) -> None:
    folder = os.path.join(top, below) if below else top
    prefix = below + b"/" if below else b""
    for entry in _entries(folder):
        name = entry.name
        if name.startswith(b"."):
            continue
        extension = name[name.rfind(b".") :].lower() if b"." in name else b""
        if extension in _EXTENSIONS:
            listing.paths.append(prefix + name)
            listing.sizes.append(_size(entry))
        elif entry.is_dir():
            # A link may lead back to a folder that we are in.
            info = entry.stat()
            here = (info.st_dev, info.st_ino)
            if here not in above:
                _walk(top, prefix + name, listing, (*above, here))
        else:
            listing.others.add(extension or name)


def _entries(folder: bytes) -> Iterator[os.DirEntry[bytes]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise DataError(f"{_printable(folder)}: cannot be listed: {reason_of(error)}") from error


def _size(entry: os.DirEntry[bytes]) -> int:
    try:
        info = entry.stat()
    except OSError:  # a dangling link, or gone since
        return 0
    return info.st_size if stat.S_ISREG(info.st_mode) else 0


def _class_names(root: Path) -> list[str]:
    """Return the folders directly below ``root``, sorted by their bytes."""
    names = [
        entry.name
        for entry in _entries(os.fsencode(root))
        if not entry.name.startswith(b".") and entry.is_dir()
    ]
    _check_names(root, names)
    return [name.decode() for name in sorted(names)]


def _check_layout(data: Path, split: str) -> None:
    """Raise the most helpful error where there is no folder DATA/SPLIT."""
    if not data.is_dir():
        what = "is not a folder" if data.exists() else "no such folder"
        raise DataError(f"{data}: {what}; {_LAYOUT}: give DATA with --data")
    if split and (data / split).is_dir():
        return
    splits = _class_names(data)
    if not splits:
        raise DataError(f"{data}: no folder of the split {split!r}, nor any other; {_LAYOUT}")
    if any(_has_images(data / name) for name in splits[:10]):
        here = data.absolute()
        raise DataError(
            f"{data}: no folder of the split {split!r}, but class folders with images "
            f"({_some(splits)}): it looks like a split itself; "
            f"did you mean --data {here.parent} --split {here.name}?"
        )
    near = difflib.get_close_matches(split, splits, 1)
    hint = f"did you mean --split {near[0]}?" if near else "choose one with --split"
    raise DataError(f"{data}: no folder of the split {split!r}; there are {_some(splits)}; {hint}")


def _has_images(folder: Path) -> bool:
    return any(
        os.path.splitext(entry.name)[1].lower() in _EXTENSIONS
        for entry in _entries(os.fsencode(folder))
    )


def _why_no_images(root: Path, names: Sequence[str], listings: Sequence[_Listing]) -> str:
    if _has_images(root):
        return (
            f"{root}: images lie directly in it, not in class folders; "
            f"{_LAYOUT}, or say which class each has with --labels FILE"
        )
    if not names:
        return f"{root}: no class folder and no image; {_LAYOUT}"
    found = _some([listing.describe() for listing in listings])
    return f"{root}: no image in its {len(names)} class folders ({found}); {_LAYOUT}"


def _names(names: set[bytes]) -> list[str]:
    return [_printable(name) for name in sorted(names)]


def _some(names: Sequence[str], most: int = 5) -> str:
    """Return the first few of ``names`` and how many follow."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
