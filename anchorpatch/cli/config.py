"""The settings file ``anchorpatch.toml``: a table per command, an entry per option."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Command", "did_you_mean", "load_config", "with_layout"]

_DEFAULT_FILE = "anchorpatch.toml"


class Command(click.Command):
    """A command that takes ``--debug`` too and refuses table entries that it has no option for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = with_layout(self.help)
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, hidden=True))

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Check the command's table before anything is parsed."""
        table = (parent.default_map or {}).get(info_name or "") if parent else None
        if table is not None and parent is not None and not parent.resilient_parsing:
            options = {p.name for p in self.params if isinstance(p, click.Option) and p.name}
            for key in table:
                if key not in options:
                    name, names = key.replace("_", "-"), [o.replace("_", "-") for o in options]
                    raise click.UsageError(
                        f"settings file, table [{info_name}]: no such option: {name!r}."
                        + did_you_mean(name, names)
                    )
        return super().make_context(info_name, args, parent, **extra)


def with_layout(text: str | None) -> str | None:
    r"""Let a raw docstring ask click with ``\b`` to keep the line breaks of a paragraph."""
    return text and text.replace("\\b\n", "\b\n")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` for a mistyped word, or nothing.

    Example:
        >>> did_you_mean("bach-size", ["batch-size", "workers"])
        " Did you mean 'batch-size'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def load_config(file: str | None, commands: Iterable[str]) -> dict[str, Any]:
    """Read the settings file as click's default map.

    Args:
        file: the file, or None for ./anchorpatch.toml where it exists.
        commands: the tables that may stand in it.

    Raises:
        click.UsageError: the file is missing, no TOML, or has a table for no command.
    """
    path = Path(file or _DEFAULT_FILE)
    if not path.is_file():
        if file is None:
            return {}
        raise click.UsageError(f"settings file {path} does not exist")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.UsageError(f"settings file {path}: {error}") from error
    commands = list(commands)
    for name, table in tables.items():
        if name not in commands or not isinstance(table, dict):
            raise click.UsageError(
                f"settings file {path}: expected a table for a command "
                f"({', '.join(commands)}), found {name!r}." + did_you_mean(name, commands)
            )
    return {name: _as_defaults(table) for name, table in tables.items()}


def _as_defaults(table: dict[str, Any]) -> dict[str, Any]:
    """Name options as click does, and write values as a command line would."""
    return {
        key.replace("-", "_"): _as_defaults(value) if isinstance(value, dict) else _as_text(value)
        for key, value in table.items()
    }


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return value
