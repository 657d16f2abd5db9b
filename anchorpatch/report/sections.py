"""From what a folder holds to the parts of the page, still without HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from anchorpatch.figures.files import FigureFile
from anchorpatch.jobs.results import Table3, Table4
from anchorpatch.report.cells import (
    Table,
    facts_table,
    shown_value,
)
from anchorpatch.report.collect import Contents, Run, Split
from anchorpatch.report.curves import Chart, comparison, draw, run_charts
from anchorpatch.report.made import MAKERS, Made
from anchorpatch.report.pictures import Embedded, embed
from anchorpatch.report.result_tables import (
    coverage_table,
    output_table,
    preset_table,
    table_3,
    table_4,
)
from anchorpatch.report.run_tables import epoch_table, run_table
from anchorpatch.report.scenes import Scenes, fit_table, size_table
from anchorpatch.report.shard_tables import histogram_table, scale_table, skipped_table
from anchorpatch.report.weights import WeightsFacts
from anchorpatch.runtime.checkpoint import versions
from anchorpatch.text import counted

__all__ = ["Charts", "Part", "Plate", "Section", "Words", "sections"]

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
    blocks: list[Any] = [table_3(table) for table in threes]
    blocks += [table_4(table) for table in fours]
    blocks += [make(table) for table in anchornet for make in (output_table, preset_table)]
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
    for number, (what, command) in _FIGURES.items():
        of_number = [figure for figure in figures if figure.number == number]
        for figure in of_number:
            blocks.append(_plate(figure))
            if figure.summary:
                caption = f"Figure {number} in numbers"
                blocks.append(coverage_table(caption, figure.summary, figure.left_out))
        if of_number:
            continue
        name = f"Figure {number} ({what})"
        if why := made.nothing.get(number):
            blocks.append(Words(f"{name} has nothing to show: {why}."))
        else:
            why = made.reason if number in MAKERS else ""
            blocks.append(Words(f"{name} is not here{why and ': '}{why}; `{command}` makes it."))
        if why:
            missing.setdefault(why, []).append(number)
    blocks += [_plate(figure) for figure in figures if figure.number not in _FIGURES]
    shown = {f"figure {number}": sum(f.number == number for f in figures) for number in _FIGURES}
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
    blocks: list[Any] = [fit_table(scenes.score), size_table(scenes.score)]
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
    yield scale_table(split)
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
                **split.facts.settings.to_json(),
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
