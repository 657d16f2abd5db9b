"""``anchorpatch figure``: the figures of the paper, a command each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import print_json, print_tables
from anchorpatch.demo import find_weights
from anchorpatch.settings import SCALES
from anchorpatch.text import counted

_F = TypeVar("_F", bound=Callable[..., Any])


@click.group(cls=opt.Group)
def figure() -> None:
    """Draw the figures of the paper from images and weights.

    Each command writes one picture, by default figures/NAME.png, and a .json file next to it,
    which `anchorpatch report` reads, and prints a summary of what the picture shows.

    \b
    anchorpatch figure patches --data imagenet     Figure 3: patches by chosen scale
    anchorpatch figure errors --data imagenet      Figure 4: what misled a branch
    anchorpatch figure attention --data imagenet   Figure 5: attention and class heatmaps
    anchorpatch figure coverage resnet50           Figure 6: accuracy by covered and masked area
    anchorpatch figure tradeoff RESULT             accuracy against cost, of dynamic inference
    """


def _example_options(name: str, limit: int = 300) -> Callable[[_F], _F]:
    """Return a decorator that adds images, weights, output and device of a figure of examples.

    Args:
        name: of the command.
        limit: images that it looks at.
    """
    return opt.grouped(
        opt.data,
        opt.split,
        opt.labels,
        opt.weights,
        opt.runs,
        click.option(
            "--images",
            type=opt.Names(),
            default=(),
            metavar="PATH[,PATH...]",
            help="Show exactly these images, given by their paths relative to the split's folder.",
        ),
        click.option(
            "--classes",
            type=opt.Names(),
            default=(),
            metavar="NAME[,NAME...]",
            help="Show only images of these classes.",
        ),
        opt.class_names,
        opt.seed("the choice of images"),
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            default=limit,
            help="Number of images to choose from, spread over the classes.",
        ),
        click.option(
            "--out",
            type=opt.PATH,
            default=Path("figures", f"{name}.png"),
            help="Picture to write: .png, .jpg, .webp or .pdf. A .json file next to it describes "
            "what it shows.",
        ),
        opt.workers,
        opt.device,
        opt.engine,
        opt.precision,
        opt.as_json,
    )


def _draw(
    number: int,
    *,
    data: Path,
    split: str,
    labels: Path | None,
    files: Path | None,
    only_labelled: bool,
    weights: str | None,
    runs: Path,
    workers: int,
    out: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    """Find what a figure of examples shows, write it, and print JSON, or a table and the caption.

    The figure is configured by the settings; the other options are those of `_example_options`.
    """
    from anchorpatch.figures import EXAMPLES
    from anchorpatch.figures.canvas import picture_kind, save_picture
    from anchorpatch.jobs.crops import CropSource
    from anchorpatch.runtime.checkpoint import load_weights
    from anchorpatch.runtime.progress import reporter

    picture_kind(out)
    configure, find, picture_of = EXAMPLES[number]
    config = configure(**settings)
    loaded = load_weights(find_weights(weights, runs))
    report = reporter()
    source = CropSource.of_folder(
        data,
        split,
        labels=labels,
        workers=workers,
        crop=loaded.meta.cropping,
        files=files,
        only_labelled=only_labelled,
        report=report,
    )
    names = config.class_names.of(source.classes, loaded.meta.classes)
    result = find(source, loaded, replace(config, class_names=names), report)
    for line in result.warnings:
        click.echo(line, err=True)
    facts = result.to_json()
    save_picture(picture_of(result), out, facts)
    if as_json:
        print_json({**facts, "picture": str(out)})
        return
    print_tables([result.table()])
    click.echo(f"{result.caption}\n{out}")


@figure.command(cls=opt.Command)
@click.option(
    "--per-scale", type=click.IntRange(min=1), default=3, help="Number of images per scale."
)
@click.option("--only-right", is_flag=True, help="Show only images that are classified correctly.")
@opt.lsp("figure")
@_example_options("patches")
def patches(preset: str, **options: Any) -> None:
    """Draw images by their chosen scale, with their patches framed and cut out (Figure 3).

    The images are a random choice, by --seed, spread over the classes. Those that AnchorNet
    classifies wrongly are included, with the predicted class; --only-right leaves them out, as
    the paper does. --images shows exactly the images that it names.

    \b
    anchorpatch figure patches --data imagenet --per-scale 6
    anchorpatch figure patches --images n01440764/ILSVRC2012_val_00000293.JPEG
    """
    _draw(3, **options)


@figure.command(cls=opt.Command)
@click.option(
    "--per-scale", type=click.IntRange(min=1), default=3, help="Number of errors per branch."
)
@click.option(
    "--scale",
    "scales",
    type=click.Choice([str(scale) for scale in SCALES]),
    multiple=True,
    default=("63", "111"),
    help="Branch whose errors to show; may be given several times.",
)
@_example_options("errors", limit=500)
def errors(scales: tuple[str, ...], **options: Any) -> None:
    """Draw errors of one branch that another branch gets right (Figure 4).

    Each row shows an image, the patches with the most evidence for the class that the branch
    predicts and for the true class, and the image of the mistaken class that the branch is most
    confident about, with its patches. The most confident errors are shown, spread over the
    classes.

    \b
    anchorpatch figure errors --data imagenet --limit 5000
    anchorpatch figure errors --scale 63 --classes typewriter,corn
    """
    _draw(4, scales=tuple(map(int, scales)), **options)


@figure.command(cls=opt.Command)
@click.option("--count", type=click.IntRange(min=1), default=4, help="Number of images to show.")
@_example_options("attention", limit=100)
def attention(**options: Any) -> None:
    """Draw spatial attention and class heatmaps of the three branches (Figure 5).

    Each row shows an image, its attention maps S as multiples of uniform attention, and the
    heatmaps M of the predicted class. Each location is drawn at the center of the patch that it
    sees. The images are a random choice, by --seed, spread over scales and classes. --images
    shows exactly the images that it names.

    \b
    anchorpatch figure attention --data imagenet --count 6
    anchorpatch figure attention --images n01440764/ILSVRC2012_val_00000293.JPEG
    """
    _draw(5, **options)


@figure.command(cls=opt.Command)
@click.argument("network")
@opt.data
@opt.split
@opt.labels
@opt.runs
@click.option(
    "--weights",
    **opt.file_or("default"),
    help="Weights of NETWORK; default: the pretrained ones.  [default: "
    "RUNS/NETWORK-baseline/best.safetensors where it exists, else the pretrained ones if their "
    "classes match, else RUNS/NETWORK/best.safetensors]",
)
@opt.anchornet_weights
@click.option(
    "--peer",
    "peers",
    type=opt.PATH,
    multiple=True,
    help="Weights of a BagNet or Saccader; may be given several times.  [default: those in "
    "RUNS/bagnet33, RUNS/bagnet77 and RUNS/saccader]",
)
@click.option(
    "--localizers",
    type=opt.Names(),
    default=(),
    metavar="NAME[,NAME...]",
    help="Localizers to compare: some of anchornet, branch63, branch95, branch111, bagnet33, "
    "bagnet77, saccader, gradcam, sobel, center, random.  [default: all]",
)
@click.option(
    "--areas",
    type=opt.NumberList(float, length=None),
    default="0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    help="Shares of the image's area that are kept, or set to 0.",
)
@click.option(
    "--iou-threshold",
    type=click.FloatRange(0, 1),
    default=0.3,
    help="IoU that two patches stay below (T), for anchornet, sobel and random.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=5,
    help="Number of seeds of the random localizer.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=500,
    help="Use N images, drawn at random from the split by --seed.",
)
@opt.seed("the choice of images")
@click.option(
    "--out",
    type=opt.PATH,
    default=Path("figures/coverage.png"),
    help="Picture to write; a .csv and a .json file are written next to it.",
)
@opt.batch_size("32 on CPU, 256 on a GPU")
@opt.workers
@opt.device
@opt.engine
@opt.matching()
@click.option("--amp", is_flag=True, help="Compute NETWORK in bfloat16 (mixed precision).")
@opt.as_json
def coverage(
    data: Path,
    split: str,
    labels: Path | None,
    files: Path | None,
    only_labelled: bool,
    anchornet_weights: str | None,
    peers: tuple[Path, ...],
    localizers: tuple[str, ...],
    limit: int,
    out: Path,
    workers: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare localizers by NETWORK's accuracy on the areas they select (Figure 6).

    Every image is classified with everything but the chosen area set to 0, and with the chosen
    area set to 0. The sizes of the areas are the same for all localizers: AnchorNet, each of its
    branches alone, BagNet-33 and BagNet-77 ordered by logits, Saccader, Grad-CAM of NETWORK,
    Sobel energy, the center and random patches. NETWORK should be trained on whole images.

    Writes the picture, all points of the curves as CSV, and the areas under the curves as JSON,
    and prints these areas with their standard errors over the images.

    \b
    anchorpatch figure coverage resnet50 --data imagenet
    anchorpatch figure coverage resnet18 --localizers anchornet,sobel,center,random
    """
    from anchorpatch.figures.canvas import picture_kind, save_picture
    from anchorpatch.figures.coverage import (
        LOCALIZERS,
        CoverageConfig,
        coverage_figure,
        coverage_table,
        measure_coverage,
    )
    from anchorpatch.jobs.crops import CropSource
    from anchorpatch.runtime.checkpoint import read_meta
    from anchorpatch.runtime.progress import reporter
    from anchorpatch.storage import write_atomically

    picture_kind(out)
    config = CoverageConfig(
        anchornet_weights=find_weights(anchornet_weights, options["runs"], "--anchornet-weights"),
        peers=peers or None,
        localizers=localizers or LOCALIZERS,
        images=limit,
        **options,
    )
    report = reporter()
    source = CropSource.of_folder(
        data,
        split,
        labels=labels,
        workers=workers,
        crop=read_meta(config.anchornet_weights).cropping,
        files=files,
        only_labelled=only_labelled,
        report=report,
    )
    result = measure_coverage(source, config, report)
    facts = result.to_json()
    write_atomically(out.with_suffix(".csv"), lambda file: file.write(result.csv().encode()))
    save_picture(coverage_figure(result), out, facts)
    if as_json:
        print_json({**facts, "picture": str(out)})
        return
    click.echo(
        "Area under the curve of top-1 by area: covered the larger is better, masked the smaller"
    )
    print_tables([coverage_table("Figure 6", result.summary(), result.left_out)])
    lines = [
        f"\n{counted(result.images, 'image')} of {result.source}",
        f"asked: {result.settings['asked']}",
        *filter(None, [result.settings["note"]]),
        *result.winners(),
        f"{out}, {out.with_suffix('.csv')}, {out.with_suffix('.json')}",
    ]
    click.echo("\n".join(lines))


@figure.command(cls=opt.Command)
@click.argument("results", metavar="RESULT...", nargs=-1, required=True, type=opt.PATH)
@click.option(
    "--out",
    type=opt.PATH,
    default=Path("figures/tradeoff.png"),
    help="Picture to write; a .csv and a .json file are written next to it.",
)
@opt.as_json
def tradeoff(results: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Draw accuracy against cost, of results of evaluate --protocol dynamic.

    Each RESULT is a file that `anchorpatch evaluate NETWORK --protocol dynamic --result RESULT`
    wrote, and gets a panel: top-1 against GMACs per image, for whole images of several sizes, fixed
    numbers of patches, and stopping when the network is sure; for patches with AnchorNet's cost and
    without.

    \b
    anchorpatch evaluate resnet50 --protocol dynamic --result runs/resnet50/dynamic.json
    anchorpatch figure tradeoff runs/resnet50/dynamic.json
    """
    from anchorpatch.figures.canvas import picture_kind, save_picture
    from anchorpatch.figures.tradeoff import (
        read_dynamic,
        tradeoff_csv,
        tradeoff_facts,
        tradeoff_figure,
    )
    from anchorpatch.storage import write_atomically

    picture_kind(out)
    found = [read_dynamic(path) for path in results]
    facts = tradeoff_facts(found)
    write_atomically(out.with_suffix(".csv"), lambda file: file.write(tradeoff_csv(found).encode()))
    save_picture(tradeoff_figure(found), out, facts)
    if as_json:
        print_json({**facts, "picture": str(out)})
        return
    click.echo(f"{facts['caption']}\n{out}, {out.with_suffix('.csv')}, {out.with_suffix('.json')}")
