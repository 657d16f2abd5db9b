"""The index of archives, which says where each image lies, and the cache that keeps it.

It is made in one pass over the headers of a tar, or from the directory at the end of a zip.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from joblib import Parallel, cpu_count, delayed

from anchorpatch.errors import DataError, ImageError, StorageError, reason_of
from anchorpatch.images.folder import (
    extension_of,
    is_image,
    printable,
)
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
from anchorpatch.signals import answers
from anchorpatch.storage import locked, write_atomically
from anchorpatch.text import counted

#: Of the cache file; another one is made where it has another version.
_VERSION: Final = 2

#: Age in ns from which an archive's time tells it from a later one: filesystems count in up to 2 s.
_SETTLED: Final = 2_000_000_000

#: Bytes of several archives from which it is worth while to start processes that index them.
_MANY_BYTES = 1 << 30

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
    total = sum(archive.size for archive in archives)
    builder = _Builder(ArchiveReader(archives))
    before = shown = 0

    def advance(done: int) -> None:
        nonlocal shown
        step = ((before + done) >> 20) - shown
        if step:
            shown += step
            report.advance(step)

    with report.counting(f"indexing {what}", total >> 20, unit="MB"):
        parts: Iterable[_Builder] = (_collected(archive, advance) for archive in archives)
        if len(archives) > 1 and total >= _MANY_BYTES:
            # By all cores, as the other processes of the machine wait for this index.
            work = Parallel(min(cpu_count(), len(archives)), return_as="generator")
            found = work(delayed(_collected)(archive) for archive in archives)
            parts = answers(found, "the processes that index archives")
        for number, (archive, part) in enumerate(zip(archives, parts, strict=True)):
            builder.join(number, part)
            before += archive.size
            advance(0)
    return builder.index()


def _collected(archive: Archive, advance: Callable[[int], object] | None = None) -> _Builder:
    """Collect the members of one archive, from its first byte to its last."""
    builder = _Builder(ArchiveReader((archive,)))
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
                if advance is not None:
                    advance(member.offset)
    except OSError as error:
        raise DataError(f"{archive.path}: cannot be read: {reason_of(error)}") from error
    builder.end()
    return builder


class _Builder:
    """Collects the members of archives as an `Index`."""

    def __init__(self, read: ArchiveReader) -> None:
        self._read, self._archive = read, read.archives[0].path
        self._done: list[tuple[npt.NDArray[Any], ...]] = []
        self._names: list[bytes] = []
        self._places: list[tuple[int, ...]] = []
        self._labels: list[bytes] = []
        self._links: dict[tuple[int, bytes], bytes] = {}
        self._folders: set[str] = set()
        self._others: Counter[str] = Counter()
        # The sample that is being collected: its key, first row, and labels by the names of files.
        self._key, self._first = b"", 0
        self._found: dict[bytes, bytes] = {}

    def join(self, number: int, part: _Builder) -> None:
        """Add what was collected from the archive of a number."""
        for names, places, labels in part._done:
            places["archive"] = number
            self._done.append((names, places, labels))
        self._links |= {(number, name): target for (_, name), target in part._links.items()}
        self._folders |= part._folders
        self._others.update(part._others)

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
                self._links[0, name] = posixpath.normpath(within + member.link)
            size = 0 if kind in (MISSING, NOT_REGULAR) else member.size
            self._names.append(name)
            place = (member.offset, member.stored, size, member.crc, member.name_crc)
            self._places.append((0, kind, *place))
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
        """Note the label in a .cls or .json, unless one that takes precedence was found."""
        is_class = extension == b".cls"
        if not is_class and (self._key_of(b".cls") in self._found or member.size > _LONGEST_JSON):
            return
        place = (0, *member[1:-1])
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
            self._found[name] = label.encode()

    def _key_of(self, extension: bytes) -> bytes:
        return self._key.removeprefix(b"/") + extension

    def _end_sample(self) -> None:
        if self._found:
            images = self._names[self._first :]
            own = {posixpath.splitext(name)[0] for name in images} - {self._key_of(b"")}
            if len(images) > 1 and any(posixpath.splitext(name)[0] in own for name in self._found):
                raise DataError(
                    f"{self._archive}: expected one label per sample, found "
                    f"{', '.join(map(printable, [*images, *self._found][:6]))}, which WebDataset "
                    "takes for one sample, as its key ends at the first dot; pack them again "
                    "without further dots in their names"
                )
            if len(images) > 1 and len(self._without_further_images()) > 1:
                raise DataError(
                    f"{self._archive}: expected one image per sample, found "
                    f"{', '.join(map(printable, images[:3]))} with one label; remove the others"
                )
            if not images:
                self._others["label without an image beside it"] += 1
            label = self._label_of_sample()
            self._labels[self._first :] = [label] * len(self._names[self._first :])
        if len(self._names) >= _CHUNK:
            self._pack()
        self._first, self._found = len(self._names), {}

    def _label_of_sample(self) -> bytes:
        """Return what key.cls says, else key.json, else the one file beside them that has a label.

        Raises:
            DataError: several have, and say different things.
        """
        for extension in (b".cls", b".json"):
            if label := self._found.get(self._key_of(extension)):
                return label
        (name, label), *others = sorted(self._found.items())
        if different := next((of for of, said in others if said != label), None):
            raise DataError(
                f"{self._archive}: expected one label per sample, found {printable(name)} and "
                f"{printable(different)}; pack the one that counts as "
                f"{printable(self._key_of(b'.cls'))}"
            )
        return label

    def _without_further_images(self) -> list[bytes]:
        """Leave out ``key.seg.png`` beside ``key.jpg``; return the images of the sample."""
        first, images = self._first, self._names[self._first :]
        kept = [i for i, name in enumerate(images) if name.rpartition(b"/")[2].count(b".") == 1]
        if len(kept) == 1:
            self._others["further images of a sample"] += len(images) - 1
            row = first + kept[0]
            self._names[first:] = [self._names[row]]
            self._places[first:] = [self._places[row]]
            self._labels[first:] = [self._labels[row]]
        return self._names[first:]

    def _pack(self) -> None:
        self._done.append(
            (
                np.array(self._names, np.bytes_),
                np.array(self._places, PLACE),
                np.array(self._labels, np.bytes_),
            )
        )
        self._names, self._places, self._labels = [], [], []

    def end(self) -> None:
        """Put the last sample away."""
        self._end_sample()
        self._pack()

    def index(self) -> Index:
        """Return what was collected.

        Raises:
            DataError: two images have the same name.
        """
        names, places, labels = (np.concatenate(parts) for parts in zip(*self._done, strict=True))
        self._done.clear()
        above = [b""] * len(self._read.archives)
        if each_a_class := not (labels != b"").any() and self._each_a_class(names):
            stems = [Path(archive.path).stem for archive in self._read.archives]
            above = [f"{stem}/".encode() for stem in stems]
            names = np.char.add(np.array(above)[places["archive"]], names)
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
        links = {above[i] + name: above[i] + target for (i, name), target in self._links.items()}
        for name, target in links.items():
            for _ in range(40):
                if target not in links:
                    break
                target = links[target]
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
        return len(stems) > 1 and bear_names and not any(b"/" in name for name in each_name(names))


def each_name(names: npt.NDArray[np.bytes_]) -> Iterator[bytes]:
    """Yield names, of which few are objects at a time."""
    for start in range(0, len(names), _CHUNK):
        yield from names[start : start + _CHUNK].tolist()
