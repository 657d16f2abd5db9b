"""Pictures of the page: made from shards where they are missing, and small enough to mail."""

from __future__ import annotations

import base64
import io
import math
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

#: A file up to here goes in as it is: making it smaller would not be seen in the page's size.
_SMALL: Final = 120_000

#: What one picture may take, in bytes: six of them stay below 4 MB as base64.
_MOST: Final = 480_000

#: WebP qualities to try in turn; where the second is not enough, the picture is made smaller.
_QUALITIES: Final = (90, 78)

#: Twice the width of the page's text, for screens of that density.
_WIDEST: Final = 2200


@dataclass(frozen=True)
class Embedded:
    """A picture as an <img> takes it.

    Attributes:
        url: data: URL.
        width: in pixels.
        height: in pixels.
        bytes: of the file in the URL.
    """

    url: str
    width: int
    height: int
    bytes: int


def embed(picture: Image.Image, encoded: bytes | None = None) -> Embedded:
    """Return a picture as a data: URL of at most about 0.65 MB.

    A file that is small stays as it is; of photographs, WebP is much smaller than PNG.

    Args:
        picture: RGB.
        encoded: its file, where there is one.
    """
    kind = _kind(encoded or b"")
    if encoded is None or not kind:
        encoded, kind = _png(picture), "png"
    if len(encoded) <= (_SMALL if kind == "png" else _MOST):
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
    return _embedded("webp", webp, smaller)


def _at_most(picture: Image.Image, width: int) -> Image.Image:
    if picture.width <= width:
        return picture
    size = (width, max(1, round(picture.height * width / picture.width)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _kind(encoded: bytes) -> str:
    """Return the kind of a file that every browser shows, or nothing."""
    if encoded.startswith(b"\x89PNG"):
        return "png"
    if encoded.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP" else ""


def _embedded(kind: str, data: bytes, picture: Image.Image) -> Embedded:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Embedded(url, picture.width, picture.height, len(data))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _webp(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=quality, method=4)
    return file.getvalue()


# --- figures that a page makes on its way, from the crops that shards store ---------------


_Find = Callable[[ImageSource, Weights, Any, Reporter], Any]


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


#: Number of a figure -> how it is found, with which settings, and drawn.
MAKERS: Final[Mapping[int, tuple[_Find, Any, Callable[[Any], Image.Image | Figure]]]] = {
    3: (find_patches, PatchesConfig(_CHOICE), patches_figure),
    4: (find_errors, ErrorsConfig(_CHOICE), errors_figure),
    5: (find_attention, AttentionConfig(_CHOICE), attention_figure),
}


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
            find, config, draw = MAKERS[number]
            result = find(source, loaded, config, reporter)
            picture = draw(result)
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
