"""The few figures at the head of the page."""

from __future__ import annotations

from dataclasses import dataclass

from anchorpatch.jobs.results import Table3, Table3Row
from anchorpatch.jobs.training.runlog import best_record
from anchorpatch.report.cells import decimal, share
from anchorpatch.report.collect import Contents, number
from anchorpatch.text import percent

__all__ = ["Key", "key_figures"]


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
            patches = sum(found.patches for found in facts.scales.values())
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
