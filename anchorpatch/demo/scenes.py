"""scenes: the procedural sample set, textured shapes on cluttered backgrounds.

A scene is a 256 x 256 picture of one object on a cluttered background. The object is a plate
of a certain outline with a textured disc at its centre; the class is the pair of the two::

    disc - stripes - square - checks - triangle - rings - star - rays - cross - dots - (disc)

Outlines and textures alternate; each neighbouring pair of this closed chain is a class, ten in
all, so that every outline and every texture belongs to two classes and neither cue tells the class
alone. Most scenes also hold one or two *distractors* with one cue each, a bare textured disc or a
plate with a plain disc. They stand next to the object's cues on the chain, so that the cues of a
picture with both fit three classes: only who sees outline and texture **together** can tell.

That is what ties an object's size to a scale. The textured disc has about 38 px whatever the size,
so the gap between it and the outline grows with the object: a window of 63 px holds a small object
whole, but of a large one the texture or the outline. Distractors stand close by, so that a window
of 111 px on a small object also holds cues of other classes. Colours are random and say nothing.

The validation transform (short side 256, centre crop 224) cuts a margin of 16 px and resamples
nothing; the object always lies inside the crop.

A set is a folder in ImageNet's layout. Everything about a picture follows from (seed, split,
index): the class is index modulo 10, the size changes every 10 pictures, so that 30 pictures hold
each class in each size.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import joblib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from anchorpatch.errors import DataError, SettingsError, reason_of
from anchorpatch.settings import CROP, RESIZE
from anchorpatch.signals import answers
from anchorpatch.storage import refusals

#: Side of a source picture in pixels.
SIDE: Final = RESIZE

#: Longest side of the object's box in pixels, by the name of its size.
SIZES: Final = {"small": (50, 60), "medium": (78, 92), "large": (120, 144)}

#: The chain of cues: outline, texture, outline, ... (closed). Neighbours make a class.
_CHAIN: Final = (
    "disc", "stripes", "square", "checks", "triangle", "rings", "star", "rays", "cross", "dots",
)  # fmt: skip
_OUTLINES: Final = _CHAIN[::2]
_EDGES: Final = tuple((_CHAIN[i], _CHAIN[(i + 1) % len(_CHAIN)]) for i in range(len(_CHAIN)))

#: The class of each index, "outline_texture", in alphabetical order as folders sort.
CLASSES: Final = tuple(sorted(f"{a}_{b}" if a in _OUTLINES else f"{b}_{a}" for a, b in _EDGES))

#: Chance of each of a scene's two distractors.
_DISTRACTORS: Final = 0.9

#: Diameters of a bare textured disc in pixels, about those inside objects.
_BARE: Final = (32, 44)

#: Diameters in pixels of a plate with a plain disc, beside a small object and beside others.
_EMPTY: Final = {True: (50, 60), False: (50, 92)}

_MARGIN: Final = (SIDE - CROP) // 2
_SUPERSAMPLE: Final = 2

Array = NDArray[np.float64]


class Box(NamedTuple):
    """The object's bounding box in pixels of the source picture; x1 and y1 are exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int

    def in_crop(self) -> Box:
        """Return the box in pixels of the 224 centre crop.

        Example:
            >>> Box(16, 20, 60, 64).in_crop()
            Box(x0=0, y0=4, x1=44, y1=48)
        """
        return Box(*(v - _MARGIN for v in self))


@dataclass(frozen=True)
class _Plate:
    """An object or distractor: where, which cues; None stands for the cue that is missing."""

    center: tuple[float, float]
    diameter: float
    outline: Array | None
    texture: str | None

    @property
    def bounds(self) -> Box:
        points = self.outline
        assert points is not None
        low, high = np.floor(points.min(0)), np.ceil(points.max(0))
        return Box(int(low[0]), int(low[1]), int(high[0]), int(high[1]))


# --- geometry ---------------------------------------------------------------------------------


def _polar(radii: Sequence[float], first: float = -90.0) -> Array:
    angle = np.radians(first + np.arange(len(radii)) * 360 / len(radii))
    points: Array = np.stack([np.cos(angle), np.sin(angle)], 1) * np.asarray(radii)[:, None]
    return points


def _unit_outline(name: str) -> Array:
    """Return the corners (n, 2) of an outline about its centre, of any scale."""
    if name == "disc":
        return _polar([1.0] * 72)
    if name == "square":
        return _polar([1.0] * 4, 45)
    if name == "triangle":
        return _polar([1.0] * 3)
    if name == "star":
        return _polar([1.0, 0.55] * 5)
    a = 0.38  # half an arm's width of the cross
    arm = np.array([[-a, 1], [a, 1], [a, a]])
    turn = np.array([[0, -1], [1, 0]])  # a quarter
    arms = [arm, arm @ turn, arm @ turn @ turn, arm @ turn @ turn @ turn]
    return np.concatenate(arms)


def _outline(rng: np.random.Generator, name: str, diameter: float) -> Array:
    """Return a turned outline about (0, 0) whose box has ``diameter`` as its longest side."""
    turn = math.radians(rng.uniform(-25, 25))
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    points: Array = _unit_outline(name) @ matrix
    points *= diameter / np.ptp(points, axis=0).max()
    return points


def _place_distractors(rng: np.random.Generator, class_index: int, target: _Plate) -> list[_Plate]:
    """Place the single cues: close to the object, which covers them, and apart from each other."""
    outline_name, texture = CLASSES[class_index].split("_")
    n = len(_CHAIN)
    a, b = _CHAIN.index(outline_name), _CHAIN.index(texture)
    first, step = (a, 1) if (a + 1) % n == b else (b, 1)
    # Four neighbours on the chain fit three classes; the object is any of the three.
    start = first - int(rng.integers(3)) * step
    cues = [_CHAIN[(start + i) % n] for i in range(4)]
    cues = [cue for cue in cues if cue not in (outline_name, texture)]
    cues = [cue for cue in cues if rng.random() < _DISTRACTORS]
    small = target.diameter <= SIZES["small"][1]
    placed = [target]
    for cue in rng.permutation(cues):
        is_plate = cue in _OUTLINES
        for _ in range(60):
            diameter = rng.uniform(*(_EMPTY[small] if is_plate else _BARE))
            gap = rng.uniform(-0.1, 0.3) * diameter
            turn, distance = rng.uniform(0, math.tau), (target.diameter + diameter) / 2 + gap
            x = target.center[0] + distance * math.cos(turn)
            y = target.center[1] + distance * math.sin(turn)
            inside = min(x, y) > _MARGIN + 10 and max(x, y) < SIDE - _MARGIN - 10
            apart = all(
                math.dist((x, y), other.center) > 0.4 * (diameter + other.diameter)
                for other in placed[1:]
            )
            if inside and apart:
                outline = _outline(rng, cue, diameter) + np.array((x, y)) if is_plate else None
                placed.append(_Plate((x, y), diameter, outline, None if is_plate else str(cue)))
                break
    return placed[1:]


# --- drawing ----------------------------------------------------------------------------------


def _color(
    rng: np.random.Generator, low: float, high: float, chroma: float = 1.0
) -> tuple[int, int, int]:
    """Return a random colour with a luma (ITU-R 601) between ``low`` and ``high`` of 255."""
    weights = np.array([0.299, 0.587, 0.114])
    rgb = rng.uniform(128 - 128 * chroma, 127 + 128 * chroma, 3)
    goal = rng.uniform(low, high)
    for _ in range(3):  # clipping shifts the luma a little; three rounds settle it
        rgb = np.clip(rgb + goal - rgb @ weights, 0, 255)
    return int(rgb[0]), int(rgb[1]), int(rgb[2])


def _contrast(rng: np.random.Generator) -> list[tuple[int, int, int]]:
    pair = [_color(rng, 20, 75), _color(rng, 175, 240)]
    return pair[::-1] if rng.random() < 0.5 else pair


def _texture_mask(rng: np.random.Generator, name: str, side: int) -> NDArray[np.bool_]:
    """Return where the second colour of a texture goes: bool (side, side) over [-1, 1]^2."""
    axis = (np.arange(side) + 0.5) * 2 / side - 1
    x, y = np.meshgrid(axis, axis)
    turn = rng.uniform(0, math.tau)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    phase = rng.uniform(0, 1, 2)
    if name == "stripes":
        bands = np.floor(u * 3 + phase[0] * 2)
    elif name == "checks":
        bands = np.floor(u * 2.4 + phase[0] * 2) + np.floor(v * 2.4 + phase[1] * 2)
    elif name == "rings":
        bands = np.floor(np.hypot(x, y) * 3.6)
    elif name == "rays":
        bands = np.floor((np.arctan2(v, u) / math.tau + 0.5) * 12)
    else:  # dots
        du, dv = (u * 2 + phase[0]) % 1 - 0.5, (v * 2 + phase[1]) % 1 - 0.5
        bands = np.floor(np.hypot(du, dv) / 0.32).clip(max=1)
    mask: NDArray[np.bool_] = bands % 2 == 0
    return mask


def _paint(rng: np.random.Generator, canvas: Image.Image, plate: _Plate) -> None:
    draw, s = ImageDraw.Draw(canvas), _SUPERSAMPLE
    if plate.outline is not None:
        body, rim = _contrast(rng)
        points = [(float(x) * s, float(y) * s) for x, y in plate.outline]
        draw.polygon(points, fill=body)
        width = max(2, round(0.035 * plate.diameter * s))
        draw.line([*points, points[0], points[1]], fill=rim, width=width, joint="curve")
    # The disc at the centre of a plate is about the same whatever the size of the plate.
    disc_diameter = plate.diameter if plate.outline is None else 30 + 0.08 * plate.diameter
    radius = disc_diameter / 2 * s
    x0, y0 = (round(c * s - radius) for c in plate.center)
    side = round(2 * radius)
    disc = Image.new("L", (side, side))
    ImageDraw.Draw(disc).ellipse((0, 0, side - 1, side - 1), fill=255)
    first, second = _contrast(rng)
    canvas.paste(first, (x0, y0), disc)
    if plate.texture is not None:
        marks = Image.fromarray(_texture_mask(rng, plate.texture, side))
        canvas.paste(second, (x0, y0), ImageChops.logical_and(disc.convert("1"), marks))


def _background(rng: np.random.Generator) -> Image.Image:
    """Return a gradient with soft noise, blobs and lines, all paler than objects are."""
    side = SIDE * _SUPERSAMPLE

    def pale() -> tuple[int, int, int]:
        return _color(rng, 85, 170, chroma=0.5)

    corners = np.array([pale() for _ in range(4)], np.uint8).reshape(2, 2, 3)
    canvas = Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR)
    for cells, share in ((12, 0.2), (64, 0.1)):
        noise = rng.integers(40, 216, (cells, cells, 3), np.uint8)
        layer = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        canvas = Image.blend(canvas, layer, share)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(5, 11)):
        (x, y), (a, b) = rng.uniform(0, side, 2), rng.uniform(0.01, 0.07, 2) * side
        draw.ellipse((x - a, y - b, x + a, y + b), fill=pale())
    for _ in range(rng.integers(5, 11)):
        x, y, length = *rng.uniform(0, side, 2), rng.uniform(0.05, 0.35) * side
        angle, width = rng.uniform(0, math.pi), int(rng.integers(2, 9))
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        draw.line([(x, y), end], fill=pale(), width=width)
    return canvas


def draw_scene(
    seed: int | Sequence[int], class_index: int, size: str
) -> tuple[NDArray[np.uint8], Box]:
    """Draw one scene.

    Args:
        seed: of this picture; the same arguments draw the same picture.
        class_index: into `CLASSES`.
        size: a key of `SIZES`.

    Returns:
        The source picture, uint8 (256, 256, 3), and the object's box in its pixels.

    Raises:
        SettingsError: no such class or size.

    Example:
        >>> image, box = draw_scene(7, 0, "large")
        >>> image.shape, 120 <= max(box.x1 - box.x0, box.y1 - box.y0) <= 146
        ((256, 256, 3), True)
    """
    rng, target = _begin(seed, class_index, size)
    distractors = _place_distractors(rng, class_index, target)
    canvas = _background(rng)
    for plate in [*distractors, target]:
        _paint(rng, canvas, plate)
    image = np.asarray(canvas.reduce(_SUPERSAMPLE), np.float32)
    image += rng.normal(0, rng.uniform(1, 6), image.shape).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), target.bounds


def _begin(
    seed: int | Sequence[int], class_index: int, size: str
) -> tuple[np.random.Generator, _Plate]:
    if not 0 <= class_index < len(CLASSES):
        raise SettingsError(f"class_index: expected 0 to {len(CLASSES) - 1}, got {class_index}")
    if size not in SIZES:
        raise SettingsError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    rng = np.random.default_rng(seed)
    outline_name, texture = CLASSES[class_index].split("_")
    diameter = rng.uniform(*SIZES[size])
    points = _outline(rng, outline_name, diameter)
    low, high = _MARGIN + 1 - points.min(0), SIDE - _MARGIN - 1 - points.max(0)
    center = rng.uniform(low, high)
    return rng, _Plate((center[0], center[1]), diameter, points + center, texture)


# --- a set on the disk --------------------------------------------------------------------------

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


def scene_box(seed: int, split: str, index: int) -> Box:
    """Return a picture's box without drawing it."""
    return _begin(*_key(seed, split, index))[1].bounds


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
        _, class_index, size = _key(seed, split, index)
        writer.writerow((path, CLASSES[class_index], size, *scene_box(seed, split, index)))
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
