"""The program: the group of commands, the settings file and how errors end a run."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from anchorpatch import __version__
from anchorpatch.cli.options import Group, SharedOption, debug_option, options_of, variable_name
from anchorpatch.cli.output import ReaderGone, open_streams
from anchorpatch.errors import AnchorpatchError, reason_of
from anchorpatch.signals import STOP_SIGNALS, ending, watch_waits
from anchorpatch.text import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Command -> module of this package that holds a click command of the same name.
_COMMANDS = (
    *("train", "tune", "extract", "finetune", "evaluate", "predict", "export"),
    *("figure", "report", "shards", "models", "demo", "scenes"),
)


class _Program(Group):
    """The commands, whose modules are imported when they are asked for."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return what has its name there."""
        if cmd_name not in self.commands:
            return None
        module = importlib.import_module(f"anchorpatch.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command


@click.group(
    cls=_Program,
    commands={name: click.Command(name) for name in _COMMANDS},
    params=[debug_option()],
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "ANCHORPATCH",
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="anchorpatch")
@click.option(
    "--config",
    type=click.Path(dir_okay=False),
    help="Settings file with a table per command.  [default: ./anchorpatch.toml, if it exists]",
)
@click.pass_context
def cli(ctx: click.Context, config: str | None) -> None:
    """Localize multi-scale semantic patches in images and train classifiers on them.

    \b
    anchorpatch train                 train AnchorNet, which localizes the patches
    anchorpatch extract --split val   write the patches of a folder of images to HDF5 shards
    anchorpatch finetune resnet50     fine-tune a classifier on the patches
    anchorpatch predict dog.jpg       classify images by their patches

    Every option can also be set in ./anchorpatch.toml or in an environment variable
    ANCHORPATCH_<COMMAND>_<OPTION>. Results go to stdout, progress and messages to stderr.
    Exit status: 0 success, 1 failure, 2 usage error, 128 + N ended by signal N (130: Ctrl-C).

    Shell completion: eval "$(_ANCHORPATCH_COMPLETE=bash_source anchorpatch)"; also zsh, fish.
    """
    if ctx.resilient_parsing:
        return
    ctx.default_map = load_config(ctx, config)
    for line in unknown_variables(ctx) if os.environ.get("RANK", "0") == "0" else ():
        click.echo(f"anchorpatch: {line}", err=True)


#: How idle OpenMP threads wait, in the words of the standard, of GNU and of LLVM and Intel.
_WAIT_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class _Terminated(BaseException):
    """A signal other than Ctrl-C's came.

    It is raised at any line, so that it must not be an `Exception`: what catches these there, from
    decoders or users' modules, would take the signal for their failure and go on.
    """


def main() -> NoReturn:
    """Run the program on ``sys.argv`` and exit."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        sys.exit("anchorpatch: runs on Linux and macOS only; on Windows, use WSL")
    open_streams()
    # Its warnings are of cache folders and of fonts that lack a weight.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    for number in STOP_SIGNALS:
        # Ctrl-C has Python's own handler; nohup has SIGHUP ignored, which is to stay.
        if number != signal.SIGINT and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise_terminated)
    # Read when torch is loaded. Threads that spin while they wait take the cores from those that
    # they wait for, wherever other programs compute too: training was then up to ten times slower.
    if not any(name in os.environ for name in _WAIT_POLICIES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    watch_waits()
    try:
        status = _run(sys.argv[1:])
        ending()
    except (_Terminated, KeyboardInterrupt) as error:  # behind the run, or as it says what failed
        ending()
        status = _fail_stopped(error, False)
    sys.exit(status)


def _run(args: list[str]) -> int:
    notes: dict[str, bool] = {}  # of --debug, wherever it stands
    try:
        status = cli.main(args, prog_name="anchorpatch", standalone_mode=False, obj=notes)
        # A report that cannot be delivered is a failure too, so it must not wait for exit.
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (_Terminated, KeyboardInterrupt, click.Abort) as error:
        return _fail_stopped(error, "debug" in notes)
    except AnchorpatchError as error:
        return _fail(str(error), error.exit_status, "debug" in notes)
    except ReaderGone:
        return 1
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        text = f"unexpected {type(error).__name__}: {text} (--debug shows the traceback)"
        if isinstance(error, OSError) and error.errno:
            # The system's answer, on a file that may fail at any moment, is no fault of the
            # program. Where a file is known to be read or written, that is said better.
            file = error.filename
            where = f"{os.fsdecode(file)}: " if isinstance(file, str | bytes) else ""
            text = f"{where}{reason_of(error)}: check the disk and run the same command again"
        return _fail(text, 1, "debug" in notes)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"anchorpatch: {message}", err=True)
    return status


def _fail_stopped(error: BaseException, debug: bool) -> int:
    by, status = "interrupted", 130
    if isinstance(error, _Terminated):
        number = signal.Signals(error.args[0])
        by, status = f"terminated by {number.name}", 128 + number
    return _fail(f"{by}; run the same command again", status, debug)


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated(number)


_DEFAULT_FILE = "anchorpatch.toml"
_PREFIX = "ANCHORPATCH_"

#: Table of the settings file for options that mean the same to all commands.
_FOR_ALL = "defaults"


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
                f"{where}, [{_FOR_ALL}]: expected some of {', '.join(sorted(known))}, that apply "
                f"to all commands, found {key!r}." + did_you_mean(key, known)
            )
    return _defaults(ctx, ctx.command, tables, shared, where)


def _defaults(
    ctx: click.Context,
    command: click.Command,
    table: Mapping[str, Any],
    shared: Mapping[str, Any],
    where: str,
    names: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the default map of a command, or of each command of a group.

    Args:
        ctx: of the program's group of commands.
        command: the command or group.
        table: of the settings file, for the command.
        shared: what the file sets for all commands.
        where: names the file.
        names: of the command, from the program's on.
    """
    inside = f"{where}, [{'.'.join(names)}]" if names else where
    if isinstance(command, click.Group):
        commands = command.list_commands(ctx)
        for name, value in table.items():
            if name not in commands:
                known = commands if names else [*commands, _FOR_ALL]
                raise click.UsageError(
                    f"{inside}: expected a table for a command ({', '.join(known)}), found "
                    f"{name!r}." + did_you_mean(name, known)
                )
            if not isinstance(value, dict):
                raise click.UsageError(
                    f"{inside}: {name} is a command: expected a table "
                    f"[{'.'.join((*names, name))}], found {_toml(value)}"
                )
        return {
            name: _defaults(
                ctx, _member(ctx, command, name), table.get(name, {}), shared, where, (*names, name)
            )
            for name in (commands if shared else table)
        }
    options = options_of(command)
    defaults: dict[str, Any] = {}
    for option in options.values():
        if isinstance(option, SharedOption) and option.shared in shared and option.name:
            place = f"{where}, [{_FOR_ALL}] {option.shared}"
            defaults[option.name] = _text(ctx, option, shared[option.shared], place)
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
    known = {f"{_PREFIX}{variable_name(name)}" for name in options_of(ctx.command)}
    known.add(f"{_PREFIX}CACHE")  # of the indexes of archives
    if known.issuperset(given):
        return []
    for names, option_name, option in _walk(ctx):
        known.add(_PREFIX + variable_name("_".join((*names, option_name))))
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
    if isinstance(group, click.Group):
        for name in group.list_commands(ctx):
            yield from _walk(ctx, _member(ctx, group, name), (*names, name))
    else:
        for option_name, option in options_of(group).items():
            yield names, option_name, option


def _member(ctx: click.Context, group: click.Group, name: str) -> click.Command:
    command = group.get_command(ctx, name)
    assert command is not None  # the group has listed it
    return command
