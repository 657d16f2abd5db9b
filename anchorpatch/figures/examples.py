"""Images for a figure: which ones to look at, and what AnchorNet and LSP say of them.

Figures show a few images out of many. A seed puts the images of a source into an order that is
spread over the classes; the first of them are looked at, and a figure chooses among those. The
choice depends on the seed and the list of images alone.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from anchorpatch.errors import DataError, NonFiniteError, SettingsError
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.jobs.localizer import Localized, Localizer, Pending
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import SCALES
from anchorpatch.text import counted

_T = TypeVar("_T")

#: Images that are decoded and submitted at once.
_BATCH: Final = 64


# --- looking at images --------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which images a figure looks at.

    Attributes:
        images: paths below the split folder: exactly these.
        classes: names of classes: only images of these; none means all.
        seed: of the order in which images are looked at.
        limit: the most images to look at.

    Raises:
        SettingsError: values that contradict each other.
    """

    images: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    seed: int = 0
    limit: int = 300

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise SettingsError(f"limit: expected at least one image, got {self.limit}")
        if self.images and self.classes:
            raise SettingsError("expected --images or --classes, got both: leave one out")

    def rows(self, source: ImageSource) -> list[int]:
        """Return the rows of a source to look at, in the order of looking.

        Without names, round k of the order takes the k-th image of every class, each round
        and each class in an order of its own.

        Raises:
            SettingsError: no image or class has such a name.
        """
        if self.images:
            return _named(source, self.images)
        indices = [_index(name, source.classes, source.name, "classes") for name in self.classes]
        rows = np.flatnonzero(np.isin(source.labels, indices)) if indices else len(source)
        shuffled = np.random.default_rng(self.seed).permutation(rows)
        rounds = np.argsort(_occurrence(source.labels[shuffled]), kind="stable")
        return [int(row) for row in shuffled[rounds][: self.limit]]


@dataclass(frozen=True, eq=False)
class Survey:
    """What AnchorNet and LSP say of the images that were looked at.

    Attributes:
        source: of the images.
        network: classes of the weights, which `found` indexes.
        rows: of the source (n,), int64, in the order of looking.
        labels: index of each image into ``source.classes`` (n,), int64.
        truth: index of each image's class into ``network``; -1 where it is none of them.
        found: decisions and patches of the n images.
        unreadable: images that could not be decoded.
    """

    source: ImageSource
    network: tuple[str, ...]
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    truth: NDArray[np.int64]
    found: Localized
    unreadable: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether AnchorNet's decision is the label (n,)."""
        return np.asarray(self.found.predicted == self.truth)

    @property
    def by_scale(self) -> dict[int, int]:
        """Number of images by the scale they chose."""
        return {scale: int((self.found.scale == scale).sum()) for scale in SCALES}

    def joined(self, other: Survey) -> Survey:
        """Return the images of this survey and, behind them, those of another of the source."""
        rows, labels, truth = (
            np.concatenate((getattr(self, name), getattr(other, name)))
            for name in ("rows", "labels", "truth")
        )
        found = _concatenated([self.found, other.found])
        unreadable = self.unreadable + other.unreadable
        return Survey(self.source, self.network, rows, labels, truth, found, unreadable)

    def example(self, i: int, pixels: NDArray[np.uint8]) -> Example:
        """Return image ``i`` of the survey with its crop."""
        found, count = self.found, self.found.counts[i]
        j = SCALES.index(int(found.scale[i]))
        return Example(
            path=self.source.path(int(self.rows[i])),
            label=self.source.classes[self.labels[i]],
            predicted=self.network[found.predicted[i]],
            probability=float(found.branch_prob[i, j]),
            scale=int(found.scale[i]),
            corners=found.corners[i, :count],
            scores=found.scores[i, :count],
            pixels=pixels,
        )

    def examples(self, chosen: Sequence[int]) -> tuple[Example, ...]:
        """Return some images of the survey; their crops are read again.

        Raises:
            DataError: an image is gone since.
        """
        if not chosen:
            return ()
        pixels = self.source.pixels([int(self.rows[i]) for i in chosen])
        return tuple(self.example(i, crop) for i, crop in zip(chosen, pixels, strict=True))


@dataclass(frozen=True, eq=False)
class Example:
    """One image of a figure.

    Attributes:
        path: below the split folder.
        label: name of its class.
        predicted: gamma, the class that AnchorNet decided on.
        probability: of gamma, by the chosen branch.
        scale: theta of the chosen branch, side of the patches in pixels.
        corners: top-left (y, x) of each patch in the crop (k, 2), the strongest first.
        scores: activation of each patch (k,).
        pixels: the crop that AnchorNet saw, uint8 (224, 224, 3).
    """

    path: str
    label: str
    predicted: str
    probability: float
    scale: int
    corners: NDArray[np.int16]
    scores: NDArray[np.float32]
    pixels: NDArray[np.uint8]


def look_at(
    source: ImageSource,
    weights: Weights,
    localizer: Localizer,
    rows: Sequence[int],
    reporter: Reporter,
) -> Survey:
    """Run AnchorNet, decision and LSP on images of a source.

    Results are those of `extract`, to the bit. Images that cannot be decoded are left out.

    Raises:
        DataError: no image can be decoded.
        NonFiniteError: the network gave NaN or infinity; names the image.
    """
    parts: list[tuple[NDArray[np.int64], Localized]] = []
    waiting: deque[tuple[NDArray[np.int64], Pending]] = deque()
    reporter.start("look at images", len(rows))
    try:
        for crops in source.batches(rows, _BATCH):
            waiting.append((crops.rows, localizer.submit(crops.pixels)))
            if len(waiting) > 2:
                parts.append(_result(source, weights, *waiting.popleft()))
                reporter.advance(len(parts[-1][0]))
        while waiting:
            parts.append(_result(source, weights, *waiting.popleft()))
            reporter.advance(len(parts[-1][0]))
    finally:
        reporter.stop()
    if not parts:
        raise DataError(
            f"{source.name}: none of {len(rows)} images can be decoded; the first is "
            f"{source.path(rows[0])}"
        )
    found = _concatenated([part for _, part in parts])
    seen = np.concatenate([part for part, _ in parts])
    labels = source.labels[seen]
    index = {name: i for i, name in enumerate(weights.meta.classes)}
    known = np.array([index.get(name, -1) for name in source.classes], np.int64)
    return Survey(
        source, weights.meta.classes, seen, labels, known[labels], found, len(rows) - len(seen)
    )


def spread(candidates: Iterable[_T], count: int, *keys: Callable[[_T], Hashable]) -> list[_T]:
    """Choose some candidates so that they differ: each next one has the rarest keys so far.

    Args:
        candidates: in the order of preference, which settles ties.
        count: how many to choose.
        keys: what to be spread over, the most important first.

    Example:
        >>> spread(["ant", "ape", "bee", "cat"], 3, lambda name: name[0])
        ['ant', 'bee', 'cat']
    """
    left, chosen = list(candidates), []
    seen = [Counter[Hashable]() for _ in keys]
    for _ in range(min(count, len(left))):
        best = min(left, key=lambda c: [n[key(c)] for n, key in zip(seen, keys, strict=True)])
        left.remove(best)
        chosen.append(best)
        for n, key in zip(seen, keys, strict=True):
            n[key(best)] += 1
    return chosen


def _result(
    source: ImageSource, weights: Weights, rows: NDArray[np.int64], pending: Pending
) -> tuple[NDArray[np.int64], Localized]:
    try:
        return rows, pending.result()
    except NonFiniteError as error:
        path = source.path(int(rows[error.row or 0]))
        raise NonFiniteError(
            f"{source.name}/{path}: {error}; the weights {weights.path} may be damaged or badly "
            "trained: train or download them again"
        ) from error


def _concatenated(parts: Sequence[Localized]) -> Localized:
    return Localized(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _occurrence(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each value stood before its place."""
    order = np.argsort(values, kind="stable")
    counts = np.unique(values, return_counts=True)[1]
    first = np.repeat(np.cumsum(counts) - counts, counts)
    occurrence = np.empty(len(values), np.int64)
    occurrence[order] = np.arange(len(values)) - first
    return occurrence


def _named(source: ImageSource, images: Sequence[str]) -> list[int]:
    paths = [source.path(row) for row in range(len(source))]
    rows = [_index(name, paths, source.name, "images") for name in images]
    return list(dict.fromkeys(rows))  # each once


def _index(name: str, known: Sequence[str], where: str, what: str) -> int:
    if name in known:
        return known.index(name)
    ending = islice((path for path in known if path.endswith(name)), 1)
    near = next(ending, None) or next(iter(difflib.get_close_matches(name, known, 1)), None)
    hint = f"did you mean {near}?" if near else f"the first is {known[0]}"
    raise SettingsError(
        f"--{what}: {name!r} is none of the {len(known):,} {what} of {where}; {hint}"
    )


# --- what Figures 3 to 5 have in common ---------------------------------------------------


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
        """Summarize a survey."""
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
        """Return what the figure shows as JSON, without pixels."""

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
