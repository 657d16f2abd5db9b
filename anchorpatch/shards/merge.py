"""Joining parts of one split that were made in different folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from anchorpatch import storage
from anchorpatch.errors import CorruptShard, ManifestMismatch, ShardError, reason_of
from anchorpatch.shards.compare import header_differences
from anchorpatch.shards.layout import MANIFEST_NAME
from anchorpatch.shards.manifest import (
    FilesDigest,
    Manifest,
    ShardEntry,
    open_manifest,
    read_manifest,
)

__all__ = ["Merged", "merge_split"]


@dataclass(frozen=True)
class Merged:
    """What a merge has come to.

    Attributes:
        folder: of the joined split.
        copied: names of the shards that were copied.
        shards: shards of the complete split.
        missing: names of the shards that no folder has.
        problems: shards that could not be copied, a line for each.
    """

    folder: Path
    copied: tuple[str, ...]
    shards: int
    missing: tuple[str, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {**vars(self), "folder": str(self.folder)}


def merge_split(
    sources: Sequence[Path], out: Path, done: Callable[[int], object] | None = None
) -> Merged:
    """Copy the shards of several folders into one, verifying their SHA-256 on the way.

    Shards that ``out`` has already stay, so a merge that was interrupted goes on.

    Args:
        sources: folders of the same split, made from the same images, weights and settings.
        out: the folder of the joined split. It is made if need be, and may be one of the sources.
        done: called with the images of each shard that is copied or cannot be.

    Raises:
        ManifestMismatch: the folders are not parts of one split; says what differs.
        ShardError: a manifest cannot be read, or two folders have different bytes for a shard.
        StorageError: the disk refuses. Shards that are copied stay.
    """
    parts = [read_manifest(folder) for folder in sources]
    targets = [read_manifest(out)] if (out / MANIFEST_NAME).exists() else []
    first = (targets + parts)[0]
    for other in (targets + parts)[1:]:
        _compare(first, other)
    found = _candidates(targets + parts)
    files = FilesDigest(first.files_count, first.files_sha256, ())
    target = open_manifest(out, first.header, files)
    copied: list[str] = []
    problems: list[str] = []
    for path in map(target.shard_path, target.missing()):
        failed = []
        for entry, folder in found.get(path.name, []):
            try:
                _copy(folder / path.name, path, entry)
            except CorruptShard as error:
                failed.append(str(error))
                continue
            target = target.commit(entry)
            copied.append(path.name)
            break
        else:
            problems += failed
        if done is not None and path.name in found:
            done(found[path.name][0][0].images)
    missing = tuple(target.shard_path(i).name for i in target.missing())
    return Merged(out, tuple(copied), target.shard_count, missing, tuple(problems))


def _compare(a: Manifest, b: Manifest) -> None:
    differences = header_differences(a.header, b.header)
    if (a.files_count, a.files_sha256) != (b.files_count, b.files_sha256):
        counts = f"{a.files_count} and {b.files_count} images"
        differences.append(counts if a.files_count != b.files_count else "other lists of images")
    if differences:
        raise ManifestMismatch(
            f"{a.folder} and {b.folder} are not parts of one split: {'; '.join(differences)}"
        )


def _candidates(parts: Sequence[Manifest]) -> dict[str, list[tuple[ShardEntry, Path]]]:
    """Return who has each shard, by its name.

    Raises:
        ShardError: two folders disagree.
    """
    found: dict[str, list[tuple[ShardEntry, Path]]] = {}
    for part in parts:
        absent = {part.shard_path(i).name for i in part.missing()}
        for entry in part.entries:
            if entry.name in absent:
                continue
            others = found.setdefault(entry.name, [])
            if others and others[0][0].sha256 != entry.sha256:
                raise ShardError(
                    f"{others[0][1] / entry.name} and {part.folder / entry.name} have different "
                    "bytes, as if made on other devices: remove one of them and merge again"
                )
            others.append((entry, part.folder))
    return found


def _copy(source: Path, path: Path, entry: ShardEntry) -> None:
    """Copy a shard.

    Raises:
        CorruptShard: it cannot be read, or is not as its entry says; nothing is copied then.
    """

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        for chunk in _chunks(source):
            digest.update(chunk)
            file.write(chunk)
        if digest.hexdigest() != entry.sha256:
            raise CorruptShard(
                f"{source}: expected SHA-256 {entry.sha256[:12]}..., found "
                f"{digest.hexdigest()[:12]}...: its bytes have changed"
            )

    storage.write_atomically(path, write, needed=entry.bytes)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except OSError as error:
        raise CorruptShard(f"{path}: cannot read: {reason_of(error)}") from error
