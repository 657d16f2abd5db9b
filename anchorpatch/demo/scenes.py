"""Scenes: procedural pictures of textured shapes on cluttered backgrounds.

A scene is a 256 x 256 picture of one object on a cluttered background. The object is a plate
of a certain outline with a textured disc at its center; the class is the pair of the two::

    disc - stripes - square - checks - triangle - rings - star - rays - cross - dots - (disc)

Outlines and textures alternate; each neighboring pair of this closed chain is a class, ten in
all, so that every outline and every texture belongs to two classes and neither cue tells the class
alone. Most scenes also hold one or two *distractors* with one cue each, a bare textured disc or a
plate with a plain disc. They stand next to the object's cues on the chain, so that the cues of a
picture with both fit three classes: only who sees outline and texture **together** can tell.

That is what ties an object's size to a scale. The textured disc has about 38 px whatever the size,
so the gap between it and the outline grows with the object: a window of 63 px holds a small object
whole, but of a large one the texture or the outline. Distractors stand close by, so that a window
of 111 px on a small object also holds cues of other classes. Colors are random and say nothing.

The validation transform (short side 256, center crop 224) cuts a margin of 16 px and resamples
nothing; the object always lies inside the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from anchorpatch.errors import SettingsError
from anchorpatch.geometry import geometry
from anchorpatch.settings import CROP, CropSettings

#: Side of a source picture in pixels.
SIDE: Final = CropSettings().resize

#: Longest side of the object's box in pixels, by the name of its size.
SIZES: Final = {"small": (50, 60), "medium": (78, 92), "large": (120, 144)}

#: The chain of cues: outline, texture, outline, ... (closed). Neighbors make a class.
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

    def in_crop(self, crop: CropSettings | None = None) -> Box:
        """Return the box in pixels of the crop, by default the 224 px center crop.

        Example:
            >>> Box(16, 20, 60, 64).in_crop()
            Box(x0=0, y0=4, x1=44, y1=48)
        """
        resized = geometry(SIDE, SIDE, crop)  # a square, so both axes are alike
        return Box(*(round(v * resized.width / SIDE) - resized.left for v in self))


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
    """Return the corners (n, 2) of an outline about its center, of any scale."""
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
    # Four neighbors on the chain fit three classes; the object is any of the three.
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
    """Return a random color with a luma (ITU-R 601) between ``low`` and ``high`` of 255."""
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
    """Return where the second color of a texture goes: bool (side, side) over [-1, 1]^2."""
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
    # The disc at the center of a plate is about the same whatever the size of the plate.
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


def object_box(seed: int | Sequence[int], class_index: int, size: str) -> Box:
    """Return the box that `draw_scene` returns for the same arguments, without drawing."""
    return _begin(seed, class_index, size)[1].bounds


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
