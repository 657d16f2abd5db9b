"""The manifest of a split: what its shards were made from, and which are done.

``OUT/SPLIT/manifest.json`` is JSON with one line per shard. A shard counts as done when its
entry is here and its file has the size of the entry. Everything else is made again: the same
inputs give the same bytes, so doing a shard twice is safe, and adopting a file that nobody
vouches for would not be. The manifest vouches for itself: its last field is the SHA-256 of all
that stands before it. Manifests of earlier versions lack that field and are read too.

Several processes, also on several hosts, commit entries to one manifest. Each commit takes
the lock ``.manifest.lock``, reads the manifest again, adds its entry and replaces the file.
To replace a file of 100,000 lines for each would take longer than to make the shards. So from 256
entries on, new ones are appended to ``manifest.journal``, and the manifest is replaced only
when these are an eighth of it, when the split is complete and at the end of a run. The journal
names the manifest that it extends by its checksum, so that it is void from the moment in which
the manifest is replaced, and each of its lines has a checksum, so that one that was cut off by a
kill or a full disk is no entry.

Where a filesystem has no locks (Lustre without ``-o flock``, some FUSE mounts), two commits
in the same moment may lose one of the entries. That shard is then pending again, and the next
run of the same command writes it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from anchorpatch import storage
from anchorpatch.errors import ManifestMismatch, ShardError, reason_of
from anchorpatch.settings import SCALES
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.layout import FORMAT_VERSION, MANIFEST_NAME, shard_name
from anchorpatch.tables import Table, scale_table

LOCK_NAME: Final = ".manifest.lock"
JOURNAL_NAME: Final = "manifest.journal"
MANIFEST_FORMAT: Final = "anchorpatch shards"
_SEAL: Final = ',\n  "sha256": "'

#: Fields of the manifest that are those of `ShardHeader`, under the same name.
_OF_HEADER: Final = ("split", "classes", "network_classes", "weights_sha256")

#: Entries from which a manifest has a journal.
_WITH_JOURNAL = 256

#: Half-written files, of killed runs too.
LEFTOVERS: Final = re.compile(
    r"\.manifest\.(?:json|journal)\.[0-9a-f]{12}\.tmp|\..+\.h5\.[0-9a-f]{12}\.tmp|.+\.h5\.tmp"
)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """What the manifest knows of a shard.

    Attributes:
        name: of the file.
        images: stored, without the skipped ones.
        patches: stored, by scale.
        chosen: images that chose each scale.
        correct: images whose predicted class has the index of their label.
        bytes: size of the file.
        sha256: of the file.
        skipped: path and reason of each image that could not be read.
        files_sha256: digest of the shard's part of the file list.
        damaged: path of each stored image that was decoded with damage.

    Raises:
        ValueError: a count cannot be one.
    """

    name: str
    images: int
    patches: dict[int, int]
    chosen: dict[int, int]
    correct: int
    bytes: int
    sha256: str
    skipped: tuple[tuple[str, str], ...] = ()
    files_sha256: str = ""
    damaged: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not {*self.patches} == {*self.chosen} == {*SCALES}:
            raise ValueError(f"expected counts for the scales {SCALES}")
        counts = (self.images, self.correct, *self.patches.values(), *self.chosen.values())
        # Rows are int32 in a shard.
        if min(*counts, self.bytes) < 0 or max(counts) >= 1 << 31 or self.bytes >= 1 << 63:
            raise ValueError(f"{self.name!r}: expected counts, found {counts}, {self.bytes} bytes")


@dataclass(frozen=True)
class FilesDigest:
    """The file list that a split is made from, as digests.

    Attributes:
        count: how many files.
        sha256: of the whole list.
        shards: of each shard's part of the list, in order.
        paths: returns the relative paths from ``start`` to ``stop``, in order. Called only to
            name the first file that differs.
    """

    count: int
    sha256: str
    shards: tuple[str, ...]
    paths: Callable[[int, int], Sequence[str]] | None = field(default=None, compare=False)


class _Seen(NamedTuple):
    """What of the files a snapshot knows, so that only what is new need be read.

    Attributes:
        file: inode, size and time of the manifest.
        seal: checksum in it.
        written: entries in it.
        journal: bytes of the journal that were read.
        entries: of both.
    """

    file: tuple[int, int, int]
    seal: str
    written: int
    journal: int
    entries: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class Manifest:
    """A snapshot of the manifest; `refreshed` and `commit` look at the disk again.

    Attributes:
        folder: the split's folder.
        header: what the shards have in common.
        files_count: images of the split, the unreadable ones included.
        files_sha256: digest of the file list.
        entries: of the shards that are done, in order.
    """

    folder: Path
    header: ShardHeader
    files_count: int
    files_sha256: str
    entries: tuple[ShardEntry, ...] = ()
    _seen: _Seen | None = field(default=None, repr=False, compare=False)

    @property
    def shard_count(self) -> int:
        """How many shards the split has when it is complete."""
        return -(-self.files_count // self.header.settings.shard_size)

    def shard_path(self, index: int) -> Path:
        """Return the path of a shard, whether it is done or not."""
        return self.folder / shard_name(self.header.split, index)

    def shard_range(self, index: int) -> range:
        """Return the part of the file list that a shard holds."""
        size = self.header.settings.shard_size
        return range(index * size, min((index + 1) * size, self.files_count))

    def without_entries(self) -> Manifest:
        """Return what the shards have in common, without the shards."""
        return replace(self, entries=(), _seen=None)

    def missing(self) -> list[int]:
        """Return the shards that are not done, as of this snapshot."""
        sizes = {entry.name: entry.bytes for entry in self.entries}
        paths = map(self.shard_path, range(self.shard_count))
        return [i for i, path in enumerate(paths) if not _is_done(path, sizes.get(path.name))]

    def has(self, index: int) -> bool:
        """Tell whether a shard is done, as of this snapshot."""
        path = self.shard_path(index)
        at = _place(self.entries, path.name)
        found = [entry.bytes for entry in self.entries[at : at + 1] if entry.name == path.name]
        return _is_done(path, *found)

    def refreshed(self) -> Manifest:
        """Return the manifest as it is on the disk right now.

        Raises:
            ManifestMismatch: another run has replaced the folder's inputs meanwhile.
        """
        now = read_manifest(self.folder, self)
        if (now.header, now.files_sha256) != (self.header, self.files_sha256):
            raise ManifestMismatch(
                f"{self.folder / MANIFEST_NAME}: another run has started this folder over with "
                "other inputs: choose another --out for one of them"
            )
        return now

    def commit(self, entry: ShardEntry) -> Manifest:
        """Add the entry of a shard that has its final name, in place of an older one.

        Returns:
            The manifest as it is now, with what others committed meanwhile.

        Raises:
            ManifestMismatch: another run has replaced the folder's inputs meanwhile.
            StorageError: the disk refuses; the manifest is as it was.
        """
        with storage.locked(self.folder / LOCK_NAME):
            now = self.refreshed()
            then = replace(now, entries=_with(now.entries, [entry]))
            seen, count = now._seen, len(then.entries)
            if (
                seen is None
                or not seen.seal
                or seen.written < _WITH_JOURNAL
                or count - seen.written > seen.written // 8
                or count == now.shard_count
            ):
                return write_manifest(then)
            _append(self.folder / JOURNAL_NAME, seen, entry)
            return now.refreshed()

    def forget(self, entries: Collection[ShardEntry]) -> Manifest:
        """Remove entries, unless they have changed meanwhile, so that their shards are made again.

        Returns and raises as `commit`.
        """
        gone = {entry.name: entry for entry in entries}
        with storage.locked(self.folder / LOCK_NAME):
            now = self.refreshed()
            kept = tuple(e for e in now.entries if gone.get(e.name) != e)
            return write_manifest(replace(now, entries=kept))

    def folded(self) -> Manifest:
        """Write all entries into the manifest file, so that there is no journal.

        Returns and raises as `commit`.
        """
        if not (self.folder / JOURNAL_NAME).exists():
            return self
        with storage.locked(self.folder / LOCK_NAME):
            return write_manifest(self.refreshed())

    def is_of(self, file: tuple[int, int, int]) -> bool:
        """Tell whether the manifest file is still the one that this snapshot was read from."""
        seen = self._seen
        if seen is None or seen.written < _WITH_JOURNAL:  # soon read, and may be as large again
            return False
        return seen.file == file and seen.entries is self.entries


def _is_done(path: Path, size: int | None = None) -> bool:
    if size is None:
        return False
    try:
        return path.stat().st_size == size
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:  # which does not say that the shard is not there
        raise ShardError(f"{path}: cannot be looked at: {reason_of(error)}") from error


def _order(name: str) -> tuple[int, str]:
    """Return the key by which entries are sorted: val-100000.h5 goes behind val-99999.h5."""
    return len(name), name


def _place(entries: Sequence[ShardEntry], name: str) -> int:
    return bisect_left(entries, _order(name), key=lambda entry: _order(entry.name))


def _with(entries: Sequence[ShardEntry], new: Iterable[ShardEntry]) -> tuple[ShardEntry, ...]:
    """Return sorted entries with others, which take the place of those of the same name."""
    found = list(entries)
    for entry in new:
        at = _place(found, entry.name)
        found[at : at + any(old.name == entry.name for old in found[at : at + 1])] = [entry]
    return tuple(found)


def read_manifest(folder: Path, known: Manifest | None = None) -> Manifest:
    """Read a split's manifest, with its journal.

    Args:
        folder: the split's folder.
        known: an earlier snapshot, of which only what has changed since is read.

    Raises:
        ShardError: it is missing, damaged, of another program or of another format version.
    """
    path = Path(folder) / MANIFEST_NAME
    while True:
        file = _identity(path)
        if known is None or not known.is_of(file):
            known = _parse(path, file)
        if len(known.entries) < _WITH_JOURNAL:
            return known
        found = _with_journal(known)
        if _identity(path) == file:  # or its journal may be gone because it was replaced
            return found


def _identity(path: Path) -> tuple[int, int, int]:
    with suppress(OSError):
        info = path.stat()
        return info.st_ino, info.st_size, info.st_mtime_ns
    return 0, 0, 0


def _parse(path: Path, file: tuple[int, int, int]) -> Manifest:
    """Read the manifest file alone."""
    again = "restore it, or write it and its shards again with --overwrite"
    try:
        text = path.read_bytes().decode()
        data = json.loads(text)
    except FileNotFoundError:
        raise ShardError(
            f"{path}: not found: expected a folder that `anchorpatch extract` wrote"
        ) from None
    except OSError as error:
        raise ShardError(f"{path}: cannot read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: damaged, not JSON ({error}): {again}") from error
    if not isinstance(data, dict) or data.get("format") != MANIFEST_FORMAT:
        raise ShardError(f"{path}: expected a manifest of anchorpatch, found other JSON")
    if data.get("format_version") != FORMAT_VERSION:
        raise ShardError(
            f"{path}: expected format version {FORMAT_VERSION}, "
            f"found {data.get('format_version')}: choose another --out, or --overwrite"
        )
    try:
        if "sha256" in data and text != _sealed(text.rpartition(_SEAL)[0]):
            raise ValueError("its bytes are not those of its own checksum")
        header = {
            **{name: data.pop(name) for name in _OF_HEADER},
            "settings": ShardSettings.from_json(data.pop("settings")),
            "version": data.pop("anchorpatch_version"),
        }
        count = data.pop("files_count")
        if type(count) is not int or not 0 <= count < 1 << 31:
            raise ValueError(f"files_count: expected an integer from 0, found {count!r:.60}")
        lines = (storage.from_json(ShardEntry, line) for line in data.pop("shards"))
        entries = tuple(sorted(lines, key=lambda entry: _order(entry.name)))
        if len({entry.name for entry in entries}) < len(entries):
            raise ValueError("expected each shard once")
        found = Manifest(
            folder=path.parent,
            header=storage.from_json(ShardHeader, header),
            files_count=count,
            files_sha256=str(data.pop("files_sha256")),
            entries=entries,
            _seen=_Seen(file, str(data.get("sha256", "")), len(entries), 0, entries),
        )
        if unknown := data.keys() - {"format", "format_version", "shard_count", "sha256"}:
            raise ValueError(f"unknown field {min(unknown)!r}")
        return found
    except (KeyError, TypeError, ValueError, AttributeError, ShardError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ShardError(f"{path}: damaged ({what}): {again}") from error


def _with_journal(known: Manifest) -> Manifest:
    """Return a snapshot with what the journal has beyond it."""
    seen, path = known._seen, known.folder / JOURNAL_NAME
    assert seen is not None
    try:
        with path.open("rb") as file:
            if _checked(file.readline()) != {"extends": seen.seal}:
                return known
            start = max(seen.journal, file.tell())
            file.seek(start)
            data = file.read()
        lines = data[: data.rfind(b"\n") + 1]  # the last one may be half written as yet
        found = (_checked(line) for line in lines.splitlines())
        new = [storage.from_json(ShardEntry, entry) for entry in found if entry is not None]
    except FileNotFoundError:
        return known
    except OSError as error:
        raise ShardError(f"{path}: cannot read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(
            f"{path}: damaged ({error}): remove it, and run the same extract again"
        ) from error
    if not new:
        return known
    entries = _with(known.entries, new)
    seen = seen._replace(journal=start + len(lines), entries=entries)
    return replace(known, entries=entries, _seen=seen)


def _append(path: Path, seen: _Seen, entry: ShardEntry) -> None:
    """Add an entry to the journal, or begin one; the caller holds the lock."""
    line = _line(storage.to_json(entry))
    if not seen.journal:
        head = _line({"extends": seen.seal})
        storage.write_atomically(path, lambda file: file.write(head + line))
        return
    with storage.refusals(path), path.open("ab") as file:
        # A line that was cut off stays, and is none.
        file.write(b"\n" * (file.tell() > seen.journal) + line)
        file.flush()
        os.fsync(file.fileno())


def _line(document: Any) -> bytes:
    """Return a line of the journal: a checksum, and JSON."""
    text = json.dumps(document).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def _checked(line: bytes) -> Any:
    """Return what `_line` wrote; None for what it did not."""
    text = line[17:].rstrip(b"\n")
    ours = line[:17] == hashlib.sha256(text).hexdigest()[:16].encode() + b" "
    return json.loads(text) if ours else None


def write_manifest(manifest: Manifest) -> Manifest:
    """Replace the manifest file, and remove the journal; the caller holds the lock."""
    header = manifest.header
    document = {
        "format": MANIFEST_FORMAT,
        "format_version": FORMAT_VERSION,
        "anchorpatch_version": header.version,
        "split": header.split,
        "settings": header.settings.to_json(),
        "weights_sha256": header.weights_sha256,
        "files_count": manifest.files_count,
        "files_sha256": manifest.files_sha256,
        "shard_count": manifest.shard_count,
        "classes": header.classes,
        "network_classes": header.network_classes,
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in document.items()]
    shards = ",\n".join(f"    {json.dumps(storage.to_json(entry))}" for entry in manifest.entries)
    text = _sealed("{\n" + "".join(lines) + f'  "shards": [\n{shards}\n  ]')
    path = manifest.folder / MANIFEST_NAME
    storage.write_atomically(path, lambda file: file.write(text.encode()))
    with storage.refusals(path):
        (manifest.folder / JOURNAL_NAME).unlink(missing_ok=True)
    seal, entries = _seal_of(text), manifest.entries
    seen = _Seen(_identity(path), seal, len(entries), 0, entries)
    return replace(manifest, _seen=seen)


def _seal_of(text: str) -> str:
    return text.rpartition(_SEAL)[2][:64]


def _sealed(text: str) -> str:
    """Return all of the manifest, from what stands before its checksum."""
    return f'{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


# --- facts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    Attributes:
        folder: of the split.
        split: its name.
        shards: that are there.
        total_shards: of the complete split.
        images: stored, without the skipped ones.
        scales: "images" that chose each scale, and "patches" of them.
        skipped: images that could not be read, by reason, the most frequent first.
        bytes: of all shards.
        classes: how many folders there are.
        network_classes: how many classes the weights have.
        same_classes: whether both lists are one, so that accuracy has a meaning.
        settings: what decided the bytes.
        weights_sha256: of the weights file.
        anchorpatch_version: that wrote the shards.
        top1: share of images that AnchorNet decided right; None where the classes differ.
    """

    folder: str
    split: str
    shards: int
    total_shards: int
    images: int
    scales: dict[int, dict[str, int]]
    skipped: dict[str, int]
    bytes: int
    classes: int
    network_classes: int
    same_classes: bool
    settings: ShardSettings
    weights_sha256: str
    anchorpatch_version: str
    top1: float | None

    def table(self) -> Table:
        """Return images and patches by chosen scale."""
        images, patches = (
            {scale: found[what] for scale, found in self.scales.items()}
            for what in ("images", "patches")
        )
        return scale_table(images, patches)


def split_facts(manifest: Manifest) -> SplitFacts:
    """Sum up a split."""
    entries, header = manifest.entries, manifest.header
    images, same = sum(e.images for e in entries), header.classes == header.network_classes
    return SplitFacts(
        folder=str(manifest.folder),
        split=header.split,
        shards=manifest.shard_count - len(manifest.missing()),
        total_shards=manifest.shard_count,
        images=images,
        scales={
            scale: {
                "images": sum(e.chosen[scale] for e in entries),
                "patches": sum(e.patches[scale] for e in entries),
            }
            for scale in SCALES
        },
        skipped=dict(Counter(reason for e in entries for _, reason in e.skipped).most_common()),
        bytes=sum(e.bytes for e in entries),
        classes=len(header.classes),
        network_classes=len(header.network_classes),
        same_classes=same,
        settings=header.settings,
        weights_sha256=header.weights_sha256,
        anchorpatch_version=header.version,
        top1=sum(e.correct for e in entries) / images if same and images else None,
    )
