"""What a folder holds that a report can show, read and checked.

Whatever is there and cannot be read is left out with its reason; the rest is taken all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from anchorpatch.demo.score import SceneScore, score_scenes
from anchorpatch.errors import AnchorpatchError, DataError, ImageError, reason_of
from anchorpatch.images.decode import decode_picture
from anchorpatch.jobs.results import AnchorNetFigures, Speed, Table3, Table3Row, Table4, Table4Row
from anchorpatch.jobs.tradeoff import Dynamic
from anchorpatch.runtime.checkpoint import WeightsMeta, read_meta
from anchorpatch.settings import SCALES
from anchorpatch.shards.layout import MANIFEST_NAME
from anchorpatch.shards.manifest import SplitFacts, read_manifest, split_facts
from anchorpatch.shards.reader import ShardReader
from anchorpatch.storage import sha256_of
from anchorpatch.tables import number

_LOG: Final = "log.jsonl"

#: Skipped images that the page names; the reasons of all are counted.
_NAMED: Final = 50

_T = TypeVar("_T")

#: What ``anchorpatch evaluate`` finds.
Result: TypeAlias = Table3 | Table4 | AnchorNetFigures | Dynamic


class LeftOut(NamedTuple):
    """Something that is there and could not be read: the file or folder, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: its folder below the folder of runs.
        folder: of the run.
        records: of its epochs, as `anchorpatch.training.loop` writes them.
        config: of ``config.json``; empty without one.
    """

    name: str
    folder: Path
    records: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """The shards of a split.

    Attributes:
        folder: of the split.
        facts: of its manifest.
        skipped: path and reason of the first images that could not be read.
        histogram: images by scale and number of patches, ``histogram[scale][k]`` with k patches;
            empty where the shards could not be opened.
    """

    folder: Path
    facts: SplitFacts
    skipped: tuple[tuple[str, str], ...]
    histogram: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class FigureFile:
    """A figure.

    Attributes:
        source: the JSON file, or what the figure was made from just now.
        facts: the JSON: texts ``figure``, ``title`` and ``caption``; there may be its ``number``
            in the paper, a list of rows as ``summary``, what it lacks as ``left_out``,
            ``settings``, ``weights_sha256``, and where its images came from as ``source``.
        picture: RGB.
        encoded: the picture's file, where there is one.
    """

    source: str
    facts: Mapping[str, Any]
    picture: Image.Image
    encoded: bytes | None = None

    @property
    def number(self) -> int:
        """Number of the figure in the paper, 3 to 6; 0 for none of them."""
        return int(self.facts.get("number", 0))


class WeightsFacts(NamedTuple):
    """A file of weights: what it says about itself, and the checksum of its bytes."""

    path: Path
    meta: WeightsMeta
    sha256: str


class Scenes(NamedTuple):
    """Drawn pictures: how patches fit the true boxes, and the picture of `anchorpatch demo`."""

    score: SceneScore
    picture: FigureFile | None


@dataclass(frozen=True)
class Contents:
    """All that a folder holds.

    Attributes:
        folder: that was searched.
        runs: in the order of their names.
        splits: in the order of their folders.
        results: of ``anchorpatch evaluate``, in the order of their files.
        figures: by number.
        weights: the best ones of the runs.
        scenes: where the folder has the true boxes of drawn pictures.
        left_out: what could not be read.
    """

    folder: Path
    runs: tuple[Run, ...]
    splits: tuple[Split, ...]
    results: tuple[Result, ...]
    figures: tuple[FigureFile, ...]
    weights: tuple[WeightsFacts, ...]
    scenes: Scenes | None
    left_out: tuple[LeftOut, ...]


def collect(
    folder: Path,
    *,
    runs: Path | None = None,
    shards: Path | None = None,
    figures: Path | None = None,
) -> Contents:
    """Read what a folder holds.

    Args:
        folder: with runs, shards, results or figures in it or below.
        runs: where the training runs lie; None for ``folder/runs``.
        shards: where the shards lie; None for ``folder/shards``.
        figures: where the figures lie; None for ``folder/figures``.

    Raises:
        DataError: there is nothing that a report could show.
    """
    bad: list[LeftOut] = []
    runs = runs or folder / "runs"
    shards = shards or folder / "shards"
    figures = figures or folder / "figures"
    logs = _files((folder, "", "*/", "*/*/"), (runs, "*/", "*/*/"), name=_LOG)
    manifests = _files((folder, "", "*/"), (shards, "", "*/"), name=MANIFEST_NAME)
    results = _files((folder, "", "*/"), (runs, "*/", "*/*/"), name="*.json", but=MANIFEST_NAME)
    drawn = _files((figures, ""), name="*.json")
    found = _each(logs, lambda path: _read_run(path, folder, runs, bad), bad)
    best = [run.folder / "best.safetensors" for run in found]
    splits = _each(manifests, lambda path: _read_split(path.parent, bad), bad)
    contents = Contents(
        folder=folder,
        runs=tuple(found),
        splits=tuple(splits),
        results=tuple(_each(results, _read_result, bad)),
        figures=tuple(sorted(_each(drawn, _read_figure, bad), key=lambda f: (f.number, f.source))),
        weights=tuple(_each([path for path in best if path.is_file()], read_weights_facts, bad)),
        scenes=_read_scenes(folder, splits, bad),
        left_out=tuple(bad),
    )
    if not (contents.runs or contents.splits or contents.results or contents.figures):
        raise DataError(_nothing(folder, bad))
    return contents


# --- searching ----------------------------------------------------------------------------


def _files(*places: tuple[Path | str, ...], name: str, but: str = "") -> list[Path]:
    """Return the files of a name in places (folder, pattern, ...), each once, in order."""
    found: dict[Path, Path] = {}
    for root, *patterns in places:
        for pattern in patterns:
            for path in sorted(Path(root).glob(f"{pattern}{name}")):
                if path.is_file() and path.name != but:
                    found.setdefault(path.resolve(), path)
    return list(found.values())


def _each(paths: Iterable[Path], read: Callable[[Path], _T | None], bad: list[LeftOut]) -> list[_T]:
    """Read each file; those that cannot be read go to ``bad``, None is nothing of ours."""
    found = (_one(path, read, bad) for path in paths)
    return [content for content in found if content is not None]


def _one(path: Path, read: Callable[[Path], _T | None], bad: list[LeftOut]) -> _T | None:
    try:
        return read(path)
    except (AnchorpatchError, OSError, ValueError, TypeError, KeyError) as error:
        bad.append(LeftOut(str(path), _reason(path, error)))
        return None


def _reason(path: Path, error: Exception) -> str:
    """Write an error in one line that does not say the file's name again."""
    if isinstance(error, AnchorpatchError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"cannot be read: {reason_of(error)}"
    elif isinstance(error, KeyError):
        text = f"damaged: it has no {error}"
    else:
        text = f"damaged: {error}"
    text = " ".join(text.split())
    return text.removeprefix(f"{path}: ")


def _nothing(folder: Path, bad: list[LeftOut]) -> str:
    if bad:
        return f"{bad[0].source}: {bad[0].reason}; {folder} holds nothing else to report on"
    what = "none of them" if folder.is_dir() else "no such folder"
    return (
        f"{folder}: expected training runs (runs/NAME/{_LOG}), shards (shards/SPLIT/"
        f"{MANIFEST_NAME}), results (results/*.json) or figures (figures/*.json), found {what}; "
        "`anchorpatch train`, `extract`, `evaluate NETWORK --result FILE` and `figure NAME` make "
        "them, `anchorpatch demo` a first set"
    )


# --- training runs ------------------------------------------------------------------------


def _read_run(path: Path, folder: Path, runs: Path, bad: list[LeftOut]) -> Run | None:
    records: list[Mapping[str, Any]] = []
    expected = 1.0  # a line each, from the first epoch on
    for line, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(text)
            epoch = number(record, "epoch") if isinstance(record, dict) else None
        except ValueError:
            epoch = None
        if epoch is None:
            why = "the record of an epoch, found other text"
            expected += 1
        elif epoch != expected:
            why = f"epoch {expected:g}, found {epoch:g}, a line of another run"
        else:
            records.append(record)
            expected += 1
            continue
        bad.append(LeftOut(str(path), f"line {line}: expected {why}"))
    if not records:
        return None
    config = path.with_name("config.json")
    settings = _one(config, _read_object, bad) if config.exists() else None
    name = _run_name(path.parent, folder, runs)
    return Run(name, path.parent, tuple(records), settings or {})


def _run_name(run: Path, folder: Path, runs: Path) -> str:
    for root in (runs, folder):
        if run != root and run.is_relative_to(root):
            return run.relative_to(root).as_posix()
    return run.resolve().name


def _read_object(path: Path) -> Mapping[str, Any]:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise TypeError(f"expected a JSON object, found {type(value).__name__}")
    return value


# --- shards -------------------------------------------------------------------------------


def _read_split(folder: Path, bad: list[LeftOut]) -> Split:
    manifest = read_manifest(folder)
    skipped = [s for entry in manifest.entries for s in entry.skipped][:_NAMED]
    histogram = _one(folder, lambda path: _histogram(ShardReader(path, partial=True)), bad)
    return Split(folder, split_facts(manifest), tuple(skipped), histogram or {})


def _histogram(reader: ShardReader) -> dict[int, tuple[int, ...]]:
    if not len(reader):
        return {}
    counts = {scale: reader.counts[reader.scale == scale] for scale in SCALES}
    return {scale: tuple(np.bincount(c).tolist()) for scale, c in counts.items()}


# --- results, figures, weights and scenes ---------------------------------------------------

#: A larger JSON file is no result of ours.
_MOST_BYTES: Final = 4 << 20


def _read_result(path: Path) -> Result | None:
    """Read a result; None for JSON of another kind, which may lie anywhere."""
    if path.stat().st_size > _MOST_BYTES:
        return None
    data = path.read_bytes()
    if b'"protocol"' not in data and not path.name.startswith("table"):
        return None
    fields = json.loads(data)
    protocol = fields.pop("protocol", None) if isinstance(fields, dict) else None
    if protocol and "notes" in fields:
        fields["notes"] = tuple(map(str, fields["notes"]))
    if protocol == "patches":
        fields["rows"] = tuple(Table3Row(**row) for row in fields["rows"])
        fields["speed"] = None if fields["speed"] is None else Speed.from_json(fields["speed"])
        fields["left_out"] = tuple(map(str, fields["left_out"]))
        return Table3(**fields)
    if protocol == "rescale":
        fields["rows"] = tuple(Table4Row(**row) for row in fields["rows"])
        return Table4(**fields)
    if protocol == "dynamic":
        return Dynamic.from_json(fields)
    return AnchorNetFigures(**fields) if protocol == "anchornet" else None


#: Types of a figure's fields; those that are no texts may be missing.
_FIELDS: Final = {
    **dict.fromkeys(("figure", "title", "caption", "picture"), (str, "text")),
    "number": (int, "a number"),
    **dict.fromkeys(("summary", "left_out"), (list, "a list")),
    "settings": (dict, "an object"),
}


def _read_figure(path: Path) -> FigureFile | None:
    """Read a figure's JSON and its picture; None for JSON of another kind.

    Raises:
        DataError: the JSON is no figure's, or its picture is missing or damaged.
    """
    facts = json.loads(path.read_bytes())
    if not isinstance(facts, dict) or "figure" not in facts:
        return None
    for key, (kind, expected) in _FIELDS.items():
        value = facts[key] if kind is str else facts.get(key, kind())
        if not isinstance(value, kind):
            raise DataError(f"expected {expected} as {key}, found {value!r}")
    if not all(isinstance(row, dict) for row in facts.get("summary", ())):
        raise DataError("expected a list of rows as summary, found other JSON")
    # By its name alone: what lies elsewhere is none of this figure's.
    picture = path.with_name(Path(facts["picture"]).name)
    try:
        data = picture.read_bytes()
        decoded = decode_picture(data).image
    except (OSError, ImageError) as error:
        raise DataError(f"its picture {picture.name}: {reason_of(error)}") from error
    return FigureFile(str(path), facts, decoded.convert("RGB"), data)


def read_weights_facts(path: Path) -> WeightsFacts:
    """Read what a file of weights says about itself.

    Raises:
        WeightsError: it is missing or damaged.
    """
    meta = read_meta(path)
    with path.open("rb") as file:
        return WeightsFacts(path, meta, sha256_of(file))


def _read_scenes(folder: Path, splits: list[Split], bad: list[LeftOut]) -> Scenes | None:
    """Compare the first split with the boxes that ``anchorpatch demo`` leaves, where there are."""
    first = min(splits, key=lambda split: split.facts.split == "train", default=None)
    boxes, picture = folder / "scenes" / "boxes.csv", folder / "patches.png"
    if not boxes.is_file() or first is None or not first.facts.images:
        return None
    score = _one(boxes, lambda path: score_scenes(first.folder, path), bad)
    if score is None:
        return None
    return Scenes(score, _one(picture, _read_demo_picture, bad) if picture.is_file() else None)


def _read_demo_picture(path: Path) -> FigureFile:
    encoded = path.read_bytes()
    facts = {
        "figure": "scenes",
        "title": "Scenes with their patches and the true boxes",
        "caption": "Bold: the strongest patch. Thin: the others. Dashed: the true box.",
    }
    return FigureFile(str(path), facts, decode_picture(encoded).image.convert("RGB"), encoded)
