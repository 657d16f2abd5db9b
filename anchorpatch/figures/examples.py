"""Images for a figure: which ones to look at, and what AnchorNet and LSP say of them.

Figures show a few images out of many. A seed puts the images of a source into an order that is
spread over the classes; the first of them are looked at, and a figure chooses among those. The
choice depends on the seed and the list of images alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count as counter
from typing import Any, ClassVar, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from anchorpatch.classes import IMAGENET_NAMES, ClassNames
from anchorpatch.errors import DataError, SettingsError
from anchorpatch.geometry import source_box
from anchorpatch.jobs.crops import CropSource
from anchorpatch.jobs.localizer import Localized, Localizer, Pending
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.runtime.device import resolve_device
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import PRESETS, SCALES, Computing, LspSettings
from anchorpatch.tables import Table, named, text
from anchorpatch.text import counted, nearest

_T = TypeVar("_T")

#: Images that are decoded and submitted at once.
_BATCH: Final = 64


@dataclass(frozen=True, kw_only=True)
class Choice(Computing):
    """Which images a figure looks at; the base of each figure's settings.

    Attributes:
        images: paths below the split folder: exactly these.
        classes: names of classes: only images of these; none means all.
        seed: of the order in which images are looked at.
        limit: the most images to look at.
        class_names: what classes are called.

    Raises:
        SettingsError: values that contradict each other, or that no figure could use.
    """

    images: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    seed: int = 0
    limit: int = 300
    class_names: ClassNames = IMAGENET_NAMES

    def __post_init__(self) -> None:
        for name in ("limit", "per_scale", "count"):  # of which a figure has what it needs
            if getattr(self, name, 1) < 1:
                raise SettingsError(
                    f"{name}: expected at least one image, got {getattr(self, name)}"
                )
        if self.images and self.classes:
            raise SettingsError("expected --images or --classes, got both: leave one out")

    def rows(self, source: CropSource) -> list[int]:
        """Return the rows of a source to look at, in the order of looking.

        Without names, round k of the order takes the k-th image of every class, each round
        and each class in an order of its own.

        Raises:
            SettingsError: no image or class has such a name.
        """
        if self.images:
            paths = [source.path(row) for row in range(len(source))]
            named = [_index(name, paths, source.name, "images") for name in self.images]
            return list(dict.fromkeys(named))  # each once
        indices = [_index(name, source.classes, source.name, "classes") for name in self.classes]
        rows = np.flatnonzero(np.isin(source.labels, indices)) if indices else len(source)
        shuffled = np.random.default_rng(self.seed).permutation(rows)
        nth: defaultdict[int, Iterator[int]] = defaultdict(counter)
        rounds = [next(nth[label]) for label in source.labels[shuffled].tolist()]
        return [int(row) for row in shuffled[np.argsort(rounds, kind="stable")][: self.limit]]

    @property
    def settings(self) -> dict[str, Any]:
        """What decides what the figure shows, as JSON."""
        facts = asdict(self)
        for name in ("device", "engine", "precision", "class_names"):
            del facts[name]
        lsp = facts.pop("lsp", {})
        return {**facts, **lsp}


@dataclass(frozen=True, eq=False)
class Survey:
    """What AnchorNet and LSP say of the images that were looked at.

    Attributes:
        source: of the images.
        weights: of AnchorNet, whose classes ``found`` indexes.
        rows: of the source (n,), int64, in the order of looking.
        found: decisions and patches of the n images.
        unreadable: images that could not be decoded.
    """

    source: CropSource
    weights: Weights
    rows: NDArray[np.int64]
    found: Localized
    unreadable: int

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return f"{counted(len(self), 'image')} of {self.source.name}"

    @property
    def network(self) -> tuple[str, ...]:
        """Classes of the weights."""
        return self.weights.meta.classes

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Index of each image into ``source.classes`` (n,)."""
        return self.source.labels[self.rows]

    @cached_property
    def truth(self) -> NDArray[np.int64]:
        """Index of each image's class into ``network`` (n,); -1 where it is not among them."""
        index = {name: i for i, name in enumerate(self.network)}
        known = np.array([index.get(name, -1) for name in self.source.classes], np.int64)
        return known[self.labels]

    @property
    def by_scale(self) -> dict[int, int]:
        """Number of images by their chosen scale."""
        return {scale: int((self.found.scale == scale).sum()) for scale in SCALES}

    def joined(self, other: Survey) -> Survey:
        """Return the images of this survey and, behind them, those of another of the source."""
        rows = np.concatenate((self.rows, other.rows))
        found = _concatenated([self.found, other.found])
        return Survey(self.source, self.weights, rows, found, self.unreadable + other.unreadable)

    def examples(self, chosen: Sequence[int]) -> tuple[Example, ...]:
        """Return some images of the survey; their crops are read again.

        Raises:
            DataError: an image is gone since.
        """
        if not chosen:
            return ()
        found, examples = self.found, []
        crops = self.source.read([int(self.rows[i]) for i in chosen])
        for i, crop, size in zip(chosen, crops.pixels.numpy(), crops.size, strict=True):
            scale, patches = int(found.scale[i]), found.counts[i]
            corners = found.corners[i, :patches]
            example = Example(
                path=self.source.path(int(self.rows[i])),
                label=self.source.classes[self.labels[i]],
                predicted=self.network[found.predicted[i]],
                probability=float(found.branch_prob[i, SCALES.index(scale)]),
                scale=scale,
                corners=corners,
                scores=found.scores[i, :patches],
                boxes=source_box(size, corners, scale, self.source.crop),
                pixels=crop,
            )
            examples.append(example)
        return tuple(examples)


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
        boxes: x0, y0, x1, y1 of each patch in pixels of the picture (k, 4); see
            `anchorpatch.geometry.source_box`.
        pixels: the crop that AnchorNet saw, uint8 (S, S, 3).
    """

    path: str
    label: str
    predicted: str
    probability: float
    scale: int
    corners: NDArray[np.int16]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float64]
    pixels: NDArray[np.uint8]


@contextmanager
def looking(
    source: CropSource,
    weights: Weights,
    config: Choice,
    reporter: Reporter | None,
    lsp: LspSettings = PRESETS["figure"],
) -> Iterator[tuple[Localizer, Survey]]:
    """Look at the images of a choice; the localizer serves until the block ends.

    Raises:
        DataError: no image can be decoded.
        NonFiniteError: the network produced NaN or infinity; names the image.
        SettingsError: no image or class has a name that was asked for.
    """
    rows = config.rows(source)
    device = resolve_device(config.device)
    computing = device, config.engine, config.precision
    side = source.crop.img_size
    with Localizer(weights, lsp, *computing, side=side, batch_size=64) as localizer:
        yield localizer, look_at(source, weights, localizer, rows, reporter)


def look_at(
    source: CropSource,
    weights: Weights,
    localizer: Localizer,
    rows: Sequence[int],
    reporter: Reporter | None = None,
) -> Survey:
    """Run AnchorNet, decision and LSP on images of a source.

    Results are those of `extract`, to the bit. Images that cannot be decoded are left out.

    Raises:
        DataError: no image can be decoded.
        NonFiniteError: the network produced NaN or infinity; names the image.
    """
    reporter = reporter or Reporter()
    seen: list[NDArray[np.int64]] = []
    found: list[Localized] = []
    waiting: deque[tuple[NDArray[np.int64], Pending]] = deque()

    def take() -> None:
        part, pending = waiting.popleft()
        found.append(pending.result(lambda i: f"{source.name}/{source.path(int(part[i]))}"))
        seen.append(part)
        reporter.advance(len(part))

    with reporter.counting("look at images", len(rows)):
        for crops in source.batches(rows, _BATCH):
            waiting.append((crops.rows, localizer.submit(crops.pixels)))
            if len(waiting) > 2:
                take()
        while waiting:
            take()
    if not seen:
        raise DataError(
            f"{source.name}: none of {len(rows)} images can be decoded; the first is "
            f"{source.path(rows[0])}"
        )
    looked_at = np.concatenate(seen)
    return Survey(source, weights, looked_at, _concatenated(found), len(rows) - len(looked_at))


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


def _concatenated(parts: Sequence[Localized]) -> Localized:
    return Localized(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _index(name: str, known: Sequence[str], where: str, what: str) -> int:
    if name in known:
        return known.index(name)
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near else f"the first is {known[0]}"
    raise SettingsError(
        f"--{what}: {name!r} is not among the {len(known):,} {what} of {where}; {hint}"
    )


@dataclass(frozen=True, eq=False)
class ShownImages(ABC):
    """What Figure 3, 4 or 5 shows.

    Attributes:
        config: what was asked for.
        survey: the images that it chose among.
    """

    config: Choice
    survey: Survey

    #: Name of the command, number of the figure in the paper, and a few words.
    name: ClassVar[str]
    number: ClassVar[int]
    title: ClassVar[str]

    #: Headings of its table.
    columns: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def caption(self) -> str:
        """A few sentences on what is seen and how it came about."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What is shown, as JSON without pixels."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, ...]]:
        """Yield a line for each image, in the order of `columns`."""

    def table(self) -> Table:
        """Return the images as a table."""
        rows = tuple(tuple(map(text, row)) for row in self.rows())
        return Table(self.title, named(*self.columns), rows)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the figure lacks, a line each."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """Return what stands in the JSON file beside the picture, and what the report reads."""
        return {
            "figure": self.name,
            "number": self.number,
            "title": self.title,
            "caption": self.caption,
            "weights_sha256": self.survey.weights.sha256,
            "source": self.survey.source.name,
            "settings": self.config.settings,
            "looked_at": len(self.survey),
            "unreadable": self.survey.unreadable,
            "class_names": self.class_names(),
            **self.facts,
        }

    def shown(self, of: str) -> str:
        """Return a class with what it is called."""
        return self.config.class_names.shown(of)

    def class_names(self) -> dict[str, str]:
        """Return what the classes of the facts are called, where something says it."""
        known = {*self.survey.source.classes, *self.survey.network}
        names = {of: self.config.class_names.name(of) for of in _texts(self.facts) if of in known}
        return {of: name for of, name in sorted(names.items()) if name is not None}


def _texts(facts: Any) -> Iterator[str]:
    """Yield every text among JSON values."""
    if isinstance(facts, str):
        yield facts
    elif isinstance(facts, dict | list | tuple):
        for value in facts.values() if isinstance(facts, dict) else facts:
            yield from _texts(value)
