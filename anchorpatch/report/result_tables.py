"""Tables 3 and 4, and the figures of AnchorNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from anchorpatch.figures.coverage_curves import AUC_FIGURES, LABELS, auc_texts
from anchorpatch.jobs.results import AnchorNetFigures, Table3, Table4
from anchorpatch.report.cells import (
    NO_VALUE,
    Cell,
    Column,
    Table,
    count,
    decimal,
    named,
    share,
    text,
)
from anchorpatch.report.collect import number
from anchorpatch.text import counted

__all__ = ["coverage_table", "output_table", "preset_table", "table_3", "table_4"]


def table_3(table: Table3) -> Table:
    """Return Table 3 of one network: whole images against patches."""
    columns = (
        Column("scale", numeric=False, help="224 is the whole image, all the patches of any scale"),
        Column("images"),
        Column("patches", help="of an image, on average"),
        Column("GMACs", help="of the network for one image, as the paper counts"),
        Column("saved", help=f"of {_gmacs(table.gmacs_whole)} GMACs at 224 px"),
        Column("in all", help=f"GMACs with AnchorNet's {_gmacs(table.gmacs_anchornet)}"),
        Column("saved in all"),
        Column("top-1"),
        Column("top-5"),
    )
    rows = [
        (
            _scale(row.scale),
            count(row.images),
            decimal(row.mean_patches),
            decimal(row.gmacs, 3),
            share(row.saved, 0),
            decimal(row.gmacs_with_anchornet, 3),
            share(row.saved_with_anchornet, 0),
            share(row.top1),
            share(row.top5),
        )
        for row in table.rows
    ]
    notes = [f"Shards {table.shards}; weights {table.weights}."]
    if table.whole_source:
        notes.append(f"Row 224: {table.whole_source}; asked: {table.asked}.")
    if speed := table.speed:
        whole, patches = decimal(speed.whole, 1).text, decimal(speed.patches, 1).text
        ratio, mean = decimal(speed.ratio).text, decimal(speed.mean_patches).text
        notes.append(
            f"Speed: {whole} images/s whole, {patches} images/s by AnchorNet, LSP and patches: "
            f"{ratio} times as many ({counted(speed.images, 'image')} of {mean} patches)."
        )
    notes += [f"Left out: {reason}." for reason in table.left_out]
    return _with_total(f"Table 3: {table.network}", columns, rows, notes)


def table_4(table: Table4) -> Table:
    """Return Table 4 of one network: one patch against the whole image made as small."""
    columns = (
        Column("scale", numeric=False),
        Column("images"),
        Column("-R top-1", help=f"the whole image rescaled ({table.whole_source})"),
        Column("-L top-1", help="the strongest patch"),
        Column("-R top-5"),
        Column("-L top-5"),
    )
    rows = [
        (
            _scale(row.scale),
            count(row.images),
            share(row.rescaled_top1),
            share(row.localized_top1),
            share(row.rescaled_top5),
            share(row.localized_top5),
        )
        for row in table.rows
    ]
    notes = [f"Shards {table.shards}; asked: {table.asked}."]
    return _with_total(f"Table 4: {table.network}", columns, rows, notes)


def output_table(found: AnchorNetFigures) -> Table:
    """Return the accuracy of each output of AnchorNet."""
    columns = named("output", "top-1", "top-5", "chosen for")
    rows = []
    for output, top1 in found.top1_by_output.items():
        part, _, scale = output.partition("_")
        chosen = found.branch_share.get(scale) if part == "localization" else None
        top5 = found.top5_by_output.get(output)
        rows.append((text(f"{part} {scale} px"), share(top1), share(top5), share(chosen, 1)))
    total = (text("decision (Eq. 7)"), share(found.top1), share(found.top5), share(1.0, 1))
    speed = decimal(found.images_per_second, 1).text
    notes = (
        f"{counted(found.images, 'image')}, {found.skipped:,} skipped; "
        f"{_gmacs(found.gmacs)} GMACs, {speed} images/s without decoding.",
    )
    return Table("AnchorNet by output", columns, tuple(rows), (total,), notes)


def preset_table(found: AnchorNetFigures) -> Table:
    """Return the patches of an image by preset."""
    scales = [*found.branch_share, "all"]
    names = [f"{scale} px" if scale != "all" else "all" for scale in scales]
    rows = [
        (text(name), *(decimal(means.get(scale)) for scale in scales))
        for name, means in found.mean_patches.items()
    ]
    return Table("Patches per image by preset", named("preset", *names), tuple(rows))


def coverage_table(
    caption: str, summary: Sequence[Mapping[str, Any]], left_out: Sequence[str] = ()
) -> Table:
    """Return the areas under the curves of Figure 6, as `anchorpatch figure coverage` prints them.

    Args:
        caption: of the table.
        summary: rows of the figure's JSON.
        left_out: localizers that took no part, and why.
    """
    columns = (
        Column("localizer", numeric=False),
        Column("covered", help="area under the curve of top-1 by kept area: the larger is better"),
        Column("±", help="standard error over the images, in brackets deviation over the seeds"),
        Column("gain", help="by how much it is better than AnchorNet"),
        Column("masked", help="the same by the area set to 0: the smaller is better"),
        Column("±"),
        Column("gain"),
    )
    rows = []
    for row in summary:
        name = str(row.get("localizer", ""))
        cells = [text(LABELS.get(name, name))]
        for way in ("covered", "masked"):
            auc, error, spread, gain, gain_error = (
                number(row, f"{way}_{name}") for name in AUC_FIGURES
            )
            texts = auc_texts(auc or 0.0, error, spread, gain, gain_error)
            for key, shown in zip((auc, error, gain), texts, strict=True):
                cells.append(Cell(NO_VALUE if key is None else shown, key))
        rows.append(tuple(cells))
    notes = tuple(f"Left out: {reason}." for reason in left_out)
    return Table(caption, columns, tuple(rows), notes=notes)


def _with_total(
    caption: str, columns: tuple[Column, ...], rows: Sequence[tuple[Cell, ...]], notes: list[str]
) -> Table:
    body = tuple(row for row in rows if row[0].text != "all")
    foot = tuple(row for row in rows if row[0].text == "all")
    return Table(caption, columns, body, foot, tuple(notes))


def _scale(name: str) -> Cell:
    return Cell(f"{name} px" if name.isdecimal() else name, float(name) if name.isdecimal() else 0)


def _gmacs(value: Any) -> str:
    return decimal(value, 3).text
