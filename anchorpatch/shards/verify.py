"""Verifying shards: their bytes against the manifest, and what they say against the schema.

`survey` opens and checks a shard in one way for all who read it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from anchorpatch import storage
from anchorpatch.errors import CorruptShard, ShardError, reason_of
from anchorpatch.settings import SCALES
from anchorpatch.shards.header import ShardHeader
from anchorpatch.shards.layout import (
    MANIFEST_NAME,
    expected_datasets,
    find_datasets,
    open_shard,
    read_attributes,
    shard_name,
)
from anchorpatch.shards.manifest import (
    JOURNAL_NAME,
    LEFTOVERS,
    Manifest,
    ShardEntry,
    read_manifest,
)
from anchorpatch.signals import answers

_Table = dict[str, NDArray[Any]]

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
        jobs: processes; -1: one per CPU core.
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
    expected = {manifest.shard_path(i).name for i in range(manifest.shard_count)}
    there = {path.name for path in manifest.folder.iterdir()}
    without = f"has no entry in {MANIFEST_NAME}"
    again = f"missing, and {without}: run the same extract again"
    foreign = (
        f"{without}: if it comes from another folder, join the folders with "
        "`anchorpatch shards merge`, else run the same extract again"
    )
    problems += [ShardProblem(n, foreign if n in there else again) for n in expected - known]
    unfit = f"has an entry in {MANIFEST_NAME}, but is no shard of this split"
    problems += [ShardProblem(name, unfit) for name in known - expected]
    others = there - known - expected - {MANIFEST_NAME, JOURNAL_NAME}
    problems += [ShardProblem(name, without) for name in others if not _OURS.fullmatch(name)]
    return sorted(problems)


def verify_shards(
    manifest: Manifest,
    entries: Sequence[ShardEntry],
    jobs: int = -1,
    done: Callable[[int], object] | None = None,
) -> list[ShardProblem]:
    """Verify some of the shards of a split; see `verify_folder`."""
    from joblib import Parallel, delayed  # slow to import, and no reader needs it

    verify = Parallel(n_jobs=1 if len(entries) < 2 else jobs, return_as="generator")
    alone = manifest.without_entries()  # goes to a process with each shard
    found = verify(delayed(verify_shard)(alone, entry) for entry in entries)
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
            return [ShardProblem(entry.name, f"{problem}: the file has changed")]
        found = survey(manifest, entry)
        problems = found.problems or list(_blob_problems(found, path))
        return [ShardProblem(entry.name, problem) for problem in problems]
    except ShardError as error:
        return [ShardProblem(entry.name, str(error).removeprefix(f"{path}: "))]
    except OSError as error:
        return [ShardProblem(entry.name, f"cannot be read: {reason_of(error)}")]


def _blob_problems(found: Survey, path: Path) -> Iterator[str]:
    """Yield the first patch of each scale that is no JPEG file of its size."""
    for scale, offset in found.blob_offsets.items():
        blob = found.view(np.memmap(path, np.uint8, "r"), f"patches/{scale}/blob")
        for row, (start, stop) in enumerate(pairwise(offset.tolist())):
            try:
                decode_patch(blob[start:stop].tobytes(), scale)
            except CorruptShard as error:
                yield f"patches/{scale}/blob: patch {row}: {error}"
                break


# --- within a shard ----------------------------------------------------------------------------


def check_size(path: Path, expected: int) -> None:
    """Raise CorruptShard unless a shard is there and has its size in bytes."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptShard(f"{path}: missing: run the same extract again") from None
    except OSError as error:
        raise CorruptShard(f"{path}: cannot read: {reason_of(error)}") from error
    if size != expected:
        raise CorruptShard(
            f"{path}: expected {expected:,} bytes, found {size:,}: run the same extract again"
        )


class Survey(NamedTuple):
    """What a shard holds, and what is wrong with it.

    Attributes:
        places: offset in the file in bytes, and shape, of each dataset of pixels.
        blob_offsets: for codec jpeg, where each patch starts in the blob, by scale.
        tables: columns of ``images`` and ``patches/T``, by group.
        problems: what was expected and what was found; nothing of the shard may be used
            unless this is empty.
    """

    places: dict[str, tuple[int, tuple[int, ...]]]
    blob_offsets: dict[int, NDArray[np.int64]]
    tables: dict[str, _Table]
    problems: list[str]

    def view(self, file: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """Return a dataset of pixels as a view into the bytes of the file."""
        offset, shape = self.places[name]
        return file[offset : offset + math.prod(shape)].reshape(shape)


def survey(manifest: Manifest, entry: ShardEntry) -> Survey:
    """Open a shard and check all of it but the pixels, first what is declared, then the values.

    What HDF5 declares is never trusted: a dataset may be a link to another file, or claim more
    bytes than there are. Takes some milliseconds; nothing larger than the file is allocated.

    Args:
        manifest: of the split.
        entry: of the shard.

    Raises:
        CorruptShard: a dataset is missing, or not stored as the schema says.
        ShardError: another format version.
    """
    with open_shard(manifest.folder / entry.name) as file:
        header, files_sha256 = read_attributes(file)
        expected = expected_datasets(header.settings, entry.images, entry.patches)
        found = find_datasets(file, expected, entry.bytes)
        tables: dict[str, _Table] = {"images": {}, **{f"patches/{s}": {} for s in SCALES}}
        places: dict[str, tuple[int, tuple[int, ...]]] = {}
        offsets: dict[int, NDArray[np.int64]] = {}
        for name, dataset in found.items():
            group, _, column = name.rpartition("/")
            if column in ("pixels", "blob"):
                places[name] = dataset.id.get_offset() or 0, dataset.shape
            elif column == "offset":
                offsets[int(group.rpartition("/")[2])] = dataset[:]
            elif group in tables:
                tables[group][column] = dataset[:]
        skipped = len(found["skipped/path"])
    problems = _header_problems(manifest, entry, header, files_sha256, skipped)
    problems += _image_problems(tables["images"], header)
    for scale in SCALES:
        of_scale = tables[f"patches/{scale}"]
        problems += _patch_problems(tables["images"], of_scale, scale, header.settings.img_size)
    for scale, offset in offsets.items():
        size = places[f"patches/{scale}/blob"][1][0]
        if offset[0] != 0 or offset[-1] != size or (offset[1:] < offset[:-1]).any():
            problems.append(
                f"patches/{scale}/offset: expected to rise from 0 to {size}, the bytes of the "
                "blob, found others"
            )
    return Survey(places, offsets, tables, problems)


def _header_problems(
    manifest: Manifest, entry: ShardEntry, header: ShardHeader, files_sha256: str, skipped: int
) -> list[str]:
    problems = [
        f"its {name} are not those of {MANIFEST_NAME}"
        for name in ("split", "classes", "network_classes", "settings", "weights_sha256")
        if getattr(header, name) != getattr(manifest.header, name)
    ]
    if files_sha256 != entry.files_sha256:
        problems.append(f"its file list is not that of {MANIFEST_NAME}")
    number = entry.name.rpartition("-")[2].partition(".")[0]
    # `verify` names a shard that is not among the split.
    if number.isdecimal() and shard_name(manifest.header.split, int(number)) == entry.name:
        expected = len(manifest.shard_range(int(number)))
        if entry.images + skipped != expected:
            problems.append(
                f"expected {expected} images and skipped images, found {entry.images} + {skipped}"
            )
    return problems


def _image_problems(images: _Table, header: ShardHeader) -> Iterator[str]:
    for name, (low, high) in {
        "label": (0, len(header.classes) - 1),
        "predicted": (0, len(header.network_classes) - 1),
        "branch_class": (0, len(header.network_classes) - 1),
        "branch_prob": (0, 1),
    }.items():
        if not ((images[name] >= low) & (images[name] <= high)).all():
            yield f"images/{name}: expected {low} to {high}, found others"
    if not np.isin(images["scale"], SCALES).all():
        yield f"images/scale: expected {SCALES}, found others"
    if (images["size"] < 1).any():
        yield "images/size: expected at least 1 px, found others"
    paths = images["path"]
    if (paths[1:] <= paths[:-1]).any():
        yield "images/path: expected each once, in order, found others"


def _patch_problems(images: _Table, patches: _Table, scale: int, side: int) -> Iterator[str]:
    rows = np.flatnonzero(images["scale"] == scale)
    count, first = images["count"][rows].astype(np.int64), images["first"][rows]
    image, corner, score = patches["image"], patches["corner"], patches["score"]
    if (first != np.cumsum(count) - count).any() or (count < 1).any() or count.sum() != len(image):
        yield f"images/first, images/count: expected to divide {len(image)} patches of {scale} px"
    elif (image != np.repeat(rows, count)).any():
        yield f"patches/{scale}/image: expected the image whose slice it is, found others"
    if ((corner < 0) | (corner > side - scale)).any():
        yield f"patches/{scale}/corner: expected 0 to {side - scale}, found others"
    if not np.isfinite(score).all():
        yield f"patches/{scale}/score: expected numbers, found NaN or infinity"
    if ((image[1:] == image[:-1]) & (score[1:] > score[:-1])).any():
        yield f"patches/{scale}/score: expected to fall within each image, found others"


def check_jpeg(data: bytes, scale: int) -> None:
    """Do nothing where a JPEG patch of a shard begins and ends as one; no pixel is decoded.

    Raises:
        CorruptShard: it is cut off or no JPEG file, or of another size or mode.
    """
    with _opened(data, scale):
        if not data.endswith(b"\xff\xd9"):
            raise ValueError("cut off")


def decode_patch(data: bytes, scale: int) -> NDArray[np.uint8]:
    """Decode a JPEG patch of a shard, uint8 (scale, scale, 3), if it says it is one.

    Raises:
        CorruptShard: it is damaged, or of another size or mode.
    """
    with _opened(data, scale) as image:
        return np.asarray(image)


@contextmanager
def _opened(data: bytes, scale: int) -> Iterator[JpegImageFile]:
    """Open a JPEG patch, and turn what goes wrong during the block into CorruptShard."""
    expected = f"expected a JPEG file, RGB of {scale} x {scale} px, found"
    try:
        # Not Image.open: that refuses large pictures with errors and warnings of its own.
        with JpegImageFile(io.BytesIO(data)) as image:
            found = image.mode, *image.size
            if found == ("RGB", scale, scale):
                yield image
    except Exception as error:  # Pillow raises nearly anything, by the damage
        raise CorruptShard(
            f"{expected} {len(data):,} bytes that are not a JPEG file: {reason_of(error)}"
        ) from error
    if found != ("RGB", scale, scale):
        raise CorruptShard(f"{expected} {found[0]} of {found[1]} x {found[2]} px")
