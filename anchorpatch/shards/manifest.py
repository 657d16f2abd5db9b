"""The manifest of a split: what its shards were made from, and which are done.

``OUT/SPLIT/manifest.json`` is JSON with one line a shard. A shard counts as done when its
entry is here and its file has the size of the entry. Everything else is made again: the same
inputs give the same bytes, so doing a shard twice is safe, and adopting a file that nobody
vouches for would not be.

Several processes, also on several hosts, commit entries to one manifest. Each commit takes
the lock ``.manifest.lock``, reads the manifest again, adds its entry and replaces the file.
Where a filesystem has no locks (Lustre without ``-o flock``, some FUSE mounts), two commits
in the same moment may lose one of the entries. That shard is then pending again, and the next
run of the same command makes it anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from anchorpatch import storage
from anchorpatch.errors import ManifestMismatch, ShardError, reason_of
from anchorpatch.shards.compare import first_changed_path, header_differences
from anchorpatch.shards.layout import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SCALES,
    ShardHeader,
    ShardSettings,
    shard_name,
)

__all__ = ["FilesDigest", "Manifest", "ShardEntry", "open_manifest", "read_manifest"]

_LOCK_NAME: Final = ".manifest.lock"
_FORMAT: Final = "anchorpatch shards"


@dataclass(frozen=True)
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

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON knows it."""
        by_scale = {
            name: {str(scale): count for scale, count in sorted(counts.items())}
            for name, counts in (("patches", self.patches), ("chosen", self.chosen))
        }
        lists = {"skipped": [list(s) for s in self.skipped], "damaged": list(self.damaged)}
        return {**vars(self), **by_scale, **lists}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShardEntry:
        """Return the entry that `to_json` wrote.

        Raises:
            ValueError: a value is of another type, or no count.
        """
        by_scale = {
            name: {int(scale): count for scale, count in data[name].items()}
            for name in ("patches", "chosen")
        }
        if any(set(counts) != set(SCALES) for counts in by_scale.values()):
            raise ValueError(f"expected counts for the scales {SCALES}")
        entry = storage.from_json(cls, {**data, **by_scale})
        counts = (entry.images, entry.correct, *entry.patches.values(), *entry.chosen.values())
        # Rows are int32 in a shard.
        if min(*counts, entry.bytes) < 0 or max(counts) >= 1 << 31 or entry.bytes >= 1 << 63:
            raise ValueError(
                f"{entry.name!r}: expected counts, found {counts}, {entry.bytes} bytes"
            )
        return entry


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


@dataclass(frozen=True)
class Manifest:
    """A snapshot of the manifest; `commit` and `pending` look at the disk again.

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

    @property
    def shard_count(self) -> int:
        """How many shards the split has when it is complete."""
        return -(-self.files_count // self.header.settings.shard_size)

    def shard_path(self, index: int) -> Path:
        """Return the path of a shard, whether it is done or not."""
        return self.folder / shard_name(self.header.split, index)

    def shard_range(self, index: int) -> tuple[int, int]:
        """Return (start, stop), the part of the file list that a shard holds."""
        size = self.header.settings.shard_size
        return index * size, min((index + 1) * size, self.files_count)

    def missing(self) -> list[int]:
        """Return the shards that are not done, as of this snapshot."""
        done = {e.name: e.bytes for e in self.entries}
        return [
            index
            for index in range(self.shard_count)
            if done.get(self.shard_path(index).name, -1) != _size(self.shard_path(index))
        ]

    def pending(self) -> list[int]:
        """Return the shards that are to be made: not done according to the disk right now."""
        return read_manifest(self.folder).missing()

    def commit(self, entry: ShardEntry) -> Manifest:
        """Add the entry of a shard that has its final name, in place of an older one.

        Returns:
            The manifest as it is now, with what others committed meanwhile.

        Raises:
            ManifestMismatch: the folder was begun anew with other inputs meanwhile.
            StorageError: the disk refuses; the manifest is as it was.
        """
        with storage.locked(self.folder / _LOCK_NAME):
            now = read_manifest(self.folder)
            if (now.header, now.files_sha256) != (self.header, self.files_sha256):
                raise ManifestMismatch(
                    f"{self.folder / MANIFEST_NAME}: another run began this folder anew with "
                    "other inputs: choose another --out for one of them"
                )
            others = [e for e in now.entries if e.name != entry.name]
            now = replace(now, entries=tuple(sorted([*others, entry], key=lambda e: e.name)))
            _write(now)
        return now


def open_manifest(
    folder: Path, header: ShardHeader, files: FilesDigest, *, overwrite: bool = False
) -> Manifest:
    """Begin a split's folder, or continue one that was begun with the same inputs.

    The version of anchorpatch may differ; the version of the format may not.

    Args:
        folder: the split's folder. It is made if need be.
        header: what the shards are made with.
        files: what they are made from.
        overwrite: where the inputs differ, or the manifest is damaged, remove the shards and the
            manifest of this split first, and nothing else. With equal inputs it does nothing, so
            a run that may begin anew can also be resumed, and several processes that work
            together can all say so.

    Raises:
        ManifestMismatch: the inputs differ from those of the shards that are there; says how.
        ShardError: the manifest is damaged, or there are shards without one.
        StorageError: the disk refuses.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    with storage.refusals(path):
        folder.mkdir(parents=True, exist_ok=True)
    with storage.locked(folder / _LOCK_NAME):
        if path.exists():
            try:
                manifest = read_manifest(folder)
                _compare(manifest, header, files)
                return manifest
            except ShardError:
                if not overwrite:
                    raise
        if overwrite:
            _remove(folder, header.split)
        stray = _shards(folder, header.split)
        if stray:
            raise ShardError(
                f"{folder} holds {len(stray)} shards ({stray[0].name}, ...) but no "
                f"{MANIFEST_NAME} that says what they are: choose another --out, or --overwrite"
            )
        manifest = Manifest(folder, header, files.count, files.sha256)
        _write(manifest)
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a split's manifest.

    Raises:
        ShardError: it is missing, damaged, of another program or of another format version.
    """
    path = Path(folder) / MANIFEST_NAME
    again = "remove it and its shards with --overwrite, or restore it"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(
            f"{path}: not found: expected a folder that `anchorpatch extract` wrote"
        ) from None
    except OSError as error:
        raise ShardError(f"{path}: cannot read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: damaged, not JSON ({error}): {again}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ShardError(f"{path}: expected a manifest of anchorpatch, found other JSON")
    if data.get("format_version") != FORMAT_VERSION:
        raise ShardError(
            f"{path}: expected format version {FORMAT_VERSION}, "
            f"found {data.get('format_version')}: choose another --out, or --overwrite"
        )
    try:
        return Manifest(
            folder=Path(folder),
            header=storage.from_json(
                ShardHeader,
                {
                    "split": data["split"],
                    "classes": data["classes"],
                    "network_classes": data["network_classes"],
                    "settings": ShardSettings.from_json(data["settings"]),
                    "weights_sha256": data["weights_sha256"],
                    "version": data["anchorpatch_version"],
                },
            ),
            files_count=_count(data["files_count"]),
            files_sha256=str(data["files_sha256"]),
            entries=_entries(data["shards"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ShardError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ShardError(f"{path}: damaged ({what}): {again}") from error


def _entries(lines: Any) -> tuple[ShardEntry, ...]:
    entries = tuple(map(ShardEntry.from_json, lines))
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError("expected each shard once")
    return entries


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"files_count: expected an integer from 0, found {value!r:.60}")
    return value


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _shards(folder: Path, split: str, suffix: str = "") -> list[Path]:
    pattern = re.compile(rf"{re.escape(split)}-\d{{5,}}\.h5{suffix}")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _remove(folder: Path, split: str) -> None:
    """Remove what an earlier run wrote: the manifest first, so that no entry lacks its shard."""
    path = folder / MANIFEST_NAME
    with suppress(ValueError, OSError):
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ShardError(
                f"{path}: expected a manifest of anchorpatch, found other JSON, "
                "which --overwrite does not touch: choose another --out"
            )
    with storage.refusals(folder):
        path.unlink(missing_ok=True)
        for shard in _shards(folder, split, r"(\.tmp)?"):
            shard.unlink()


def _write(manifest: Manifest) -> None:
    """Replace the manifest file; the caller holds the lock."""
    header = manifest.header
    fields = {
        "format": _FORMAT,
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
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in fields.items()]
    shards = ",\n".join(f"    {json.dumps(entry.to_json())}" for entry in manifest.entries)
    text = "{\n" + "\n".join(lines) + f'\n  "shards": [\n{shards}\n  ]\n}}\n'
    storage.write_atomically(
        manifest.folder / MANIFEST_NAME, lambda file: file.write(text.encode())
    )


def _compare(manifest: Manifest, header: ShardHeader, files: FilesDigest) -> None:
    """Raise when the inputs differ from the manifest's, naming all that differs."""
    found = header_differences(manifest.header, header)
    if (manifest.files_count, manifest.files_sha256) != (files.count, files.sha256):
        found.append(f"images were {manifest.files_count}, now {files.count}")
        # The parts of the list are comparable while their bounds are the same.
        if manifest.header.settings.shard_size == header.settings.shard_size:
            first = _first_changed_file(manifest, files)
            found[-1] += f" ({first})" if first else ""
    if found:
        raise ManifestMismatch(
            f"{manifest.folder} holds shards made from other inputs: {'; '.join(found)}. "
            "Choose another --out, or --overwrite to make them anew"
        )


def _first_changed_file(manifest: Manifest, files: FilesDigest) -> str:
    """Name the first file that differs, if a shard knows its name."""
    digests = {entry.name: entry.files_sha256 for entry in manifest.entries}
    for index in range(manifest.shard_count):
        path = manifest.shard_path(index)
        old, new = digests.get(path.name), files.shards[index : index + 1]
        if old is None or files.paths is None:
            return ""
        if (old,) != new:
            size = manifest.header.settings.shard_size
            return first_changed_path(path, files.paths(index * size, (index + 1) * size))
    return f"those after number {manifest.files_count} are new"
