"""The whole job of ``anchorpatch report``: read a folder, make what is missing, write one page."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from anchorpatch.report.collect import LeftOut, collect
from anchorpatch.report.key_figures import key_figures
from anchorpatch.report.made import Made, make_figures
from anchorpatch.report.page import page_date, render
from anchorpatch.report.scenes import read_scenes
from anchorpatch.report.sections import sections
from anchorpatch.report.weights import read_weights_facts
from anchorpatch.runtime.progress import Reporter
from anchorpatch.storage import write_atomically

__all__ = ["ReportConfig", "ReportSummary", "run"]


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
        """Return the summary as JSON knows it."""
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
