"""``anchorpatch models``."""

from __future__ import annotations

from typing import Any

import click

from anchorpatch.cli.options import Command, json_option
from anchorpatch.cli.output import print_json, print_table
from anchorpatch.settings import CROP, SCALES
from anchorpatch.text import percent


@click.command(cls=Command)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--classes", type=click.IntRange(min=1), default=1000, help="Number of classes.")
@click.option(
    "--size", type=click.IntRange(min=32), default=CROP, help="Side of a whole image in px."
)
@click.option(
    "--table3", is_flag=True, help="Compare computed GMACs with those printed in Table 3."
)
@click.option("--names", "only_names", is_flag=True, help="Print all names and nothing else.")
@json_option
def models(
    names: tuple[str, ...],
    classes: int,
    size: int,
    table3: bool,
    only_names: bool,
    as_json: bool,
) -> None:
    r"""List networks with their parameters and their GMACs for whole images and for patches.

    NAME is anchornet, bagnet33, bagnet77, saccader, hcgnet_b, hcgnet_c, resnext50, the name of
    any classifier of torchvision, or timm:NAME if timm is installed. The default is the networks
    of the paper.

    \b
    anchorpatch models
    anchorpatch models resnet18 timm:mobilenetv4_conv_small
    anchorpatch models --table3

    All numbers are computed from the networks. GMACs count the convolutions and matrix products
    for one image or patch; "-" means that a network does not accept one of that size. AnchorNet
    is listed as it is trained, with the full class maps F, and as `extract` runs it, which
    computes the map of one class only. The counts of the BagNets and Saccader include the maps of
    all classes.
    """
    if table3 or only_names:
        if names or (table3 and only_names):
            flag = "--table3" if table3 else "--names"
            raise click.UsageError(f"{flag} cannot be combined with NAME or another list")
        (_print_table_3 if table3 else _print_names)(as_json)
        return
    rows = _rows(names, classes, size)
    if as_json:
        print_json({"classes": classes, "size": size, "networks": rows})
        return
    sides = _sides(size)
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
                *(_gmacs_text(row["gmacs_by_side"][str(side)]) for side in sides),
            ]
            for row in rows
        ],
    )
    for name, fields in [(row["network"], row["receptive_fields"]) for row in rows]:
        if fields is not None and " " not in name:
            plural = "s" if len(fields) > 1 else ""
            click.echo(f"receptive field{plural} of {name}: {', '.join(map(str, fields))} px")
    if not names:
        click.echo(
            "Any classifier of torchvision works by its name (--names lists them), and timm's as "
            "timm:NAME.",
            err=True,
        )


def _sides(size: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys((size, *sorted(SCALES, reverse=True))))


def _gmacs_text(gmacs: float | None) -> str:
    return "-" if gmacs is None else f"{gmacs:.4f}"


def _rows(names: tuple[str, ...], classes: int, size: int) -> list[dict[str, Any]]:
    from anchorpatch.models.registry import NETWORKS, check_name
    from anchorpatch.runtime.progress import reporter

    for name in names:
        check_name(name)
    wanted = tuple(dict.fromkeys(names)) or tuple(NETWORKS)
    progress = reporter()
    progress.start("counting", len(wanted), unit="networks")
    rows: list[dict[str, Any]] = []
    try:
        for name in wanted:
            if name == "anchornet":
                rows += _anchornet_rows(classes, size)
            else:
                rows.append(_network_row(name, classes, size))
            progress.advance(1)
    finally:
        progress.stop()
    return rows


def _network_row(name: str, classes: int, size: int) -> dict[str, Any]:
    from anchorpatch.models.bagnet import BagNet
    from anchorpatch.models.complexity import macs_at, parameters
    from anchorpatch.models.registry import build_on_meta
    from anchorpatch.models.saccader import Saccader

    net = build_on_meta(name, classes)
    forward = net.logit_map if isinstance(net, BagNet) else None  # what localises
    fields = [net.theta] if isinstance(net, BagNet | Saccader) else None
    return _row(name, parameters(net), macs_at(net, _sides(size), forward), size, fields)


def _anchornet_rows(classes: int, size: int) -> list[dict[str, Any]]:
    """AnchorNet takes whole images only: what it sees of them are the patches."""
    from anchorpatch.models.anchornet import AnchorNet
    from anchorpatch.models.complexity import anchornet_receptive_fields, macs_at, parameters

    net = AnchorNet(classes)  # no meta device: it leaves autocast, which knows none
    heads = sum(parameters(b.get_submodule("attention_classifier")) for b in net.branches)
    fields = list(anchornet_receptive_fields(net))
    return [
        _row(name, count, macs_at(net, [size], forward), size, fields)
        for name, count, forward in (
            ("anchornet", parameters(net), net.full),
            ("anchornet (localising)", parameters(net) - heads, net.localize),
        )
    ]


def _row(
    name: str,
    parameters: int,
    macs: dict[int, int | None],
    size: int,
    fields: list[int] | None = None,
) -> dict[str, Any]:
    found = {side: count / 1e9 for side, count in macs.items() if count is not None}
    return {
        "network": name,
        "parameters": parameters,
        "gmacs": found.get(size),
        "gmacs_by_side": {str(side): found.get(side) for side in _sides(size)},
        "receptive_fields": fields,
    }


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
                "cells": [cell.to_json() for cell in cells],
            }
        )
        return
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
        title="Table 3, FLOPs (G): the network's MACs for one patch times the mean patches",
    )
    means = ", ".join(f"{mean} of {scale} px" for scale, mean in MEAN_PATCHES.items())
    images = ", ".join(f"{count:,}" for count in IMAGES.values())
    click.echo(
        f"patches per image: {means}; overall weighted by {images} images; "
        "without the GMACs of AnchorNet"
    )
