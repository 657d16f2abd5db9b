"""``anchorpatch train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.cli.config import Command
from anchorpatch.cli.options import (
    PATH,
    Share,
    data_option,
    device_option,
    json_option,
    labels_option,
    runs_option,
    workers_option,
)
from anchorpatch.cli.output import print_json, print_table
from anchorpatch.cli.training_options import RECORD_COLUMNS, loop_options, record_rows, run_options

if TYPE_CHECKING:
    from anchorpatch.jobs.train import TrainSummary

__all__ = ["train"]

_RECIPE = "by --recipe"


@click.command(cls=Command)
@data_option
@labels_option
@runs_option
@click.option(
    "--recipe",
    type=click.Choice(["paper", "small"]),
    default="paper",
    help="Section 4.1, or what suits a few thousand images; any option goes before it.",
)
@loop_options(_RECIPE)
@click.option(
    "--crop-size",
    type=click.IntRange(min=111),
    help="Side of training crops in px; validation takes 224.  [default: by --recipe]",
)
@click.option(
    "--min-area",
    type=Share(),
    help="Smallest share of the picture in a crop.  [default: by --recipe]",
)
@click.option("--se/--no-se", default=True, help="Squeeze-and-excitation.")
@click.option(
    "--weighted-mean/--no-weighted-mean", default=True, help="Take S times H*W, not S as printed."
)
@click.option(
    "--attention-loss/--no-attention-loss", default=True, help="Supervise the attention branches."
)
@click.option("--init", type=PATH, help="Weights to start from.")
@click.option(
    "--image-cache",
    type=PATH,
    help="Folder for decoded pictures, so that each file is decoded once.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of weights, order and crops.")
@workers_option
@device_option
@click.option("--max-bad", type=Share(), default=0.01, help="Fail beyond this share of bad images.")
@run_options
@json_option
def train(
    data: Path,
    runs: Path,
    recipe: str,
    workers: int | None,
    compile_: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train AnchorNet on DATA/train, measured on DATA/val.

    RUNS/anchornet gets best.safetensors (which `extract` takes), last.safetensors, log.jsonl,
    config.json and last.pt. A run that was stopped goes on when it is started again.

    \b
    anchorpatch train --data imagenet --amp --compile
    anchorpatch train --data photos --recipe small --image-cache cache
    torchrun --nproc-per-node 8 -m anchorpatch train --data imagenet --sync-batchnorm
    """  # noqa: D301 (click reads the character)
    from anchorpatch.jobs.train import RECIPES, TrainConfig, run
    from anchorpatch.runtime.device import cpu_count
    from anchorpatch.runtime.progress import reporter

    given = {name: value for name, value in options.items() if value is not None}
    config = TrainConfig(
        data=data,
        folder=runs / "anchornet",
        recipe=recipe,
        workers=cpu_count() if workers is None else workers,
        compile=compile_,
        **{**RECIPES[recipe], **given},
    )
    summary = run(config, reporter())
    if int(os.environ.get("RANK", 0)) == 0:
        print_summary(summary, as_json)


def print_summary(summary: TrainSummary, as_json: bool) -> None:
    """Print what a run came to."""
    if as_json:
        print_json({**vars(summary), "weights": str(summary.weights)})
        return
    print_table(RECORD_COLUMNS, record_rows(summary.best, summary.last))
    train_images, val_images = summary.images
    lines = [
        f"{summary.epochs} epochs on {train_images:,} images of {summary.classes} classes, "
        f"measured on {val_images:,}: {summary.weights}"
    ]
    if summary.bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.bad.items())
        lines.append(f"skipped: {sum(summary.bad.values()):,} ({reasons})")
    click.echo("\n".join(lines))
