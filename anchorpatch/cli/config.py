"""The settings file ``anchorpatch.toml`` and the variables ``ANCHORPATCH_*``.

Both name an option as the command line does, without the dashes in front. A value in the file
goes through the same conversion as one on the command line, whichever command runs.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from anchorpatch.cli.options import SharedOption
from anchorpatch.errors import OutOfMemory

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "Command",
    "debug_option",
    "did_you_mean",
    "load_config",
    "unknown_variables",
    "with_layout",
]

_DEFAULT_FILE = "anchorpatch.toml"
_PREFIX = "ANCHORPATCH_"

#: Table of the settings file for options that mean the same to all commands.
_FOR_ALL = "defaults"


def _note_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(dict)["debug"] = True


def debug_option(**attributes: Any) -> click.Option:
    """Return ``--debug``, which leaves a note for whoever reports the error."""
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_note_debug,
        help="Show the traceback of an error.",
        **attributes,
    )


class Command(click.Command):
    """A command with ``--debug`` whose options also stand in the environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = with_layout(self.help)
        self.params.append(debug_option(hidden=True))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an error about a value from the environment names the variable."""
        for name, param in _options(self).items():
            # click would take the name of the function's argument, such as AS_JSON.
            param.envvar = f"{ctx.auto_envvar_prefix}_{_variable(name)}"
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            option = error.param
            if isinstance(option, click.Option) and option.name:
                source = ctx.get_parameter_source(option.name)
                if source is ParameterSource.ENVIRONMENT and not error.param_hint:
                    own = str(option.envvar)
                    shared = getattr(option, "variable", own)
                    variable = own if os.environ.get(own) else shared
                    error.param_hint = f"{option.get_error_hint(ctx)} (from ${variable})"
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run; where memory is used up, name the command's options that need less of it."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            message = _out_of_memory(error, _options(self))
            if message is None:
                raise
            raise OutOfMemory(message) from error


def _out_of_memory(error: Exception, options: Container[str]) -> str | None:
    """Return what to tell the user if memory is what an error is about."""
    text = str(error)
    # By name: importing torch takes seconds, and commands that do without have no such error.
    gpu = type(error).__name__ == "OutOfMemoryError" or re.search(
        r"CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", text
    )
    host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in text
    if not gpu and not host:
        return None
    size = re.search(r"allocate (\d[\d.]* ?\w+)", text)
    needed = f" ({size[1]} more were needed)" if size else ""
    ways = {
        "batch-size": "a lower --batch-size",
        "accumulate": "a higher --accumulate",
        "workers": "" if gpu else "fewer --workers",
        "device": "--device cpu" if gpu else "",
    }
    known = [way for option, way in ways.items() if way and option in options]
    advice = f"use {' or '.join(known[:2])}" if known else "close other programs"
    return f"out of {'GPU ' if gpu else ''}memory{needed}: {advice}"


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


def load_config(ctx: click.Context, file: str | None) -> dict[str, Any]:
    """Read the settings file as click's default map.

    Args:
        ctx: of the program's group of commands.
        file: the file, or None for ./anchorpatch.toml where it exists.

    Raises:
        click.UsageError: the file is missing or no TOML, or names a command or an option that
            does not exist, or a value is not what the command line would take.
    """
    path = Path(file or _DEFAULT_FILE)
    if not path.is_file():
        if file is None:
            return {}
        raise click.UsageError(f"settings file {path} does not exist")
    where = f"settings file {path}"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.UsageError(f"{where}: {error}") from error
    shared = tables.pop(_FOR_ALL, {})
    if not isinstance(shared, dict):
        raise click.UsageError(f"{where}: {_FOR_ALL}: expected a table, found {_toml(shared)}")
    shared = {key.replace("_", "-"): value for key, value in shared.items()}
    if shared:
        known = {option.shared for *_, option in _walk(ctx) if isinstance(option, SharedOption)}
        for key in shared.keys() - known:
            raise click.UsageError(
                f"{where}, [{_FOR_ALL}]: expected some of {', '.join(sorted(known))}, which hold "
                f"for all commands, found {key!r}." + did_you_mean(key, known)
            )
    return _group_defaults(ctx, ctx.command, tables, shared, where, ())


def _group_defaults(
    ctx: click.Context,
    group: click.Command,
    tables: Mapping[str, Any],
    shared: Mapping[str, Any],
    where: str,
    names: tuple[str, ...],
) -> dict[str, Any]:
    """Return the default map of a group from the tables of its commands."""
    inside = f"{where}, [{'.'.join(names)}]" if names else where
    commands = _commands(ctx, group)
    for name, table in tables.items():
        if name not in commands:
            tables_known = commands if names else [*commands, _FOR_ALL]
            raise click.UsageError(
                f"{inside}: expected a table for a command ({', '.join(tables_known)}), found "
                f"{name!r}." + did_you_mean(name, tables_known)
            )
        if not isinstance(table, dict):
            raise click.UsageError(
                f"{inside}: {name} is a command: expected a table "
                f"[{'.'.join((*names, name))}], found {_toml(table)}"
            )
    defaults = {}
    for name in commands if shared else tables:
        command = _command(ctx, group, name)
        make = _group_defaults if isinstance(command, click.Group) else _command_defaults
        defaults[name] = make(ctx, command, tables.get(name, {}), shared, where, (*names, name))
    return defaults


def _command_defaults(
    ctx: click.Context,
    command: click.Command,
    table: Mapping[str, Any],
    shared: Mapping[str, Any],
    where: str,
    names: tuple[str, ...],
) -> dict[str, Any]:
    """Return the default map of a command: its own table, and what holds for all commands."""
    inside, options = f"{where}, [{'.'.join(names)}]", _options(command)
    defaults: dict[str, Any] = {}
    for option in options.values():
        if isinstance(option, SharedOption) and option.shared in shared and option.name:
            defaults[option.name] = _text(
                ctx, option, shared[option.shared], f"{where}, [{_FOR_ALL}] {option.shared}"
            )
    given: dict[str, str] = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in options:
            raise click.UsageError(
                f"{inside}: no such option: {name!r}." + did_you_mean(name, options)
            )
        if name in given:
            raise click.UsageError(f"{inside}: {given[name]} and {key} are the same option")
        given[name] = key
        defaults[options[name].name or name] = _text(ctx, options[name], value, f"{inside} {key}")
    return defaults


def _text(ctx: click.Context, option: click.Option, value: Any, where: str) -> Any:
    """Return a value of the settings file as the command line would give it.

    Raises:
        click.UsageError: the command line would not take it.
    """
    if option.is_flag:
        if isinstance(value, bool):
            return value
        raise click.UsageError(f"{where}: expected true or false, found {_toml(value)}")
    several = option.multiple or getattr(option.type, "takes_list", False)
    items = value if isinstance(value, list) and several else [value]
    # bool is an int to Python, but not to whoever writes a settings file.
    for item in items:
        if type(item) not in (str, int, float):
            raise click.UsageError(f"{where}: expected {_expected(option)}, found {_toml(item)}")
    texts = [str(item) for item in items]
    text = texts if option.multiple or isinstance(value, list) else texts[0]
    try:
        option.type_cast_value(ctx, text)
    except click.BadParameter as error:
        raise click.UsageError(f"{where}: {error.message}") from error
    return text


def _expected(option: click.Option) -> str:
    kind = option.type
    if isinstance(kind, click.types.IntParamType):
        return "a whole number"
    if isinstance(kind, click.types.FloatParamType):
        return "a number"
    if isinstance(kind, click.Choice):
        return f"one of {', '.join(map(str, kind.choices))}"
    return "text" if isinstance(kind, click.Path | click.types.StringParamType) else kind.name


def _toml(value: Any) -> str:
    """Return a value for an error message."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return str(value).lower() if isinstance(value, bool) else str(value)


def unknown_variables(ctx: click.Context) -> list[str]:
    """Return a line for each variable ``ANCHORPATCH_*`` that no command reads.

    Args:
        ctx: of the program's group of commands.
    """
    # The tests' own are called ANCHORPATCH_TEST_*.
    given = [n for n in os.environ if n.startswith(_PREFIX) and not n.startswith(f"{_PREFIX}TEST_")]
    known = {f"{_PREFIX}{_variable(name)}" for name in _options(ctx.command)}
    if known.issuperset(given):
        return []
    for names, option_name, option in _walk(ctx):
        known.add(_PREFIX + _variable("_".join((*names, option_name))))
        if isinstance(option, SharedOption):
            known.add(option.variable)
    return [
        f"{name} is set, but no option has this name; it is ignored." + did_you_mean(name, known)
        for name in sorted(given)
        if name not in known
    ]


def _walk(
    ctx: click.Context, group: click.Command | None = None, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, click.Option]]:
    """Yield the names of each command, and name and option of each of its options."""
    group = group or ctx.command
    for name in _commands(ctx, group):
        command = _command(ctx, group, name)
        if isinstance(command, click.Group):
            yield from _walk(ctx, command, (*names, name))
        else:
            for option_name, option in _options(command).items():
                yield (*names, name), option_name, option


def _commands(ctx: click.Context, group: click.Command) -> list[str]:
    return group.list_commands(ctx) if isinstance(group, click.Group) else []


def _command(ctx: click.Context, group: click.Command, name: str) -> click.Command:
    command = group.get_command(ctx, name) if isinstance(group, click.Group) else None
    assert command is not None  # the group has listed it
    return command


def _options(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command by the name that the user sees, without the dashes."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    return {max(option.opts, key=len).lstrip("-"): option for option in options}


def _variable(name: str) -> str:
    return name.replace("-", "_").upper()
