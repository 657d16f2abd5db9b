"""Options and option types that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

__all__ = [
    "PATH",
    "NumberList",
    "Share",
    "SharedOption",
    "allow_empty_option",
    "anchornet_weights_option",
    "background_option",
    "data_option",
    "device_option",
    "json_option",
    "labels_option",
    "limit_option",
    "lsp_options",
    "runs_option",
    "shards_option",
    "threads_option",
    "weights_option",
    "workers_option",
]

# click's type of types takes a parameter from 8.5 on, for type checkers only.
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

PATH = click.Path(path_type=Path)


class SharedOption(click.Option):
    """An option with the same meaning for all commands, which may be set for all of them at once.

    That is in ANCHORPATCH_<SHARED>, or in the table [defaults] of the settings file. What is set
    for a command overrides it.

    Args:
        shared: name of the setting, such as "data".
    """

    def __init__(self, *args: Any, shared: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared, self.variable = shared, f"ANCHORPATCH_{shared.upper()}"

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """Return the command's own variable, else the shared one."""
        return super().resolve_envvar_value(ctx) or os.environ.get(self.variable) or None


class NumberList(_ParamType):
    """Comma-separated numbers: one for every scale, or one for all; or any number of them.

    Args:
        kind: int or float.
        length: how many; None for any number.
    """

    takes_list = True  # as a settings file may write it

    def __init__(self, kind: type[int] | type[float], length: int | None = 3) -> None:
        self.kind, self.length = kind, length
        letter = "N" if kind is int else "X"
        self.name = ",".join([letter] * length) if length else f"{letter},{letter},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of the numbers."""
        if isinstance(value, tuple):
            return value
        items = value if isinstance(value, list) else str(value).split(",")
        try:
            numbers = tuple(self.kind(item) for item in items)
        except ValueError:
            numbers = ()
        wanted = self.length or max(1, len(numbers))
        if len(numbers) == 1:
            numbers *= wanted
        if len(numbers) != wanted:
            kind = "whole numbers" if self.kind is int else "numbers"
            count = f"{self.length} " if self.length else ""
            self.fail(f"expected {count}{kind} such as {self.name}, got {value!r}", param, ctx)
        return numbers


class Share(_ParamType):
    """A share from 0 to 1, also written in per cent."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a float from 0 to 1."""
        text = str(value).strip()
        try:
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"expected a share such as 0.01 or 1%, got {value!r}", param, ctx)
        return share


data_option = click.option(
    "--data",
    cls=SharedOption,
    shared="data",
    type=PATH,
    default=Path("data"),
    help="Folder with SPLIT/CLASS/*.JPEG below it; also $ANCHORPATCH_DATA.",
)

labels_option = click.option(
    "--labels",
    type=PATH,
    help="Labels of a flat split folder: LOC_val_solution.csv, or a table of image and class.",
)


def background_option(default: str) -> Callable[[_F], _F]:
    """Return the option of the color behind transparent pixels, with a note on its default."""
    return click.option(
        "--background",
        metavar="COLOR",
        help=f"Color behind transparent pixels: a name, or #rrggbb.  [default: {default}]",
    )


allow_empty_option = click.option(
    "--allow-empty", is_flag=True, help="Accept class folders without images."
)

limit_option = click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Take only N images, evenly spread over the sorted list and so over the classes.",
)

anchornet_weights_option = click.option(
    "--anchornet-weights",
    metavar="FILE|demo",
    help="AnchorNet weights.  [default: RUNS/anchornet/best.safetensors]",
)

weights_option = click.option(
    "--weights",
    default=None,
    metavar="FILE|demo",
    help="AnchorNet weights.  [default: RUNS/anchornet/best.safetensors]",
)

runs_option = click.option(
    "--runs",
    cls=SharedOption,
    shared="runs",
    type=PATH,
    default=Path("runs"),
    help="Folder of training runs; also $ANCHORPATCH_RUNS.",
)

shards_option = click.option(
    "--shards",
    cls=SharedOption,
    shared="shards",
    type=PATH,
    default=Path("shards"),
    help="Folder that holds the shards of each split; also $ANCHORPATCH_SHARDS.",
)

device_option = click.option(
    "--device",
    cls=SharedOption,
    shared="device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to compute.",
)

workers_option = click.option(
    "--workers",
    cls=SharedOption,
    shared="workers",
    type=click.IntRange(min=0),
    default=None,
    help="Decoding processes; 0 decodes in the main one.  [default: one per CPU core]",
)

threads_option = click.option(
    "--threads",
    cls=SharedOption,
    shared="threads",
    type=click.IntRange(min=1),
    default=None,
    help="Threads that compute on the CPU.  [default: $OMP_NUM_THREADS, else one per CPU core]",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


_F = TypeVar("_F", bound=Callable[..., Any])


def lsp_options(default: str | None, shown: str) -> Callable[[_F], _F]:
    """Return a decorator that adds the preset of LSP, and what overrides it.

    Args:
        default: preset; None where it depends on the split.
        shown: the default in the help.
    """
    options = (
        click.option(
            "--preset",
            type=click.Choice(["figure", "finetune", "evaluate"]),
            default=default,
            help=f"Values of K, T and P.  [default: {shown}]",
            show_default=False,
        ),
        click.option(
            "--max-patches",
            type=NumberList(int),
            help="Maximum patches per image (K) at 63, 95 and 111 px (overrides the preset).",
        ),
        click.option(
            "--iou-threshold",
            type=float,
            help="IoU (T) that two patches of an image stay below (overrides the preset).",
        ),
        click.option(
            "--coverage",
            type=NumberList(float),
            help="Share (P) of the locations that are candidates at 63, 95 and 111 px (overrides "
            "the preset).",
        ),
    )
    return lambda function: reduce(lambda f, option: option(f), reversed(options), function)
