"""``anchorpatch scenes``."""

from __future__ import annotations

from pathlib import Path

import click

from anchorpatch.cli.options import PATH, Command, json_option
from anchorpatch.cli.output import print_json


@click.command(cls=Command)
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--train", type=click.IntRange(min=0), default=4000, help="Pictures in DIR/train.")
@click.option("--val", type=click.IntRange(min=0), default=1000, help="Pictures in DIR/val.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, help="Another seed gives other pictures."
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Drawing processes.  [default: one a CPU core]"
)
@json_option
def scenes(folder: Path, train: int, val: int, seed: int, jobs: int | None, as_json: bool) -> None:
    r"""Draw the sample set of textured shapes, with the true boxes of the objects.

    Ten classes, each small, medium and large, in ImageNet's layout: DIR/train/CLASS/*.JPEG,
    DIR/val/CLASS/*.JPEG. DIR/boxes.csv holds each object's size and box in pixels of the 256 px
    picture; subtract 16 for the 224 px crop. A picture depends on the seed, its split and its
    number alone. A folder that holds anything else is refused; the same command again completes
    an interrupted one.

    \b
    anchorpatch scenes data --train 4000 --val 1000
    """
    from anchorpatch.demo.scenes import CLASSES, make_scenes

    summary = make_scenes(folder, train, val, seed, jobs)
    if as_json:
        print_json({**vars(summary), "folder": str(summary.folder), "classes": list(CLASSES)})
        return
    click.echo(
        f"{summary.train:,} train and {summary.val:,} val pictures of {len(CLASSES)} classes, "
        f"{summary.drawn:,} of them drawn now: {summary.folder}"
    )
