"""What ``anchorpatch evaluate`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.cli.output import print_csv, print_json, print_markdown, print_table
from anchorpatch.text import counted, decimal, percent

if TYPE_CHECKING:
    from anchorpatch.jobs.results import AnchorNetFigures, Table3, Table4

__all__ = ["print_anchornet", "print_table_3", "print_table_4"]


def print_anchornet(summary: AnchorNetFigures, as_json: bool) -> None:
    """Print the figures of AnchorNet."""
    if as_json:
        print_json(summary.to_json())
        return
    rows = []
    for output, top1 in summary.top1_by_output.items():
        part, scale = output.split("_")
        share = f"{summary.branch_share[scale]:.1%}" if part == "localization" else "-"
        rows.append(
            [f"{part} {scale} px", f"{top1:.2%}", f"{summary.top5_by_output[output]:.2%}", share]
        )
    rows.append(["decision (Eq. 7)", f"{summary.top1:.2%}", f"{summary.top5:.2%}", "100.0%"])
    print_table(["output", "top-1", "top-5", "chosen for"], rows)
    click.echo()
    scales = list(summary.branch_share)
    print_table(
        ["preset: patches an image", *(f"{scale} px" for scale in scales), "all"],
        [
            [name, *("-" if (m := means[s]) is None else f"{m:.2f}" for s in [*scales, "all"])]
            for name, means in summary.mean_patches.items()
        ],
    )
    click.echo(
        f"\n{counted(summary.images, 'image')}, {summary.skipped:,} skipped; "
        f"{summary.gmacs:.4f} GMACs, {summary.images_per_second:,.1f} images/s without decoding"
    )
    if summary.damaged:
        click.echo(f"decoded with damage: {summary.damaged:,}")


def print_table_3(table: Table3, form: str) -> None:
    """Print a network on patches: as a table, markdown, csv or json."""
    columns = (
        "scale",
        "images",
        "patches",
        "GMACs",
        "saved",
        "in all",
        "saved in all",
        "top-1",
        "top-5",
    )
    rows = [
        [
            row.scale,
            f"{row.images:,}",
            _number(row.mean_patches),
            _number(row.gmacs, 3),
            _share(row.saved, 0),
            _number(row.gmacs_with_anchornet, 3),
            _share(row.saved_with_anchornet, 0),
            _share(row.top1),
            _share(row.top5),
        ]
        for row in table.rows
    ]
    notes = [
        f"{table.network} on {table.shards}; weights: {table.weights}",
        f"saved of {table.gmacs_whole:.3f} GMACs at 224 px; in all: with AnchorNet's "
        f"{table.gmacs_anchornet:.3f} GMACs",
    ]
    if table.whole_source:
        notes.append(f"row 224: {table.whole_source}; asked: {table.asked}")
    if speed := table.speed:
        notes.append(
            f"speed: {speed.whole:,.1f} images/s whole, {speed.patches:,.1f} images/s by "
            f"AnchorNet, LSP and patches: {speed.ratio:.2f} times as many "
            f"({counted(speed.images, 'image')} of {speed.mean_patches:.2f} patches, "
            f"{counted(speed.rounds, 'turn')} each)"
        )
    left_out = [f"left out: {text}" for text in table.left_out]
    _print(form, table.to_json(), columns, rows, notes + left_out)


def print_table_4(table: Table4, form: str) -> None:
    """Print localising against rescaling: as a table, markdown, csv or json."""
    rows = [
        [
            row.scale,
            f"{row.images:,}",
            _share(row.rescaled_top1),
            _share(row.localized_top1),
            _share(row.rescaled_top5),
            _share(row.localized_top5),
        ]
        for row in table.rows
    ]
    notes = [
        f"{table.network} on {table.shards}; asked: {table.asked}",
        f"-R: the whole image rescaled ({table.whole_source}); -L: the strongest patch",
    ]
    columns = ("scale", "images", "-R top-1", "-L top-1", "-R top-5", "-L top-5")
    _print(form, table.to_json(), columns, rows, notes)


def _print(
    form: str,
    result: dict[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> None:
    if form == "json":
        print_json(result)
    elif form == "csv":
        print_csv(result["rows"])
        for note in notes:
            click.echo(note, err=True)
    elif form == "markdown":
        print_markdown(columns, rows)
        click.echo("\n" + "\n".join(f"- {note}" for note in notes))
    else:
        print_table(columns, rows)
        click.echo("\n" + "\n".join(notes))


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else decimal(value, digits)


def _share(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else percent(value, digits)
