"""Figure 5: what the attention branches weigh, and the heatmap of the decided class beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anchorpatch.errors import SettingsError
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.jobs.figures.examples import Choice, Example, look_at, spread
from anchorpatch.jobs.figures.record import LookedAt, ShownImages
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.runtime.device import resolve_device
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import PRESETS, SCALES

__all__ = ["AttentionConfig", "AttentionExample", "AttentionExamples", "find_attention"]


@dataclass(frozen=True)
class AttentionConfig:
    """What Figure 5 shows.

    Attributes:
        choice: the images to look at.
        count: images to show.
        device: auto, cpu or cuda.

    Raises:
        SettingsError: a value that no figure could use.
    """

    choice: Choice = field(default_factory=lambda: Choice(limit=100))
    count: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise SettingsError(f"count: expected at least one image, got {self.count}")


@dataclass(frozen=True, eq=False)
class AttentionExample:
    """One image with the maps of the three branches, in the order of `SCALES`.

    Attributes:
        image: the image and AnchorNet's decision.
        branch_class: name of the class that each branch predicts.
        branch_prob: its probability.
        attention: S of each branch times H * W (H, W): 1 is the uniform weight.
        heatmaps: M of each branch for the decided class (H, W).
    """

    image: Example
    branch_class: tuple[str, ...]
    branch_prob: tuple[float, ...]
    attention: tuple[NDArray[np.float32], ...]
    heatmaps: tuple[NDArray[np.float32], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the image as JSON knows it, with the extremes of its maps."""
        branches = [
            {
                "scale": scale,
                "predicted": self.branch_class[j],
                "probability": self.branch_prob[j],
                "attention_max": float(self.attention[j].max()),
                "attention_at": _place(self.attention[j]),
                "heatmap_max": float(self.heatmaps[j].max()),
                "heatmap_at": _place(self.heatmaps[j]),
            }
            for j, scale in enumerate(SCALES)
        ]
        return {**self.image.to_json(), "branches": branches}


@dataclass(frozen=True, eq=False)
class AttentionExamples(ShownImages):
    """Images with their attention maps and class heatmaps.

    Attributes:
        config: what was asked for.
        examples: images to show.
    """

    config: AttentionConfig
    examples: tuple[AttentionExample, ...]

    name, number = "attention", 5
    title = "Attention maps and class heatmaps of the three branches"

    @property
    def caption(self) -> str:
        """One or two sentences on what is seen and how it came about."""
        return (
            f"{len(self.examples)} of {self.looked} that were looked at: "
            "on the left the spatial attention S of each branch, as a multiple of uniform "
            "attention, and on the right the heatmap M of the decided class, its evidence at each "
            "location. A location is drawn at the centre of the patch it sees; the frame marks "
            "the branch that localizes the image."
        )

    def to_json(self) -> dict[str, Any]:
        """Return what the figure shows as JSON knows it, without pixels."""
        return self.record(
            self.config.choice,
            {"count": self.config.count},
            images=[example.to_json() for example in self.examples],
        )


def find_attention(
    source: ImageSource,
    weights: Weights,
    config: AttentionConfig,
    reporter: Reporter | None = None,
) -> AttentionExamples:
    """Choose images, spread over scales and classes, and compute their maps.

    Args:
        source: of the images.
        weights: of AnchorNet.
        config: what to show.
        reporter: takes the progress.

    Raises:
        DataError: no image can be decoded.
        SettingsError: no image or class has a name that was asked for.
    """
    rows = config.choice.rows(source)
    device = resolve_device(config.device)
    with Localizer(weights, PRESETS["figure"], device, batch_size=64) as localizer:
        survey = look_at(source, weights, localizer, rows, reporter or Reporter())
        chosen = list(range(len(survey)))
        if not config.choice.images:
            found, labels = survey.found, survey.labels
            chosen = spread(
                chosen, config.count, lambda i: int(found.scale[i]), lambda i: int(labels[i])
            )
        images = survey.examples(chosen)
        pixels = torch.from_numpy(np.stack([image.pixels for image in images]))
        decided = torch.from_numpy(survey.found.predicted[chosen].astype(np.int64))
        maps = localizer.maps(pixels, decided[:, None])
    examples = tuple(
        AttentionExample(
            image=image,
            branch_class=tuple(survey.network[c] for c in survey.found.branch_class[i]),
            branch_prob=tuple(survey.found.branch_prob[i].tolist()),
            attention=tuple(branch[k] for branch in maps.attention),
            heatmaps=tuple(branch[k, 0] for branch in maps.heatmaps),
        )
        for k, (i, image) in enumerate(zip(chosen, images, strict=True))
    )
    return AttentionExamples(LookedAt.of(survey, weights), config, examples)


def _place(values: NDArray[np.float32]) -> list[int]:
    """Return the location (h, w) of the largest value, the first in row-major order."""
    return [int(i) for i in np.unravel_index(values.argmax(), values.shape)]
