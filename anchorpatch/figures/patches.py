"""Figure 3: images by the scale that each chose, with their patches framed and cut out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from PIL import Image

from anchorpatch.errors import DataError, SettingsError
from anchorpatch.figures.canvas import GAP, GREY, bordered, stacked, tiled, written
from anchorpatch.figures.examples import (
    Choice,
    Example,
    LookedAt,
    ShownImages,
    look_at,
    spread,
)
from anchorpatch.figures.frames import heading, localized_picture
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.runtime.device import resolve_device
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import PRESETS, SCALES, LspSettings
from anchorpatch.storage import to_json
from anchorpatch.text import counted


@dataclass(frozen=True)
class PatchesConfig:
    """What Figure 3 shows.

    Attributes:
        choice: the images to look at.
        lsp: K, T and P of Algorithm 1.
        per_scale: images to show of each scale.
        only_right: show only images whose class AnchorNet decides right.
        device: auto, cpu or cuda.

    Raises:
        SettingsError: a value that no figure could use.
    """

    choice: Choice = field(default_factory=Choice)
    lsp: LspSettings = PRESETS["figure"]
    per_scale: int = 3
    only_right: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.per_scale < 1:
            raise SettingsError(f"per_scale: expected at least one image, got {self.per_scale}")


@dataclass(frozen=True, eq=False)
class PatchExamples(ShownImages):
    """Images by chosen scale, with their patches.

    Attributes:
        config: what was asked for.
        by_scale: images among those looked at, by chosen scale.
        examples: images to show, by chosen scale.
    """

    config: PatchesConfig
    by_scale: dict[int, int]
    examples: dict[int, tuple[Example, ...]]

    name, number = "patches", 3
    title = "Semantic patches by chosen scale"

    @property
    def caption(self) -> str:
        """One or two sentences on what is seen and how it came about."""
        shares = ", ".join(f"{n / self.looked.images:.1%} {s} px" for s, n in self.by_scale.items())
        right = " Only images whose class is decided right are shown." * self.config.only_right
        return (
            f"Of {self.looked}, AnchorNet chose for {shares}. Each is "
            f"shown with its patches framed, numbered from the strongest on, and cut out "
            f"({self.config.lsp}).{right}"
        )

    @property
    def missing(self) -> dict[int, int]:
        """Number of images by scale, where fewer are to be shown than were asked for."""
        if self.config.choice.images:
            return {}
        return {s: len(e) for s, e in self.examples.items() if len(e) < self.config.per_scale}

    def to_json(self) -> dict[str, Any]:
        """Return what the figure shows as JSON, without pixels."""
        config = self.config
        return self.record(
            config.choice,
            {"per_scale": config.per_scale, "only_right": config.only_right, **asdict(config.lsp)},
            chosen=to_json(self.by_scale),
            images=[to_json(e) for of_scale in self.examples.values() for e in of_scale],
        )


def find_patches(
    source: ImageSource,
    weights: Weights,
    config: PatchesConfig,
    reporter: Reporter | None = None,
) -> PatchExamples:
    """Choose images of each scale, spread over the classes, and localize their patches.

    Args:
        source: of the images.
        weights: of AnchorNet.
        config: what to show.
        reporter: takes the progress.

    Raises:
        DataError: there is no image to show.
        SettingsError: no image or class has a name that was asked for.
    """
    rows = config.choice.rows(source)
    with Localizer(weights, config.lsp, resolve_device(config.device), batch_size=64) as localizer:
        survey = look_at(source, weights, localizer, rows, reporter or Reporter())
    shown = np.flatnonzero(survey.right) if config.only_right else np.arange(len(survey))
    if not len(shown):
        raise DataError(
            f"{source.name}: AnchorNet decides none of {len(survey)} images right: raise --limit, "
            "leave --only-right out, or name weights of these classes"
        )
    examples = {}
    for scale in SCALES:
        of_scale = [int(i) for i in shown if survey.found.scale[i] == scale]
        if not config.choice.images:
            of_scale = spread(of_scale, config.per_scale, lambda i: survey.labels[i])
        examples[scale] = survey.examples(of_scale)
    return PatchExamples(LookedAt.of(survey, weights), config, survey.by_scale, examples)


# --- drawing ------------------------------------------------------------------------------

#: What the page aims at, in pixels.
_WIDTH: Final = 1400

#: Most images in a row.
_COLUMNS: Final = 3


def patches_figure(result: PatchExamples) -> Image.Image:
    """Draw Figure 3: a block of images for each scale, the patches framed and cut out.

    A frame is the outermost two pixels of its patch, one pixel of the picture being one of the
    crop. The patches are numbered, the strongest first.

    Args:
        result: from `anchorpatch.figures.patches.find_patches`.
    """
    wrong = any(e.label != e.predicted for part in result.examples.values() for e in part)
    cells = {
        scale: [_cell(example, predicted=wrong) for example in examples]
        for scale, examples in result.examples.items()
    }
    widest = max(cell.width for of_scale in cells.values() for cell in of_scale)
    columns = max(1, min(_COLUMNS, _WIDTH // widest))
    blocks = []
    for scale, of_scale in cells.items():
        share = result.by_scale[scale] / result.looked.images
        top = heading(scale, f"chosen by {share:.1%} of {counted(result.looked.images, 'image')}")
        rows = [tiled(of_scale, columns, 2 * GAP, width=widest)] if of_scale else []
        blocks.append(stacked([top, *rows]))
    return bordered(stacked(blocks, 3 * GAP))


def _cell(example: Example, *, predicted: bool) -> Image.Image:
    picture = localized_picture(example.pixels, example.corners, example.scale)
    lines = [written(example.label, picture.width)]
    if predicted:
        right = example.label == example.predicted
        name, start = ("right", "predicted ") if right else (example.predicted, "predicted as ")
        end = f", {example.probability:.0%}"
        lines.append(written(name, picture.width, size=12, fill=GREY, start=start, end=end))
    return stacked([*lines, picture], 2)
