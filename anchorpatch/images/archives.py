"""Images in archives, read without unpacking: tar, zip, a tar of tars, and WebDataset shards.

An index says where each image lies: it is made in one pass over the headers of a tar, or from the
directory at the end of a zip, and kept in a cache file. Images are then read at their offsets, by
any number of processes and in any order.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import posixpath
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from anchorpatch.errors import DataError, ImageError, StorageError, reason_of
from anchorpatch.images.folder import (
    Listing,
    extension_of,
    factorized,
    is_image,
    printable,
    read_image,
)
from anchorpatch.images.labels import EXTENSIONS
from anchorpatch.images.members import (
    FOLDER,
    LINK,
    MISSING,
    NOT_REGULAR,
    PLACE,
    PLAIN,
    ZIP_DEFLATED,
    Archive,
    ArchiveReader,
    Member,
    check_kind,
    tar_members,
    zip_members,
)
from anchorpatch.runtime.progress import Reporter
from anchorpatch.storage import locked, write_atomically
from anchorpatch.text import counted, few

#: Of the cache file; another one is made where it has another version.
_VERSION: Final = 1

#: Age in ns from which an archive's time tells it from a later one: filesystems count in up to 2 s.
_SETTLED: Final = 2_000_000_000

#: Members at a time that are objects.
_CHUNK: Final = 1 << 16

#: Longest text that is taken for a label, and longest JSON that is looked at for one.
_LONGEST_LABEL: Final = 1 << 10
_LONGEST_JSON: Final = 1 << 20


class Index(NamedTuple):
    """The images in one or several archives, sorted by the bytes of their names.

    Attributes:
        archives: the files.
        names: UTF-8, ``S`` (n,); those in a tar within a tar begin with its stem.
        each_a_class: each of several archives is a class; names begin with its stem too.
        places: of `PLACE` (n,).
        labels: text of the label that lies beside an image (WebDataset), ``S`` (n,); empty
            without one.
        folders: names of members that are folders, and of tars within a tar, sorted.
        others: members that are no images, by extension.
    """

    archives: tuple[Archive, ...]
    names: npt.NDArray[np.bytes_]
    places: npt.NDArray[np.void]
    labels: npt.NDArray[np.bytes_]
    folders: tuple[str, ...]
    others: dict[str, int]
    each_a_class: bool


def read_named(name: str) -> bytes:
    """Return the bytes of an image file, or of ``archive.tar::member``.

    Raises:
        ImageError: it cannot be read; see `anchorpatch.images.folder.read_image`.
        DataError: the archive cannot be used, or the disk does not answer.
    """
    archive, colons, member = name.partition("::")
    if not colons or os.path.exists(name):
        return read_image(name)
    with _indexing:
        index, read = _named(archive)
    found = int(np.searchsorted(index.names, member.encode(errors="surrogateescape")))
    if found == len(index.names) or bytes(index.names[found]).decode() != member:
        raise ImageError("missing")
    return read(index.places[found].item())


def named_in(archive: str) -> Iterator[str]:
    """Yield the names of the images in an archive, as `read_named` takes them.

    Raises:
        DataError: the archive cannot be used.
    """
    with _indexing:
        index, _ = _named(archive)
    for name in _each(index.names):
        yield f"{archive}::{name.decode()}"


#: Held by the thread that makes an index which others may want too.
_indexing = threading.Lock()


@functools.lru_cache(maxsize=4)
def _named(archive: str) -> tuple[Index, ArchiveReader]:
    index = open_index([Path(archive)])
    return index, ArchiveReader(index.archives)


# --- the index and its cache --------------------------------------------------------------------


def open_index(files: Sequence[Path], report: Reporter | None = None) -> Index:
    """Return the index of archives: from the cache, else made and put there.

    The cache is in $ANCHORPATCH_CACHE, by default ``anchorpatch`` in the user's folder of caches.
    Processes that need the same index make it once.

    Args:
        files: tar or zip files whose members are the images of one list.
        report: shows the progress.

    Raises:
        DataError: an archive is missing or damaged, or no archive, or holds what could be taken for
            another image than the one meant.
    """
    report = report or Reporter()
    archives = tuple(Archive.of(os.path.abspath(file)) for file in files)
    key = hashlib.sha256(json.dumps([archive.path for archive in archives]).encode()).hexdigest()
    stem = Path(archives[0].path).stem
    kept = _cache_folder() / f"{stem}-{key[:16]}.index"
    if (index := _load(kept, archives)) is not None:
        return index
    with ExitStack() as stack:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(kept.with_suffix(".lock")))
        except (OSError, StorageError) as error:
            report.message(_not_kept(kept, error))
            return _build(archives, report)
        if (index := _load(kept, archives)) is not None:  # made by another process meanwhile
            return index
        index = _build(archives, report)
        # What was written just now may be written again without a later time.
        if time.time_ns() - max(archive.mtime for archive in archives) < _SETTLED:
            return index
        try:
            write_atomically(kept, lambda file: _save(index, file))
        except StorageError as error:
            report.message(_not_kept(kept, error))
        return index


def _cache_folder() -> Path:
    own = os.environ.get("ANCHORPATCH_CACHE")
    if own:
        return Path(own)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches, "anchorpatch")


def _not_kept(kept: Path, error: Exception) -> str:
    return (
        f"the index of the archive cannot be kept in {kept.parent} ({reason_of(error)}), so that "
        "each run makes it again; set $ANCHORPATCH_CACHE to a folder that can be written to"
    )


def _facts(index: Index) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "archives": [list(archive) for archive in index.archives],
        "folders": list(index.folders),
        "others": index.others,
        "each_a_class": index.each_a_class,
    }


def _save(index: Index, file: BinaryIO) -> None:
    facts = np.frombuffer(json.dumps(_facts(index)).encode(), np.uint8)
    arrays = {"names": index.names, "places": index.places, "labels": index.labels}
    np.savez_compressed(file, facts=facts, **arrays)  # type: ignore[arg-type]


def _load(kept: Path, archives: tuple[Archive, ...]) -> Index | None:
    """Return the index in a cache file; None where it is missing, damaged or of other archives."""
    try:
        with kept.open("rb") as file, np.load(file, allow_pickle=False) as found:
            facts = json.loads(found["facts"].tobytes())
            if facts["version"] != _VERSION or facts["archives"] != [list(a) for a in archives]:
                return None
            names, places, labels = found["names"], found["places"], found["labels"]
            folders, others = tuple(facts["folders"]), facts["others"]
            each = facts["each_a_class"]
    except Exception:  # a file that was cut off or overwritten may fail in any way
        return None
    fits = names.dtype.kind == labels.dtype.kind == "S" and places.dtype == PLACE
    if not (fits and names.shape == places.shape == labels.shape == (len(names),)):
        return None
    return Index(archives, names, places, labels, folders, others, each)


def _build(archives: tuple[Archive, ...], report: Reporter) -> Index:
    what = archives[0].path if len(archives) == 1 else f"{len(archives):,} archives"
    builder = _Builder(ArchiveReader(archives))
    total = sum(archive.size for archive in archives)
    before = shown = 0

    def advance(done: int) -> None:
        nonlocal shown
        step = ((before + done) >> 20) - shown
        if step:
            shown += step
            report.advance(step)

    with report.counting(f"indexing {what}", total >> 20, unit="MB"):
        for number, archive in enumerate(archives):
            builder.begin(number)
            try:
                with open(archive.path, "rb", buffering=1 << 14) as file:
                    check_kind(file, archive)
                    zipped = file.read(4) in (b"PK\3\4", b"PK\5\6")
                    members = zip_members if zipped else tar_members
                    for member in members(file, archive):
                        stem, extension = posixpath.splitext(posixpath.basename(member.name))
                        if zipped or member.kind != PLAIN or extension != b".tar":
                            builder.add(member, b"")
                        elif not stem.startswith(b"."):
                            stem += b"/"
                            builder.add(Member(stem, FOLDER), b"")
                            end = member.offset + member.size
                            for inner in tar_members(file, archive, member.offset, end):
                                builder.add(inner, b"" if inner.name.startswith(stem) else stem)
                        advance(member.offset)
            except OSError as error:
                raise DataError(f"{archive.path}: cannot be read: {reason_of(error)}") from error
            before += archive.size
            advance(0)
    return builder.index()


class _Builder:
    """Collects the members of archives as an `Index`."""

    def __init__(self, read: ArchiveReader) -> None:
        self._read, self._number, self._archive = read, 0, ""
        self._done: list[tuple[npt.NDArray[Any], ...]] = []
        self._names: list[bytes] = []
        self._places: list[tuple[int, ...]] = []
        self._labels: list[bytes] = []
        self._links: dict[bytes, bytes] = {}
        self._folders: set[str] = set()
        self._others: Counter[str] = Counter()
        # The sample that is being collected: its key, first row, and label.
        self._key, self._first, self._label = b"", 0, b""

    def begin(self, number: int) -> None:
        """Go on with another archive."""
        self._end_sample()
        self._number, self._archive = number, self._read.archives[number].path

    def add(self, member: Member, within: bytes) -> None:
        """Add a member, of a tar within a tar below the folder ``within``."""
        name = self._checked(within + member.name)
        if not name:
            return
        extension = extension_of(name)
        if is_image(name):
            folder, _, base = name.rpartition(b"/")
            self._sample(folder + b"/" + base.partition(b".")[0])
            kind = member.kind
            if kind == FOLDER:
                kind = NOT_REGULAR
            elif kind == LINK:
                kind = MISSING
                self._links[name] = posixpath.normpath(within + member.link)
            size = 0 if kind in (MISSING, NOT_REGULAR) else member.size
            self._names.append(name)
            place = (member.offset, member.stored, size, member.crc, member.name_crc)
            self._places.append((self._number, kind, *place))
            self._labels.append(b"")
        elif member.kind == FOLDER:
            self._folders.add(name.decode())
        elif extension in (b".cls", b".json") and member.kind <= ZIP_DEFLATED:
            folder, _, base = name.rpartition(b"/")
            self._sample(folder + b"/" + base.partition(b".")[0])
            self._note_label(name, extension, member)
        else:
            self._others[printable(extension or name)] += 1

    def _checked(self, name: bytes) -> bytes:
        """Return a name without empty parts; empty for what is hidden.

        Raises:
            DataError: it climbs out, or holds what no name may.
        """
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if name.startswith(b"/") or b".." in parts:
            raise DataError(
                f"{self._archive}: the name {printable(name)} leads out of the archive; pack it "
                "again with names below the folder of the images"
            )
        if any(part.startswith(b".") for part in parts) or parts[:1] == [b"__MACOSX"]:
            return b""
        whole = b"/".join(parts)
        if b"\0" in whole:
            raise DataError(f"{self._archive}: the name {printable(whole)} holds a NUL; rename it")
        try:
            whole.decode()
        except UnicodeDecodeError:
            raise DataError(
                f"{self._archive}: the name {printable(whole)} is not UTF-8; rename it"
            ) from None
        return whole

    def _sample(self, key: bytes) -> None:
        if key != self._key:
            self._end_sample()
            self._key = key

    def _note_label(self, name: bytes, extension: bytes, member: Member) -> None:
        """Take the label of a sample from its .cls, else from its .json."""
        is_class = extension == b".cls"
        if not is_class and (self._label or member.size > _LONGEST_JSON):
            return
        place = (self._number, *member[1:-1])
        label: Any = None
        try:
            data = self._read(place) if not is_class or member.size <= _LONGEST_LABEL else b""
            label = data.decode() if is_class else json.loads(data)
        except (ImageError, ValueError):  # said where the label is missed
            pass
        if isinstance(label, dict):
            label = label.get("label")
        if isinstance(label, int) and not isinstance(label, bool):
            label = str(label)
        if isinstance(label, str) and (label := label.strip()):
            if not label.isprintable():
                raise DataError(
                    f"{self._archive}: {printable(name)}: expected the name or number of a class, "
                    f"found {label[:60]!r}"
                )
            self._label = label.encode()

    def _end_sample(self) -> None:
        if self._label:
            images = self._names[self._first :]
            if len(images) > 1:
                raise DataError(
                    f"{self._archive}: expected one image per sample, found "
                    f"{', '.join(map(printable, images[:3]))} with one label; remove the others"
                )
            if not images:
                self._others["label without an image beside it"] += 1
            self._labels[self._first :] = [self._label] * len(images)
        if len(self._names) >= _CHUNK:
            self._pack()
        self._first, self._label = len(self._names), b""

    def _pack(self) -> None:
        self._done.append(
            (
                np.array(self._names, np.bytes_),
                np.array(self._places, PLACE),
                np.array(self._labels, np.bytes_),
            )
        )
        self._names, self._places, self._labels = [], [], []

    def index(self) -> Index:
        """Return what was collected.

        Raises:
            DataError: two images have the same name.
        """
        self._end_sample()
        self._pack()
        names, places, labels = (np.concatenate(parts) for parts in zip(*self._done, strict=True))
        self._done.clear()
        if each_a_class := not (labels != b"").any() and self._each_a_class(names):
            stems = [Path(archive.path).stem for archive in self._read.archives]
            names = np.char.add(
                np.array([f"{s}/".encode() for s in stems])[places["archive"]], names
            )
            self._folders.update(stems)
        order = np.argsort(names, kind="stable")
        names, places, labels = names[order], places[order], labels[order]
        (same,) = np.nonzero(names[1:] == names[:-1])
        if len(same):
            first, second = (
                self._read.archives[places["archive"][same[0] + i]].path for i in (0, 1)
            )
            where = first if first == second else f"{first} and {second}"
            raise DataError(
                f"{where}: {counted(len(same), 'image')} there twice, such as "
                f"{printable(bytes(names[same[0]]))}; pack each image once"
            )
        for name, target in self._links.items():
            for _ in range(40):
                if target not in self._links:
                    break
                target = self._links[target]
            found = int(np.searchsorted(names, target))
            if found < len(names) and bytes(names[found]) == target:
                places[np.searchsorted(names, name)] = places[found]
        folders = tuple(sorted(self._folders, key=str.encode))
        others = dict(self._others)
        return Index(self._read.archives, names, places, labels, folders, others, each_a_class)

    def _each_a_class(self, names: npt.NDArray[np.bytes_]) -> bool:
        """Tell whether each of several tars holds the images of one class, whose name it bears.

        Shards differ in nothing but a number, and their names say nothing about their images.
        """
        stems = [Path(archive.path).stem for archive in self._read.archives]
        unlike = {re.sub(r"\d+", "", stem) for stem in stems}
        bear_names = len(unlike) == len(stems) or all(re.fullmatch(r"n\d{8}", s) for s in stems)
        return len(stems) > 1 and bear_names and not any(b"/" in name for name in _each(names))


# --- as the images of a split ------------------------------------------------------------------


def list_archives(
    root: Path, archives: Sequence[Path], split: str, report: Reporter, *, flat: bool
) -> Listing:
    """List the images in archives; without labels if they are to be ``flat``."""
    index = open_index(archives, report)
    beside = bool((index.labels != b"").any())
    within = b"" if beside else _folder_of(split, index, all_of_it=split in archives[0].name)
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
        return _in_class_folders(found, index, within.decode())
    texts = [text.decode() or None for text in labels.tolist()]
    numbered = all(text is None or text.isdecimal() for text in texts)
    if numbered:  # 007 is 7
        texts = [text and str(int(text)) for text in texts]
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
    for folder in {name.rpartition(b"/")[0] for name in _each(index.names)}:
        parts = folder.split(b"/")
        if split.encode() in parts:
            found.add(b"/".join(parts[: parts.index(split.encode()) + 1]) + b"/")
        else:
            others = True
    if not found or (all_of_it and (others or len(found) > 1)):
        return b""
    if len(found) > 1:
        raise DataError(
            f"{index.archives[0].path}: expected one folder of the split {split!r}, found "
            f"{few(sorted(folder.decode() for folder in found))}"
        )
    return found.pop()


def _each(names: npt.NDArray[np.bytes_]) -> Iterator[bytes]:
    """Yield names, of which few are objects at a time."""
    for start in range(0, len(names), _CHUNK):
        yield from names[start : start + _CHUNK].tolist()


def _columns(names: npt.NDArray[np.bytes_], start: int) -> npt.NDArray[np.bytes_]:
    """Return names without their first bytes."""
    width = max(names.dtype.itemsize - start, 1)
    letters = names.view(np.uint8).reshape(len(names), -1)[:, start : start + width]
    return np.ascontiguousarray(letters).view(f"S{width}").reshape(-1)


def _in_class_folders(found: Listing, index: Index, within: str) -> Listing:
    """Return the images of an archive with the folders at its top for classes.

    Raises:
        DataError: there are none, or all of them lie in one folder.
    """
    n, index_of = len(found.paths), {b"": -1}
    tops = (path.rpartition(b"/")[0].partition(b"/")[0] for path in _each(found.paths))
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
    deep = len(names) == 1 and all(path.count(b"/") > 1 for path in _each(found.paths))
    if deep and not loose.any():
        raise DataError(
            f"{found.root}: expected class folders at its top, found all images in folders below "
            f"{names[0]}; pack the class folders alone: tar -C FOLDER -cf ..., or name what is "
            "above them as the split"
        )
    below = (name.removeprefix(within) for name in index.folders if name.startswith(within))
    empty = {name.partition("/")[0] for name in below} - {*names, ""}
    outside = Counter(
        f"{extension_of(path).decode()} outside the class folders"
        for path in _each(found.paths[loose])
    )
    return replace(
        found.taking(~loose) if loose.any() else found,
        labels=labels[~loose],
        names=names,
        empty={name: f"{name}: empty" for name in sorted(empty, key=str.encode)},
        others=Counter(found.others) + outside,
    )
