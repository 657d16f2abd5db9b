"""Options and figures that the commands which train a network share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, TypeVar

import click

__all__ = ["RECORD_COLUMNS", "loop_options", "record_row", "record_rows", "run_options"]

_F = TypeVar("_F", bound=Callable[..., Any])

#: Columns of `record_rows`.
RECORD_COLUMNS = ("weights", "top-1", "top-5", "val loss", "train loss")


def loop_options(defaults: str | Mapping[str, str], unit: str = "images") -> Callable[[_F], _F]:
    """Return a decorator that adds the settings of `jobs.loop_config.LoopConfig`.

    Options that are not given are None, and the job's own defaults hold.

    Args:
        defaults: what the help says of them: one text, or one for each option, by its name.
        unit: what is trained on.
    """

    def note(name: str) -> str:
        return f"  [default: {defaults if isinstance(defaults, str) else defaults[name]}]"

    return _all(
        click.option(
            "--epochs", type=click.IntRange(min=1), help="Passes over train." + note("epochs")
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            help=f"{unit.capitalize()} of a step, over all processes." + note("batch_size"),
        ),
        click.option(
            "--accumulate",
            type=click.IntRange(min=1),
            help="Pieces a process works in." + note("accumulate"),
        ),
        click.option(
            "--optimizer",
            type=click.Choice(["sgd", "adamw"]),
            help="What steps." + note("optimizer"),
        ),
        click.option(
            "--lr",
            type=float,
            help="Rate for a batch of 256; others scale it: linearly for sgd, by the square root "
            "for adamw." + note("lr"),
        ),
        click.option(
            "--weight-decay", type=float, help="Of all parameters." + note("weight_decay")
        ),
        click.option(
            "--schedule",
            type=click.Choice(["step", "cosine"]),
            help="A tenth every 30 epochs, or a cosine to 0." + note("schedule"),
        ),
        click.option(
            "--warmup-epochs",
            type=float,
            help="The rate rises over these." + note("warmup_epochs"),
        ),
        click.option(
            "--label-smoothing",
            type=float,
            help="Share of the target that all classes get." + note("label_smoothing"),
        ),
        click.option(
            "--ema-decay", type=float, help="Average the weights; 0 does not." + note("ema_decay")
        ),
    )


def run_options(command: _F) -> _F:
    """Add how a run computes and what it leaves."""
    return _all(
        click.option("--amp", is_flag=True, help="Compute in bfloat16."),
        click.option("--channels-last/--no-channels-last", default=True, help="Memory format."),
        click.option("--compile", "compile_", is_flag=True, help="Use torch.compile."),
        click.option("--sync-batchnorm", is_flag=True, help="Normalise over all GPUs."),
        click.option(
            "--checkpoint-minutes",
            type=click.FloatRange(min=0),
            default=10.0,
            help="Between checkpoints within an epoch.",
        ),
        click.option("--tensorboard", is_flag=True, help="Write event files too."),
        click.option(
            "--overwrite",
            is_flag=True,
            help="Replace a run of other settings, or weights without a checkpoint.",
        ),
    )(command)


def _all(*options: Callable[[Any], Any]) -> Callable[[_F], _F]:
    """Return one decorator for several, of which the first stands on top."""

    def add(command: _F) -> _F:
        return reduce(lambda decorated, option: option(decorated), reversed(options), command)

    return add


def record_rows(best: Mapping[str, Any], last: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of a table that compares the best epoch with the last."""
    return [record_row("best", best), record_row("last", last)]


def record_row(name: str, record: Mapping[str, Any]) -> list[str]:
    """Return the row of one epoch, which ``name`` says something of."""
    val = record["val"]
    return [
        f"{name}: epoch {record['epoch']}",
        f"{val['top1']:.2%}",
        f"{val['top5']:.2%}",
        f"{val['loss']:.3f}",
        f"{record['train']['loss']:.3f}",
    ]
