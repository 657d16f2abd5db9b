"""``anchorpatch models``."""

from __future__ import annotations

from typing import Any

import click

from anchorpatch.classes import IMAGENET_NAMES
from anchorpatch.cli import options as opt
from anchorpatch.cli.output import print_json, print_table
from anchorpatch.settings import CROP, SCALES
from anchorpatch.text import percent


@click.command(cls=opt.Command)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--classes", type=click.IntRange(min=1), default=1000, help="Number of classes.")
@click.option(
    "--size", type=click.IntRange(min=32), default=CROP, help="Side of a whole image in px."
)
@click.option(
    "--table3", is_flag=True, help="Compare computed GMACs with those printed in Table 3."
)
@click.option("--names", "only_names", is_flag=True, help="Print only the names, one per line.")
@opt.as_json
def models(
    names: tuple[str, ...],
    classes: int,
    size: int,
    table3: bool,
    only_names: bool,
    as_json: bool,
) -> None:
    """List networks with their parameters and their GMACs for whole images and for patches.

    NAME is anchornet, bagnet33, bagnet77, saccader, hcgnet_b, hcgnet_c, resnext50, the name of
    any classifier of torchvision, timm:NAME if timm is installed, or MODULE:FUNCTION, a network
    of your own: a function in a module, in the current directory or installed, that takes the
    number of classes and returns a torch.nn.Module. The default is the networks of the paper.

    \b
    anchorpatch models
    anchorpatch models resnet18 timm:mobilenetv4_conv_small
    anchorpatch models --table3

    All numbers are computed from the networks. GMACs count the convolutions and matrix products
    for one image or patch; "-" means that a network does not accept inputs of that size. AnchorNet
    is listed as it is trained, with the full class maps F, and as `extract` runs it, which
    computes the map of one class only. The counts of the BagNets and Saccader include the maps of
    all classes.

    The last lines are how the pretrained weights of NAME expect their input. Mean and std are
    followed everywhere and recorded in checkpoints, and so is the interpolation, which
    `evaluate --protocol rescale` resizes by. Patches and whole images are resized bilinearly, as
    AnchorNet sees them, and keep their own sizes. For anchornet, the classes of the bundled
    weights (`--weights demo`, `--weights photos`) are listed.
    """
    if table3 or only_names:
        if names or (table3 and only_names):
            flag = "--table3" if table3 else "--names"
            raise click.UsageError(f"{flag} cannot be combined with NAME or another list")
        (_print_table_3 if table3 else _print_names)(as_json)
        return
    sides = list(dict.fromkeys((size, *sorted(SCALES, reverse=True))))
    rows = _rows(names, classes, sides)
    bundled = _bundled() if "anchornet" in (row["network"] for row in rows) else {}
    if as_json:
        print_json({"classes": classes, "size": size, "networks": rows, "bundled": bundled})
        return
    print_table(
        [
            "network",
            "parameters",
            *(f"{side} px" if i else f"GMACs at {side} px" for i, side in enumerate(sides)),
        ],
        [
            [
                row["network"],
                f"{row['parameters']:,}",
                *("-" if g is None else f"{g:.4f}" for g in row["gmacs_by_side"].values()),
            ]
            for row in rows
        ],
    )
    for row in rows:
        name, fields = row["network"], row["receptive_fields"]
        if fields is not None and " " not in name:
            plural = "s" if len(fields) > 1 else ""
            click.echo(f"receptive field{plural} of {name}: {', '.join(map(str, fields))} px")
        if names and (made := row["preprocessing"]) is not None:
            mean, std = (", ".join(f"{v:g}" for v in made[key]) for key in ("mean", "std"))
            click.echo(
                f"pretrained input of {name}: mean {mean}; std {std}; {made['interpolation']}, "
                f"{made['size']} px, crop_pct {made['crop_pct']:.3g}"
            )
    for name, known in bundled.items():
        shown = (IMAGENET_NAMES.name(of) or of for of in known)
        click.echo(f"bundled weights of anchornet: {name} ({', '.join(shown)})")
    if not names:
        click.echo(
            "Any classifier of torchvision works by its name (--names lists them), and timm's as "
            "timm:NAME.",
            err=True,
        )


def _rows(names: tuple[str, ...], classes: int, sides: list[int]) -> list[dict[str, Any]]:
    from anchorpatch.models.complexity import summaries
    from anchorpatch.models.registry import NETWORKS, check_name
    from anchorpatch.runtime.progress import reporter
    from anchorpatch.state_dicts import preprocessing_of

    for name in names:
        check_name(name)
    wanted = tuple(dict.fromkeys(names)) or tuple(NETWORKS)
    progress = reporter()
    rows: list[dict[str, Any]] = []
    with progress.counting("counting", len(wanted), unit="networks"):
        for name in wanted:
            made = preprocessing_of(name)
            facts = None if made is None else made._asdict()
            rows += [{**row, "preprocessing": facts} for row in summaries(name, classes, sides)]
            progress.advance(1)
    return rows


def _bundled() -> dict[str, tuple[str, ...]]:
    """Return the classes of the bundled weights by their names."""
    from anchorpatch.demo import BUNDLED, bundled_weights
    from anchorpatch.runtime.checkpoint import read_meta

    return {name: read_meta(bundled_weights(name)).classes for name in BUNDLED}


def _print_names(as_json: bool) -> None:
    from anchorpatch.models.registry import NETWORKS, torchvision_names

    names = list(dict.fromkeys((*NETWORKS, *torchvision_names())))
    if as_json:
        print_json({"names": names})
    else:
        click.echo("\n".join(names))


def _print_table_3(as_json: bool) -> None:
    from anchorpatch.models.complexity import IMAGES, MEAN_PATCHES, table_3_costs

    cells = table_3_costs()
    if as_json:
        print_json(
            {
                "mean_patches": {str(scale): mean for scale, mean in MEAN_PATCHES.items()},
                "images": {str(scale): images for scale, images in IMAGES.items()},
                "cells": [cell._asdict() for cell in cells],
            }
        )
        return
    click.echo("Table 3, FLOPs (G): the network's MACs for one patch times the mean patches")
    print_table(
        ["network", "scale", "GMACs per image", "printed", "deviation"],
        [
            [
                cell.network,
                "overall" if cell.scale == "all" else f"{cell.scale} px",
                f"{cell.gmacs:.3f}",
                f"{cell.printed:.1f}",
                percent(cell.deviation, 1, sign=True),
            ]
            for cell in cells
        ],
    )
    means = ", ".join(f"{mean} of {scale} px" for scale, mean in MEAN_PATCHES.items())
    images = ", ".join(f"{count:,}" for count in IMAGES.values())
    click.echo(
        f"patches per image: {means}; overall weighted by {images} images; "
        "without the GMACs of AnchorNet"
    )
