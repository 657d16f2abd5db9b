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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

import anchorpatch
from anchorpatch import storage
from anchorpatch.classes import IMAGENET_NAMES, ClassNames
from anchorpatch.errors import SettingsError
from anchorpatch.figures import EXAMPLES
from anchorpatch.figures.coverage import coverage_table
from anchorpatch.jobs.results import Table3, Table4
from anchorpatch.jobs.tradeoff import Dynamic
from anchorpatch.report.charts import (
    Chart,
    comparison,
    draw,
    epoch_table,
    run_charts,
    run_table,
    tradeoff_chart,
)
from anchorpatch.report.collect import (
    Contents,
    FigureFile,
    LeftOut,
    Run,
    Scenes,
    Split,
    WeightsFacts,
    collect,
    read_weights_facts,
)
from anchorpatch.report.pictures import Embedded, Made, embed, make_figures
from anchorpatch.runtime.checkpoint import versions
from anchorpatch.runtime.progress import Reporter
from anchorpatch.tables import (
    Cell,
    Column,
    Table,
    barred,
    decimal,
    facts_table,
    named,
    number,
    share,
    shown_value,
    text,
)
from anchorpatch.text import clean, counted, percent, tally
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
        class_names: what their classes are called.
        date: of the page; None for now, or for SOURCE_DATE_EPOCH.
    """

    folder: Path
    out: Path | None = None
    runs: Path | None = None
    shards: Path | None = None
    figures: Path | None = None
    weights: Path | None = None
    make_figures: bool = True
    class_names: ClassNames = IMAGENET_NAMES
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
        left_out = [what._asdict() for what in self.left_out]
        return {**storage.to_json(self), "seconds": round(self.seconds, 2), "left_out": left_out}


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
        made = make_figures(contents, config.weights, progress, config.class_names)
    left_out = (*contents.left_out, *made.left_out)
    parts = sections(contents, made)
    page = render(config.folder, key_figures(contents), parts, left_out, date)
    out = config.out or config.folder / "report.html"
    storage.write_atomically(out, lambda file: file.write(page))
    counts = {section.key: section.counts for section in parts}
    missing = {section.key: section.missing for section in parts if section.missing}
    return ReportSummary(out, len(page), time.monotonic() - began, counts, missing, left_out)


# --- key figures --------------------------------------------------------------------------


class Key(NamedTuple):
    """A key figure at the head of the page: a number, written, and what it is."""

    value: str
    label: str


def key_figures(contents: Contents, most: int = 8) -> tuple[Key, ...]:
    """Return what a reader wants to know first: accuracy, and what it costs."""
    keys: list[Key] = []
    for table in contents.results:
        if isinstance(table, Table3):
            keys += _costs(table)
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


def _costs(table: Table3) -> Iterator[Key]:
    """Yield accuracy, what an image costs in all, and the speed, each with AnchorNet's part."""
    for row in table.rows:
        if row.scale != "all":
            continue
        yield Key(share(row.top1, 1).text, f"top-1 of {table.network} on patches")
        if row.gmacs_with_anchornet is not None:
            own, whole = (decimal(v, 3).text for v in (table.gmacs_anchornet, table.gmacs_whole))
            label = f"GMACs per image of {table.network} in all, AnchorNet's {own} included"
            if (saved := row.saved_with_anchornet) is not None:
                more = "less" if saved >= 0 else "more"
                label += f": {percent(abs(saved), 0)} {more} than a whole image's {whole}"
            yield Key(decimal(row.gmacs_with_anchornet, 3).text, label)
        if table.speed is not None:
            label = f"the speed of {table.network} on whole images, measured, AnchorNet included"
            yield Key(f"{decimal(table.speed.ratio).text} times", label)


# --- sections, still without HTML ---------------------------------------------------------

#: Figure -> its title and the command that makes it.
_FIGURES: Final = {
    3: ("patches by chosen scale", "anchorpatch figure patches"),
    4: ("what misled a branch", "anchorpatch figure errors"),
    5: ("attention and class heatmaps", "anchorpatch figure attention"),
    6: ("accuracy by covered and masked area", "anchorpatch figure coverage NETWORK"),
}


class Charts(NamedTuple):
    """Charts side by side, each with its <svg>."""

    charts: tuple[tuple[Chart, str], ...]


class Plate(NamedTuple):
    """A figure with its picture, and how it was made."""

    figure: FigureFile
    picture: Embedded
    settings: Mapping[str, str]


class Part(NamedTuple):
    """A part of a section under a heading of its own."""

    title: str
    blocks: Sequence[Any]


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: its name in links and in the summary.
        title: its heading.
        blocks: `Charts`, `Plate`, `Part`, `Table` or text, in order; what stands between backticks
            in a text is a command.
        counts: what it holds, for the summary of the command.
        missing: why something is not in it, in one line; empty where nothing is to be said.
    """

    key: str
    title: str
    blocks: Sequence[Any]
    counts: dict[str, int]
    missing: str = ""


def sections(contents: Contents, made: Made) -> tuple[Section, ...]:
    """Return the sections of the page: those that hold something before those that do not.

    An empty one says what would fill it. The settings come last.
    """
    found = [_training(contents.runs), _results(contents), _figures(contents, made)]
    if contents.scenes is not None:
        found.append(_scenes(contents.scenes))
    found.append(_shards(contents.splits))
    found.sort(key=lambda section: not any(section.counts.values()))
    files = {file.path.resolve(): file for file in contents.weights}
    if made.weights is not None:
        files[made.weights.resolve()] = read_weights_facts(made.weights)
    return (*found, _settings(contents, list(files.values())))


def _training(runs: Sequence[Run]) -> Section:
    if not runs:
        words = "There is no training run; `anchorpatch train` makes one in `runs/anchornet`."
        return Section("training", "Training", [words], {"runs": 0}, "no training run")
    blocks: list[Any] = [run_table(runs)]
    if (chart := comparison(runs)) is not None:
        blocks.append(Charts(((chart, draw(chart, "runs", width=4.6, height=2.9)),)))
    for i, run in enumerate(runs):
        charts = [(chart, draw(chart, f"run{i}-{j}")) for j, chart in enumerate(run_charts(run))]
        blocks.append(Part(run.name, [Charts(tuple(charts)), epoch_table(run)]))
    return Section("training", "Training", blocks, {"runs": len(runs)})


def _results(contents: Contents) -> Section:
    kinds = {Table3: "table 3", Table4: "table 4", Dynamic: "dynamic"}
    by_kind: dict[str, list[Any]] = {kind: [] for kind in (*kinds.values(), "anchornet")}
    for result in contents.results:
        by_kind[kinds.get(type(result), "anchornet")].append(result)
    blocks: list[Any] = []
    for result in (result for found in by_kind.values() for result in found):
        if isinstance(result, Dynamic):
            chart = tradeoff_chart(result)
            svg = draw(chart, f"tradeoff{len(blocks)}", width=6.0, height=4.2)
            blocks.append(Charts(((chart, svg),)))
        blocks += result.tables()
    for kind, what, option in (
        ("table 3", "patches against whole images", ""),
        ("table 4", "one patch against the rescaled image", " --protocol rescale"),
        ("dynamic", "accuracy against cost", " --protocol dynamic"),
    ):
        if not by_kind[kind]:
            blocks.append(
                f"{kind.capitalize()} ({what}) is not here; `anchorpatch evaluate NETWORK{option} "
                f"--result runs/NETWORK/{kind.replace(' ', '')}.json` makes it."
            )
    missing = "" if contents.results else "no result of `anchorpatch evaluate --result`"
    counts = {kind: len(found) for kind, found in by_kind.items()}
    return Section("tables", "Accuracy and cost", blocks, counts, missing)


def _figures(contents: Contents, made: Made) -> Section:
    figures = sorted((*contents.figures, *made.figures), key=lambda figure: figure.number)
    blocks: list[Any] = []
    counts: dict[str, int] = {}
    missing: dict[str, list[str]] = {}  # reason -> figures
    for no, (what, command) in _FIGURES.items():
        of_number = [figure for figure in figures if figure.number == no]
        counts[f"figure {no}"] = len(of_number)
        for figure in of_number:
            blocks.append(_plate(figure))
            if summary := figure.facts.get("summary"):
                left_out = tuple(map(str, figure.facts.get("left_out", ())))
                blocks.append(coverage_table(f"Figure {no} in numbers", summary, left_out))
        if of_number:
            continue
        name, why = f"Figure {no} ({what})", made.nothing.get(no, "")
        if why:
            blocks.append(f"{name} has nothing to show: {why}.")
        else:
            why = made.reason if no in EXAMPLES else ""
            blocks.append(f"{name} is not here{why and ': '}{why}; `{command}` makes it.")
        if why:
            missing.setdefault(why, []).append(str(no))
    blocks += [_plate(figure) for figure in figures if figure.number not in _FIGURES]
    reasons = "; ".join(
        f"figure{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {why}"
        for why, numbers in missing.items()
    )
    return Section("figures", "Figures", blocks, counts, reasons)


def _plate(figure: FigureFile) -> Plate:
    facts = {
        "images": figure.facts.get("source") or "",
        "weights": figure.facts.get("weights_sha256") or "",
        **figure.facts.get("settings", {}),
        "from": figure.source,
    }
    settings = {name: shown_value(value) for name, value in facts.items() if value != ""}
    return Plate(figure, embed(figure.picture, figure.encoded), settings)


def _scenes(scenes: Scenes) -> Section:
    blocks: list[Any] = [*scenes.score.tables()]
    if scenes.picture is not None:
        blocks.append(_plate(scenes.picture))
    return Section("scenes", "Scenes", blocks, {"images": scenes.score.images})


def _shards(splits: Sequence[Split]) -> Section:
    counts = {"splits": len(splits), "images": sum(split.facts.images for split in splits)}
    if not splits:
        words = "There are no shards; `anchorpatch extract` writes the patches of a folder."
        return Section("shards", "Shards", [words], counts, "no shards")
    blocks = [Part(split.facts.split, list(_split_blocks(split))) for split in splits]
    return Section("shards", "Shards", blocks, counts)


def _split_blocks(split: Split) -> Iterator[Any]:
    facts = split.facts
    top1 = f" AnchorNet decides {facts.top1:.2%} of them right." if facts.top1 is not None else ""
    of = "" if facts.shards == facts.total_shards else f"{facts.shards:,} of "
    yield (
        f"{counted(facts.images, 'image')} of {counted(facts.classes, 'class')} in "
        f"{of}{counted(facts.total_shards, 'shard')}.{top1} "
        f"Skipped: {tally(facts.skipped)}."
    )
    yield facts.table()
    if any(split.histogram.values()):
        yield histogram_table(split)
    if split.skipped:
        shown, skipped = len(split.skipped), sum(facts.skipped.values())
        notes = (f"The first {shown:,} of {skipped:,}.",) if skipped > shown else ()
        columns = (Column("image", numeric=False), Column("reason", numeric=False))
        rows = tuple(tuple(map(text, image)) for image in split.skipped)
        yield Table("Skipped images", columns, rows, notes=notes, folded=shown > 8)


def histogram_table(split: Split) -> Table:
    """Return how many images have how many patches, a column for each scale."""
    longest = max(map(len, split.histogram.values()))
    width = -(-(longest - 1) // 24)  # at most 24 lines
    starts = range(1, longest, width)
    bins = {
        scale: [sum(n[start : start + width]) for start in starts]
        for scale, n in split.histogram.items()
    }
    most = max((max(n, default=0) for n in bins.values()), default=0)
    rows = []
    for i, start in enumerate(starts):
        name = f"{start}" if width == 1 else f"{start} to {start + width - 1}"
        rows.append((Cell(name, start), *(barred(n[i], most) for n in bins.values())))
    columns = named("patches", *(f"{scale} px" for scale in bins), first_numeric=True)
    caption = "Images by number of patches and chosen scale"
    return Table(caption, columns, tuple(rows), folded=len(rows) > 8)


def _settings(contents: Contents, weights: Sequence[WeightsFacts]) -> Section:
    software: dict[str, Mapping[str, Any]] = {"this page": dict(versions())}
    blocks: list[Table] = []
    if contents.runs:
        runs = {run.name: dict(run.config) for run in contents.runs}
        for name, config in runs.items():
            found = config.pop("versions", None)
            if isinstance(found, dict):
                software[f"run {name}"] = found
        table = _turned("Settings of the training runs", runs)
        blocks.append(replace(table, folded=len(table.rows) > 12))
    if contents.splits:
        shards = {}
        for split in contents.splits:
            facts, sha256 = split.facts, {"weights SHA-256": split.facts.weights_sha256}
            settings = {"bytes": f"{facts.bytes:,}", **storage.to_json(facts.settings), **sha256}
            shards[str(split.folder)] = settings
            software[f"shards {split.folder}"] = {"anchorpatch": facts.anchorpatch_version}
        blocks.append(_turned("Settings of the shards", shards))
    if weights:
        files = {}
        for path, meta, digest in weights:
            top1 = number(meta.training, "record", "val", "top1")
            files[str(path)] = {
                "network": meta.architecture,
                "classes": f"{len(meta.classes):,}",
                "top-1": "" if top1 is None else f"{top1:.2%}",
                "SHA-256": digest,
            }
            software[f"weights {path}"] = meta.versions
        blocks.append(facts_table("Weights", "file", files))
    blocks.append(facts_table("Software", "written by", software))
    return Section("settings", "Settings and versions", blocks, {"tables": len(blocks)})


def _turned(caption: str, things: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a line for each setting, a column for each thing that has some."""
    names = dict.fromkeys(name for facts in things.values() for name in facts)
    rows = {
        name.replace("_", " "): {
            thing: facts[name] for thing, facts in things.items() if name in facts
        }
        for name in names
    }
    return facts_table(caption, "setting", rows)


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
    """Return the page as UTF-8."""
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
