"""The whole job of ``anchorpatch report``: read a folder, make what is missing, write one page.

The page is one HTML file without a request to any network. What comes from files goes through
Jinja's escaping; only the charts, which matplotlib drew, and the style and script of this
package go in as they are. The page's own security policy lets no script run but that one, and no
request leave.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

import anchorpatch
from anchorpatch.errors import SettingsError
from anchorpatch.figures.files import FigureFile
from anchorpatch.jobs.results import Table3, Table3Row, Table4
from anchorpatch.report.charts import Chart, comparison, draw, run_charts
from anchorpatch.report.collect import (
    Contents,
    LeftOut,
    Run,
    Scenes,
    Split,
    WeightsFacts,
    collect,
    number,
    read_scenes,
    read_weights_facts,
)
from anchorpatch.report.pictures import MAKERS, Embedded, Made, embed, make_figures
from anchorpatch.report.tables import (
    coverage_table,
    epoch_table,
    histogram_table,
    run_table,
    skipped_table,
)
from anchorpatch.runtime.checkpoint import versions
from anchorpatch.runtime.progress import Reporter
from anchorpatch.storage import to_json, write_atomically
from anchorpatch.tables import Table, decimal, facts_table, share, shown_value
from anchorpatch.text import clean, counted, percent
from anchorpatch.training.run_folder import best_record


@dataclass(frozen=True)
class ReportConfig:
    """What the page is about.

    Attributes:
        folder: that holds the runs, shards, results and figures.
        out: the page; None for ``folder/report.html``.
        runs: where training runs lie; None for ``folder/runs``.
        shards: where shards lie; None for ``folder/shards``.
        figures: where figures lie; None for ``folder/figures``.
        weights: of AnchorNet, for the figures that are made on the way; None for those among the
            runs or the bundled ones that made the shards.
        make_figures: make the figures that can be made from the shards and are not there.
        date: of the page; None for now, or for SOURCE_DATE_EPOCH.
    """

    folder: Path
    out: Path | None = None
    runs: Path | None = None
    shards: Path | None = None
    figures: Path | None = None
    weights: Path | None = None
    make_figures: bool = True
    date: datetime | None = None


@dataclass(frozen=True)
class ReportSummary:
    """What was written.

    Attributes:
        report: the page.
        bytes: its size.
        seconds: that it took.
        sections: section -> what it holds -> how many.
        missing: section -> why it lacks something, where it does.
        left_out: what is there and could not be read.
    """

    report: Path
    bytes: int
    seconds: float
    sections: dict[str, dict[str, int]]
    missing: dict[str, str]
    left_out: tuple[LeftOut, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON."""
        return {
            "report": str(self.report),
            "bytes": self.bytes,
            "seconds": round(self.seconds, 2),
            "sections": self.sections,
            "missing": self.missing,
            "left_out": [vars(what) for what in self.left_out],
        }


def run(config: ReportConfig, progress: Reporter | None = None) -> ReportSummary:
    """Write the page of a folder.

    Raises:
        DataError: there is nothing that a page could show.
        SettingsError: SOURCE_DATE_EPOCH is no date.
        WeightsError: the weights that are named did not make the shards.
        StorageError: the disk refused; what stood under the page's name before is as it was.
    """
    began = time.monotonic()
    date, progress = config.date or page_date(), progress or Reporter()
    contents = collect(
        config.folder, runs=config.runs, shards=config.shards, figures=config.figures
    )
    made = Made(reason="--no-figures was given")
    if config.make_figures:
        made = make_figures(contents, config.weights, progress)
    scenes, bad = read_scenes(contents)
    left_out = (*contents.left_out, *made.left_out, *bad)
    figures = sorted((*contents.figures, *made.figures), key=lambda figure: figure.number)
    used = [] if made.weights is None else [read_weights_facts(made.weights)]
    parts = sections(contents, figures, scenes, used, made)
    page = render(config.folder, key_figures(contents), parts, left_out, date)
    out = config.out or config.folder / "report.html"
    write_atomically(out, lambda file: file.write(page))
    counts = {section.key: section.counts for section in parts}
    missing = {section.key: section.missing for section in parts if section.missing}
    return ReportSummary(out, len(page), time.monotonic() - began, counts, missing, left_out)


# --- key figures --------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A key figure at the head of the page.

    Attributes:
        value: written.
        label: what it is.
    """

    value: str
    label: str


def key_figures(contents: Contents, most: int = 8) -> tuple[Key, ...]:
    """Return what a reader wants to know first: accuracy, and what it costs."""
    keys = []
    tables = [r.table for r in contents.results if isinstance(r.table, Table3)]
    for table, row in ((t, row) for t in tables for row in t.rows if row.scale == "all"):
        keys.append(Key(share(row.top1, 1).text, f"top-1 of {table.network} on patches"))
        keys += _cost(table, row)
    validation = [split for split in contents.splits if split.facts.split != "train"]
    for split in validation or contents.splits:
        facts = split.facts
        if facts.top1 is not None:
            keys.append(Key(share(facts.top1, 1).text, f"top-1 of AnchorNet on {facts.split}"))
        if facts.images:
            patches = sum(found["patches"] for found in facts.scales.values())
            mean = decimal(patches / facts.images).text
            keys.append(Key(mean, f"patches per image of {facts.split}"))
    for run in contents.runs:
        if best := best_record(run.records):
            top1 = share(number(best, "val", "top1"), 1).text
            keys.append(Key(top1, f"best top-1 of run {run.name}"))
    return tuple(keys[:most])


def _cost(table: Table3, row: Table3Row) -> list[Key]:
    """Return what an image costs in all, and the measured speed: AnchorNet's part is in both."""
    keys = []
    if row.gmacs_with_anchornet is not None:
        own, whole = (decimal(v, 3).text for v in (table.gmacs_anchornet, table.gmacs_whole))
        label = f"GMACs per image of {table.network} in all, AnchorNet's {own} included"
        if (saved := row.saved_with_anchornet) is not None:
            more = "less" if saved >= 0 else "more"
            label += f": {percent(abs(saved), 0)} {more} than a whole image's {whole}"
        keys.append(Key(decimal(row.gmacs_with_anchornet, 3).text, label))
    if table.speed is not None:
        label = f"the speed of {table.network} on whole images, measured, AnchorNet included"
        keys.append(Key(f"{decimal(table.speed.ratio).text} times", label))
    return keys


# --- sections, still without HTML ---------------------------------------------------------

#: Figure -> its title and the command that makes it.
_FIGURES: Final = {
    3: ("patches by chosen scale", "anchorpatch figure patches"),
    4: ("what misled a branch", "anchorpatch figure errors"),
    5: ("attention and class heatmaps", "anchorpatch figure attention"),
    6: ("accuracy by covered and masked area", "anchorpatch figure coverage NETWORK"),
}

_NOTHING_MADE: Final = Made()


@dataclass(frozen=True)
class Words:
    """A paragraph; what stands between backticks is a command."""

    text: str
    kind: ClassVar[str] = "words"


@dataclass(frozen=True)
class Charts:
    """Charts side by side: each with its <svg>."""

    charts: tuple[tuple[Chart, str], ...]
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Plate:
    """A figure of the paper with its picture."""

    figure: FigureFile
    picture: Embedded
    settings: tuple[tuple[str, str], ...]
    kind: ClassVar[str] = "plate"


@dataclass(frozen=True)
class Part:
    """A part of a section under a heading of its own."""

    title: str
    blocks: tuple[Any, ...]
    kind: ClassVar[str] = "part"


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: its name in links and in the summary.
        title: its heading.
        blocks: `Words`, `Charts`, `Plate`, `Part` or `Table`, in order.
        counts: what it holds, for the summary of the command.
        missing: why something is not in it, in one line; empty where nothing is to be said.
    """

    key: str
    title: str
    blocks: tuple[Any, ...]
    counts: dict[str, int]
    missing: str = ""


def sections(
    contents: Contents,
    figures: Sequence[FigureFile],
    scenes: Scenes | None = None,
    used: Sequence[WeightsFacts] = (),
    made: Made = _NOTHING_MADE,
) -> tuple[Section, ...]:
    """Return the sections of the page: those that hold something before those that do not.

    An empty one says what would fill it. The settings come last.

    Args:
        contents: of the folder.
        figures: of the folder, and those made just now.
        scenes: what is known of drawn pictures, where the images are such.
        used: weights that figures were made with just now.
        made: what was made on the way: why some figures are not there.
    """
    found = [_training(contents.runs), _results(contents), _figures(figures, made)]
    found += [] if scenes is None else [_scenes(scenes)]
    found.append(_shards(contents.splits))
    found.sort(key=lambda section: not any(section.counts.values()))
    return (*found, _settings(contents, _each_once((*contents.weights, *used))))


def _training(runs: Sequence[Run]) -> Section:
    if not runs:
        words = "There is no training run; `anchorpatch train` makes one in `runs/anchornet`."
        return Section("training", "Training", (Words(words),), {"runs": 0}, "no training run")
    blocks: list[Any] = [run_table(runs)]
    if (chart := comparison(runs)) is not None:
        blocks.append(Charts(((chart, draw(chart, "runs", width=4.6, height=2.9)),)))
    for i, run in enumerate(runs):
        charts = tuple(
            (chart, draw(chart, f"run{i}-{j}")) for j, chart in enumerate(run_charts(run))
        )
        blocks.append(Part(run.name, (Charts(charts), epoch_table(run))))
    return Section("training", "Training", tuple(blocks), {"runs": len(runs)})


def _results(contents: Contents) -> Section:
    found = [result.table for result in contents.results]
    threes = [table for table in found if isinstance(table, Table3)]
    fours = [table for table in found if isinstance(table, Table4)]
    anchornet = [t for t in found if not isinstance(t, (Table3, Table4))]
    in_order: list[Any] = [*threes, *fours, *anchornet]
    blocks: list[Any] = [table for found in in_order for table in found.tables()]
    for there, name, more in (
        (threes, "3, patches against whole images", ""),
        (fours, "4, one patch against the rescaled image", " --protocol rescale"),
    ):
        if not there:
            blocks.append(
                Words(
                    f"Table {name[0]} ({name[3:]}) is not here; `anchorpatch evaluate "
                    f"NETWORK{more} --result runs/NETWORK/table{name[0]}.json` makes it."
                )
            )
    counts = {"table 3": len(threes), "table 4": len(fours), "anchornet": len(anchornet)}
    missing = "" if found else "no result of `anchorpatch evaluate --result`"
    return Section("tables", "Accuracy and cost", tuple(blocks), counts, missing)


def _figures(figures: Sequence[FigureFile], made: Made) -> Section:
    blocks: list[Any] = []
    missing: dict[str, list[int]] = {}  # reason -> figures
    for no, (what, command) in _FIGURES.items():
        of_number = [figure for figure in figures if figure.number == no]
        for figure in of_number:
            blocks.append(_plate(figure))
            if figure.summary:
                caption = f"Figure {no} in numbers"
                blocks.append(coverage_table(caption, figure.summary, figure.left_out))
        if of_number:
            continue
        name = f"Figure {no} ({what})"
        if why := made.nothing.get(no):
            blocks.append(Words(f"{name} has nothing to show: {why}."))
        else:
            why = made.reason if no in MAKERS else ""
            blocks.append(Words(f"{name} is not here{why and ': '}{why}; `{command}` makes it."))
        if why:
            missing.setdefault(why, []).append(no)
    blocks += [_plate(figure) for figure in figures if figure.number not in _FIGURES]
    shown = {f"figure {no}": sum(f.number == no for f in figures) for no in _FIGURES}
    reasons = "; ".join(
        f"figure{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}: {why}"
        for why, numbers in missing.items()
    )
    return Section("figures", "Figures", tuple(blocks), shown, reasons)


def _plate(figure: FigureFile) -> Plate:
    facts = {
        "images": figure.images,
        "weights": figure.weights_sha256,
        **figure.settings,
        "from": figure.source,
    }
    settings = tuple((name, shown_value(value)) for name, value in facts.items() if value != "")
    return Plate(figure, embed(figure.picture, figure.encoded), settings)


def _scenes(scenes: Scenes) -> Section:
    blocks: list[Any] = [*scenes.score.tables()]
    if scenes.picture is not None:
        blocks.append(_plate(scenes.picture))
    return Section("scenes", "Scenes", tuple(blocks), {"images": scenes.score.images})


def _shards(splits: Sequence[Split]) -> Section:
    if not splits:
        words = "There are no shards; `anchorpatch extract` writes the patches of a folder."
        return Section("shards", "Shards", (Words(words),), {"splits": 0, "images": 0}, "no shards")
    blocks = tuple(Part(split.facts.split, tuple(_split_blocks(split))) for split in splits)
    images = sum(split.facts.images for split in splits)
    return Section("shards", "Shards", blocks, {"splits": len(splits), "images": images})


def _split_blocks(split: Split) -> Iterable[Any]:
    facts = split.facts
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in facts.skipped.items())
    skipped = sum(facts.skipped.values())
    top1 = f" AnchorNet decides {facts.top1:.2%} of them right." if facts.top1 is not None else ""
    of = "" if facts.shards == facts.total_shards else f"{facts.shards:,} of "
    yield Words(
        f"{counted(facts.images, 'image')} of {counted(facts.classes, 'class', 'classes')} in "
        f"{of}{counted(facts.total_shards, 'shard')}.{top1} "
        f"Skipped: {skipped:,}{f' ({reasons})' if reasons else ''}."
    )
    yield split.facts.table()
    if any(split.histogram.values()):
        yield histogram_table(split)
    if split.skipped:
        yield skipped_table(split)


def _settings(contents: Contents, weights: Sequence[WeightsFacts]) -> Section:
    blocks: list[Table] = []
    if contents.runs:
        names = dict.fromkeys(n for r in contents.runs for n in r.config if n != "versions")
        by_setting = {
            name.replace("_", " "): {
                r.name: r.config[name] for r in contents.runs if name in r.config
            }
            for name in names
        }
        caption = "Settings of the training runs"
        blocks.append(facts_table(caption, "setting", by_setting, folded=len(names) > 12))
    if contents.splits:
        shards = {
            str(split.folder): {
                "bytes": f"{split.facts.bytes:,}",
                **to_json(split.facts.settings),
                "weights SHA-256": split.facts.weights_sha256,
            }
            for split in contents.splits
        }
        blocks.append(facts_table("Settings of the shards", "setting", _turned(shards)))
    if weights:
        files = {str(found.path): found.shown() for found in weights}
        blocks.append(facts_table("Weights", "file", files))
    blocks.append(facts_table("Software", "written by", _software(contents, weights)))
    return Section("settings", "Settings and versions", tuple(blocks), {"tables": len(blocks)})


def _turned(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Turn thing -> fact -> value into fact -> thing -> value."""
    names = dict.fromkeys(name for facts in rows.values() for name in facts)
    return {
        name.replace("_", " "): {
            thing: facts[name] for thing, facts in rows.items() if name in facts
        }
        for name in names
    }


def _each_once(weights: Iterable[WeightsFacts]) -> list[WeightsFacts]:
    return list({file.path.resolve(): file for file in weights}.values())


def _software(contents: Contents, weights: Sequence[WeightsFacts]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {"this page": dict(versions())}
    for run in contents.runs:
        found = run.config.get("versions")
        if isinstance(found, dict):
            rows[f"run {run.name}"] = found
    for split in contents.splits:
        rows[f"shards {split.folder}"] = {"anchorpatch": split.facts.anchorpatch_version}
    for file in weights:
        rows[f"weights {file.path}"] = dict(file.meta.versions)
    return rows


# --- HTML ---------------------------------------------------------------------------------


def page_date() -> datetime:
    """Return the date of the page: now, or that of SOURCE_DATE_EPOCH, in UTC.

    Raises:
        SettingsError: SOURCE_DATE_EPOCH is no number of seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return datetime.now(timezone.utc)
    try:
        return datetime.fromtimestamp(int(text), timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise SettingsError(
            f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {text!r}"
        ) from None


def render(
    folder: Path,
    keys: Sequence[Key],
    sections: Sequence[Section],
    left_out: Sequence[LeftOut],
    date: datetime,
) -> bytes:
    """Return the page as UTF-8.

    Args:
        folder: that it is about.
        keys: figures at the head of the page.
        sections: in order.
        left_out: what could not be read.
        date: of the page.
    """
    script = _file("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=clean,
    )
    environment.filters["commands"] = _commands
    page = environment.from_string(_file("page.html")).render(
        name=folder.resolve().name or str(folder),
        folder=str(folder),
        keys=keys,
        sections=sections,
        left_out=left_out,
        date=date,
        version=anchorpatch.__version__,
        style=Markup(_file("style.css")),
        script=Markup(script),
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    )
    return page.lstrip().encode()


def _commands(text: str) -> Markup:
    """Escape a text and set what stands between backticks as code."""
    parts = str(escape(text)).split("`")
    return Markup("".join(_code(part) if i % 2 else part for i, part in enumerate(parts)))


def _code(escaped: str) -> str:
    """Return a command that a line may break between its words, not at their hyphens."""
    words = [f"<span>{word}</span>" if len(word) < 30 else word for word in escaped.split(" ")]
    return f"<code>{' '.join(words)}</code>"


def _file(name: str) -> str:
    return resources.files("anchorpatch.report").joinpath(name).read_text(encoding="utf-8")
