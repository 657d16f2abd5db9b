"""``anchorpatch scenes``."""

from __future__ import annotations

from pathlib import Path

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import print_json


@click.command(cls=opt.Command)
@click.argument("folder", metavar="DIR", type=opt.PATH)
@click.option(
    "--train", type=click.IntRange(min=0), default=4000, help="Number of images in DIR/train."
)
@click.option(
    "--val", type=click.IntRange(min=0), default=1000, help="Number of images in DIR/val."
)
@opt.seed("the images")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Number of processes that draw.  [default: one per CPU core]",
)
@opt.as_json
def scenes(folder: Path, train: int, val: int, seed: int, jobs: int | None, as_json: bool) -> None:
    """Draw a synthetic dataset of textured shapes, with the true boxes of the objects.

    There are ten classes, each with small, medium and large objects, in the layout of ImageNet:
    DIR/train/CLASS/*.JPEG, DIR/val/CLASS/*.JPEG. DIR/boxes.csv holds the size and the box of each
    object, in pixels of the 256 px image; subtract 16 for the 224 px crop. An image depends only
    on the seed, its split and its number. DIR must be new or hold nothing else; run the same
    command again to complete an interrupted one.

    \b
    anchorpatch scenes data --train 4000 --val 1000
    """
    from anchorpatch.demo.scene_folder import make_scenes
    from anchorpatch.demo.scenes import CLASSES

    drawn = make_scenes(folder, train, val, seed, jobs)
    if as_json:
        counts = {"train": train, "val": val, "seed": seed, "drawn": drawn}
        print_json({"folder": str(folder), **counts, "classes": CLASSES})
        return
    click.echo(
        f"{train:,} train and {val:,} val pictures of {len(CLASSES)} classes, "
        f"{drawn:,} of them drawn now: {folder}"
    )
