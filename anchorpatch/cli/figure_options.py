"""Options and steps that the commands which draw a figure from images share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from anchorpatch.cli.extract import find_weights
from anchorpatch.cli.options import (
    PATH,
    data_option,
    device_option,
    json_option,
    labels_option,
    runs_option,
    weights_option,
    workers_option,
)

if TYPE_CHECKING:
    from anchorpatch.figures.examples import Choice
    from anchorpatch.jobs.crops import ImageSource
    from anchorpatch.runtime.checkpoint import Weights

__all__ = ["Names", "figure_options", "inputs"]

_F = TypeVar("_F", bound=Callable[..., Any])

# click's type of types takes a parameter from 8.5 on, for type checkers only.
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType


class Names(_ParamType):
    """Names with commas between them."""

    name = "names"
    takes_list = True  # as a settings file may write them

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of text."""
        if isinstance(value, tuple | list):
            return tuple(value)
        return tuple(name.strip() for name in str(value).split(",") if name.strip())


def figure_options(name: str, limit: int = 300) -> Callable[[_F], _F]:
    """Return a decorator that adds images, weights, output and device of a figure.

    Args:
        name: of the command.
        limit: images that it looks at.
    """
    options = (
        data_option,
        click.option("--split", default="val", help="Name of the folder below --data."),
        labels_option,
        weights_option,
        runs_option,
        click.option(
            "--images",
            type=Names(),
            default=(),
            metavar="PATH[,PATH...]",
            help="Exactly these images, by their paths below the split folder.",
        ),
        click.option(
            "--classes",
            type=Names(),
            default=(),
            metavar="NAME[,NAME...]",
            help="Only images of these classes.",
        ),
        click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the choice."),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            default=limit,
            help="Look at so many images, spread over the classes, and choose among them.",
        ),
        click.option(
            "--out",
            type=PATH,
            default=Path("figures", f"{name}.png"),
            help="The picture: .png, .jpg, .webp or .pdf. What it shows goes into a .json beside.",
        ),
        workers_option,
        device_option,
        json_option,
    )
    return lambda function: reduce(lambda f, option: option(f), reversed(options), function)


def inputs(
    data: Path,
    split: str,
    labels: Path | None,
    weights: str | None,
    runs: Path,
    images: tuple[str, ...],
    classes: tuple[str, ...],
    seed: int,
    limit: int,
    workers: int | None,
    out: Path,
) -> tuple[ImageSource, Weights, Choice]:
    """Read what `figure_options` name, after a look at what needs none of it.

    Raises:
        AnchorpatchError: an option cannot be used.
    """
    from anchorpatch.figures.examples import Choice
    from anchorpatch.figures.files import picture_kind
    from anchorpatch.jobs.crops import ImageSource
    from anchorpatch.runtime.checkpoint import load_weights
    from anchorpatch.runtime.device import cpu_count

    picture_kind(out)
    choice = Choice(images, classes, seed, limit)
    loaded = load_weights(find_weights(weights, runs))
    workers = cpu_count() if workers is None else workers
    source = ImageSource.of_folder(
        data, split, labels=labels, workers=workers, crop=loaded.meta.cropping
    )
    return source, loaded, choice
