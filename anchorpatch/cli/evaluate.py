"""``anchorpatch evaluate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.cli.config import Command
from anchorpatch.cli.extract import find_weights
from anchorpatch.cli.options import (
    Share,
    data_option,
    device_option,
    json_option,
    labels_option,
    runs_option,
    weights_option,
    workers_option,
)
from anchorpatch.cli.output import print_json, print_table

if TYPE_CHECKING:
    from anchorpatch.jobs.evaluate import EvaluateSummary

__all__ = ["evaluate"]


@click.command(cls=Command)
@click.argument("network", type=click.Choice(["anchornet"]))
@data_option
@click.option("--split", default="val", help="Name of the folder below --data.")
@labels_option
@weights_option
@runs_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images in a batch.  [default: 16 on CPU, 256 on a GPU]",
)
@workers_option
@device_option
@click.option("--amp", is_flag=True, help="Compute in bfloat16.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first N images.")
@click.option("--max-bad", type=Share(), default=0.01, help="Fail beyond this share of bad images.")
@json_option
def evaluate(
    network: str,
    data: Path,
    weights: str | None,
    runs: Path,
    workers: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a network on a labelled folder.

    For anchornet: top-1 and top-5 of every branch and of the decision of Eq. 7, the share of
    images that each branch is chosen for, patches an image for each preset, and the cost.

    \b
    anchorpatch evaluate anchornet --data imagenet --split val
    """  # noqa: D301 (click reads the character)
    from anchorpatch.jobs.evaluate import EvaluateConfig, run
    from anchorpatch.runtime.device import cpu_count
    from anchorpatch.runtime.progress import reporter

    config = EvaluateConfig(
        data=data,
        weights=find_weights(weights, runs),
        workers=cpu_count() if workers is None else workers,
        **options,
    )
    summary = run(config, reporter())
    if int(os.environ.get("RANK", 0)) == 0:
        print_summary(summary, as_json)


def print_summary(summary: EvaluateSummary, as_json: bool) -> None:
    """Print the figures of an evaluation."""
    if as_json:
        print_json(summary.to_json())
        return
    rows = []
    for output, top1 in summary.top1_by_output.items():
        part, scale = output.split("_")
        share = f"{summary.branch_share[scale]:.1%}" if part == "localization" else "-"
        rows.append(
            [f"{part} {scale} px", f"{top1:.2%}", f"{summary.top5_by_output[output]:.2%}", share]
        )
    rows.append(["decision (Eq. 7)", f"{summary.top1:.2%}", f"{summary.top5:.2%}", "100.0%"])
    print_table(["output", "top-1", "top-5", "chosen for"], rows)
    click.echo()
    scales = list(summary.branch_share)
    print_table(
        ["preset: patches an image", *(f"{scale} px" for scale in scales), "all"],
        [
            [name, *("-" if (m := means[s]) is None else f"{m:.2f}" for s in [*scales, "all"])]
            for name, means in summary.mean_patches.items()
        ],
    )
    click.echo(
        f"\n{summary.images:,} images, {summary.skipped:,} skipped; {summary.gmacs:.4f} GMACs, "
        f"{summary.images_per_second:,.1f} images/s without decoding"
    )
