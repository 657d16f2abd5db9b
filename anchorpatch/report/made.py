"""Figures that a page makes on its way: from the crops that shards store, nothing is written."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure
from PIL import Image

from anchorpatch.demo import demo_weights
from anchorpatch.errors import AnchorpatchError, NothingToShow, WeightsError
from anchorpatch.figures import attention_figure, errors_figure, patches_figure
from anchorpatch.figures.attention import AttentionConfig, find_attention
from anchorpatch.figures.errors import ErrorsConfig, find_errors
from anchorpatch.figures.examples import Choice
from anchorpatch.figures.files import FigureFile, encoded, figure_of
from anchorpatch.figures.patches import PatchesConfig, find_patches
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.report.collect import Contents, LeftOut, Split
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.runtime.progress import Reporter
from anchorpatch.shards.reader import ShardReader
from anchorpatch.storage import sha256_of

__all__ = ["MAKERS", "Made", "make_figures"]

_Maker = Callable[[ImageSource, Weights, Reporter], tuple[Any, Image.Image | Figure]]


@dataclass(frozen=True)
class Made:
    """What could be made.

    Attributes:
        figures: one for each number that was missing and could be made.
        weights: that they were made with; None where nothing was made.
        left_out: what failed, and why.
        nothing: why there is nothing to show, by the number of the figure; no fault.
        reason: why none of those that were missing was tried; empty where they were.
    """

    figures: tuple[FigureFile, ...] = ()
    weights: Path | None = None
    left_out: tuple[LeftOut, ...] = ()
    nothing: Mapping[int, str] = field(default_factory=dict)
    reason: str = ""


#: Images that each figure looks at: fewer than its command does, so that a page is quick to make.
_CHOICE: Final = Choice(limit=150)


def _patches(source: ImageSource, weights: Weights, reporter: Reporter) -> tuple[Any, Image.Image]:
    result = find_patches(source, weights, PatchesConfig(_CHOICE), reporter)
    return result, patches_figure(result)


def _errors(source: ImageSource, weights: Weights, reporter: Reporter) -> tuple[Any, Image.Image]:
    result = find_errors(source, weights, ErrorsConfig(_CHOICE), reporter)
    return result, errors_figure(result)


def _attention(source: ImageSource, weights: Weights, reporter: Reporter) -> tuple[Any, Figure]:
    result = find_attention(source, weights, AttentionConfig(_CHOICE), reporter)
    return result, attention_figure(result)


#: Number of a figure -> what makes it: the job's result, and its picture.
MAKERS: Final[Mapping[int, _Maker]] = {3: _patches, 4: _errors, 5: _attention}


def make_figures(contents: Contents, weights: Path | None, reporter: Reporter) -> Made:
    """Make the figures that the folder lacks and that its shards are enough for.

    Args:
        contents: of the folder.
        weights: of AnchorNet; None to look for those that made the shards, among the runs and
            the bundled ones.
        reporter: takes the progress.

    Raises:
        WeightsError: ``weights`` cannot be read, or made none of the shards that store crops.
    """
    missing = [number for number in MAKERS if number not in {f.number for f in contents.figures}]
    splits = [s for s in contents.splits if s.facts.settings.store_images and s.facts.images]
    # Validation images tell more than those that the network was trained on.
    splits.sort(key=lambda split: split.facts.split == "train")
    split, path = _matching(splits, contents, weights)
    if not missing:
        return Made()
    if split is None or path is None:
        return Made(reason=_lacking(contents, splits))
    figures, left_out, nothing = [], [], {}
    loaded = load_weights(path)
    for number in missing:
        try:
            source = ImageSource.of_shards(ShardReader(split.folder, partial=True))
            result, picture = MAKERS[number](source, loaded, reporter)
            if isinstance(picture, Figure):
                picture = Image.open(io.BytesIO(encoded(picture, "PNG")))
            figures.append(figure_of(result.to_json(), picture, source="made for this page"))
        except NothingToShow as error:
            nothing[number] = str(error)
        except AnchorpatchError as error:
            left_out.append(LeftOut(f"Figure {number} of {split.folder}", str(error)))
    return Made(tuple(figures), path, tuple(left_out), nothing)


def _matching(
    splits: Sequence[Split], contents: Contents, given: Path | None
) -> tuple[Split | None, Path | None]:
    """Return the first split whose weights are at hand, and their file."""
    if given is not None:
        digest = load_weights(given).sha256
        known: Iterable[tuple[str, Path]] = [(digest, given)]
    else:
        known = _known_weights(contents)
    by_digest: dict[str, Path] = {}
    for digest, path in known:
        by_digest.setdefault(digest, path)
    for split in splits:
        if split.facts.weights_sha256 in by_digest:
            return split, by_digest[split.facts.weights_sha256]
    if given is not None:
        made = ", ".join(sorted({split.facts.weights_sha256[:12] for split in splits}))
        found = f"shards made by {made}" if made else "no shards that store their crops"
        raise WeightsError(
            f"{given}: expected the weights that made shards of {contents.folder} that store "
            f"their crops, found SHA-256 {digest[:12]} and {found}; name those, or give "
            "--no-figures"
        )
    return None, None


def _lacking(contents: Contents, splits: Sequence[Split]) -> str:
    """Say what keeps figures from being made."""
    if not contents.splits:
        return "there are no shards"
    if not any(split.facts.images for split in contents.splits):
        return "the shards hold no image"
    if not splits:
        return "the shards store no images: extract with --store-images"
    made = ", ".join(dict.fromkeys(split.facts.weights_sha256[:12] for split in splits))
    return (
        f"the weights that made the shards (SHA-256 {made}) are neither those of a run nor the "
        "bundled ones (`anchorpatch report --weights FILE` names them)"
    )


def _known_weights(contents: Contents) -> Iterator[tuple[str, Path]]:
    for file in contents.weights:
        if file.meta.architecture == "anchornet":
            yield file.sha256, file.path
    try:
        path = demo_weights()
    except WeightsError:
        return
    with path.open("rb") as stream:
        yield sha256_of(stream), path
