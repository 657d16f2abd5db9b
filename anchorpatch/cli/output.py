"""What goes to stdout, tables for people or one JSON object for programs, and the streams."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from anchorpatch.errors import StorageError, reason_of
from anchorpatch.tables import NO_VALUE, Table, shown_value


class ReaderGone(BrokenPipeError):
    """The reader of stdout has all it wanted, as in ``anchorpatch ... | head``."""


class _Output(io.FileIO):
    """stdout, which must take what it gets, or stderr, which may lose messages."""

    def write(self, data: Any, /) -> int:
        """Write.

        Raises:
            ReaderGone: stdout is a pipe that nobody reads.
            StorageError: stdout is closed, or on a full disk.
        """
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() != 1:
                return len(data)
            # Python writes again as it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if isinstance(error, BrokenPipeError):
                raise ReaderGone(*error.args) from error
            raise StorageError(f"cannot write to stdout: {reason_of(error)}") from error


def _named_otherwise(name: str) -> codecs.CodecInfo | None:
    """Return ASCII under another name: click takes a stream for misconfigured that says ASCII."""
    if name != "ascii_only":
        return None
    ascii = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii.encode,
        ascii.decode,
        incrementalencoder=ascii.incrementalencoder,
        incrementaldecoder=ascii.incrementaldecoder,
        name=name,
    )


def open_streams() -> None:
    """Give the program a stdout that tells when it fails and a stderr that never does.

    Both show characters that the encoding does not have as backslash escapes.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened would have this number. Reading gives nothing, and
            # writing fails.
            os.open(os.devnull, os.O_RDONLY)
    codecs.register(_named_otherwise)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old, raw = getattr(sys, name), _Output(number, "w", closefd=False)
        encoding = codecs.lookup(old.encoding).name if old else "utf-8"
        new = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding="ascii_only" if encoding == "ascii" else encoding,
            errors="backslashreplace",
            line_buffering=raw.isatty() or number == 2,
        )
        setattr(sys, name, new)


def print_json(result: Any) -> None:
    """Print the result as one JSON object."""
    click.echo(json.dumps(result, indent=2, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: framed on a terminal, aligned plain text into a pipe.

    The first column is left-aligned, the others, which hold numbers, right-aligned.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    terminal = sys.stdout.isatty()
    table = RichTable(box=box.ROUNDED if terminal else None, pad_edge=terminal, highlight=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not terminal)
    for row in rows:
        table.add_row(*row)
    if terminal:
        Console(markup=False).print(table)
        return
    # Rich folds at 80 columns where there is no terminal, and fills lines up; a pipe has no width.
    console = Console(file=io.StringIO(), width=1000, markup=False)
    with console.capture() as text:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))


def print_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, aligned as `print_table`."""
    rule = ["---:" if i else ":---" for i in range(len(columns))]
    for row in (columns, rule, *rows):
        click.echo(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")


def print_result(result: Mapping[str, Any], tables: Sequence[Table], form: str) -> None:
    """Print a result.

    Args:
        result: as JSON values.
        tables: the same for people.
        form: "json"; "csv" for the result's rows, where None is an empty field, with the notes on
            stderr; "markdown" or "table".
    """
    if form == "json":
        print_json(result)
    elif form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(result["rows"][0])
        for row in result["rows"]:
            cells = row.values()
            writer.writerow(shown_value(v) if isinstance(v, (list, tuple)) else v for v in cells)
        click.echo(text.getvalue(), nl=False)
        for note in _notes(tables):
            click.echo(note, err=True)
    else:
        print_tables(tables, form)


def print_tables(tables: Sequence[Table], form: str = "table") -> None:
    """Print tables as "table" or "markdown", and below them their notes."""
    write, dash = (print_markdown, "- ") if form == "markdown" else (print_table, "")
    for i, table in enumerate(tables):
        if i:
            click.echo(f"\n{table.caption}:\n")
        rows = [
            ["-" if cell.text == NO_VALUE else cell.text for cell in row]
            for row in (*table.rows, *table.foot)
        ]
        write([column.name for column in table.columns], rows)
    if notes := _notes(tables):
        click.echo("\n" + "\n".join(dash + note for note in notes))


def _notes(tables: Sequence[Table]) -> list[str]:
    helps = [f"{c.name}: {c.help}." for table in tables for c in table.columns if c.help]
    return helps + [note for table in tables for note in table.notes]


def print_records(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Print records of a training log, as a row each.

    Args:
        records: by what is to be said of them, such as "best".
    """
    print_table(
        ["weights", "top-1", "top-5", "val loss", "train loss"],
        [
            [
                f"{name}: epoch {record['epoch']}",
                f"{record['val']['top1']:.2%}",
                f"{record['val']['top5']:.2%}",
                f"{record['val']['loss']:.3f}",
                f"{record['train']['loss']:.3f}",
            ]
            for name, record in records.items()
        ],
    )


def bytes_text(count: float) -> str:
    """Write a number of bytes in decimal units, as disks are sold.

    Example:
        >>> bytes_text(999), bytes_text(365_000_000_000)
        ('999 B', '365 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"
