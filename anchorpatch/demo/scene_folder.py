"""A set of scenes on the disk, in ImageNet's layout, with the true boxes of the objects.

Everything about a picture follows from (seed, split, index): the class is index modulo 10, the
size changes every 10 pictures, so that 30 pictures hold each class in each size.
"""

from __future__ import annotations

import csv
import io
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import joblib
from PIL import Image

from anchorpatch.demo.scenes import CLASSES, SIZES, Box, draw_scene, object_box
from anchorpatch.errors import DataError, SettingsError, reason_of
from anchorpatch.signals import answers
from anchorpatch.storage import refusals

SPLITS: Final = ("train", "val")

#: Changes with the drawings, so that sets of other drawings are told apart.
_VERSION: Final = 2
_MARKER: Final = "scenes.json"
_BOXES: Final = "boxes.csv"
_HEADER: Final = ("path", "class", "size", "x0", "y0", "x1", "y1")


def _key(seed: int, split: str, index: int) -> tuple[tuple[int, int, int], int, str]:
    """Return the arguments of `draw_scene` for a picture of the set."""
    size = tuple(SIZES)[index // len(CLASSES) % len(SIZES)]
    return (seed, SPLITS.index(split), index), index % len(CLASSES), size


def scene_path(split: str, index: int) -> str:
    """Return a picture's path below DIR.

    Example:
        >>> scene_path("val", 12)
        'val/disc_dots/000012.JPEG'
    """
    return f"{split}/{CLASSES[index % len(CLASSES)]}/{index:06d}.JPEG"


def make_scenes(folder: Path, train: int, val: int, seed: int = 0, jobs: int | None = None) -> int:
    """Write a set of scenes in the folder layout of ImageNet, and its true boxes.

    ``DIR/train/<class>/*.JPEG``, ``DIR/val/<class>/*.JPEG``, ``DIR/boxes.csv`` (path below DIR,
    class, size, x0, y0, x1, y1 in pixels of the 256 x 256 source picture, ends exclusive) and
    ``DIR/scenes.json`` with the parameters. A picture does not depend on how many there are. An
    interrupted call is completed by the same call; where the set is whole, nothing is written.

    Args:
        folder: DIR; new, empty, or holding a set of the same parameters.
        train: number of pictures in ``train``.
        val: number of pictures in ``val``.
        seed: 0 or more; another seed gives other pictures.
        jobs: processes; None takes one for each CPU.

    Returns:
        The number of pictures drawn; 0 where the set was already there.

    Raises:
        SettingsError: a negative number, or no picture at all.
        DataError: the folder holds something else; nothing in it is changed.
        StorageError: the disk refused a write.
    """
    if min(train, val, seed) < 0 or train + val == 0 or (jobs is not None and jobs < 1):
        raise SettingsError(
            f"scenes: expected train, val and seed of at least 0, at least one picture and one "
            f"job, got train={train}, val={val}, seed={seed}, jobs={jobs}"
        )
    parameters = {"scenes": _VERSION, "train": train, "val": val, "seed": seed}
    wanted = {
        scene_path(split, index): (split, index)
        for split, count in zip(SPLITS, (train, val), strict=True)
        for index in range(count)
    }
    present = _survey(folder, parameters, set(wanted))
    missing = [at for path, at in wanted.items() if path not in present]
    if missing or _BOXES not in present:
        try:
            with refusals(folder):
                folder.mkdir(parents=True, exist_ok=True)
                _write(folder / _MARKER, (json.dumps(parameters) + "\n").encode())
                for parent in {(folder / path).parent for path in wanted}:
                    parent.mkdir(parents=True, exist_ok=True)
                _draw_all(folder, seed, missing, jobs)
                _write(folder / _BOXES, _boxes_csv(seed, wanted))
        except BaseException:
            # Also what processes left that were ended in the middle of a picture.
            for path in (*wanted, _MARKER, _BOXES):
                with suppress(OSError):
                    _temporary(folder / path).unlink()
            raise
    return len(missing)


def _survey(folder: Path, parameters: dict[str, int], wanted: set[str]) -> set[str]:
    """Return the paths of the set that are there; refuse a folder that holds anything else."""
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder for scenes, found a file; choose another")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    # A temporary file is what an interrupted write of our own left: it will be replaced.
    ours = wanted | {_MARKER, _BOXES}
    found = {path for path in found if path.removesuffix(".tmp") not in ours or path in ours}
    if not found:
        return found
    marker = folder / _MARKER
    try:
        there = json.loads(marker.read_bytes())
    except (OSError, ValueError):
        raise DataError(
            f"{folder}: expected an empty folder or a set of scenes, found {min(found)} and no "
            f"readable {_MARKER}; choose another folder"
        ) from None
    if there != parameters:
        raise DataError(
            f"{marker}: the folder holds another set ({json.dumps(there)}, asked for "
            f"{json.dumps(parameters)}); choose another folder or delete that one"
        )
    foreign = found - ours
    if foreign:
        raise DataError(
            f"{folder}: expected scenes alone, found {min(foreign)}; move it away or choose "
            "another folder"
        )
    return found


def _temporary(path: Path) -> Path:
    """Return the name of a file until it is whole; the same in every call, which replaces it."""
    return path.with_name(path.name + ".tmp")


def _write(path: Path, data: bytes) -> None:
    # Not synced to the disk as by `storage.write_atomically`: that takes longer than the drawing.
    _temporary(path).write_bytes(data)
    os.replace(_temporary(path), path)


def _draw_all(folder: Path, seed: int, missing: list[tuple[str, int]], jobs: int | None) -> None:
    # Starting processes takes as long as 50 pictures.
    n_jobs = 1 if len(missing) < 50 else jobs or joblib.cpu_count()
    drawn = joblib.Parallel(n_jobs=n_jobs, batch_size=32, return_as="generator")(
        joblib.delayed(_draw_file)(folder, seed, split, index) for split, index in missing
    )
    for _ in answers(drawn, "the processes that draw scenes"):
        pass


def _draw_file(folder: Path, seed: int, split: str, index: int) -> None:
    image, _ = draw_scene(*_key(seed, split, index))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92)
    _write(folder / scene_path(split, index), buffer.getvalue())


def _boxes_csv(seed: int, wanted: dict[str, tuple[str, int]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADER)
    for path, (split, index) in wanted.items():
        key = _key(seed, split, index)
        writer.writerow((path, CLASSES[key[1]], key[2], *object_box(*key)))
    return text.getvalue().encode()


def read_boxes(path: Path) -> dict[str, tuple[str, Box]]:
    """Read ``boxes.csv``: the size's name and the box in source pixels, by the path below DIR.

    Raises:
        DataError: the file is missing or not such a table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            if tuple(next(rows, ())) != _HEADER:
                raise ValueError("the header differs")
            return {row[0]: (row[2], Box(*map(int, row[3:]))) for row in rows}
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: expected a table {','.join(_HEADER)}, found none ({reason_of(error)}); "
            "make it with: anchorpatch scenes"
        ) from error
