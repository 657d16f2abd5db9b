"""The few figures at the head of the page."""

from __future__ import annotations

from dataclasses import dataclass

from anchorpatch.jobs.evaluation.tables import Table3
from anchorpatch.report.cells import decimal, share
from anchorpatch.report.collect import Contents, number

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


def key_figures(contents: Contents, most: int = 6) -> tuple[Key, ...]:
    """Return what a reader wants to know first: accuracy, and what it costs."""
    keys = []
    tables = [r.table for r in contents.results if isinstance(r.table, Table3)]
    for table, row in ((t, row) for t in tables for row in t.rows if row.scale == "all"):
        keys.append(Key(share(row.top1, 1).text, f"top-1 of {table.network} on patches"))
        whole = decimal(table.gmacs_whole).text
        keys.append(Key(share(row.saved, 0).text, f"of its {whole} GMACs saved"))
    validation = [split for split in contents.splits if split.facts.split != "train"]
    for split in validation or contents.splits:
        facts = split.facts
        if facts.top1 is not None:
            keys.append(Key(f"{facts.top1:.1%}", f"top-1 of AnchorNet on {facts.split}"))
        if facts.images:
            patches = sum(found.patches for found in facts.scales.values())
            keys.append(Key(f"{patches / facts.images:.2f}", f"patches an image of {facts.split}"))
    for run in contents.runs:
        tops = [top for r in run.records if (top := number(r, "val", "top1")) is not None]
        if tops:
            keys.append(Key(f"{max(tops):.1%}", f"best top-1 of run {run.name}"))
    return tuple(keys[:most])
