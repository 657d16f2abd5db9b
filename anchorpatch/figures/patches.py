"""Figure 3: images by chosen scale, their patches framed and cut out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anchorpatch.figures.canvas import BLACK, GAP, GREY, beside, bordered, stacked, written
from anchorpatch.figures.frames import COLORS, badge, draw_frames, framed, number
from anchorpatch.jobs.figures.examples import Example
from anchorpatch.jobs.figures.patches import PatchExamples
from anchorpatch.text import counted

__all__ = ["heading", "localized_picture", "patches_figure"]

#: What the page aims at, in pixels.
_WIDTH: Final = 1400

#: Most images in a row.
_COLUMNS: Final = 3

_MARGIN: Final = 2


def patches_figure(result: PatchExamples) -> Image.Image:
    """Draw Figure 3: a block of images for each scale, the patches framed and cut out.

    A frame is the outermost two pixels of its patch, one pixel of the picture being one of the
    crop. The patches are numbered, the strongest first.

    Args:
        result: from `anchorpatch.jobs.figures.patches.find_patches`.
    """
    wrong = any(e.label != e.predicted for part in result.examples.values() for e in part)
    cells = {
        scale: [_cell(example, predicted=wrong) for example in examples]
        for scale, examples in result.examples.items()
    }
    width = max(cell.width for of_scale in cells.values() for cell in of_scale)
    blocks = []
    for scale, of_scale in cells.items():
        share = result.by_scale[scale] / result.looked.images
        top = heading(scale, f"chosen by {share:.1%} of {counted(result.looked.images, 'image')}")
        blocks.append(stacked([top, _grid(of_scale, width)] if of_scale else [top]))
    return bordered(stacked(blocks, 3 * GAP))


def localized_picture(
    pixels: NDArray[np.uint8], corners: NDArray[Any], theta: int, *, note: str = ""
) -> Image.Image:
    """Draw an image with its patches framed and numbered, and cut out beside it, in rows.

    Args:
        pixels: the crop, uint8 (224, 224, 3).
        corners: top-left (y, x) of each patch in pixels (k, 2), the strongest first.
        theta: side of the patches in pixels.
        note: a line below the image.
    """
    color = COLORS[theta]
    marks = [number(rank + 1, color) for rank in range(len(corners))]
    image = draw_frames(pixels, corners, theta, [color] * len(corners), marks, width=_MARGIN)
    # The number stands beside the patch: no pixel of it is hidden.
    cuts = [
        beside([badge(mark), framed(pixels[y : y + theta, x : x + theta], color, _MARGIN)], 0)
        for mark, (y, x) in zip(marks, np.asarray(corners).tolist(), strict=True)
    ]
    most = max(1, round(len(pixels) / (theta + 3 * _MARGIN)))  # rows beside the image
    columns = -(-len(cuts) // most)
    rows = [beside(cuts[i : i + columns], 2 * _MARGIN) for i in range(0, len(cuts), columns)]
    if note:
        image = stacked([image, written(note, image.width, size=12, fill=GREY)], _MARGIN)
    return beside([image, stacked(rows, _MARGIN)], 2 * _MARGIN)


def _cell(example: Example, *, predicted: bool) -> Image.Image:
    picture = localized_picture(example.pixels, example.corners, example.scale)
    lines = [written(example.label, picture.width)]
    if predicted:
        right = example.label == example.predicted
        name, start = ("right", "predicted ") if right else (example.predicted, "predicted as ")
        end = f", {example.probability:.0%}"
        lines.append(written(name, picture.width, size=12, fill=GREY, start=start, end=end))
    return stacked([*lines, picture], 2)


def _grid(cells: Sequence[Image.Image], width: int) -> Image.Image:
    columns = max(1, min(_COLUMNS, _WIDTH // width))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return stacked([beside(row, 2 * GAP, width=width) for row in rows], 2 * GAP)


def heading(scale: int, text: str) -> Image.Image:
    """Return the line above a block: the colour and the name of a scale, and a text."""
    swatch = Image.new("RGB", (16, 16), COLORS[scale])
    name = written(f"{scale} px", None, size=16, bold=True, fill=BLACK)
    return beside([swatch, name, written(text, None, size=15, fill=GREY)])
