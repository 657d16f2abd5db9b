"""Figure 4: what misled a branch where another one is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from anchorpatch.classes import ClassNames
from anchorpatch.errors import NothingToShow, SettingsError
from anchorpatch.figures.canvas import (
    GAP,
    Color,
    beside,
    bordered,
    rounded,
    small,
    stacked,
    written,
)
from anchorpatch.figures.examples import Choice, ShownImages, Survey, look_at, looking, spread
from anchorpatch.figures.frames import (
    MARK,
    badge,
    cross,
    cut_out,
    draw_frames,
    heading,
    localized_picture,
    squares,
    tick,
)
from anchorpatch.jobs.crops import CropSource
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.lsp import select
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import PRESETS, SCALES, STRIDE
from anchorpatch.storage import to_json
from anchorpatch.text import counted, few

#: Images of a mistaken class to look at, for one that the branch is sure about.
_TYPICAL_OF: Final = 16


@dataclass(frozen=True, kw_only=True)
class ErrorsConfig(Choice):
    """What Figure 4 shows.

    Attributes:
        scales: of the branches whose errors are shown; the paper's narrowest and widest field.
        per_scale: errors to show of each branch.
    """

    scales: tuple[int, ...] = (63, 111)
    per_scale: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scales or any(scale not in SCALES for scale in self.scales):
            raise SettingsError(f"scales: expected some of {SCALES}, got {self.scales}")


@dataclass(frozen=True)
class Evidence:
    """The patch of a branch that speaks most for a class.

    Attributes:
        name: of the class.
        probability: that the branch gives the class.
        corner: top-left (y, x) in the crop in pixels.
        score: M of the class there; of equal ones the first in row-major order.
    """

    name: str
    probability: float
    corner: tuple[int, int]
    score: float


@dataclass(frozen=True, eq=False)
class Typical:
    """The image of a class that a branch is surest about, with the branch's patches of it.

    Attributes:
        path: below the split folder.
        probability: that the branch gives the class, which is right.
        corners: top-left (y, x) of each patch (k, 2), the strongest first.
        scores: activation of each (k,).
        pixels: the crop, uint8 (S, S, 3).
    """

    path: str
    probability: float
    corners: NDArray[np.int64]
    scores: NDArray[np.float32]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class BranchError:
    """An image that a branch takes for another class, and another branch for its own.

    Attributes:
        path: below the split folder.
        pixels: the crop, uint8 (S, S, 3).
        mistaken: evidence of the branch for the class that it predicts.
        true: its evidence for the image's class.
        right: scales of the branches that are right.
        typical: an image of the mistaken class; None where the branch is right about none of
            those looked at.
    """

    path: str
    pixels: NDArray[np.uint8]
    mistaken: Evidence
    true: Evidence
    right: tuple[int, ...]
    typical: Typical | None


@dataclass(frozen=True, eq=False)
class BranchErrors(ShownImages):
    """Errors of branches.

    Attributes:
        found: errors among those looked at, by the branch's scale.
        errors: those to show, by scale.
    """

    config: ErrorsConfig
    found: dict[int, int]
    errors: dict[int, tuple[BranchError, ...]]

    name, number = "errors", 4
    title = "Where a branch is wrong and another right"
    columns = ("image", "branch", "class", "taken for", "probability", "right by")

    @property
    def caption(self) -> str:
        """A few sentences on what is seen and how it came about."""
        counts = " and ".join(f"{n:,} by {scale} px" for scale, n in self.found.items())
        return (
            f"Of {self.survey}, a branch is wrong and another right "
            f"about {counts}. A row shows the image, the patch with the branch's most evidence for "
            "the class that it predicts (cross) and for the true one (tick), and the image of the "
            "mistaken class that the branch is surest about with its patches there."
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What is shown, as JSON without pixels."""
        return {"found": to_json(self.found), "images": to_json(self.errors)}

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a line for each error, in the order of `columns`."""
        for scale, errors in self.errors.items():
            for e in errors:
                names = self.shown(e.true.name), self.shown(e.mistaken.name)
                yield (
                    e.path,
                    f"{scale} px",
                    *names,
                    f"{e.mistaken.probability:.0%}",
                    "/".join(map(str, e.right)),
                )


def find_errors(
    source: CropSource,
    weights: Weights,
    config: ErrorsConfig,
    reporter: Reporter | None = None,
) -> BranchErrors:
    """Find images about which a branch is wrong and another is right, and what misled it.

    Of those found, the most confident errors are shown, spread over the true classes and then
    over the mistaken ones.

    Raises:
        NothingToShow: no branch is wrong where another is right.
        NothingToShow: no branch is wrong where another is right, or the weights know none of the
            classes.
        DataError: no image can be decoded.
        SettingsError: no image or class has a name that was asked for.
    """
    with looking(source, weights, config, reporter) as (localizer, survey):
        predicted, labels = survey.found.branch_class, survey.labels
        right = predicted == survey.truth[:, None]
        found, chosen = {}, {}
        for scale in config.scales:
            j = SCALES.index(scale)
            wrong = np.flatnonzero(~right[:, j] & right.any(1))
            surest = wrong[np.argsort(-survey.found.branch_prob[wrong, j], kind="stable")]
            found[scale] = len(wrong)
            chosen[scale] = spread(
                surest.tolist(), config.per_scale, labels.__getitem__, predicted[:, j].__getitem__
            )
        if not any(found.values()):
            if (survey.truth < 0).all():
                raise NothingToShow(
                    f"{source.name}: {weights.path} knows none of its classes "
                    f"({few(source.classes)}), only {few(survey.network)}: give weights for these "
                    "classes with --weights"
                )
            scales = " or ".join(f"{scale} px" for scale in config.scales)
            raise NothingToShow(
                f"{source.name}: among {counted(len(survey), 'image')} the branch of {scales} is "
                "nowhere wrong where another is right: raise --limit, or choose another --scale"
            )
        mistaken = {int(predicted[i, SCALES.index(s)]) for s, rows in chosen.items() for i in rows}
        more, known = _more_rows(survey, mistaken, config.seed), survey
        if more:
            known = survey.joined(look_at(source, weights, localizer, more, reporter))
        errors = {
            scale: tuple(_error(localizer, known, i, SCALES.index(scale)) for i in images)
            for scale, images in chosen.items()
        }
    return BranchErrors(config, survey, found, errors)


def _more_rows(survey: Survey, mistaken: set[int], seed: int) -> list[int]:
    """Return further images of the mistaken classes where few of them were looked at.

    Of a thousand classes a look at some hundred images has none of most.
    """
    source, rows = survey.source, []
    for c in sorted(mistaken):
        missing = _TYPICAL_OF - int((survey.truth == c).sum())
        if missing > 0 and survey.network[c] in source.classes:
            label = source.classes.index(survey.network[c])
            left = np.setdiff1d(np.flatnonzero(source.labels == label), survey.rows)
            rows += np.random.default_rng((seed, c)).permutation(left)[:missing].tolist()
    return rows


def _error(localizer: Localizer, survey: Survey, i: int, j: int) -> BranchError:
    """Work one image of the survey out, for the branch of index j."""
    pixels = survey.source.read([int(survey.rows[i])]).pixels
    predicted, truth = survey.found.branch_class[i], int(survey.truth[i])
    classes = (int(predicted[j]), truth)
    maps = localizer.maps(pixels, torch.tensor([classes]))
    evidence = []
    for c, heatmap in zip(classes, maps.heatmaps[j][0], strict=True):
        h, w = np.unravel_index(heatmap.argmax(), heatmap.shape)
        probability, corner = float(maps.probabilities[0, j, c]), (int(h) * STRIDE, int(w) * STRIDE)
        evidence.append(Evidence(survey.network[c], probability, corner, float(heatmap[h, w])))
    return BranchError(
        path=survey.source.path(int(survey.rows[i])),
        pixels=pixels[0].numpy(),
        mistaken=evidence[0],
        true=evidence[1],
        right=tuple(scale for scale, c in zip(SCALES, predicted, strict=True) if c == truth),
        typical=_typical(localizer, survey, classes[0], j),
    )


def _typical(localizer: Localizer, survey: Survey, mistaken: int, j: int) -> Typical | None:
    """Return the image of a class that the branch is right and surest about."""
    found = survey.found
    right = (survey.truth == mistaken) & (found.branch_class[:, j] == mistaken)
    if not right.any():
        return None
    i = int(np.argmax(np.where(right, found.branch_prob[:, j], -1.0)))
    pixels = survey.source.read([int(survey.rows[i])]).pixels
    maps = localizer.maps(pixels, torch.tensor([[mistaken]]))
    heatmap, lsp = torch.from_numpy(maps.heatmaps[j][:, 0]), PRESETS["figure"]
    patches = select(heatmap, SCALES[j], lsp.max_patches[j], lsp.iou_threshold, lsp.coverage[j])
    count = int(patches.counts[0])
    return Typical(
        path=survey.source.path(int(survey.rows[i])),
        probability=float(found.branch_prob[i, j]),
        corners=patches.corners[0, :count].numpy(),
        scores=patches.scores[0, :count].numpy(),
        pixels=pixels[0].numpy(),
    )


# --- drawing ------------------------------------------------------------------------------

#: Green and red that stay apart for the color-blind (Okabe and Ito's); signs say it too.
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
    """
    wrong = "most evidence of the branch for the class it predicts, which is wrong"
    right = "most evidence of the branch for the true class"
    legend = [
        badge(cross(WRONG)),
        small(wrong, None, 13),
        badge(tick(RIGHT)),
        small(right, None, 13),
    ]
    blocks = [beside(legend)]
    for scale, errors in result.errors.items():
        text = (
            f"is wrong and another branch right about {result.found[scale]:,} of "
            f"{counted(len(result.survey), 'image')}"
        )
        rows = [_row(error, scale, result.config.class_names) for error in errors]
        blocks.append(stacked([heading(scale, text), *rows], 2 * GAP))
    return bordered(stacked(blocks, 3 * GAP))


def _row(error: BranchError, scale: int, names: ClassNames) -> Image.Image:
    marks = [cross(WRONG), tick(RIGHT)]
    boxes = squares([error.mistaken.corner, error.true.corner], scale)
    image = draw_frames(error.pixels, boxes, [WRONG, RIGHT], marks, width=_MARGIN)
    true, of = names.parts(error.true.name)
    name = written(true, image.width, bold=True, end=of)
    others = " and ".join(f"{other} px" for other in error.right)
    parts = [
        stacked([name, image, small(f"right by {others}", image.width)], 2),
        _patch(error, error.mistaken, scale, WRONG, cross(WRONG), names),
        _patch(error, error.true, scale, RIGHT, tick(RIGHT), names),
    ]
    mistaken, of = names.parts(error.mistaken.name)
    if (typical := error.typical) is not None:
        note = f"{typical.probability:.0%} by {scale} px"
        picture = localized_picture(typical.pixels, typical.corners, scale, note=note)
        name = written(mistaken, picture.width, start="an image of ", end=of)
        parts.append(stacked([name, picture], 2))
    else:
        width = error.pixels.shape[1]
        name = written(mistaken, width, start="no image of ", end=of)
        parts.append(stacked([name, written("that it is right about", width)], 0))
    return beside(parts, 2 * GAP)


def _patch(
    error: BranchError,
    evidence: Evidence,
    scale: int,
    color: Color,
    mark: Image.Image,
    names: ClassNames,
) -> Image.Image:
    cut = cut_out(error.pixels, evidence.corner, scale, color, width=_MARGIN)
    width = max(cut.width, _PATCH_TEXT)
    name = written(names.parts(evidence.name)[0], width - MARK - GAP)  # the row has the id
    facts = (f"evidence {rounded(evidence.score)}", f"{evidence.probability:.0%} by {scale} px")
    lines = [small(fact, width) for fact in facts]
    return stacked([beside([badge(mark), name]), cut, *lines], 2)
