"""The folder of a split: begun, continued with the same inputs, or joined from several.

What a run is asked for and what the folder holds are compared first; where they differ, every
message says how.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from anchorpatch import storage
from anchorpatch.errors import CorruptShard, ManifestMismatch, ShardBusy, ShardError, reason_of
from anchorpatch.shards.header import ShardHeader, first_difference, header_differences
from anchorpatch.shards.layout import (
    MANIFEST_NAME,
    decode_text,
    find_datasets,
    open_shard,
    shard_name,
)
from anchorpatch.shards.manifest import (
    LEFTOVERS,
    LOCK_NAME,
    MANIFEST_FORMAT,
    FilesDigest,
    Manifest,
    ShardEntry,
    read_manifest,
    write_manifest,
)
from anchorpatch.signals import waiting_for
from anchorpatch.text import counted

#: Half-written files are removed when they are so old.
_LEFTOVER_SECONDS: Final = 3600


def open_manifest(
    folder: Path,
    header: ShardHeader,
    files: FilesDigest,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Manifest:
    """Begin a split's folder, or continue one that was started with the same inputs.

    The version of anchorpatch may differ; the version of the format may not. Where there is no
    shard yet, other inputs than those of the manifest simply take their place.

    Args:
        folder: the split's folder. It is made if need be.
        header: what the shards are made with.
        files: what they are made from.
        overwrite: where the inputs differ, or the manifest is damaged, remove the shards that
            are made from other inputs, and nothing else: all of them if the header differs, those
            whose part of the file list differs if only that has changed. With equal inputs it
            does nothing, so a run that may begin anew can also be resumed, and several processes
            that work together can all say so.
        dry_run: change nothing on disk; return the manifest as it would be.

    Raises:
        ManifestMismatch: the inputs differ from those of the shards that are there; says how.
        ShardBusy: shards are to be removed, and another process is writing one.
        ShardError: the manifest is damaged, or there are shards without one.
        StorageError: the disk refuses.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if dry_run:
        return _next(folder, header, files, overwrite)[1]
    with storage.refusals(path):
        folder.mkdir(parents=True, exist_ok=True)
    with storage.locked(folder / LOCK_NAME):
        with storage.refusals(folder):
            _clear_leftovers(folder)
        found, manifest = _next(folder, header, files, overwrite)
        if manifest is found:
            return manifest
        _check_idle(folder, header.split)
        # A crash in between leaves the old inputs without the shards that are gone, and the same
        # command goes on from there; never an entry of other inputs, or one without its shard.
        if found is None:
            with storage.refusals(path):
                path.unlink(missing_ok=True)
        else:
            write_manifest(replace(found, entries=manifest.entries))
        kept = {entry.name for entry in manifest.entries}
        with storage.refusals(folder):
            for shard in _shards(folder, header.split):
                if shard.name not in kept:
                    shard.unlink()
        write_manifest(manifest)
        return manifest


def _next(
    folder: Path, header: ShardHeader, files: FilesDigest, overwrite: bool
) -> tuple[Manifest | None, Manifest]:
    """Return the manifest that is there, if it is of use, and the one to go on with."""
    path = folder / MANIFEST_NAME
    found = None
    if path.exists():
        try:
            found = read_manifest(folder)
        except ShardError:
            if not overwrite:
                raise
            _spare_foreign(path)
    shards = _shards(folder, header.split)
    begun = Manifest(folder, header, files.count, files.sha256)
    if found is None:
        if shards and not overwrite:
            raise ShardError(
                f"{folder} holds {len(shards)} shards ({shards[0].name}, ...) but no "
                f"{MANIFEST_NAME} that describes them: choose another --out, or --overwrite"
            )
        return None, begun
    differences = header_differences(found.header, header)
    same_files = (found.files_count, found.files_sha256) == (files.count, files.sha256)
    if same_files and not differences:
        return found, found
    if shards and not overwrite:
        if not same_files:
            differences.append(_changed_files(found, files, header.settings.shard_size))
        raise ManifestMismatch(
            f"{folder} holds shards made from other inputs: {'; '.join(differences)}. "
            "Choose another --out, or --overwrite to replace what differs"
        )
    if differences:
        return found, begun
    parts = {shard_name(header.split, i): part for i, part in enumerate(files.shards)}
    kept = tuple(e for e in found.entries if parts.get(e.name) == e.files_sha256)
    return found, replace(begun, header=found.header if kept else header, entries=kept)


def _shards(folder: Path, split: str, suffix: str = "") -> list[Path]:
    pattern = re.compile(rf"{re.escape(split)}-\d{{5,}}\.h5{suffix}")
    return sorted(path for path in folder.glob("*") if pattern.fullmatch(path.name))


def _spare_foreign(path: Path) -> None:
    """Raise ShardError for whole JSON of another program."""
    with suppress(ValueError, OSError):
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != MANIFEST_FORMAT:
            raise ShardError(
                f"{path}: expected a manifest of anchorpatch, found other JSON, "
                "which --overwrite does not touch: choose another --out"
            )


def _check_idle(folder: Path, split: str) -> None:
    """Raise ShardBusy if another process is writing a shard of the folder."""
    for path in _shards(folder, split, r"\.lock"):
        with suppress(FileNotFoundError), path.open("rb") as file:
            if not storage.try_lock(file, wait=False):
                raise ShardBusy(
                    f"{path.with_suffix('')}: another process is writing this shard from other "
                    "inputs: wait for it or end it, or choose another --out"
                )


def _clear_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if LEFTOVERS.fullmatch(path.name):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()


# --- comparing -----------------------------------------------------------------------------------


def wait_for_shards(
    folder: Path, owned: Callable[[int], bool], patience: float = 3600.0
) -> Manifest:
    """Wait until some shards of a split are done, whoever makes them.

    The manifest tells when; no process talks to another. A rank of ``torchrun`` that fails does
    not leave the others waiting, since torchrun ends them. Other launchers may not.

    Args:
        folder: the split's folder.
        owned: tells whether a shard is waited for.
        patience: seconds without a change in the folder after which nobody is writing any more.

    Raises:
        ShardError: shards are missing, and nobody has written for ``patience`` seconds.
    """
    seen, since = None, time.monotonic()
    manifest = read_manifest(folder)
    missing = list(filter(owned, manifest.missing()))
    with waiting_for("the other ranks to write their shards"):
        # Only what was missing is looked for again: a folder may hold 100,000 shards.
        while missing := [i for i in missing if not manifest.has(i)]:
            now, there = time.monotonic(), (folder.stat().st_mtime_ns, len(manifest.entries))
            if there != seen:
                seen, since = there, now
            elif now - since > patience:
                raise ShardError(
                    f"{folder}: {counted(len(missing), 'shard')} missing, and no rank "
                    f"has written for {patience:,.0f} s: one has probably failed; run the same "
                    "command again"
                )
            time.sleep(0.2)
            manifest = read_manifest(folder, manifest)
    return manifest


def files_in(folder: Path) -> set[tuple[str, int, int]]:
    """Return name, size and time of each file: they change while somebody writes."""
    found = set()
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # just renamed
                info = entry.stat()
                found.add((entry.name, info.st_size, info.st_mtime_ns))
    return found


def _changed_files(manifest: Manifest, files: FilesDigest, shard_size: int) -> str:
    """Say how the file list has changed, with the first change if a shard knows its names."""
    said = f"images were {manifest.files_count}, now {files.count}"
    unnamed = (
        said
        if manifest.files_count != files.count
        else f"{said}, with other names, sizes or labels"
    )
    # Parts of lists that are cut into shards of different sizes cannot be compared.
    if manifest.header.settings.shard_size != shard_size or files.paths is None:
        return unnamed
    entries = {entry.name: entry for entry in manifest.entries}
    for index in range(manifest.shard_count):
        path = manifest.shard_path(index)
        if path.name not in entries:
            return unnamed
        if (entries[path.name].files_sha256,) == files.shards[index : index + 1]:
            continue
        try:
            was = _stored_paths(path)
        except ShardError:
            return unnamed
        now = files.paths(index * shard_size, min((index + 1) * shard_size, files.count))
        if sorted(was) == sorted(now):
            return f"{said} ({path.name} has the same names, but a file's size or label changed)"
        return f"{said} (first in {path.name}: {first_difference(was, now)})"
    return f"{said} (those after number {manifest.files_count} are new)"


def _stored_paths(path: Path) -> list[str]:
    """Return the paths in a shard that may not be what the manifest says, the skipped ones too.

    Raises:
        ShardError: they cannot be read.
    """
    with open_shard(path) as file:
        expected = {name: ("S", (None,)) for name in ("images/path", "skipped/path")}
        found = find_datasets(file, expected, path.stat().st_size)
        # They were one list, sorted by bytes.
        stored = sorted(path for dataset in found.values() for path in dataset[:].tolist())
        return [decode_text(path) for path in stored]


# --- joining -------------------------------------------------------------------------------------


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
    first, *others = targets + parts
    for other in others:
        differences = header_differences(first.header, other.header)
        if first.files_count != other.files_count:
            differences.append(f"{first.files_count} and {other.files_count} images")
        elif first.files_sha256 != other.files_sha256:
            differences.append("other lists of images")
        if differences:
            raise ManifestMismatch(
                f"{first.folder} and {other.folder} are not parts of one split: "
                + "; ".join(differences)
            )
    found = _candidates([first, *others])
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
    target = target.folded()
    missing = tuple(target.shard_path(i).name for i in target.missing())
    return Merged(out, tuple(copied), target.shard_count, missing, tuple(problems))


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
            others.append((entry, part.folder))
            if others[0][0].sha256 != entry.sha256:
                raise ShardError(
                    f"{others[0][1] / entry.name} and {part.folder / entry.name} have different "
                    "bytes, as if made on other devices: remove one of them and merge again"
                )
    return found


def _copy(source: Path, path: Path, entry: ShardEntry) -> None:
    """Copy a shard.

    Raises:
        CorruptShard: it cannot be read, or is not as its entry says; nothing is copied then.
    """

    def write(file: BinaryIO) -> None:
        sha256 = storage.write_hashed(file, _chunks(source))
        if sha256 != entry.sha256:
            raise CorruptShard(
                f"{source}: expected SHA-256 {entry.sha256[:12]}..., found {sha256[:12]}...: "
                "the file has changed"
            )

    storage.write_atomically(path, write, needed=entry.bytes)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except OSError as error:
        raise CorruptShard(f"{path}: cannot read: {reason_of(error)}") from error
