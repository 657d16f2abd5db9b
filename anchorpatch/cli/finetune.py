"""``anchorpatch finetune``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import print_json, print_records, print_table
from anchorpatch.cli.train import training_options
from anchorpatch.settings import SCALES
from anchorpatch.storage import to_json
from anchorpatch.text import counted
from anchorpatch.training.config import SCRATCH, FinetuneConfig

if TYPE_CHECKING:
    from anchorpatch.jobs.finetune import FinetuneSummary


def _default(name: str) -> str:
    note = f"; {SCRATCH[name]} with --weights none" if name in SCRATCH else ""
    return f"{getattr(FinetuneConfig, name)}{note}"


@click.command(cls=opt.Command)
@click.argument("network")
@opt.shards
@opt.runs
@click.option(
    "--weights",
    default=FinetuneConfig.weights,
    metavar="default|none|FILE",
    help="Initial weights: the pretrained ones of torchvision or timm, random ones, or a file.",
)
@opt.matching(all_classes=False)
@click.option(
    "--scale",
    type=click.Choice([str(scale) for scale in SCALES]),
    help="Train and validate on the patches of one scale only.  [default: one network for all]",
)
@click.option(
    "--patches-per-image",
    type=click.IntRange(min=1),
    help="Number of random patches per image and epoch.  [default: all]",
)
@click.option(
    "--holdout",
    type=opt.Share(),
    default=FinetuneConfig.holdout,
    help="Share of the training images to keep out of training, for `anchorpatch evaluate "
    "--protocol dynamic --budget` to calibrate on.",
)
@click.option(
    "--baseline",
    is_flag=True,
    help="Train on whole images instead, with the MACs of the run on patches in RUNS/NETWORK "
    "(estimated if there is none), or for --epochs if given.",
)
@opt.data
@click.option(
    "--flip/--no-flip", default=FinetuneConfig.flip, help="Random horizontal flip (p = 0.5)."
)
@click.option(
    "--jitter",
    type=float,
    default=FinetuneConfig.jitter,
    help="Strength of the color jitter: brightness, contrast and saturation vary by up to this "
    "fraction.",
)
@click.option(
    "--min-area",
    type=opt.Share(),
    default=FinetuneConfig.min_area,
    help="--baseline: minimum share of an image's area that a training crop covers.",
)
@click.option(
    "--freeze-bn",
    is_flag=True,
    help="Keep the running statistics of BatchNorm layers, which those of a few classes or images "
    "replace otherwise.",
)
@opt.seed("new weights, order and augmentation")
@opt.workers
@click.option(
    "--dry-run", is_flag=True, help="Show what would be trained and its cost in MACs, then exit."
)
@training_options(_default, "patches")
def finetune(
    network: str,
    runs: Path,
    scale: str | None,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune NETWORK on the patches in SHARDS/train and validate on SHARDS/val.

    NETWORK is resnet50, resnext50, densenet169, hcgnet_b, hcgnet_c, any classifier of
    torchvision, timm:NAME, or MODULE:FUNCTION for a network of your own (see `anchorpatch models
    --help`). An image is classified by the sum of the softmax outputs of its patches. Pretrained
    weights keep the rows of their last layer that belong to the classes of the shards; other
    classes get new ones.

    Writes best.safetensors, last.safetensors, log.jsonl, config.json and last.pt to RUNS/NETWORK
    (RUNS/NETWORK-63 with --scale 63, RUNS/NETWORK-baseline with --baseline). Run the same command
    again to resume a stopped run, or with more --epochs to extend a finished one.

    \b
    anchorpatch finetune resnet50 --amp
    anchorpatch finetune resnet50 --baseline --data imagenet --amp
    torchrun --nproc-per-node 8 -m anchorpatch finetune densenet169 --amp --sync-batchnorm
    """
    from anchorpatch.jobs.finetune import forecast, run
    from anchorpatch.networks import run_folder
    from anchorpatch.runtime.device import use_files, use_threads
    from anchorpatch.runtime.distributed import is_main
    from anchorpatch.runtime.progress import reporter

    use_threads(threads)
    use_files()
    given = {name: value for name, value in options.items() if value is not None}
    side, baseline = None if scale is None else int(scale), given["baseline"]
    config = FinetuneConfig(
        network=network,
        folder=run_folder(runs, network, scale=side, baseline=baseline),
        like=run_folder(runs, network) if baseline and "epochs" not in given else None,
        scale=side,
        **{**(SCRATCH if given["weights"] == "none" else {}), **given},
    )
    if dry_run:
        print_forecast(forecast(config), as_json)
        return
    summary = run(config, reporter())
    if is_main():
        print_summary(summary, as_json)


def print_forecast(plan: Mapping[str, Any], as_json: bool) -> None:
    """Print what a run would do."""
    if as_json:
        print_json(plan)
        return
    cost, unit = plan["cost"], plan["unit"]
    rows = [
        [f"{side} px", f"{n:,}", f"{cost['macs_by_side'][side] / 1e9:.3f}"]
        for side, n in cost["rows_an_epoch"].items()
    ]
    rows.append(["all", f"{sum(cost['rows_an_epoch'].values()):,}", ""])
    one = "patch" if unit == "patches" else "image"
    print_table(["size", f"{unit} per epoch", f"GMACs per {one}"], rows)
    train, val = plan["images"]
    known = {"default": "pretrained weights", "none": "random weights"}
    click.echo(
        f"{plan['network']} from {known.get(plan['weights'], plan['weights'])}, on "
        f"{plan['source']}: "
        f"{train:,} training and {val:,} validation images of "
        f"{counted(plan['classes'], 'class')}"
    )
    click.echo(
        f"{counted(cost['epochs'], 'epoch')} of {counted(cost['steps_an_epoch'], 'step')} of "
        f"{plan['batch_size']} {unit}: {cost['macs'] / 1e9:,.1f} GMACs for the forward passes, "
        f"about three times as many in total"
    )
    if "budget" in cost:
        click.echo(
            f"budget: {cost['budget']['macs'] / 1e9:,.1f} GMACs, as many as {cost['budget']['of']}"
        )
    click.echo(f"would write {plan['folder']}")


def print_summary(summary: FinetuneSummary, as_json: bool) -> None:
    """Print the result of a run."""
    if as_json:
        print_json(to_json(summary))
        return
    print_records({"best": summary.best, "last": summary.last})
    by_scale = summary.best["val"].get("by_scale")
    if by_scale:
        click.echo()
        print_table(
            ["best, by scale", "images", "patches per image", "top-1", "top-5"],
            [
                [
                    f"{scale} px",
                    f"{found['images']:,}",
                    f"{found['patches'] / found['images']:.2f}",
                    f"{found['top1']:.2%}",
                    f"{found['top5']:.2%}",
                ]
                for scale, found in by_scale.items()
                if found["images"]
            ],
        )
    train, val = summary.images
    cost = summary.cost
    click.echo(
        f"{summary.network}: {counted(summary.epochs, 'epoch')} on {summary.source} "
        f"({cost['macs'] / 1e9:,.1f} GMACs forward), {counted(train, 'image')} of "
        f"{counted(summary.classes, 'class')}, measured on {val:,}: {summary.weights}"
    )
