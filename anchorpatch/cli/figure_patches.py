"""``anchorpatch figure patches``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anchorpatch.cli.config import Command
from anchorpatch.cli.extract import overridden
from anchorpatch.cli.figure_options import figure_options, inputs
from anchorpatch.cli.options import NumberList
from anchorpatch.cli.output import print_json, print_table

__all__ = ["patches"]


@click.command(cls=Command)
@click.option(
    "--per-scale", type=click.IntRange(min=1), default=3, help="Images to show of each scale."
)
@click.option("--only-right", is_flag=True, help="Only images whose class is decided right.")
@click.option(
    "--preset",
    type=click.Choice(["figure", "finetune", "evaluate"]),
    default="figure",
    help="Values of K, T and P.",
)
@click.option("--max-patches", type=NumberList(int), help="K for 63, 95, 111 px; over the preset.")
@click.option("--iou-threshold", type=float, help="T; over the preset.")
@click.option("--coverage", type=NumberList(float), help="P for 63, 95, 111 px; over the preset.")
@figure_options("patches")
def patches(
    per_scale: int,
    only_right: bool,
    preset: str,
    max_patches: tuple[int, int, int] | None,
    iou_threshold: float | None,
    coverage: tuple[float, float, float] | None,
    out: Path,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Draw images by the scale they chose, their patches framed and cut out (Figure 3).

    The images are a seeded choice, spread over the classes, of those looked at; wrong decisions
    are among them, with the predicted class. --only-right leaves them out, as the paper does.
    --images shows exactly the images that it names.

    \b
    anchorpatch figure patches --data imagenet --per-scale 6
    anchorpatch figure patches --images n01440764/ILSVRC2012_val_00000293.JPEG
    """
    from anchorpatch.figures import patches_figure
    from anchorpatch.figures.files import save_figure
    from anchorpatch.figures.patches import PatchesConfig, find_patches
    from anchorpatch.runtime.progress import reporter

    lsp = overridden(preset, max_patches, iou_threshold, coverage)
    source, weights, choice = inputs(out=out, **options)
    config = PatchesConfig(choice, lsp, per_scale, only_right, device)
    result = find_patches(source, weights, config, reporter())
    for scale, found in result.missing.items():
        click.echo(
            f"only {found} of {result.looked} that were looked at can be shown for {scale} px: "
            "raise --limit for more",
            err=True,
        )
    facts = result.to_json()
    save_figure(patches_figure(result), out, facts)
    if as_json:
        print_json({**facts, "picture": str(out)})
        return
    print_table(
        ["image", "class", "predicted", "scale", "patches", "strongest"],
        [
            [
                *(example.path, example.label, example.predicted, f"{scale} px"),
                *(str(len(example.scores)), f"{example.scores[0]:.3g}"),
            ]
            for scale, examples in result.examples.items()
            for example in examples
        ],
    )
    click.echo(f"{result.caption}\n{out}")
