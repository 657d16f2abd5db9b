"""Verifying shards: their bytes against the manifest, and what they say against the schema."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray

from anchorpatch import storage
from anchorpatch.errors import ShardError
from anchorpatch.shards.access import ShardFile, check_size, open_shard, read_table
from anchorpatch.shards.layout import CROP_SIDE, MANIFEST_NAME, SCALES, read_attributes
from anchorpatch.shards.manifest import Manifest, ShardEntry, read_manifest

__all__ = ["ShardProblem", "verify_folder", "verify_shard"]

_Table = dict[str, NDArray[Any]]

#: Leftovers of a run that was killed: no fault, as the next run clears them away.
_LEFTOVERS: Final = re.compile(r"\.manifest\.lock|\.manifest\.json\.[0-9a-f]{12}\.tmp|.*\.h5\.tmp")


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
        Every problem found, by the name of the file.

    Raises:
        ShardError: there is no manifest that can be read. Never for a bad shard.
    """
    manifest = read_manifest(Path(folder))
    jobs = 1 if len(manifest.entries) < 2 else jobs
    verify = Parallel(n_jobs=jobs, return_as="generator")
    found = verify(delayed(verify_shard)(manifest, entry) for entry in manifest.entries)
    problems = []
    for entry, of_shard in zip(manifest.entries, found, strict=True):
        problems += of_shard
        if done is not None:
            done(entry.images)
    known = {entry.name for entry in manifest.entries}
    expected = [manifest.shard_path(i).name for i in range(manifest.shard_count)]
    for name in expected:
        if name not in known:
            there = (manifest.folder / name).exists()
            what = "has no entry in" if there else "is missing, and has no entry in"
            problems.append(
                ShardProblem(name, f"{what} {MANIFEST_NAME}: run the same extract again")
            )
    for name in sorted(known - set(expected)):
        problems.append(ShardProblem(name, f"is in {MANIFEST_NAME}, but no shard of this split"))
    for path in sorted(manifest.folder.iterdir()):
        if path.name not in {*known, *expected, MANIFEST_NAME} and not _LEFTOVERS.fullmatch(
            path.name
        ):
            problems.append(ShardProblem(path.name, f"is not in {MANIFEST_NAME}"))
    return sorted(problems)


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
        return [ShardProblem(entry.name, f"cannot be read: {error.strerror or error}")]


def _inside(manifest: Manifest, entry: ShardEntry, path: Path) -> Iterator[str]:
    """Yield what is wrong within a shard whose bytes are those that were written."""
    ShardFile.load(path, entry)
    with open_shard(path) as file:
        header, files_sha256 = read_attributes(file)
        skipped = file["skipped/path"].shape[0]
    for name in ("split", "classes", "network_classes", "settings", "weights_sha256"):
        if getattr(header, name) != getattr(manifest.header, name):
            yield f"its {name} are not those of {MANIFEST_NAME}"
    if files_sha256 != entry.files_sha256:
        yield f"its file list is not that of {MANIFEST_NAME}"
    start, stop = manifest.shard_range(int(entry.name.rpartition("-")[2].split(".")[0]))
    if entry.images + skipped != stop - start:
        yield f"expected {stop - start} images and skipped images, found {entry.images} + {skipped}"
    images = read_table(path, "images", entry.images)
    yield from _image_problems(images, header.classes, header.network_classes)
    for scale in SCALES:
        patches = read_table(path, f"patches/{scale}", entry.patches[scale])
        yield from _patch_problems(images, patches, scale)


def _image_problems(
    images: _Table, classes: tuple[str, ...], network_classes: tuple[str, ...]
) -> Iterator[str]:
    for name, limit in (
        ("label", len(classes)),
        ("predicted", len(network_classes)),
        ("branch_class", len(network_classes)),
    ):
        if ((images[name] < 0) | (images[name] >= limit)).any():
            yield f"images/{name}: expected 0 to {limit - 1}, found others"
    if not np.isin(images["scale"], SCALES).all():
        yield f"images/scale: expected {SCALES}, found others"
    probability = images["branch_prob"]
    if not ((probability >= 0) & (probability <= 1)).all():
        yield "images/branch_prob: expected 0 to 1, found others"
    if (images["size"] < 1).any():
        yield "images/size: expected at least 1 px, found others"
    paths = images["path"]
    if (paths[1:] <= paths[:-1]).any():
        yield "images/path: expected each once, in order, found others"


def _patch_problems(images: _Table, patches: _Table, scale: int) -> Iterator[str]:
    rows = np.flatnonzero(images["scale"] == scale)
    count, first = images["count"][rows], images["first"][rows]
    m = len(patches["image"])
    if (first != np.cumsum(count) - count).any() or (count < 1).any() or count.sum() != m:
        yield f"images/first, images/count: expected to divide {m} patches of {scale} px"
    elif (patches["image"] != np.repeat(rows, count)).any():
        yield f"patches/{scale}/image: expected the image whose slice it is, found others"
    corner, score = patches["corner"], patches["score"]
    if ((corner < 0) | (corner > CROP_SIDE - scale)).any():
        yield f"patches/{scale}/corner: expected 0 to {CROP_SIDE - scale}, found others"
    if not np.isfinite(score).all():
        yield f"patches/{scale}/score: expected numbers, found NaN or infinity"
    same_image = patches["image"][1:] == patches["image"][:-1]
    if (same_image & (score[1:] > score[:-1])).any():
        yield f"patches/{scale}/score: expected the strongest first, found others"
