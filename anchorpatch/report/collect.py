"""What a folder holds that a report can show, read and checked.

Whatever is there and cannot be read is left out with its reason; the rest is taken all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from anchorpatch.demo.score import SceneScore, score_scenes
from anchorpatch.errors import AnchorpatchError, DataError, ImageError, reason_of
from anchorpatch.figures.files import FigureFile, read_figure
from anchorpatch.images.decode import decode_picture
from anchorpatch.jobs.results import AnchorNetFigures, Speed, Table3, Table3Row, Table4, Table4Row
from anchorpatch.runtime.checkpoint import WeightsMeta, read_meta
from anchorpatch.settings import SCALES
from anchorpatch.shards.layout import MANIFEST_NAME
from anchorpatch.shards.manifest import SplitFacts, read_manifest, split_facts
from anchorpatch.shards.reader import ShardReader
from anchorpatch.storage import sha256_of

_LOG: Final = "log.jsonl"

#: Skipped images that the page names; the reasons of all are counted.
_NAMED: Final = 50

_T = TypeVar("_T")


@dataclass(frozen=True)
class LeftOut:
    """Something that is there and could not be read.

    Attributes:
        source: the file or folder.
        reason: what was expected and what was found.
    """

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


@dataclass(frozen=True)
class Contents:
    """All that a folder holds.

    Attributes:
        folder: that was searched.
        runs: in the order of their names.
        splits: in the order of their folders.
        results: in the order of their files.
        figures: by number.
        weights: the best ones of the runs.
        left_out: what could not be read.
    """

    folder: Path
    runs: tuple[Run, ...]
    splits: tuple[Split, ...]
    results: tuple[Result, ...]
    figures: tuple[FigureFile, ...]
    weights: tuple[WeightsFacts, ...]
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
    runs, shards, figures = (
        given or folder / name
        for given, name in ((runs, "runs"), (shards, "shards"), (figures, "figures"))
    )
    logs = _files((folder, "", "*/", "*/*/"), (runs, "*/", "*/*/"), name=_LOG)
    manifests = _files((folder, "", "*/"), (shards, "", "*/"), name=MANIFEST_NAME)
    results = _files((folder, "", "*/"), (runs, "*/", "*/*/"), name="*.json", but=MANIFEST_NAME)
    found = _each(logs, lambda path: _read_run(path, folder, runs, bad), bad)
    weights = [run.folder / "best.safetensors" for run in found]
    contents = Contents(
        folder=folder,
        runs=tuple(found),
        splits=tuple(_each(manifests, lambda path: _read_split(path.parent, bad), bad)),
        results=tuple(_each(results, read_result, bad)),
        figures=tuple(
            sorted(
                _each(_files((figures, ""), name="*.json"), read_figure, bad),
                key=lambda figure: (figure.number, figure.source),
            )
        ),
        weights=tuple(_each([w for w in weights if w.is_file()], read_weights_facts, bad)),
        left_out=tuple(bad),
    )
    if not (contents.runs or contents.splits or contents.results or contents.figures):
        raise DataError(_nothing(folder, bad))
    return contents


def number(record: Mapping[str, Any], *keys: str) -> float | None:
    """Return a finite number of a record of an epoch, or None.

    Example:
        >>> number({"val": {"top1": 0.5}}, "val", "top1"), number({"val": None}, "val", "top1")
        (0.5, None)
    """
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
    return float(value) if known else None


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
    taken = []
    for path in paths:
        try:
            found = read(path)
        except (AnchorpatchError, OSError, ValueError, TypeError, KeyError) as error:
            bad.append(LeftOut(str(path), _reason(path, error)))
            continue
        if found is not None:
            taken.append(found)
    return taken


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
            found = "the record of an epoch, found other text"
            expected += 1
        elif epoch != expected:
            found = f"epoch {expected:g}, found {epoch:g}, a line of another run"
        else:
            records.append(record)
            expected += 1
            continue
        bad.append(LeftOut(str(path), f"line {line}: expected {found}"))
    if not records:
        return None
    return Run(
        _run_name(path.parent, folder, runs), path.parent, tuple(records), _config(path, bad)
    )


def _run_name(run: Path, folder: Path, runs: Path) -> str:
    for root in (runs, folder):
        if run != root and run.is_relative_to(root):
            return run.relative_to(root).as_posix()
    return run.resolve().name


def _config(log: Path, bad: list[LeftOut]) -> Mapping[str, Any]:
    path = log.with_name("config.json")
    if not path.exists():
        return {}
    found = _each([path], lambda file: _object(json.loads(file.read_bytes())), bad)
    return found[0] if found else {}


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a JSON object, found {type(value).__name__}")
    return value


# --- shards -------------------------------------------------------------------------------


def _read_split(folder: Path, bad: list[LeftOut]) -> Split:
    manifest = read_manifest(folder)
    skipped = [s for entry in manifest.entries for s in entry.skipped][:_NAMED]
    histograms = _each([folder], lambda path: _histogram(ShardReader(path, partial=True)), bad)
    return Split(folder, split_facts(manifest), tuple(skipped), histograms[0] if histograms else {})


def _histogram(reader: ShardReader) -> dict[int, tuple[int, ...]]:
    if not len(reader):
        return {}
    counts = {scale: reader.counts[reader.scale == scale] for scale in SCALES}
    return {scale: tuple(np.bincount(c).tolist()) for scale, c in counts.items()}


#: A larger JSON file is no result of ours.
_MOST_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class Result:
    """What ``anchorpatch evaluate`` found.

    Attributes:
        source: the file.
        table: Table 3, Table 4, or the figures of AnchorNet.
    """

    source: str
    table: Table3 | Table4 | AnchorNetFigures


def read_result(path: Path) -> Result | None:
    """Read a result; None for JSON of another kind, which may lie anywhere."""
    if path.stat().st_size > _MOST_BYTES:
        return None
    data = path.read_bytes()
    if b'"protocol"' not in data and not path.name.startswith("table"):
        return None
    document = json.loads(data)
    if not isinstance(document, dict) or document.get("protocol") not in _READERS:
        return None
    fields = {name: value for name, value in document.items() if name != "protocol"}
    return Result(str(path), _READERS[document["protocol"]](fields))


def _table_3(fields: dict[str, Any]) -> Table3:
    rows = tuple(Table3Row(**row) for row in fields["rows"])
    speed = None if fields["speed"] is None else Speed(**fields["speed"])
    left_out = tuple(map(str, fields["left_out"]))
    return Table3(**{**fields, "rows": rows, "speed": speed, "left_out": left_out})


def _table_4(fields: dict[str, Any]) -> Table4:
    return Table4(**{**fields, "rows": tuple(Table4Row(**row) for row in fields["rows"])})


_READERS: Final[Mapping[str, Callable[[dict[str, Any]], Table3 | Table4 | AnchorNetFigures]]] = {
    "patches": _table_3,
    "rescale": _table_4,
    "anchornet": lambda fields: AnchorNetFigures(**fields),
}


@dataclass(frozen=True)
class WeightsFacts:
    """A file of weights.

    Attributes:
        path: of the file.
        meta: what it says about itself.
        sha256: of its bytes.
    """

    path: Path
    meta: WeightsMeta
    sha256: str

    def shown(self) -> dict[str, Any]:
        """Return what a page says of it."""
        record = self.meta.training.get("record")
        val = record.get("val") if isinstance(record, dict) else None
        top1 = val.get("top1") if isinstance(val, dict) else None
        return {
            "network": self.meta.architecture,
            "classes": f"{len(self.meta.classes):,}",
            "top-1": f"{top1:.2%}" if isinstance(top1, (int, float)) else "",
            "SHA-256": self.sha256,
        }


def read_weights_facts(path: Path) -> WeightsFacts:
    """Read what a file of weights says about itself.

    Raises:
        WeightsError: it is missing or damaged.
    """
    meta = read_meta(path)
    with path.open("rb") as file:
        return WeightsFacts(path, meta, sha256_of(file))


#: Where ``anchorpatch demo`` leaves the true boxes and a picture, below its folder.
BOXES: Final = Path("scenes", "boxes.csv")
PICTURE: Final = "patches.png"


@dataclass(frozen=True, eq=False)
class Scenes:
    """What is known of drawn pictures.

    Attributes:
        score: of the patches against the true boxes.
        picture: that ``anchorpatch demo`` wrote; None without one.
    """

    score: SceneScore
    picture: FigureFile | None


def read_scenes(contents: Contents) -> tuple[Scenes | None, tuple[LeftOut, ...]]:
    """Compare the first split with the true boxes, where the folder has boxes.

    Returns:
        What is known, or None; and what could not be read.
    """
    boxes = contents.folder / BOXES
    splits = sorted(contents.splits, key=lambda split: split.facts.split == "train")
    if not boxes.is_file() or not splits or not splits[0].facts.images:
        return None, ()
    picture = contents.folder / PICTURE
    try:
        score = score_scenes(splits[0].folder, boxes)
        drawn = _picture(picture) if picture.is_file() else None
    except ImageError as error:
        return Scenes(score, None), (LeftOut(str(picture), error.reason),)
    except AnchorpatchError as error:
        return None, (LeftOut(str(boxes), str(error).removeprefix(f"{boxes}: ")),)
    return Scenes(score, drawn), ()


def _picture(path: Path) -> FigureFile:
    encoded = path.read_bytes()
    return FigureFile(
        source=str(path),
        name="scenes",
        number=0,
        title="Scenes with their patches and the true boxes",
        caption="Bold: the strongest patch. Thin: the others. Dashed: the true box.",
        picture=decode_picture(encoded).image.convert("RGB"),
        encoded=encoded,
    )
