"""Results as tables, which the command line prints and the page of a report renders.

Each cell has its text and what it is sorted by on the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from anchorpatch.text import decimal as decimal_text
from anchorpatch.text import percent

NO_VALUE: Final = "–"  # noqa: RUF001 (an en dash)


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: what is shown.
        key: what the column is sorted by; None goes last.
        bar: share from 0 to 1 of a bar behind the text; None without.
    """

    text: str
    key: float | str | None
    bar: float | None = None

    @property
    def long(self) -> bool:
        """Whether it may be broken into lines, if need be within a word such as a checksum."""
        return len(self.text) > 24


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: its heading.
        numeric: aligned to the right.
        help: what the heading stands for; shown below the table.
    """

    name: str
    numeric: bool = True
    help: str = ""

    @property
    def long(self) -> bool:
        """Whether it may be broken into lines, as a long cell."""
        return Cell(self.name, None).long


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        columns: their headings.
        rows: that take part in sorting.
        foot: rows of totals, which stay at the end.
        notes: lines below.
        folded: shown on request alone.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    foot: tuple[tuple[Cell, ...], ...] = ()
    notes: tuple[str, ...] = ()
    folded: bool = False


def named(*names: str, first_numeric: bool = False) -> tuple[Column, ...]:
    """Return columns of numbers, of which the first is text by default."""
    return tuple(Column(name, numeric=i > 0 or first_numeric) for i, name in enumerate(names))


def with_total(
    caption: str,
    columns: tuple[Column, ...],
    rows: Iterable[tuple[Cell, ...]],
    notes: Iterable[str],
) -> Table:
    """Return a table whose row "all" is the total."""
    every = tuple(rows)
    body = tuple(row for row in every if row[0].text != "all")
    foot = tuple(row for row in every if row[0].text == "all")
    return Table(caption, columns, body, foot, tuple(notes))


def text(value: Any) -> Cell:
    """Return a cell of text."""
    return Cell(str(value), str(value))


def count(value: Any) -> Cell:
    """Return a cell of a whole number."""
    return written(value, lambda v: f"{v:,.0f}")


def barred(n: int, most: int) -> Cell:
    """Return a cell of a count, with a bar as long as its share of the largest."""
    return Cell(f"{n:,}", n, n / most if most and n else None)


def decimal(value: Any, digits: int = 2) -> Cell:
    """Return a cell of a number with decimals."""
    return written(value, lambda v: decimal_text(v, digits))


def share(value: Any, digits: int = 2) -> Cell:
    """Return a cell of a share from 0 to 1, in percent."""
    return written(value, lambda v: percent(v, digits))


def shown_value(value: Any) -> str:
    """Write a setting: a list with slashes, as the command line's messages do.

    Example:
        >>> shown_value([24, 10, 8]), shown_value(None), shown_value(True), shown_value(0.3)
        ('24/10/8', 'none', 'yes', '0.3')
    """
    if isinstance(value, (list, tuple)):
        return "/".join(map(shown_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def number(record: Mapping[str, Any], *keys: str) -> float | None:
    """Return a finite number within a record that may be damaged, or None.

    Example:
        >>> number({"val": {"top1": 0.5}}, "val", "top1"), number({"val": None}, "val", "top1")
        (0.5, None)
    """
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def written(value: Any, form: Callable[[Any], str]) -> Cell:
    """Return a cell of a number written by ``form``; what is no number goes last."""
    if value is None:
        return Cell(NO_VALUE, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return Cell(str(value), None)
    return Cell(form(value), value)


def facts_table(caption: str, first: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a line for each thing, a column for each fact that any of them has.

    Args:
        caption: of the table.
        first: heading of the things' names.
        rows: name -> fact -> value.
    """
    names = list(dict.fromkeys(name for facts in rows.values() for name in facts))
    columns = (
        Column(first, numeric=False),
        *(Column(name.replace("_", " "), numeric=False) for name in names),
    )
    cells = tuple(
        (text(thing), *(text(shown_value(facts.get(name, ""))) for name in names))
        for thing, facts in rows.items()
    )
    return Table(caption, columns, cells)


def scale_table(images: Mapping[int, int], patches: Mapping[int, int]) -> Table:
    """Return images and patches by chosen scale.

    Args:
        images: that chose each scale.
        patches: of these images.
    """
    total, most = sum(images.values()), max(images.values(), default=0)

    def row(name: Cell, n: Cell, of: int, found: int) -> tuple[Cell, ...]:
        mean = decimal(found / of if of else None)
        return name, n, share(of / total if total else None, 1), count(found), mean

    rows = tuple(
        row(Cell(f"{scale} px", scale), barred(n, most), n, patches[scale])
        for scale, n in images.items()
    )
    foot = row(text("all"), count(total), total, sum(patches.values()))
    columns = named("scale", "images", "share", "patches", "patches per image")
    return Table("Images and patches by chosen scale", columns, rows, (foot,))
