"""Figure 4: the patches that misled a branch, and an image of the class it took."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image

from anchorpatch.figures.canvas import (
    GAP,
    GREY,
    Color,
    beside,
    bordered,
    rounded,
    stacked,
    written,
)
from anchorpatch.figures.frames import MARK, Mark, badge, cross, draw_frames, framed, tick
from anchorpatch.figures.patches import heading, localized_picture
from anchorpatch.jobs.figures.errors import BranchError, BranchErrors, Evidence
from anchorpatch.text import counted

__all__ = ["RIGHT", "WRONG", "errors_figure"]

#: Green and red that stay apart for the colour-blind (Okabe and Ito's); signs say it too.
RIGHT: Final[Color] = (0, 158, 115)
WRONG: Final[Color] = (194, 30, 0)

#: Margin of a cut-out patch, and of its frame in the image, in pixels.
_MARGIN: Final = 3

#: Width of the text below a patch, in pixels.
_PATCH_TEXT: Final = 150


def errors_figure(result: BranchErrors) -> Image.Image:
    """Draw Figure 4: a row for each error, in a block for each branch.

    From left to right: the image; the branch's patch with the most evidence for the class that it
    predicts, red with a cross, and for the true class, green with a tick; an image of the mistaken
    class that the branch is surest about, with the branch's patches framed and cut out.

    Args:
        result: from `anchorpatch.jobs.figures.errors.find_errors`.
    """
    blocks = [_legend()]
    for scale, errors in result.errors.items():
        text = (
            f"is wrong and another branch right about {result.found[scale]:,} of "
            f"{counted(result.looked.images, 'image')}"
        )
        rows = [_row(error, scale) for error in errors]
        blocks.append(stacked([heading(scale, text), *rows], 2 * GAP))
    return bordered(stacked(blocks, 3 * GAP))


def _legend() -> Image.Image:
    return beside(
        [
            badge(cross(WRONG)),
            written(
                "most evidence of the branch for the class it predicts, which is wrong",
                None,
                size=13,
                fill=GREY,
            ),
            badge(tick(RIGHT)),
            written("most evidence of the branch for the true class", None, size=13, fill=GREY),
        ]
    )


def _row(error: BranchError, scale: int) -> Image.Image:
    corners = np.array([error.mistaken.corner, error.true.corner])
    marks = [cross(WRONG), tick(RIGHT)]
    image = draw_frames(error.pixels, corners, scale, [WRONG, RIGHT], marks, width=_MARGIN)
    others = " and ".join(f"{other} px" for other in error.right)
    parts = [
        stacked(
            [
                written(error.true.name, image.width, bold=True),
                image,
                written(f"right by {others}", image.width, size=12, fill=GREY),
            ],
            2,
        ),
        _patch(error, error.mistaken, scale, WRONG, cross(WRONG)),
        _patch(error, error.true, scale, RIGHT, tick(RIGHT)),
    ]
    if error.typical is not None:
        typical = error.typical
        note = f"{typical.probability:.0%} by {scale} px"
        picture = localized_picture(typical.pixels, typical.corners, scale, note=note)
        name = written(error.mistaken.name, picture.width, start="an image of ")
        parts.append(stacked([name, picture], 2))
    else:
        parts.append(
            written(f"no image of {error.mistaken.name} that it is right about", 224, wrap=True)
        )
    return beside(parts, 2 * GAP)


def _patch(
    error: BranchError, evidence: Evidence, scale: int, color: Color, mark: Mark
) -> Image.Image:
    y, x = evidence.corner
    cut = framed(error.pixels[y : y + scale, x : x + scale], color, _MARGIN)
    width = max(cut.width, _PATCH_TEXT)
    name = written(evidence.name, width - MARK - GAP)
    facts = (f"evidence {rounded(evidence.score)}", f"{evidence.probability:.0%} by {scale} px")
    lines = [written(fact, width, size=12, fill=GREY) for fact in facts]
    return stacked([beside([badge(mark), name]), cut, *lines], 2)
