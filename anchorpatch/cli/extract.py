"""``anchorpatch extract``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.cli.config import Command
from anchorpatch.cli.options import (
    PATH,
    Share,
    SharedOption,
    allow_empty_option,
    background_option,
    data_option,
    device_option,
    json_option,
    labels_option,
    limit_option,
    lsp_options,
    runs_option,
    threads_option,
    weights_option,
    workers_option,
)
from anchorpatch.cli.output import bytes_text, print_json, print_table
from anchorpatch.errors import WeightsError
from anchorpatch.settings import DAMAGED
from anchorpatch.text import counted

if TYPE_CHECKING:
    from anchorpatch.jobs.extract import Forecast
    from anchorpatch.jobs.extract_summary import ExtractSummary
    from anchorpatch.settings import LspSettings


@click.command(cls=Command)
@data_option
@click.option("--split", default="val", help="Name of the folder below --data.")
@labels_option
@weights_option
@runs_option
@click.option(
    "--out",
    cls=SharedOption,
    shared="shards",
    type=PATH,
    default=Path("shards"),
    help="Folder for the shards, OUT/SPLIT/SPLIT-00000.h5, ...; also $ANCHORPATCH_SHARDS.",
)
@lsp_options(None, "finetune for the split train, evaluate for others")
@click.option(
    "--codec",
    type=click.Choice(["raw", "jpeg", "image"]),
    default="raw",
    help="Patches as raw pixels, as JPEG, or images once and patches cut when read.",
)
@click.option("--jpeg-quality", type=click.IntRange(1, 100), default=95, help="For --codec jpeg.")
@click.option("--store-images", is_flag=True, help="Store the 224 px crop of each image too.")
@click.option("--shard-size", type=click.IntRange(min=1), default=1024, help="Images in a shard.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images in a batch; on a GPU all shards of a split need the same.  "
    "[default: 64 on CPU, 256 on a GPU]",
)
@workers_option
@threads_option
@device_option
@click.option("--amp", is_flag=True, help="Compute in bfloat16; needs a GPU.")
@click.option("--compile", "compile_", is_flag=True, help="Use torch.compile.")
@limit_option
@background_option("that of the weights")
@click.option(
    "--damaged",
    type=click.Choice(DAMAGED),
    default="keep",
    help="JPEGs with missing or corrupt data that can be decoded all the same: keep and count "
    "them, or skip them.",
)
@allow_empty_option
@click.option("--max-bad", type=Share(), default=0.01, help="Fail beyond this share of bad images.")
@click.option(
    "--task",
    metavar="I/N",
    help="Write every N-th shard, starting with number I, and no others.  [default: all, shared "
    "with the other jobs of a SLURM array]",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace shards made from other inputs. If only the list of images has changed, shards "
    "whose part of it is the same are kept.",
)
@click.option(
    "--repair", is_flag=True, help="Verify existing shards first and rewrite the damaged ones."
)
@click.option(
    "--retry-skipped",
    is_flag=True,
    help="Read images again that were skipped or damaged, and rewrite the shards of those that are "
    "whole now.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done and foretell the bytes.")
@json_option
def extract(
    data: Path,
    weights: str | None,
    runs: Path,
    preset: str | None,
    max_patches: tuple[int, int, int] | None,
    iou_threshold: float | None,
    coverage: tuple[float, float, float] | None,
    compile_: bool,
    task: str | None,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Write the semantic patches of a folder of images into HDF5 shards.

    Images are DATA/SPLIT/CLASS/*.JPEG (also PNG, WebP, BMP, GIF, TIFF, AVIF), or lie flat in
    DATA/SPLIT with --labels. How they become crops of 224 px is taken from the weights. A run
    that was interrupted goes on when it is started again; the shards come out the same, whatever
    the number of workers, processes or interruptions.

    \b
    anchorpatch extract --split val --data imagenet --weights demo --out shards
    torchrun --nproc-per-node 8 -m anchorpatch extract --split train --amp
    sbatch --array=0-7 --wrap 'anchorpatch extract --split train'
    anchorpatch extract --split train --task 0/8
    """
    from anchorpatch.jobs.extract import ExtractConfig, default_preset, forecast, run
    from anchorpatch.jobs.extract_summary import wait_for_ranks
    from anchorpatch.runtime.device import use_threads
    from anchorpatch.runtime.distributed import rank_and_size, resolve_task
    from anchorpatch.runtime.progress import Reporter, reporter

    use_threads(threads)
    part = resolve_task(task)
    lsp = overridden(
        preset or default_preset(options["split"]), max_patches, iou_threshold, coverage
    )
    config = ExtractConfig(
        data=data,
        weights=find_weights(weights, runs),
        preset=preset,
        lsp=lsp,
        compile=compile_,
        task=part,
        **options,
    )
    if dry_run:
        _print_forecast(forecast(config), as_json)
        return
    rank, ranks = rank_and_size()
    if part.total > 1:
        click.echo(f"extract: part {part.index} of {part.total} ({part.source})", err=True)
    elif part.job is not None:
        click.echo(f"extract: sharing the work with other jobs ({part.source})", err=True)
    summary = run(config, reporter() if rank == 0 else Reporter())
    if rank == 0:
        # Shards may be those of other jobs, which this one need not wait for.
        if ranks > 1 and part.job is None:
            summary = wait_for_ranks(summary, part, ranks)
        print_summary(summary, as_json)


def find_weights(weights: str | None, runs: Path, option: str = "--weights") -> Path:
    """Return the file of AnchorNet's weights that an option means.

    Args:
        weights: a file, "demo", or None where the option is not given.
        runs: folder of training runs.
        option: its name.

    Raises:
        WeightsError: the option is not given and there is no trained network.
    """
    if weights == "demo":
        from anchorpatch.demo import demo_weights

        return demo_weights()
    if weights is not None:
        return Path(weights)
    trained = runs / "anchornet" / "best.safetensors"
    if not trained.is_file():
        raise WeightsError(
            f"{trained} does not exist: train a network with `anchorpatch train`, name a file "
            f"with {option}, or take the bundled ones of the sample set with {option} demo"
        )
    return trained


def overridden(
    preset: str,
    max_patches: tuple[int, int, int] | None,
    iou_threshold: float | None,
    coverage: tuple[float, float, float] | None,
) -> LspSettings:
    """Return the settings of a preset with those in place of its own that are given."""
    from anchorpatch.settings import PRESETS

    given = {"max_patches": max_patches, "iou_threshold": iou_threshold, "coverage": coverage}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(PRESETS[preset], **changes)


def print_summary(summary: ExtractSummary, as_json: bool) -> None:
    """Print the closing summary of an extraction."""
    from anchorpatch.jobs.extract_summary import mean_patches

    if as_json:
        print_json(summary.to_json())
        return
    images = summary.images
    print_table(
        ["scale", "images", "share", "patches", "mean patches"],
        [
            [
                f"{scale} px",
                f"{summary.images_by_scale[scale]:,}",
                f"{summary.images_by_scale[scale] / images:.1%}" if images else "-",
                f"{summary.patches_by_scale[scale]:,}",
                f"{mean_patches(summary, scale):.2f}",
            ]
            for scale in summary.images_by_scale
        ],
    )
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.skipped.items())
    lines = [
        f"{counted(images, 'image')} in {counted(summary.shards, 'shard')}, "
        f"{bytes_text(summary.bytes)}: {summary.folder}",
        f"skipped: {sum(summary.skipped.values()):,}" + (f" ({reasons})" if reasons else ""),
    ]
    if summary.damaged:
        lines.append(f"decoded with damage: {summary.damaged:,}")
    if summary.top1 is not None:
        lines.append(f"top-1 of AnchorNet: {summary.top1:.2%}")
    if summary.images_run:
        speed = f"{summary.images_per_second:,.1f} images/s"
        lines.append(f"{counted(summary.images_run, 'image')} in {summary.seconds:,.1f} s: {speed}")
    else:
        lines.append("nothing was left to do")
    if summary.pending:
        lines.append(
            f"{summary.pending} of {summary.split_shards} shards of the split are pending: other "
            "jobs or tasks write them, or the same command without --task"
        )
    click.echo("\n".join(lines))


def _print_forecast(forecast: Forecast, as_json: bool) -> None:
    if as_json:
        fields = {**vars(forecast), "folder": str(forecast.folder)}
        print_json({**fields, "settings": forecast.settings.to_json()})
        return
    settings = forecast.settings
    per_scale = "/".join(str(k) for k in settings.max_patches)
    click.echo(
        f"would write {forecast.pending:,} of {counted(forecast.shards, 'shard')} to "
        f"{forecast.folder}: "
        f"{counted(forecast.images, 'image')} of {counted(forecast.classes, 'class', 'classes')}\n"
        f"settings: preset {settings.preset or 'none'}, K {per_scale}, T {settings.iou_threshold}, "
        f"P {'/'.join(str(p) for p in settings.coverage)}, codec {settings.codec}\n"
        f"about {bytes_text(forecast.bytes)} in all, {bytes_text(forecast.bytes_per_image)} an "
        f"image (from {counted(forecast.sample, 'image')})"
    )
