"""``anchorpatch figure coverage``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anchorpatch.cli.config import Command
from anchorpatch.cli.extract import find_weights
from anchorpatch.cli.figure_options import Names
from anchorpatch.cli.options import (
    PATH,
    NumberList,
    anchornet_weights_option,
    data_option,
    device_option,
    json_option,
    labels_option,
    runs_option,
    workers_option,
)
from anchorpatch.cli.output import print_json, print_table
from anchorpatch.text import counted

__all__ = ["coverage"]


@click.command(cls=Command)
@click.argument("network")
@data_option
@click.option("--split", default="val", help="Name of the folder below --data.")
@labels_option
@runs_option
@click.option(
    "--weights",
    metavar="FILE|default",
    help="Weights of NETWORK; default: the published ones.  [default: "
    "RUNS/NETWORK-baseline/best.safetensors where it exists, else the published ones where they "
    "fit, else RUNS/NETWORK/best.safetensors]",
)
@anchornet_weights_option
@click.option(
    "--peer",
    "peers",
    type=PATH,
    multiple=True,
    help="Weights of a BagNet or Saccader, several times.  [default: those in RUNS/bagnet33, "
    "RUNS/bagnet77 and RUNS/saccader]",
)
@click.option(
    "--localizers",
    type=Names(),
    default=(),
    metavar="NAME[,NAME...]",
    help="Some of anchornet, branch63, branch95, branch111, bagnet33, bagnet77, saccader, "
    "gradcam, sobel, centre, random.  [default: all]",
)
@click.option(
    "--areas",
    type=NumberList(float, length=None),
    default="0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    help="Shares of the image that are kept, or set to 0.",
)
@click.option(
    "--iou-threshold",
    type=click.FloatRange(0, 1),
    default=0.3,
    help="T of Algorithm 1, for AnchorNet, edges and random patches.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=5, help="Random localizers.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=500,
    help="Take N images, drawn at random from the split by --seed.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the choice of images.")
@click.option(
    "--out",
    type=PATH,
    default=Path("figures/coverage.png"),
    help="The picture; .csv and .json lie beside it.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images in a batch.  [default: 32 on CPU, 256 on a GPU]",
)
@workers_option
@device_option
@click.option("--amp", is_flag=True, help="Let NETWORK compute in bfloat16.")
@json_option
def coverage(
    data: Path,
    split: str,
    labels: Path | None,
    anchornet_weights: str | None,
    peers: tuple[Path, ...],
    localizers: tuple[str, ...],
    limit: int,
    out: Path,
    workers: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Compare localizers by what NETWORK makes of the areas they choose (Figure 6).

    Every image is classified with all but the chosen area set to 0, and with the chosen area
    set to 0, for areas that are the same for all localizers: AnchorNet, each of its branches
    alone, BagNet-33 and BagNet-77 ordered by logits, Saccader, Grad-CAM of NETWORK, Sobel
    energy, the centre and random patches. NETWORK is one for whole images.

    Writes the picture, every point of every curve as CSV, and the areas under the curves as
    JSON, and prints the latter with standard errors over the images.

    \b
    anchorpatch figure coverage resnet50 --data imagenet
    anchorpatch figure coverage resnet18 --localizers anchornet,sobel,centre,random
    """
    from anchorpatch.figures import coverage_figure
    from anchorpatch.figures.coverage import CoverageConfig, measure_coverage
    from anchorpatch.figures.coverage_curves import LABELS, LOCALIZERS, write_points
    from anchorpatch.figures.files import picture_kind, save_figure
    from anchorpatch.jobs.crops import ImageSource
    from anchorpatch.runtime.checkpoint import read_meta
    from anchorpatch.runtime.device import cpu_count
    from anchorpatch.runtime.progress import reporter

    picture_kind(out)
    config = CoverageConfig(
        anchornet_weights=find_weights(anchornet_weights, options["runs"], "--anchornet-weights"),
        peers=peers or None,
        localizers=localizers or LOCALIZERS,
        images=limit,
        **options,
    )
    source = ImageSource.of_folder(
        data,
        split,
        labels=labels,
        workers=cpu_count() if workers is None else workers,
        crop=read_meta(config.anchornet_weights).cropping,
    )
    result = measure_coverage(source, config, reporter())
    facts = result.to_json()
    write_points(result, out.with_suffix(".csv"))
    save_figure(coverage_figure(result), out, facts, dpi=150)
    if as_json:
        print_json({**facts, "picture": str(out)})
        return
    print_table(
        ["localizer", "covered", "±", "gain", "masked", "±", "gain"],
        [
            [LABELS[curve.localizer], *curve.covered.texts, *curve.masked.texts]
            for curve in result.curves
        ],
        title="Area under the curve of top-1 by area: covered the larger is better, masked the "
        "smaller",
    )
    lines = [
        f"\n{counted(result.images, 'image')} of {result.source}; ±: standard error over the "
        "images, in brackets standard deviation over the seeds; gain: better than AnchorNet by so "
        "much",
        f"asked: {result.settings['asked']}",
        *result.winners(),
        *(f"left out: {text}" for text in result.left_out),
        f"{out}, {out.with_suffix('.csv')}, {out.with_suffix('.json')}",
    ]
    click.echo("\n".join(lines))
