"""``anchorpatch demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.classes import ClassNames
from anchorpatch.cli import options as opt
from anchorpatch.cli.extract import print_summary
from anchorpatch.cli.output import print_json, print_tables
from anchorpatch.demo import BUNDLED, find_weights
from anchorpatch.storage import to_json
from anchorpatch.tables import Table
from anchorpatch.text import counted, tally

if TYPE_CHECKING:
    from anchorpatch.runtime.checkpoint import Weights


@click.command(cls=opt.Command)
@click.argument("folder", metavar="[DIR]", type=opt.PATH, required=False)
@click.option(
    "--photos",
    type=opt.PATH,
    help="Take photographs instead of drawn scenes: a folder of images, at any depth, DATA or "
    "DATA/SPLIT as ImageNet's, or an archive. Nothing is written there.",
)
@click.option(
    "--split",
    help="Split of --photos.  [default: val, else test, else train, else the folder itself]",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=300,
    help="Number of scenes to draw, or of photographs to take, spread evenly over them.",
)
@opt.seed("the scenes; the bundled weights were trained on those of seed 0", default=1)
@click.option(
    "--weights",
    **opt.file_or(*BUNDLED),
    help="AnchorNet weights.  [default: demo, which know the scenes; with --photos photos, which "
    "know ten classes of photographs]",
)
@opt.class_names
@opt.workers
@opt.device
@opt.engine
@opt.precision
@click.option("--overwrite", is_flag=True, help="Replace shards made from other inputs.")
@opt.as_json
def demo(
    folder: Path | None,
    photos: Path | None,
    split: str | None,
    images: int,
    seed: int,
    weights: str | None,
    class_names: ClassNames,
    workers: int,
    overwrite: bool,
    as_json: bool,
    **computing: Any,
) -> None:
    """Run the pipeline on synthetic scenes with known objects, or on photographs of your own.

    Draws scenes in DIR/scenes, extracts their patches to DIR/shards, verifies the shards,
    compares the patches with the true boxes, and draws some of them in DIR/patches.png. Takes
    about a minute. Run the same command again to resume it. DIR is anchorpatch-demo by default.

    With --photos, images that need no labels take the place of the scenes. What they are predicted
    as takes the place of the boxes, with top-1 accuracy where their folders are called as classes
    of the weights (n03028079 or church), and Figure 3 of them is drawn. DIR is then
    anchorpatch-photos by default. The bundled weights know ten classes: tench, English springer,
    cassette player, chain saw, church, French horn, garbage truck, gas pump, golf ball and
    parachute; other images are predicted as one of these too.

    \b
    anchorpatch demo
    anchorpatch shards inspect anchorpatch-demo/shards/val
    anchorpatch report anchorpatch-demo
    anchorpatch demo --photos ~/Pictures
    """
    from anchorpatch.demo.scene_folder import make_scenes
    from anchorpatch.errors import CorruptShard, DataError
    from anchorpatch.images.source import find_split
    from anchorpatch.jobs.extract import run
    from anchorpatch.jobs.extract_plan import ExtractConfig
    from anchorpatch.runtime.checkpoint import load_weights
    from anchorpatch.runtime.progress import reporter
    from anchorpatch.shards.verify import verify_folder

    if split is not None and photos is None:
        raise click.UsageError("--split needs --photos.")
    what = "demo" if photos is None else "photos"
    folder = folder or Path(f"anchorpatch-{what}")
    loaded = load_weights(find_weights(weights or what, folder))  # before anything is drawn
    progress = reporter()
    if photos is None:
        data, split = folder / "scenes", "val"
        progress.message(f"drawing {counted(images, 'scene')} in {data}")
        drawn = make_scenes(data, 0, images, seed)
        made_of: dict[str, Any] = {"train": 0, "val": images, "seed": seed, "drawn": drawn}
        config: dict[str, Any] = {}
    else:
        data, split = (photos, split) if split else find_split(photos)
        made_of = {"split": split}
        # A demo goes on past unreadable files, which the summary counts.
        config = {"unlabelled": True, "allow_empty": True, "max_bad": 1.0, "limit": images}
    extracted = run(
        ExtractConfig(
            data=data,
            split=split,
            weights=loaded.path,
            out=folder / "shards",
            preset="evaluate",
            store_images=True,
            workers=workers,
            overwrite=overwrite,
            **config,
            **computing,
        ),
        progress,
    )
    if not extracted.facts.images:
        raise DataError(f"{photos or data}: no image can be read: {tally(extracted.facts.skipped)}")
    shards, number = folder / "shards" / split, extracted.facts.shards
    if problems := verify_folder(shards):
        raise CorruptShard(
            f"{shards / problems[0].shard}: {problems[0].problem}; "
            f"{counted(len(problems), 'problem')} in all: see anchorpatch shards verify {shards}"
        )
    if photos is None:
        score, tables, picture = _scenes(shards, data / "boxes.csv", folder)
    else:
        score, tables, picture = _photos(shards, loaded, folder, class_names, computing)
    if as_json:
        print_json(
            {
                "scenes" if photos is None else "photos": {"folder": str(data), **made_of},
                "extract": extracted.to_json(),
                "verified_shards": number,
                "score": to_json(score),
                "picture": str(picture),
            }
        )
        return
    print_summary(extracted, as_json=False)
    click.echo(f"all {counted(number, 'shard')} verified\n")
    print_tables(tables)
    click.echo(f"\npicture: {picture}")
    progress.message(f"anchorpatch report {folder} puts everything on one page")


def _scenes(shards: Path, boxes_csv: Path, folder: Path) -> tuple[Any, Sequence[Table], Path]:
    """Compare patches with the true boxes and draw some; return score, tables and picture."""
    from anchorpatch.demo.score import score_scenes

    score, picture = score_scenes(shards, boxes_csv), folder / "patches.png"
    _write_picture(shards, boxes_csv, picture)
    return score, score.tables(), picture


def _photos(
    shards: Path, weights: Weights, folder: Path, names: ClassNames, computing: dict[str, Any]
) -> tuple[Any, Sequence[Table], Path]:
    """Count what photographs are predicted as, and draw Figure 3 where a report finds it."""
    from anchorpatch.demo.score import score_photos
    from anchorpatch.figures.canvas import save_picture
    from anchorpatch.figures.patches import PatchesConfig, find_patches, patches_figure
    from anchorpatch.jobs.crops import CropSource
    from anchorpatch.runtime.progress import reporter
    from anchorpatch.shards.reader import ShardReader

    score = score_photos(shards)
    source = CropSource.of_shards(ShardReader(shards))
    names = names.of(source.classes, weights.meta.classes)
    config = PatchesConfig(limit=len(source), class_names=names, **computing)
    found = find_patches(source, weights, config, reporter())
    picture = folder / "figures" / "patches.png"
    save_picture(patches_figure(found), picture, found.to_json())
    return score, [score.table(names)], picture


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
