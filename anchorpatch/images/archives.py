"""Images in archives, read without unpacking: tar, zip, a tar of tars, and WebDataset shards.

They are read at their offsets, by any number of processes and in any order.
"""

from __future__ import annotations

import functools
import os
import posixpath
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from anchorpatch.errors import DataError, ImageError
from anchorpatch.images.folder import (
    OUTSIDE,
    Listing,
    as_numbers,
    extension_of,
    factorized,
    read_image,
)
from anchorpatch.images.index import Index, each_name, open_index
from anchorpatch.images.labels import EXTENSIONS
from anchorpatch.images.members import ArchiveReader
from anchorpatch.runtime.progress import Reporter
from anchorpatch.text import few

#: Folders that are splits and not classes where they hold folders, the most wanted first.
SPLITS: Final = ("val", "valid", "validation", "test", "testing", "train", "training")
_SPLITS: Final = frozenset(name.encode() for name in SPLITS)


def list_archives(
    root: Path,
    archives: Sequence[Path],
    split: str,
    report: Reporter,
    *,
    flat: bool,
    named: bool,
) -> Listing:
    """List the images of a split in archives.

    Args:
        root: what messages call the archives.
        archives: the files.
        split: name of the split.
        report: shows the progress of an index.
        flat: leave labels out.
        named: the archive bears the name of the split, so that it holds no other.

    Raises:
        DataError: an archive cannot be used, or it does not say which class each image has.
    """
    index = open_index(archives, report)
    beside = bool((index.labels != b"").any())
    within = b"" if beside else _folder_of(split, index, all_of_it=named)
    rows = slice(*np.searchsorted(index.names, [within, within + b"\xff"]))
    paths = _columns(index.names, len(within))[rows] if within else index.names
    rows = rows if within else slice(None)
    places, labels = index.places[rows], index.labels[rows]
    found = Listing(
        root,
        paths,
        places["size"].astype(np.int64),
        (),
        np.full(len(paths), -1, np.int32),
        ArchiveReader(index.archives, None if index.each_a_class else within.decode()),
        others={} if within else index.others,
        places=places,
        why_not=f"{root}: no image; {', '.join(EXTENSIONS)} expected, found "
        + (few(sorted(index.others), 5) or "nothing else"),
    )
    if flat or not len(paths):
        return found
    if not beside:
        sole = named or bool(within) or len(archives) > 1
        return _in_class_folders(found, index, within.decode(), "" if sole else split)
    texts, numbered = as_numbers([text.decode() or None for text in labels.tolist()])
    names, values = factorized(texts)
    return replace(found, names=names, labels=values, numbered=numbered)


def _folder_of(split: str, index: Index, *, all_of_it: bool) -> bytes:
    """Return the folder in an archive that holds a split, with a slash; empty for the whole.

    Args:
        split: name of the split.
        index: of the archive.
        all_of_it: the archive holds this split alone, which may lie in folders.

    Raises:
        DataError: several folders could be the split.
    """
    if not split or len(index.archives) > 1:
        return b""
    found, others = set(), False
    folders = {name.rpartition(b"/")[0] for name in each_name(index.names)}
    for folder in folders:
        parts = folder.split(b"/")
        if split.encode() in parts:
            found.add(b"/".join(parts[: parts.index(split.encode()) + 1]) + b"/")
        else:
            others = True
    tops = {folder.partition(b"/")[0] for folder in folders if b"/" in folder}
    of_splits = len(tops) > 1 and tops <= _SPLITS | {split.encode()}
    if not found or (all_of_it and not of_splits and (others or len(found) > 1)):
        return b""
    # A class may have the name of a split, such as train.
    depth = min(name.count(b"/") for name in found)
    found = {name for name in found if name.count(b"/") == depth}
    if len(found) > 1:
        raise DataError(
            f"{index.archives[0].path}: expected one folder of the split {split!r}, found "
            f"{few(sorted(folder.decode() for folder in found))}"
        )
    return found.pop()


def _columns(names: npt.NDArray[np.bytes_], start: int) -> npt.NDArray[np.bytes_]:
    """Return names without their first bytes."""
    width = max(names.dtype.itemsize - start, 1)
    letters = names.view(np.uint8).reshape(len(names), -1)[:, start : start + width]
    return np.ascontiguousarray(letters).view(f"S{width}").reshape(-1)


def _in_class_folders(found: Listing, index: Index, within: str, sought: str) -> Listing:
    """Return the images of an archive with the folders at its top for classes.

    Args:
        found: the images.
        index: of the archive.
        within: folder of the split in it, with a slash.
        sought: split that has no folder in it, where it could have one.

    Raises:
        DataError: there are none, or all of them lie in one folder.
    """
    n, index_of = len(found.paths), {b"": -1}
    tops = (path.rpartition(b"/")[0].partition(b"/")[0] for path in each_name(found.paths))
    values = (index_of.setdefault(top, len(index_of) - 1) for top in tops)
    labels = np.fromiter(values, np.int32, n)
    names = [top.decode() for top in index_of if top]
    loose = labels < 0
    if loose.all():
        raise DataError(
            f"{found.root}: images without a class: they lie in no class folders, and neither "
            "NAME.cls nor a label in NAME.json lies beside them; or say which class each has with "
            "--labels FILE"
        )
    assert found.places is not None
    of_archives = np.bincount(found.places["archive"])
    strays = np.bincount(found.places["archive"][loose], minlength=len(of_archives))
    for i in np.flatnonzero((strays == of_archives) & (strays > 0))[:1]:
        raise DataError(
            f"{index.archives[i].path}: images without a class: they lie in no class folders, as "
            f"those of {found.root} do ({few(names, 5)}); pack all in the same way"
        )
    folders = {path.rpartition(b"/")[0] for path in each_name(found.paths)} - {b""}
    deeper = {folder.partition(b"/")[0] for folder in folders if b"/" in folder}
    deep = all(b"/" in folder for folder in folders)
    if sought and (not deeper.issubset(folders) or deeper & _SPLITS):
        raise DataError(
            f"{found.root}: no folder for split {sought!r} in it; there are {few(names, 5)}; "
            f"choose one with --split, or if these are the classes, call it {sought}"
            f"{found.root.suffix} and give its folder with --data"
        )
    if deep and len(names) == 1:
        raise DataError(
            f"{found.root}: expected class folders at its top, found all images in folders below "
            f"{names[0]}; pack the class folders alone: tar -C FOLDER -cf ..., or name what is "
            "above them as the split"
        )
    below = (name.removeprefix(within) for name in index.folders if name.startswith(within))
    empty = {name.partition("/")[0] for name in below} - {*names, ""}
    outside = Counter(
        extension_of(path).decode() + OUTSIDE for path in each_name(found.paths[loose])
    )
    return replace(
        found.taking(~loose) if loose.any() else found,
        labels=labels[~loose],
        names=names,
        empty={name: f"{name}: empty" for name in sorted(empty, key=str.encode)},
        others=Counter(found.others) + outside,
    )


def read_named(name: str) -> bytes:
    """Return the bytes of an image file, or of ``archive.tar::member``.

    Raises:
        ImageError: it cannot be read; see `anchorpatch.images.folder.read_image`.
        DataError: the archive has changed meanwhile, or the disk does not answer.
    """
    archive, colons, member = name.partition("::")
    if not colons or os.path.exists(name):
        return read_image(name)
    while not os.path.isfile(archive) and "::" in member:  # which folders may have in their names
        further, _, member = member.partition("::")
        archive += "::" + further
    if not os.path.exists(archive):
        raise ImageError(f"missing: there is no archive {archive}")
    try:
        with _indexing:
            index, read = _named(archive)
    except DataError as error:
        raise ImageError(str(error)) from error
    wanted = posixpath.normpath(os.fsencode(member))  # tar may list it as ./member
    found = int(np.searchsorted(index.names, wanted))
    if found == len(index.names) or bytes(index.names[found]) != wanted:
        raise ImageError("missing")
    return read(index.places[found].item())


def named_in(archive: str) -> Iterator[str]:
    """Yield the names of the images in an archive, as `read_named` takes them.

    Raises:
        DataError: the archive cannot be used.
    """
    with _indexing:
        index, _ = _named(archive)
    for name in each_name(index.names):
        yield f"{archive}::{name.decode()}"


#: Held by the thread that makes an index which others may want too.
_indexing = threading.Lock()


@functools.lru_cache(maxsize=4)
def _named(archive: str) -> tuple[Index, ArchiveReader]:
    index = open_index([Path(archive)])
    return index, ArchiveReader(index.archives)
