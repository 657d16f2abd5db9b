"""``anchorpatch figure attention``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anchorpatch.cli.config import Command
from anchorpatch.cli.figure_options import figure_options, inputs
from anchorpatch.cli.output import print_json, print_table

__all__ = ["attention"]


@click.command(cls=Command)
@click.option("--count", type=click.IntRange(min=1), default=4, help="Images to show.")
@figure_options("attention", limit=100)
def attention(count: int, out: Path, device: str, as_json: bool, **options: Any) -> None:
    r"""Draw spatial attention and class heatmaps of the three branches (Figure 5).

    A row shows an image, its attention maps S as multiples of uniform attention, and the
    heatmaps M of the class that was decided on. Each location lies at the centre of the patch
    that it sees. The images are a seeded choice, spread over scales and classes, of those looked
    at. --images shows exactly the images that it names.

    \b
    anchorpatch figure attention --data imagenet --count 6
    anchorpatch figure attention --images n01440764/ILSVRC2012_val_00000293.JPEG
    """
    from anchorpatch.figures import attention_figure
    from anchorpatch.figures.attention import AttentionConfig, find_attention
    from anchorpatch.figures.files import save_figure
    from anchorpatch.runtime.progress import reporter

    source, weights, choice = inputs(out=out, **options)
    result = find_attention(source, weights, AttentionConfig(choice, count, device), reporter())
    facts = result.to_json()
    save_figure(attention_figure(result), out, facts)
    if as_json:
        print_json({**facts, "picture": str(out)})
        return
    print_table(
        ["image", "class", "predicted", "scale", "S max 63", "95", "111 px"],
        [
            [
                *(image["path"], image["label"], image["predicted"], f"{image['scale']} px"),
                *(f"{branch['attention_max']:.3g}" for branch in image["branches"]),
            ]
            for image in facts["images"]
        ],
    )
    click.echo(f"{result.caption}\n{out}")
