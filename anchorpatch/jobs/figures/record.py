"""What Figures 3 to 5 have in common: images that were looked at, and the JSON beside a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from anchorpatch.jobs.figures.examples import Choice, Survey
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.settings import LspSettings
from anchorpatch.text import counted

__all__ = ["LookedAt", "ShownImages", "settings_text"]


@dataclass(frozen=True)
class LookedAt:
    """The images among which a figure's were chosen.

    Attributes:
        source: name of the images' folder.
        weights_sha256: of AnchorNet's weights.
        images: that were looked at.
        unreadable: images that could not be decoded.
    """

    source: str
    weights_sha256: str
    images: int
    unreadable: int

    def __str__(self) -> str:
        return f"{counted(self.images, 'image')} of {self.source}"

    @classmethod
    def of(cls, survey: Survey, weights: Weights) -> LookedAt:
        """Sum a survey up."""
        return cls(survey.source.name, weights.sha256, len(survey), survey.unreadable)


@dataclass(frozen=True, eq=False)
class ShownImages(ABC):
    """What a figure shows.

    Attributes:
        looked: the images that it chose among.
    """

    looked: LookedAt

    #: Name of the command, number of the figure in the paper, and a few words.
    name: ClassVar[str]
    number: ClassVar[int]
    title: ClassVar[str]

    @property
    @abstractmethod
    def caption(self) -> str:
        """A few sentences on what is seen and how it came about."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return what the figure shows as JSON knows it, without pixels."""

    def record(self, choice: Choice, settings: dict[str, Any], **facts: Any) -> dict[str, Any]:
        """Return what stands in the JSON file beside the picture, and what the report reads.

        Args:
            choice: of the images.
            settings: further ones.
            facts: what the figure shows.
        """
        return {
            "figure": self.name,
            "number": self.number,
            "title": self.title,
            "caption": self.caption,
            "weights_sha256": self.looked.weights_sha256,
            "source": self.looked.source,
            "settings": {**asdict(choice), **settings},
            "looked_at": self.looked.images,
            "unreadable": self.looked.unreadable,
            **facts,
        }


def settings_text(lsp: LspSettings) -> str:
    """Write the settings of Algorithm 1 for people.

    Example:
        >>> settings_text(LspSettings((5, 3, 2), 0.3, (0.05, 0.04, 0.03)))
        'K 5/3/2, T 0.3, P 0.05/0.04/0.03'
    """
    k, p = "/".join(map(str, lsp.max_patches)), "/".join(map(str, lsp.coverage))
    return f"K {k}, T {lsp.iou_threshold}, P {p}"
