"""Pictures of the page: made from shards where they are missing, and small enough to mail."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from matplotlib.figure import Figure
from PIL import Image

from anchorpatch.classes import IMAGENET_NAMES, ClassNames
from anchorpatch.demo import BUNDLED, bundled_weights
from anchorpatch.errors import AnchorpatchError, NothingToShow, WeightsError
from anchorpatch.figures import EXAMPLES
from anchorpatch.figures.canvas import encoded as encoded_picture
from anchorpatch.jobs.crops import CropSource
from anchorpatch.report.collect import Contents, FigureFile, LeftOut, Split
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.runtime.progress import Reporter
from anchorpatch.shards.reader import ShardReader

#: A file up to here goes in as it is: making it smaller would not be seen in the page's size.
_SMALL: Final = 120_000

#: What one picture may take, in bytes: six of them stay below 4 MB as base64.
_MOST: Final = 480_000

#: WebP qualities to try in turn; where the second is not enough, the picture is made smaller.
_QUALITIES: Final = (90, 78)

#: Twice the width of the page's text, for screens of that density.
_WIDEST: Final = 2200


class Embedded(NamedTuple):
    """A picture as an <img> takes it: a data: URL, and the size in pixels."""

    url: str
    width: int
    height: int


def embed(picture: Image.Image, encoded: bytes | None = None) -> Embedded:
    """Return a picture as a data: URL of at most about 0.65 MB.

    A file that is small stays as it is; of photographs, WebP is much smaller than PNG.

    Args:
        picture: RGB.
        encoded: its file, where there is one.
    """
    kind = _kind(encoded or b"")
    if encoded is None or not kind:
        encoded, kind = _encoded(picture, "PNG"), "PNG"
    if len(encoded) <= (_SMALL if kind == "PNG" else _MOST):
        return _embedded(kind, encoded, picture)
    smaller = _at_most(picture, _WIDEST)
    webp = _webp(smaller, _QUALITIES[0])
    if len(webp) > _MOST:
        webp = _webp(smaller, _QUALITIES[1])
    if len(encoded) <= _MOST and len(webp) > 0.7 * len(encoded):
        return _embedded(kind, encoded, picture)
    while len(webp) > _MOST:
        # Bytes grow about as the area does.
        share = 0.95 * math.sqrt(_MOST / len(webp))
        smaller = _at_most(smaller, max(1, int(smaller.width * share)))
        webp = _webp(smaller, _QUALITIES[1])
    return _embedded("WEBP", webp, smaller)


def _kind(encoded: bytes) -> str:
    """Return the kind of a file that every browser shows, or nothing."""
    kinds = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WEBP"}
    return next((kind for start, kind in kinds.items() if encoded.startswith(start)), "")


def _at_most(picture: Image.Image, width: int) -> Image.Image:
    if picture.width <= width:
        return picture
    size = (width, max(1, round(picture.height * width / picture.width)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _embedded(kind: str, data: bytes, picture: Image.Image) -> Embedded:
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"
    return Embedded(url, picture.width, picture.height)


def _webp(picture: Image.Image, quality: int) -> bytes:
    return _encoded(picture, "WEBP", quality=quality, method=4)


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# --- figures that a page makes on its way, from the crops that shards store ---------------


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
_LIMIT: Final = 150


def make_figures(
    contents: Contents,
    weights: Path | None,
    reporter: Reporter,
    class_names: ClassNames = IMAGENET_NAMES,
) -> Made:
    """Make the figures that the folder lacks and that its shards are enough for.

    Args:
        contents: of the folder.
        weights: of AnchorNet; None to look for those that made the shards, among the runs and
            the bundled ones.
        reporter: takes the progress.
        class_names: what classes are called.

    Raises:
        WeightsError: ``weights`` cannot be read, or made none of the shards that store crops.
    """
    missing = [number for number in EXAMPLES if number not in {f.number for f in contents.figures}]
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
        configure, find, draw = EXAMPLES[number]
        try:
            source = CropSource.of_shards(ShardReader(split.folder, partial=True))
            names = class_names.of(source.classes, loaded.meta.classes)
            result = find(source, loaded, configure(limit=_LIMIT, class_names=names), reporter)
            picture = draw(result)
            if isinstance(picture, Figure):
                picture = Image.open(io.BytesIO(encoded_picture(picture, "PNG"))).convert("RGB")
            figures.append(FigureFile("made for this page", result.to_json(), picture))
        except NothingToShow as error:
            nothing[number] = str(error)
        except AnchorpatchError as error:
            left_out.append(LeftOut(f"Figure {number} of {split.folder}", str(error)))
    return Made(tuple(figures), path, tuple(left_out), nothing)


def _matching(
    splits: Sequence[Split], contents: Contents, given: Path | None
) -> tuple[Split | None, Path | None]:
    """Return the first split whose weights are at hand, and their file."""
    known: dict[str, Path] = {}
    if given is not None:
        known[load_weights(given).sha256] = given
    else:
        for bundled in BUNDLED:
            with suppress(WeightsError):
                known[load_weights(bundled_weights(bundled)).sha256] = bundled_weights(bundled)
        # Of equal files, the first run's counts.
        for file in reversed(contents.weights):
            if file.meta.architecture == "anchornet":
                known[file.sha256] = file.path
    made_by = [split.facts.weights_sha256 for split in splits]
    for split, digest in zip(splits, made_by, strict=True):
        if digest in known:
            return split, known[digest]
    if given is not None:
        made = ", ".join(sorted({digest[:12] for digest in made_by}))
        found = f"shards made by {made}" if made else "no shards that store their crops"
        raise WeightsError(
            f"{given}: expected the weights that made shards of {contents.folder} that store "
            f"their crops, found SHA-256 {next(iter(known))[:12]} and {found}; name those, or give "
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
