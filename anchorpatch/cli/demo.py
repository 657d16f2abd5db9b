"""``anchorpatch demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.extract import print_summary
from anchorpatch.cli.output import print_json, print_tables
from anchorpatch.demo import find_weights
from anchorpatch.storage import to_json
from anchorpatch.text import counted

_PICTURE = "patches.png"


@click.command(cls=opt.Command)
@click.argument("folder", metavar="[DIR]", type=opt.PATH, default=Path("anchorpatch-demo"))
@click.option("--images", type=click.IntRange(min=1), default=300, help="Number of scenes to draw.")
@opt.seed("the scenes; the bundled weights were trained on those of seed 0", default=1)
@click.option(
    "--weights",
    default="demo",
    metavar="FILE|demo",
    help="AnchorNet weights trained on scenes; demo: the bundled ones.",
)
@opt.workers
@opt.device
@opt.engine
@opt.precision
@click.option("--overwrite", is_flag=True, help="Replace shards made from other inputs.")
@opt.as_json
def demo(
    folder: Path,
    images: int,
    seed: int,
    weights: str,
    workers: int,
    overwrite: bool,
    as_json: bool,
    **computing: Any,
) -> None:
    """Run the pipeline on synthetic scenes with known objects.

    Draws scenes in DIR/scenes, extracts their patches to DIR/shards, verifies the shards,
    compares the patches with the true boxes, and draws some of them in DIR/patches.png. Takes
    about a minute. Run the same command again to resume it.

    \b
    anchorpatch demo
    anchorpatch shards inspect anchorpatch-demo/shards/val
    anchorpatch report anchorpatch-demo
    """
    from anchorpatch.demo.scene_folder import make_scenes
    from anchorpatch.demo.score import score_scenes
    from anchorpatch.errors import CorruptShard
    from anchorpatch.jobs.extract import run
    from anchorpatch.jobs.extract_plan import ExtractConfig
    from anchorpatch.runtime.checkpoint import load_weights
    from anchorpatch.runtime.progress import reporter
    from anchorpatch.shards.verify import verify_folder

    network = find_weights(weights, folder)
    load_weights(network)  # a bad file is better found before anything is drawn
    progress = reporter()
    scenes = folder / "scenes"
    progress.message(f"drawing {counted(images, 'scene')} in {scenes}")
    drawn = make_scenes(scenes, 0, images, seed)
    config = ExtractConfig(
        data=scenes,
        split="val",
        weights=network,
        out=folder / "shards",
        store_images=True,
        workers=workers,
        **computing,
        overwrite=overwrite,
    )
    extracted = run(config, progress)
    shards, number = folder / "shards" / "val", extracted.facts.shards
    if problems := verify_folder(shards):
        raise CorruptShard(
            f"{shards / problems[0].shard}: {problems[0].problem}; "
            f"{counted(len(problems), 'problem')} in all: see anchorpatch shards verify {shards}"
        )
    boxes = scenes / "boxes.csv"
    score = score_scenes(shards, boxes)
    _write_picture(shards, boxes, folder / _PICTURE)
    if as_json:
        print_json(
            {
                "scenes": {
                    "folder": str(scenes),
                    "train": 0,
                    "val": images,
                    "seed": seed,
                    "drawn": drawn,
                },
                "extract": extracted.to_json(),
                "verified_shards": number,
                "score": to_json(score),
                "picture": str(folder / _PICTURE),
            }
        )
        return
    print_summary(extracted, as_json=False)
    click.echo(f"all {counted(number, 'shard')} verified\n")
    print_tables(score.tables())
    click.echo(f"\npicture: {folder / _PICTURE}")
    progress.message(f"anchorpatch report {folder} puts everything on one page")


def _write_picture(shards: Path, boxes_csv: Path, picture: Path, per_size: int = 3) -> None:
    """Frame the patches of some images of each size, a row for each, of many classes."""
    from anchorpatch.demo.scene_folder import read_boxes
    from anchorpatch.demo.scenes import SIZES
    from anchorpatch.figures.canvas import save_picture
    from anchorpatch.figures.frames import Tile, contact_sheet
    from anchorpatch.shards.reader import ShardReader

    reader, boxes = ShardReader(shards), read_boxes(boxes_csv)
    paths = [path.decode() for path in reader.path.tolist()]
    truth = [boxes[f"{reader.header.split}/{path}"] for path in paths]
    tiles, shown = [], [0] * len(reader.classes)
    for size in SIZES:
        of_size = [i for i, (name, _) in enumerate(truth) if name == size]
        for _ in range(min(per_size, len(of_size))):
            i = min(of_size, key=lambda i: (shown[reader.label[i]], i))
            of_size.remove(i)
            shown[reader.label[i]] += 1
            patches = reader.image_patches(i)
            label = reader.classes[reader.label[i]]
            seen = reader.network_classes[reader.predicted[i]]
            mistaken = f" as {seen}" if seen != label else ""
            caption = f"{size} {label}{mistaken}, {patches.scale} px"
            box = truth[i][1].in_crop()
            tiles.append(Tile(reader.image(i), patches.scale, patches.corners, caption, box))
    title = "Bold: the strongest patch. Thin: the others. Dashed: the true box."
    save_picture(contact_sheet(tiles, per_size, title), picture)
