"""Verifying shards: their bytes against the manifest, and what they say against the schema."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from joblib import Parallel, delayed

from anchorpatch import storage
from anchorpatch.errors import CorruptShard, ShardError, reason_of
from anchorpatch.shards.access import check_size, decode_patch, survey
from anchorpatch.shards.layout import MANIFEST_NAME
from anchorpatch.shards.manifest import LEFTOVERS, Manifest, ShardEntry, read_manifest
from anchorpatch.signals import answers

__all__ = ["ShardProblem", "verify_folder", "verify_shard", "verify_shards"]

#: No fault: later runs clear these away.
_OURS: Final = re.compile(rf"\.manifest\.lock|.+\.h5\.lock|{LEFTOVERS.pattern}")


class ShardProblem(NamedTuple):
    """What is wrong with one file.

    Attributes:
        shard: name of the file.
        problem: what was expected and what was found.
    """

    shard: str
    problem: str


def verify_folder(
    folder: Path | str, jobs: int = -1, done: Callable[[int], object] | None = None
) -> list[ShardProblem]:
    """Verify all shards of a split, several at a time in processes of their own.

    A shard whose bytes are not those of the manifest is named and not looked into, as HDF5
    may crash on a damaged file.

    Args:
        folder: OUT/SPLIT.
        jobs: processes; -1: one a CPU core.
        done: called with the images of each shard that is verified.

    Returns:
        Every problem found, by the name of the file; only that of the manifest where it is
        damaged.

    Raises:
        ShardError: there is no manifest. Never for a bad shard.
    """
    path = Path(folder, MANIFEST_NAME)
    try:
        manifest = read_manifest(path.parent)
    except ShardError as error:
        if not path.exists():
            raise
        return [ShardProblem(MANIFEST_NAME, str(error).removeprefix(f"{path}: "))]
    problems = verify_shards(manifest, manifest.entries, jobs, done)
    known = {entry.name for entry in manifest.entries}
    expected = [manifest.shard_path(i).name for i in range(manifest.shard_count)]
    for name in expected:
        if name not in known:
            problem = f"missing, and has no entry in {MANIFEST_NAME}: run the same extract again"
            if (manifest.folder / name).exists():
                problem = (
                    f"has no entry in {MANIFEST_NAME}: if it comes from another folder, join the "
                    "folders with `anchorpatch shards merge`, else run the same extract again"
                )
            problems.append(ShardProblem(name, problem))
    for name in sorted(known - set(expected)):
        problem = f"has an entry in {MANIFEST_NAME}, but is no shard of this split"
        problems.append(ShardProblem(name, problem))
    for path in sorted(manifest.folder.iterdir()):
        if path.name not in {*known, *expected, MANIFEST_NAME} and not _OURS.fullmatch(path.name):
            problems.append(ShardProblem(path.name, f"has no entry in {MANIFEST_NAME}"))
    return sorted(problems)


def verify_shards(
    manifest: Manifest,
    entries: Sequence[ShardEntry],
    jobs: int = -1,
    done: Callable[[int], object] | None = None,
) -> list[ShardProblem]:
    """Verify some of the shards of a split; see `verify_folder`."""
    verify = Parallel(n_jobs=1 if len(entries) < 2 else jobs, return_as="generator")
    found = verify(delayed(verify_shard)(manifest, entry) for entry in entries)
    problems = []
    of_all = answers(found, "the processes that verify shards")
    for entry, of_shard in zip(entries, of_all, strict=True):
        problems += of_shard
        if done is not None:
            done(entry.images)
    return problems


def verify_shard(manifest: Manifest, entry: ShardEntry) -> list[ShardProblem]:
    """Verify one shard; never raises for a bad one."""
    path = manifest.folder / entry.name
    try:
        check_size(path, entry.bytes)
        with path.open("rb") as file:
            sha256 = storage.sha256_of(file)
        if sha256 != entry.sha256:
            problem = f"expected SHA-256 {entry.sha256[:12]}..., found {sha256[:12]}..."
            return [ShardProblem(entry.name, f"{problem}: its bytes have changed")]
        return [ShardProblem(entry.name, problem) for problem in _inside(manifest, entry, path)]
    except ShardError as error:
        return [ShardProblem(entry.name, str(error).removeprefix(f"{path}: "))]
    except OSError as error:
        return [ShardProblem(entry.name, f"cannot be read: {reason_of(error)}")]


def _inside(manifest: Manifest, entry: ShardEntry, path: Path) -> Iterator[str]:
    """Yield what is wrong within a shard whose bytes are those that were written."""
    found = survey(manifest, entry)
    yield from found.problems
    if found.problems or not found.file.blob_offsets:
        return
    file = np.asarray(np.memmap(path, np.uint8, "r"))
    for scale, offset in found.file.blob_offsets.items():
        blob = found.file.view(file, f"patches/{scale}/blob")
        for row, (start, stop) in enumerate(pairwise(offset.tolist())):
            try:
                decode_patch(blob[start:stop].tobytes(), scale)
            except CorruptShard as error:
                yield f"patches/{scale}/blob: patch {row}: {error}"
                break
