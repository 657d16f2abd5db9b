"""The program: the group of commands, the settings file and how errors end a run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any, NoReturn

import click

from anchorpatch import __version__
from anchorpatch.cli.config import debug_option, load_config, unknown_variables
from anchorpatch.cli.lazy import LazyGroup
from anchorpatch.cli.output import ReaderGone, open_streams
from anchorpatch.errors import AnchorpatchError, Interrupted
from anchorpatch.signals import STOP_SIGNALS, ending, watch_waits

__all__ = ["cli", "main"]

#: Command -> module of this package that holds a click command of the same name.
_COMMANDS = (
    *("train", "extract", "finetune", "evaluate", "predict"),
    *("figure", "report", "shards", "models", "demo", "scenes"),
)


@click.group(
    cls=LazyGroup,
    names=_COMMANDS,
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
    help="Settings file, a table per command. [default: ./anchorpatch.toml where it exists]",
)
@click.pass_context
def cli(ctx: click.Context, config: str | None) -> None:
    r"""Localize multi-scale semantic patches of images and train classifiers on them.

    \b
    anchorpatch train                 train the localiser, AnchorNet
    anchorpatch extract --split val   write the patches of a folder into HDF5 shards
    anchorpatch finetune resnet50     train an ordinary network on the patches
    anchorpatch predict dog.jpg       classify pictures by their patches

    Every option may also stand in ./anchorpatch.toml or in an environment variable
    ANCHORPATCH_<COMMAND>_<OPTION>. Results go to stdout, progress and messages to stderr.
    Exit status: 0 done, 1 failed, 2 wrong usage, 128 + N ended by signal N (130: Ctrl-C).

    Shell completion: eval "$(_ANCHORPATCH_COMPLETE=bash_source anchorpatch)", also zsh, fish.
    """
    if ctx.resilient_parsing:
        return
    ctx.default_map = load_config(ctx, config)
    for line in unknown_variables(ctx) if os.environ.get("RANK", "0") == "0" else ():
        click.echo(f"anchorpatch: {line}", err=True)


#: How idle OpenMP threads wait, in the words of the standard, of GNU and of LLVM and Intel.
_WAIT_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


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
            signal.signal(number, _raise_interrupted)
    # Read when torch is loaded. Threads that spin while they wait take the cores from those that
    # they wait for, wherever other programs compute too: training was then up to ten times slower.
    if not any(name in os.environ for name in _WAIT_POLICIES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    watch_waits()
    status = _run(sys.argv[1:])
    ending()
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
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; run the same command again", 130, "debug" in notes)
    except AnchorpatchError as error:
        return _fail(str(error), error.exit_status, "debug" in notes)
    except ReaderGone:
        return 1
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        text = f"unexpected {type(error).__name__}: {text} (--debug shows the traceback)"
        return _fail(text, 1, "debug" in notes)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    click.echo(f"anchorpatch: {message}", err=True)
    return status


def _raise_interrupted(number: int, frame: FrameType | None) -> Any:
    name = signal.Signals(number).name
    raise Interrupted(f"terminated by {name}; run the same command again", number)
