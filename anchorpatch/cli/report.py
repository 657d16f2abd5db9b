"""``anchorpatch report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import bytes_text, print_json
from anchorpatch.demo import BUNDLED, find_weights
from anchorpatch.text import clean, counted

if TYPE_CHECKING:
    from anchorpatch.report.page import ReportSummary


@click.command(cls=opt.Command)
@click.argument("folder", metavar="[DIR]", type=opt.PATH, default=Path())
@click.option("--out", type=opt.PATH, help="Page to write.  [default: DIR/report.html]")
@click.option("--runs", type=opt.PATH, help="Folder of the training runs.  [default: DIR/runs]")
@click.option("--shards", type=opt.PATH, help="Folder of the shards.  [default: DIR/shards]")
@click.option("--figures", type=opt.PATH, help="Folder of the figures.  [default: DIR/figures]")
@click.option(
    "--weights",
    **opt.file_or(*BUNDLED),
    help="AnchorNet weights that the shards were extracted with, to draw missing figures.  "
    "[default: those of the runs or the bundled ones, if they made the shards]",
)
@opt.class_names
@click.option("--no-figures", is_flag=True, help="Do not draw missing figures.")
@opt.as_json
def report(
    folder: Path, as_json: bool, weights: str | None, no_figures: bool, **options: Any
) -> int:
    """Write a report on everything in DIR: one self-contained HTML page.

    Shows training runs (runs/*/log.jsonl) as curves, results of `anchorpatch evaluate --result`
    (results/*.json, runs/NETWORK/*.json) as Tables 3 and 4, figures (figures/*.json), shards
    (shards/SPLIT), settings and versions. DIR defaults to the current directory.

    Missing figures of example images are drawn if the shards store their crops and the weights
    that made the shards can be found.

    Files that cannot be read are listed on the page and on stderr, and the exit status is then
    1; the rest of the page is still written. With $SOURCE_DATE_EPOCH set, the same folder
    gives a byte-identical page.

    \b
    anchorpatch report
    anchorpatch report anchorpatch-demo
    """
    from anchorpatch.report.page import ReportConfig, run
    from anchorpatch.runtime.progress import reporter

    known = None if weights is None else find_weights(weights, folder)
    config = ReportConfig(folder, weights=known, make_figures=not no_figures, **options)
    summary = run(config, reporter())
    for what in summary.left_out:
        click.echo(f"left out: {clean(f'{what.source}: {what.reason}')}", err=True)
    if as_json:
        print_json(summary.to_json())
    else:
        _print_summary(summary)
    return int(bool(summary.left_out))


def _print_summary(summary: ReportSummary) -> None:
    for name, counts in summary.sections.items():
        held = ", ".join(_held(what, count) for what, count in counts.items() if count)
        why = summary.missing.get(name)
        click.echo(clean(f"{name}: {held or 'nothing'}{f' ({why})' if why else ''}"))
    size = bytes_text(summary.bytes)
    click.echo(f"{clean(str(summary.report))}: {size} in {summary.seconds:.1f} s")


def _held(what: str, count: int) -> str:
    """Write a count: things that can be counted are in the plural, tables and figures have names.

    Example:
        >>> _held("runs", 1), _held("figure 3", 1), _held("table 3", 2)
        ('1 run', 'figure 3', 'table 3 (2 times)')
    """
    if what.endswith("s"):
        return counted(count, what.removesuffix("s"))
    return what if count == 1 else f"{what} ({count:,} times)"
