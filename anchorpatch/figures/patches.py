"""Figure 3: images by the scale that each chose, with their patches framed and cut out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
from PIL import Image

from anchorpatch.classes import ClassNames
from anchorpatch.errors import DataError
from anchorpatch.figures.canvas import GAP, bordered, small, stacked, tiled, written
from anchorpatch.figures.examples import Choice, Example, ShownImages, looking, spread
from anchorpatch.figures.frames import heading, localized_picture
from anchorpatch.jobs.crops import CropSource
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import PRESETS, SCALES, LspSettings
from anchorpatch.storage import to_json
from anchorpatch.text import counted


@dataclass(frozen=True, kw_only=True)
class PatchesConfig(Choice):
    """What Figure 3 shows.

    Attributes:
        per_scale: images to show of each scale.
        only_right: show only images whose class AnchorNet decides right.
        lsp: K, T and P of Algorithm 1.
    """

    per_scale: int = 3
    only_right: bool = False
    lsp: LspSettings = PRESETS["figure"]


@dataclass(frozen=True, eq=False)
class PatchExamples(ShownImages):
    """Images by chosen scale, with their patches.

    Attributes:
        examples: images to show, by chosen scale.
    """

    config: PatchesConfig
    examples: dict[int, tuple[Example, ...]]

    name, number = "patches", 3
    title = "Semantic patches by chosen scale"
    columns = ("image", "class", "predicted", "scale", "patches", "strongest")

    @property
    def caption(self) -> str:
        """One or two sentences on what is seen and how it came about."""
        by_scale = self.survey.by_scale.items()
        shares = ", ".join(f"{n / len(self.survey):.1%} {scale} px" for scale, n in by_scale)
        right = " Only correctly classified images are shown." * self.config.only_right
        return (
            f"Scales that AnchorNet chose for {self.survey}: {shares}. Each is "
            f"shown with its patches framed, numbered from the strongest on, and cut out "
            f"({self.config.lsp}).{right}"
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the figure lacks: scales with fewer images than were asked for."""
        found = {} if self.config.images else {s: len(e) for s, e in self.examples.items()}
        return tuple(
            f"only {n} of {self.survey} that were looked at can be shown for {scale} px: "
            "raise --limit for more"
            for scale, n in found.items()
            if n < self.config.per_scale
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What is shown, as JSON without pixels."""
        shown = chain.from_iterable(self.examples.values())
        return {"chosen": to_json(self.survey.by_scale), "images": to_json(list(shown))}

    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a line for each image, in the order of `columns`."""
        for e in chain.from_iterable(self.examples.values()):
            patches = str(len(e.scores)), f"{e.scores[0]:.3g}"
            names = self.shown(e.label), self.shown(e.predicted)
            yield e.path, *names, f"{e.scale} px", *patches


def find_patches(
    source: CropSource,
    weights: Weights,
    config: PatchesConfig,
    reporter: Reporter | None = None,
) -> PatchExamples:
    """Choose images of each scale, spread over the classes, and localize their patches.

    Raises:
        DataError: there is no image to show.
        SettingsError: no image or class has a name that was asked for.
    """
    with looking(source, weights, config, reporter, config.lsp) as (_, survey):
        right = survey.found.predicted == survey.truth
        shown = np.flatnonzero(right) if config.only_right else np.arange(len(survey))
        if not len(shown):
            raise DataError(
                f"{source.name}: AnchorNet decides none of {len(survey)} images right: raise "
                "--limit, omit --only-right, or give weights for these classes"
            )
        examples = {}
        for scale in SCALES:
            of_scale = [int(i) for i in shown if survey.found.scale[i] == scale]
            if not config.images:
                of_scale = spread(of_scale, config.per_scale, lambda i: survey.labels[i])
            examples[scale] = survey.examples(of_scale)
    return PatchExamples(config, survey, examples)


# --- drawing ------------------------------------------------------------------------------

#: What the page aims at, in pixels.
_WIDTH: Final = 1400

#: Most images in a row.
_COLUMNS: Final = 3


def patches_figure(result: PatchExamples) -> Image.Image:
    """Draw Figure 3: a block of images for each scale, the patches framed and cut out.

    A frame is the outermost two pixels of its patch, one pixel of the picture being one of the
    crop. The patches are numbered, the strongest first.
    """
    wrong = any(e.label != e.predicted for part in result.examples.values() for e in part)
    cells = {
        scale: [_cell(e, result.config.class_names, predicted=wrong) for e in examples]
        for scale, examples in result.examples.items()
    }
    widest = max(cell.width for of_scale in cells.values() for cell in of_scale)
    columns = max(1, min(_COLUMNS, _WIDTH // widest))
    blocks, images = [], len(result.survey)
    for scale, of_scale in cells.items():
        share = result.survey.by_scale[scale] / images
        top = heading(scale, f"chosen by {share:.1%} of {counted(images, 'image')}")
        rows = [tiled(of_scale, columns, 2 * GAP, width=widest)] if of_scale else []
        blocks.append(stacked([top, *rows]))
    return bordered(stacked(blocks, 3 * GAP))


def _cell(example: Example, names: ClassNames, *, predicted: bool) -> Image.Image:
    picture = localized_picture(example.pixels, example.corners, example.scale)
    label, of = names.parts(example.label)
    lines = [written(label, picture.width, end=of)]
    if predicted:
        right = example.label == example.predicted
        name, of = ("right", "") if right else names.parts(example.predicted)
        start, end = f"predicted {'' if right else 'as '}", f"{of}, {example.probability:.0%}"
        lines.append(small(name, picture.width, start=start, end=end))
    return stacked([*lines, picture], 2)
