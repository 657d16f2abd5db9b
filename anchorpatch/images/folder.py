"""Images that are files: those in the folder of a split, or in a list, and how one is read.

The folder is ``DATA/SPLIT/CLASS/*`` as torchvision's ImageFolder reads it, or flat as ImageNet's
validation images, ``DATA/SPLIT/*.JPEG``.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from os.path import splitext
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from anchorpatch.errors import DataError, ImageError, reason_of
from anchorpatch.images.labels import EXTENSIONS, read_list
from anchorpatch.signals import shut_down, waiting_for
from anchorpatch.storage import patiently
from anchorpatch.text import few

_EXTENSIONS: Final = frozenset(extension.encode() for extension in EXTENSIONS)

#: What follows the extension of images that have no class, where others have, among `others`.
OUTSIDE: Final = " outside the class folders"

#: Where images are expected, for messages.
LAYOUT: Final = "expected DATA/SPLIT/CLASS/*.jpg"

#: Threads that list class folders.
_LISTING: Final = 16

#: Files of more bytes are not read: an uncompressed image of `MAX_PIXELS` fits.
MAX_BYTES: Final = 1 << 30

#: A label that is a number.
_NUMBER: Final = re.compile(r"-?\d+")

#: What says nothing about the image: the process has run out of something.
_NOT_THE_IMAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})

_REASONS: Final = {
    errno.ENOENT: "missing",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EISDIR: "not a regular file",
    errno.ELOOP: "too many links",
    errno.ENXIO: "not a regular file",  # a socket
}


def extension_of(name: bytes) -> bytes:
    """Return what a name ends with from its last dot on, in lower case; nothing without a dot."""
    return name[name.rfind(b".") :].lower() if b"." in name else b""


def is_image(name: bytes) -> bool:
    """Tell whether a name is that of an image, whatever bears it."""
    return extension_of(name) in _EXTENSIONS


def printable(name: bytes) -> str:
    """Return a name that may hold anything, on one line."""
    text = name.decode(errors="backslashreplace")
    return text if text.isprintable() else repr(text)


def read_image(path: str) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ImageError: it cannot be read: "missing", "permission denied", "not a regular file",
            "file too large" or the system's own words.
        DataError: the disk or network does not answer, which is no fault of the image.
        OSError: this process has run out of files or memory.
    """

    def read() -> bytes:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise ImageError("not a regular file")
            if info.st_size > MAX_BYTES:
                raise ImageError("file too large")
            return file.read()

    try:
        return patiently(path, read)
    except OSError as error:
        if error.errno in _NOT_THE_IMAGE:
            raise
        raise ImageError(
            _REASONS.get(error.errno or 0, f"unreadable: {reason_of(error)}")
        ) from error


@dataclass(frozen=True)
class FolderReader:
    """Reads images by their paths relative to a folder; workers take it along."""

    root: str

    def __call__(self, path: bytes) -> bytes:
        """Return the bytes of an image; see `read_image` for errors."""
        return read_image(os.path.join(self.root, path.decode()))


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of a split as they are found, before their classes have numbers.

    Attributes:
        root: the folder or archive.
        paths: UTF-8, ``S`` (n,), in any order.
        sizes: bytes of each image, int64 (n,); 0 for what is not a regular file.
        names: the classes that images have, in any order.
        labels: index of each image's class into ``names``, int32 (n,); -1 without one.
        numbered: the classes are numbers and not names.
        empty: classes without an image, and what there is instead.
        others: files that are passed over, by extension.
        why_not: why there is no image, for messages.
        read: from a place to the bytes of an image.
        places: where each image lies (n,); None: by its path.
    """

    root: Path
    paths: npt.NDArray[np.bytes_]
    sizes: npt.NDArray[np.int64]
    names: Sequence[str]
    labels: npt.NDArray[np.int32]
    read: Callable[[Any], bytes]
    numbered: bool = False
    empty: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    why_not: str = ""
    places: npt.NDArray[Any] | None = None

    def taking(self, rows: Any) -> Listing:
        """Return some of the images."""
        return replace(
            self,
            paths=self.paths[rows],
            sizes=self.sizes[rows],
            labels=self.labels[rows],
            places=None if self.places is None else self.places[rows],
        )


def list_class_folders(root: Path) -> Listing:
    """List the images in the class folders of a split, or in folders below these."""
    names = class_names(root)
    # A disk is asked as fast as by one thread; a network filesystem takes 0.1 to 1 ms per answer,
    # and answers many questions at once.
    pool = ThreadPoolExecutor(_LISTING, "listing")
    try:
        with waiting_for("the threads that list folders"):
            found = list(pool.map(partial(_below, root), names))
    finally:
        shut_down(pool, "the threads that list folders")
    loose = loose_images(root)
    if loose:
        why_not = (
            f"{root}: images lie directly in it, not in class folders; "
            f"{LAYOUT}, or say which class each has with --labels FILE"
        )
    elif not names:
        why_not = f"{root}: no class folder and no image; {LAYOUT}"
    else:
        descriptions = few([below.describe() for below in found], 5)
        why_not = f"{root}: no image in its {len(names)} class folders ({descriptions}); {LAYOUT}"
    others = Counter(extension + OUTSIDE for extension in loose)
    for below in found:
        others.update(below.others)
    counts = [len(below.paths) for below in found if below.paths]
    return Listing(
        root,
        np.array([path for below in found for path in below.paths], np.bytes_),
        np.array([size for below in found for size in below.sizes], np.int64),
        [below.name for below in found if below.paths],
        np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        FolderReader(str(root)),
        empty={below.name: below.describe() for below in found if not below.paths},
        others=others,
        why_not=why_not,
    )


def list_folder(root: Path) -> Listing:
    """List all images below a folder, without labels."""
    below = _below(root, "")
    n = len(below.paths)
    return Listing(
        root,
        np.array(below.paths, np.bytes_),
        np.array(below.sizes, np.int64),
        (),
        np.full(n, -1, np.int32),
        FolderReader(str(root)),
        others=below.others,
        why_not=f"{root}: no image, {below.describe()}; {', '.join(EXTENSIONS)} expected",
    )


def list_files(file: Path, *, labelled: bool = True, subset: bool = False) -> Listing:
    """Look up the images of a list; without labels, each has the name of its folder for a class.

    Args:
        file: the list; see `anchorpatch.images.labels.read_list`.
        labelled: the images must have classes.
        subset: some may be without a label where others have one.

    Raises:
        DataError: an image has no label and lies in no folder.
    """
    paths, said = read_list(file, subset=subset)
    labels, numbered = as_numbers(said) if said else ([], False)
    if not labels:
        labels = [os.path.basename(os.path.dirname(path)) for path in paths]
        if labelled and "" in labels:
            raise DataError(
                f"{file}: {paths[labels.index('')]!r} has no label and lies in no class folder; "
                "expected path,label"
            )
    names, values = factorized(labels)
    sizes = [_size(path.encode(), partial(os.stat, path)) for path in paths]
    return Listing(
        Path(),
        np.array([path.encode() for path in paths], np.bytes_),
        np.array(sizes, np.int64),
        names,
        values,
        FolderReader(""),
        numbered=numbered,
    )


def as_numbers(labels: Sequence[str | None]) -> tuple[list[str | None], bool]:
    """Return labels and whether they are numbers, which are then the indices of classes.

    A negative number is no label, as is usual for images of a test set.

    Example:
        >>> as_numbers(["007", None, "-1"]), as_numbers(["7", "cat"])
        ((['7', None, None], True), (['7', 'cat'], False))
    """
    found = list(labels)
    if not all(label is None or _NUMBER.fullmatch(label) for label in labels):
        return found, False
    numbers = (None if label is None else int(label) for label in labels)
    return [None if n is None or n < 0 else str(n) for n in numbers], True


def factorized(labels: Sequence[str | None]) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Return the different labels, and the index of each into them, -1 for None.

    Example:
        >>> factorized(["cat", None, "ant", "cat"])
        (['cat', 'ant'], array([ 0, -1,  1,  0], dtype=int32))
    """
    index = {name: i for i, name in enumerate(dict.fromkeys(labels)) if name is not None}
    index = {name: i for i, name in enumerate(index)}
    values = (-1 if label is None else index[label] for label in labels)
    return list(index), np.fromiter(values, np.int32, len(labels))


def loose_images(folder: Path) -> list[str]:
    """Return the extensions of the images that lie directly in a folder."""
    found = [splitext(entry.name)[1].lower() for entry in _entries(os.fsencode(folder))]
    return [extension.decode() for extension in found if extension in _EXTENSIONS]


def archives_in(folder: Path, *suffixes: str) -> list[Path]:
    """Return what lies directly in a folder and bears the name of an archive, sorted."""
    names = [os.fsdecode(entry.name) for entry in _entries(os.fsencode(folder))]
    return [folder / name for name in sorted(names) if name.lower().endswith(suffixes)]


def class_names(root: Path) -> list[str]:
    """Return the folders directly below ``root``, sorted by their bytes."""
    names = [entry.name for entry in _entries(os.fsencode(root)) if _is_folder(entry)]
    _check_names(root, names)
    return [name.decode() for name in sorted(names)]


@dataclass
class _Below:
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


def _below(root: Path, name: str) -> _Below:
    """List the images below ``root/name``: one scan per folder, one stat per image."""
    below = _Below(name, [], [], Counter())
    info = patiently(root / name, (root / name).stat)
    _walk(os.fsencode(root), os.fsencode(name), below, ((info.st_dev, info.st_ino),))
    _check_names(root, below.paths)
    return below


def _walk(top: bytes, within: bytes, found: _Below, above: tuple[tuple[int, int], ...]) -> None:
    folder = os.path.join(top, within) if within else top
    prefix = within + b"/" if within else b""
    for entry in _entries(folder):
        name = entry.name
        if is_image(name):
            found.paths.append(prefix + name)
            found.sizes.append(_size(entry.path, entry.stat))
        elif _is_folder(entry):
            # A link may lead back to a folder that we are in.
            info = patiently(entry.path, entry.stat)
            here = (info.st_dev, info.st_ino)
            if here not in above:
                _walk(top, prefix + name, found, (*above, here))
        else:
            found.others[printable(extension_of(name) or name)] += 1


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    """Return what a folder holds, but for what is hidden."""

    def read() -> list[os.DirEntry[bytes]]:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(b".")]

    try:
        return patiently(folder, read)
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be listed: {reason_of(error)}") from error


def _size(path: bytes, look: Callable[[], os.stat_result]) -> int:
    try:
        info = patiently(path, look)
    except OSError:  # a dangling link, or gone since
        return 0
    return info.st_size if stat.S_ISREG(info.st_mode) else 0


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return patiently(entry.path, entry.is_dir)
    except OSError:  # a link to itself
        return False


def _check_names(root: Path, names: Sequence[bytes]) -> None:
    try:
        b"\n".join(names).decode()
    except UnicodeDecodeError as error:
        # The name around the first bad byte; a line break inside it only shortens the message.
        start = error.object.rfind(b"\n", 0, error.start) + 1
        name = error.object[start:].split(b"\n", 1)[0]
        raise DataError(f"{root}: the name {printable(name)} is not UTF-8; rename it") from None
