"""Commands, the types of their options, and the options that several share: ``@opt.data``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container
from dataclasses import replace
from functools import reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from anchorpatch.classes import ClassNames, Matching
from anchorpatch.demo import BUNDLED
from anchorpatch.errors import OutOfMemory
from anchorpatch.settings import CONFIDENCES, ENGINES, PRECISIONS, PRESETS, default_preset

_F = TypeVar("_F", bound=Callable[..., Any])


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
    """A command with ``--debug`` whose options can also be set in the environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(debug_option(hidden=True))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse; an error about a value from the environment names the variable."""
        for name, param in options_of(self).items():
            # click would take the name of the function's argument, such as AS_JSON.
            param.envvar = f"{ctx.auto_envvar_prefix}_{variable_name(name)}"
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            option = error.param
            if isinstance(option, click.Option) and option.name and not error.param_hint:
                source = ctx.get_parameter_source(option.name)
                if source is ParameterSource.ENVIRONMENT:
                    own = str(option.envvar)
                    variable = own if os.environ.get(own) else getattr(option, "variable", own)
                    error.param_hint = f"{option.get_error_hint(ctx)} (from ${variable})"
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run; where memory is used up, name the command's options that need less of it."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if message := _out_of_memory(error, options_of(self)):
                raise OutOfMemory(message) from error
            raise


class Group(click.Group):
    """A group whose commands are listed in the order of their definition."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(self.commands)


def _out_of_memory(error: Exception, options: Container[str]) -> str | None:
    """Return the message for an out-of-memory error."""
    text = str(error)
    # By name: importing torch takes seconds, and commands that do without have no such error.
    gpu = type(error).__name__ == "OutOfMemoryError" or re.search(
        r"CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", text
    )
    if not (gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text):
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


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command by the name that the user sees, without the dashes."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    return {max(option.opts, key=len).lstrip("-"): option for option in options}


def variable_name(name: str) -> str:
    """Return an option's name as variables of the environment spell it."""
    return name.replace("-", "_").upper()


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
        shared: name of the setting, such as "data"; None: that of the option.
    """

    def __init__(self, *args: Any, shared: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared = shared or str(self.name)
        self.variable = f"ANCHORPATCH_{variable_name(self.shared)}"

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
    """A share from 0 to 1, also written in percent."""

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


class Names(_ParamType):
    """Comma-separated names."""

    name = "names"
    takes_list = True  # as a settings file may write them

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of text."""
        if isinstance(value, tuple | list):
            return tuple(value)
        return tuple(name.strip() for name in str(value).split(",") if name.strip())


def grouped(*options: Callable[[Any], Any]) -> Callable[[_F], _F]:
    """Return one decorator for several options, of which the first is listed first."""
    return lambda command: reduce(lambda f, option: option(f), reversed(options), command)


def folder(name: str, shared: str, text: str) -> Callable[[_F], _F]:
    """Return the option of a folder that all commands share, by default ./SHARED."""
    return click.option(
        name,
        cls=SharedOption,
        shared=shared,
        type=PATH,
        default=Path(shared),
        help=f"{text}; also $ANCHORPATCH_{shared.upper()}.",
    )


data = folder(
    "--data",
    "data",
    "Images: a folder with SPLIT/CLASS/*.JPEG, SPLIT.tar or SPLIT.zip, an archive, or WebDataset "
    "shards such as 'train-{000..255}.tar'",
)
runs = folder("--runs", "runs", "Folder of the training runs")
shards = folder("--shards", "shards", "Folder of the shards, with a folder per split")

split = click.option("--split", default="val", help="Name of the split's folder or archive.")

class_names = click.option(
    "--class-names",
    cls=SharedOption,
    shared="class-names",
    type=PATH,
    callback=lambda ctx, param, value: ClassNames.read(value),
    help="Text file of the names to show beside the classes: a class, a tab or comma, and its name "
    "per line, or a name per line in the order of the classes.  [default: ImageNet's names]",
)


def matching(*, all_classes: bool = True, of: str = "the weights") -> Callable[[_F], _F]:
    """Return a decorator that adds the options of a `Matching`, which the command gets."""

    def add(command: _F) -> _F:
        @wraps(command)
        def matched(*, class_map: Path | None, all_classes: bool = False, **rest: Any) -> Any:
            return command(matching=Matching.read(class_map, all_classes=all_classes), **rest)

        return grouped(*options)(matched)  # type: ignore[return-value]

    options: list[Callable[[Any], Any]] = [
        click.option(
            "--class-map",
            type=PATH,
            help=f"Text file with the classes of the outputs of {of}, one per line, in their "
            "order.  [default: those recorded in the weights; ImageNet's for pretrained ones]",
        )
    ]
    if all_classes:
        options.append(
            click.option(
                "--all-classes",
                is_flag=True,
                help="Keep the outputs of the weights for classes that the data lack; predictions "
                "of these count as wrong.  [default: leave them out]",
                show_default=False,
            )
        )
    return add


labels = grouped(
    click.option(
        "--labels",
        type=PATH,
        help="Labels for a split whose images are not in class folders: LOC_val_solution.csv, or a "
        "table of image and class.",
    ),
    click.option(
        "--files",
        type=PATH,
        metavar="LIST",
        help="Use the images of this list, one path or path,label per line, relative to the "
        "working directory; -: stdin.",
    ),
    click.option("--only-labelled", is_flag=True, help="Leave out images without a label."),
)

allow_empty = click.option("--allow-empty", is_flag=True, help="Accept empty class folders.")

limit = click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Use only N images, evenly spaced in the sorted list and so over the classes.",
)

max_bad = click.option(
    "--max-bad",
    type=Share(),
    default=0.01,
    help="Maximum share of unreadable images; above it, the command fails.",
)


def file_or(*names: str) -> dict[str, Any]:
    """Return what an option has that takes a file or one of some names: metavar, completion."""

    def complete(ctx: click.Context, param: click.Parameter, start: str) -> list[CompletionItem]:
        known = [CompletionItem(name) for name in names if name.startswith(start)]
        return [CompletionItem(start, type="file"), *known]

    return {"metavar": "|".join(("FILE", *names)), "shell_complete": complete}


weights, anchornet_weights = (
    click.option(
        name,
        **file_or(*BUNDLED),
        help="AnchorNet weights; photos: bundled ones for ten classes of photographs; demo: for "
        "the drawn scenes.  [default: RUNS/anchornet/best.safetensors]",
    )
    for name in ("--weights", "--anchornet-weights")
)

device = click.option(
    "--device",
    cls=SharedOption,
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Device to compute on; auto: a GPU if there is one.",
)

engine = click.option(
    "--engine",
    type=click.Choice(["auto", *ENGINES]),
    default="auto",
    help="What computes AnchorNet on a CPU; auto: openvino where it can be used, else torch.",
)


def _note_amp(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta["anchorpatch.amp"] = value


def _precision(ctx: click.Context, param: click.Parameter, value: str) -> str:
    return "bfloat16" if ctx.meta["anchorpatch.amp"] else value


precision = grouped(
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default="float32",
        callback=_precision,
        help="Type to compute in; bfloat16 needs a device with instructions for it.",
    ),
    click.option(
        "--amp",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_note_amp,
        help="The same as --precision bfloat16.",
    ),
)

confidence = click.option(
    "--confidence",
    type=click.Choice(CONFIDENCES),
    default="max",
    help="How sure the network is of the mean softmax so far: its largest probability, the margin "
    "to the second largest, or 1 minus its normalized entropy.",
)


def _one_per_core() -> int:
    from anchorpatch.runtime.device import cpu_count  # torch is slow to import

    return cpu_count()


workers = click.option(
    "--workers",
    cls=SharedOption,
    type=click.IntRange(min=0),
    default=_one_per_core,
    show_default=False,
    help="Number of workers that load images or patches; 0: load in the main process.  "
    "[default: one per CPU core]",
)

threads = click.option(
    "--threads",
    cls=SharedOption,
    type=click.IntRange(min=1),
    help="Number of CPU threads for computing.  [default: $OMP_NUM_THREADS, else one per CPU core]",
)


def seed(of: str, default: int = 0) -> Callable[[_F], _F]:
    """Return the option of the random seed, which the help says what of."""
    return click.option(
        "--seed", type=click.IntRange(min=0), default=default, help=f"Random seed for {of}."
    )


as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def batch_size(default: str, unit: str = "images", note: str = "") -> Callable[[_F], _F]:
    """Return the option of the batch size, with a note on its default and another one."""
    return click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help=f"Number of {unit} per batch{note}.  [default: {default}]",
    )


def patches(what: str) -> Callable[[_F], _F]:
    """Return the option of mean numbers of patches, which the help says what is found for."""
    return click.option(
        "--patches",
        type=NumberList(float),
        help=f"{what} on a sample of the images, and --max-patches where it is too small, so that "
        "an image has X patches on average at 63, 95 and 111 px.",
    )


_EXCLUSIVE = ("patches", "coverage")


def lsp(default: str | None = None, shown: str | None = None) -> Callable[[_F], _F]:
    """Return a decorator that adds the preset of LSP, and what overrides its values.

    The command gets ``preset``, a name in `PRESETS`, and ``lsp``, the `LspSettings`.

    Args:
        default: preset; None: as `default_preset` says for the command's --split.
        shown: what the help says of a default that depends on the split.
    """

    def add(command: _F) -> _F:
        @wraps(command)
        def with_settings(*, preset: str | None, **rest: Any) -> Any:
            # Mean numbers of patches are found by P, below a K that seldom matters.
            tuned = rest.get("patches") is not None
            name = preset or ("dense" if tuned else default_preset(rest["split"]))
            names = ("max_patches", "iou_threshold", "coverage")
            given = {key: value for key in names if (value := rest.pop(key)) is not None}
            if "coverage" in given and rest.get("patches") is not None:
                # One on the command line overrides the other of a settings file.
                source = click.get_current_context().get_parameter_source
                typed = [source(key) is ParameterSource.COMMANDLINE for key in _EXCLUSIVE]
                if typed[0] == typed[1]:
                    raise click.UsageError("--patches and --coverage are mutually exclusive.")
                (given if typed[0] else rest).pop("coverage" if typed[0] else "patches")
            return command(preset=name, lsp=replace(PRESETS[name], **given), **rest)

        return options(with_settings)  # type: ignore[return-value]

    at = "at 63, 95 and 111 px"
    overrides: tuple[tuple[str, Any, str], ...] = (
        ("--max-patches", NumberList(int), f"Maximum patches per image (K) {at}"),
        ("--iou-threshold", float, "IoU threshold (T): two patches of an image overlap less"),
        ("--coverage", NumberList(float), f"Share of the locations that are candidates (P) {at}"),
    )
    options = grouped(
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            default=default,
            help="Preset for --max-patches, --iou-threshold and --coverage.  "
            f"[default: {default or shown}]",
            show_default=False,
        ),
        *(
            click.option(name, type=kind, help=f"{text} (overrides the preset).")
            for name, kind, text in overrides
        ),
    )
    return add
