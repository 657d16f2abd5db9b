"""``anchorpatch train``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import print_json, print_records
from anchorpatch.settings import ARCHITECTURES, CROP, CROP_MODES, CROP_SIDES
from anchorpatch.storage import to_json
from anchorpatch.text import counted, tally
from anchorpatch.training.config import (
    CHOICES,
    RECIPES,
    LoopConfig,
    TrainConfig,
    recipe_settings,
)

if TYPE_CHECKING:
    from anchorpatch.jobs.train import TrainSummary


_F = TypeVar("_F", bound=Callable[..., Any])


def training_options(default: Callable[[str], str], unit: str = "images") -> Callable[[_F], _F]:
    """Return a decorator that adds how a network is trained, computed and recorded.

    Those of the loop are None where they are not given, and the job's own defaults hold.

    Args:
        default: returns what the help says of the default of a setting, by its name.
        unit: what is trained on.
    """

    def loop(name: str, text: str) -> Callable[[Any], Any]:
        kind: Any = click.IntRange(min=1) if type(getattr(LoopConfig, name)) is int else float
        if name in CHOICES:
            kind = click.Choice(CHOICES[name])
        option = f"--{name.replace('_', '-')}"
        return click.option(option, type=kind, help=f"{text}  [default: {default(name)}]")

    texts = {
        "epochs": "Number of passes over the training split.",
        "batch_size": f"Number of {unit} per step, over all processes.",
        "accumulate": "Number of smaller batches per step, whose gradients are accumulated.",
        "optimizer": "Optimizer.",
        "lr": "Learning rate at batch size 256; scaled linearly (sgd) or by the square root "
        "(adamw) for other batch sizes.",
        "weight_decay": "Weight decay, applied to all parameters.",
        "schedule": "Learning rate schedule: step (a tenth every 30 epochs) or cosine (to 0).",
        "warmup_epochs": "Epochs of linear warm-up.",
        "label_smoothing": "Label smoothing.",
        "ema_decay": "Decay of the exponential moving average (EMA) of the weights; 0 disables it.",
    }
    return opt.grouped(
        *(loop(name, text) for name, text in texts.items()),
        opt.threads,
        opt.device,
        click.option("--amp", is_flag=True, help="Compute in bfloat16 (mixed precision)."),
        click.option(
            "--channels-last/--no-channels-last",
            default=LoopConfig.channels_last,
            help="Use the channels-last memory format.",
        ),
        click.option("--compile", "compile", is_flag=True, help="Use torch.compile."),
        click.option("--sync-batchnorm", is_flag=True, help="Synchronize BatchNorm across GPUs."),
        click.option(
            "--checkpoint-minutes",
            type=click.FloatRange(min=0),
            default=LoopConfig.checkpoint_minutes,
            help="Minutes between checkpoints within an epoch.",
        ),
        click.option("--tensorboard", is_flag=True, help="Write TensorBoard event files too."),
        click.option(
            "--overwrite",
            is_flag=True,
            help="Replace a run with other settings, or weights without a checkpoint.",
        ),
        opt.as_json,
    )


def crop_options(*defaults: str) -> Callable[[_F], _F]:
    """Return a decorator that adds how images become crops, each None where it is not given.

    Args:
        defaults: of each of the four, as the help says them.
    """
    size, pct, mode, background = defaults
    return opt.grouped(
        click.option(
            "--img-size",
            type=click.IntRange(*CROP_SIDES),
            help=f"Side of the crop that AnchorNet sees, in px.  [default: {size}]",
        ),
        click.option(
            "--crop-pct",
            type=float,
            help="Share of the resized image's side that the crop keeps: images are resized to "
            f"--img-size / --crop-pct px.  [default: {pct}]",
        ),
        click.option(
            "--crop-mode",
            type=click.Choice(CROP_MODES),
            help="center: resize the short side and take the center crop; squash: resize both "
            "sides, as in the paper; border: resize the long side and pad with --background.  "
            f"[default: {mode}]",
        ),
        click.option(
            "--background",
            metavar="COLOR",
            help="Color behind transparent pixels and of borders: a name, or #rrggbb.  "
            f"[default: {background}]",
        ),
    )


@click.command(cls=opt.Command)
@click.option(
    "--arch",
    type=click.Choice(list(ARCHITECTURES)),
    default=TrainConfig.arch,
    help="Network to train: AnchorNet, or a peer to compare it with.",
)
@opt.data
@opt.labels
@opt.runs
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=TrainConfig.recipe,
    help="Set of defaults for the other options: paper (section 4.1) or small (for a few thousand "
    "images); explicit options override it.",
)
@click.option(
    "--crop-size",
    type=click.IntRange(min=33),
    help="Side of the training crops in px; at least 111 for anchornet, 33 and 77 for the BagNets, "
    "77 for saccader. Validation uses --img-size.  [default: by --recipe and --img-size]",
)
@click.option(
    "--min-area",
    type=opt.Share(),
    help="Smallest share of an image's area that a training crop covers.  [default: by --recipe]",
)
@crop_options(str(CROP), "0.875 for center, else 1", TrainConfig.crop_mode, "white")
@opt.allow_empty
@click.option("--se/--no-se", default=TrainConfig.se, help="anchornet: use squeeze-and-excitation.")
@click.option(
    "--weighted-mean/--no-weighted-mean",
    default=TrainConfig.weighted_mean,
    help="anchornet: multiply the attention S by H*W; the paper's formula does not.",
)
@click.option(
    "--attention-loss/--no-attention-loss",
    default=TrainConfig.attention_loss,
    help="anchornet: train the attention branches with losses of their own.",
)
@click.option(
    "--init",
    type=opt.PATH,
    help="Initial weights. For saccader: weights of a bagnet77, which replace the first stage "
    "if its classes are the same.",
)
@click.option(
    "--teacher",
    metavar="NETWORK",
    help="anchornet: a classifier whose softened distribution on the same crop the six outputs "
    "learn as well as the labels (knowledge distillation).",
)
@click.option(
    "--teacher-weights",
    default=TrainConfig.teacher_weights,
    metavar="default|FILE",
    help="Weights of the teacher: the pretrained ones of torchvision or timm, or a file.",
)
@click.option(
    "--distill-weight",
    type=opt.Share(),
    default=TrainConfig.distill_weight,
    help="Weight of the teacher's part of the loss; the labels have the rest.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=TrainConfig.temperature,
    help="Temperature of the distributions of the teacher and the outputs.",
)
@opt.matching(all_classes=False, of="the teacher")
@click.option(
    "--image-cache",
    type=opt.PATH,
    help="Folder for decoded images, so that each file is decoded only once.",
)
@opt.seed("weights, order and crops")
@opt.max_bad
@opt.workers
@training_options(lambda _: "by --recipe")
def train(
    arch: str,
    runs: Path,
    recipe: str,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train AnchorNet, or a peer to compare it with, on DATA/train and validate on DATA/val.

    DATA/train may also be DATA/train.tar or .zip, or a folder of WebDataset shards, and so may
    DATA/val. --files lists the training images, --labels those of a flat DATA/val.

    Writes best.safetensors (which `extract` uses), last.safetensors, log.jsonl, config.json and
    last.pt to RUNS/ARCH. Run the same command again to resume a stopped run, or with more
    --epochs to extend a finished one.

    Validation images are resized and cropped as --img-size, --crop-pct and --crop-mode say. The
    weights record it, and every command that uses them, or shards made with them, does the same.

    Saccader is trained in three stages of --epochs each, in subfolders of RUNS/saccader: 1-bagnet
    (the BagNet-77 that it builds on), 2-location (to look where the true class has its highest
    logits) and 3-reinforce (sampled locations, at a tenth of the learning rate). RUNS/saccader
    gets the best.safetensors of the last stage.

    \b
    anchorpatch train --data imagenet --amp --compile
    anchorpatch train --data photos --recipe small --image-cache cache
    anchorpatch train --arch bagnet77 --data photos --recipe small --amp
    anchorpatch train --arch saccader --data photos --recipe small --amp \\
        --init runs/bagnet77/best.safetensors
    torchrun --nproc-per-node 8 -m anchorpatch train --data imagenet --sync-batchnorm
    """
    from anchorpatch.jobs.train import run
    from anchorpatch.runtime.device import use_threads
    from anchorpatch.runtime.distributed import is_main
    from anchorpatch.runtime.progress import reporter

    use_threads(threads)
    given = {name: value for name, value in options.items() if value is not None}
    defaults = recipe_settings(recipe, arch, given.get("img_size", CROP))
    config = TrainConfig(folder=runs / arch, arch=arch, recipe=recipe, **{**defaults, **given})
    summary = run(config, reporter())
    if is_main():
        print_summary(summary, as_json)


def print_summary(summary: TrainSummary, as_json: bool) -> None:
    """Print the result of a run."""
    if as_json:
        print_json(to_json(summary))
        return
    print_records({**summary.earlier, "best": summary.best, "last": summary.last})
    train_images, val_images = summary.images
    stages = " per stage" if summary.earlier else ""
    lines = [
        f"{counted(summary.epochs, 'epoch')}{stages} on {counted(train_images, 'image')} of "
        f"{counted(summary.classes, 'class')}, measured on {val_images:,}: "
        f"{summary.weights}"
    ]
    if summary.bad:
        lines.append(f"skipped: {tally(summary.bad)}")
    if summary.damaged:
        lines.append(f"decoded with damage: {summary.damaged:,}")
    click.echo("\n".join(lines))
