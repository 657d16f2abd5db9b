"""``anchorpatch extract``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import bytes_text, print_json, print_tables
from anchorpatch.cli.train import crop_options
from anchorpatch.demo import find_weights
from anchorpatch.settings import CODECS, DAMAGED, DECODERS
from anchorpatch.text import counted, tally

if TYPE_CHECKING:
    from anchorpatch.jobs.extract import ExtractSummary
    from anchorpatch.settings import LspSettings


@click.command(cls=opt.Command)
@opt.data
@opt.split
@opt.labels
@opt.weights
@opt.runs
@opt.folder("--out", "shards", "Folder for the shards, OUT/SPLIT/SPLIT-00000.h5, ...")
@opt.lsp(shown="finetune for the split train, evaluate for others")
@opt.patches("Find --coverage")
@click.option(
    "--codec",
    type=click.Choice(CODECS),
    default="raw",
    help="How to store patches: as raw pixels, as JPEG, or (image) as the crop from which "
    "they are cut when read.",
)
@click.option(
    "--jpeg-quality", type=click.IntRange(1, 100), default=95, help="JPEG quality of --codec jpeg."
)
@click.option("--store-images", is_flag=True, help="Store the crop of each image as well.")
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=1024, help="Number of images per shard."
)
@opt.batch_size(
    "64 on CPU, 256 on a GPU", "images", "; on a GPU, it must be the same for all shards of a split"
)
@opt.workers
@opt.threads
@opt.device
@opt.engine
@opt.precision
@click.option(
    "--decoder",
    type=click.Choice(DECODERS),
    default="libjpeg",
    help="What decodes JPEGs: libjpeg in the workers, or nvjpeg on a GPU, where most CPU time goes "
    "into decoding; its pixels differ slightly, and corrupt data goes unnoticed.",
)
@click.option("--compile", "compile", is_flag=True, help="Use torch.compile.")
@opt.limit
@crop_options(*["that of the weights"] * 4)
@click.option(
    "--damaged",
    type=click.Choice(DAMAGED),
    default="keep",
    help="What to do with JPEGs that can be decoded although data is missing or corrupt: keep and "
    "count them, or skip them.",
)
@opt.allow_empty
@opt.max_bad
@click.option(
    "--task",
    metavar="I/N",
    help="Write only every N-th shard, starting with number I.  [default: all; the jobs of a "
    "SLURM array share them]",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="",
    metavar="[ADDRESS]",
    help="Have actors on a Ray cluster write the shards: that of the head node at HOST:PORT, auto "
    "for the one that this machine is part of, or without ADDRESS $RAY_ADDRESS, else this machine.",
)
@click.option(
    "--ray-cpus",
    type=click.IntRange(min=1),
    help="Number of CPU cores per Ray actor; its --workers and --threads follow.  [default: those "
    "of the smallest node, or of one of its GPUs]",
)
@click.option(
    "--collect",
    is_flag=True,
    help="Send shards through Ray to this machine, if nodes do not share the output folder.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace shards made from other inputs. If only the list of images has changed, "
    "unaffected shards are kept.",
)
@click.option(
    "--repair", is_flag=True, help="Verify existing shards first and rewrite the damaged ones."
)
@click.option(
    "--retry-skipped",
    is_flag=True,
    help="Try skipped and damaged images again, and rewrite the shards of those that are intact "
    "now.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what would be written and the estimated size, then exit.",
)
@opt.as_json
def extract(
    weights: str | None,
    runs: Path,
    task: str | None,
    threads: int | None,
    ray: str | None,
    ray_cpus: int | None,
    collect: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the semantic patches of a split of images to HDF5 shards.

    The images are DATA/SPLIT/CLASS/*.JPEG (also PNG, WebP, BMP, GIF, TIFF, AVIF), with --labels
    DATA/SPLIT/*.JPEG, or the same in DATA/SPLIT.tar or .zip, which are not unpacked. The weights
    record how images are resized and cropped; --img-size, --crop-pct and --crop-mode override
    that, with a warning. Run an interrupted command again to resume it. The shards do not depend on
    the number of workers, processes or interruptions, nor on where the images lie.

    \b
    anchorpatch extract --split val --data imagenet --weights demo --out shards
    torchrun --nproc-per-node 8 -m anchorpatch extract --split train --precision bfloat16
    sbatch --array=0-7 --wrap 'anchorpatch extract --split train'
    anchorpatch extract --split train --task 0/8
    anchorpatch extract --split train --ray 10.0.0.1:6379
    anchorpatch extract --split train --data 'imagenet-train-{0000..1023}.tar'
    find photos -name '*.jpg' | anchorpatch extract --split mine --files -
    """
    from anchorpatch.jobs.extract import forecast, run
    from anchorpatch.jobs.extract_plan import ExtractConfig
    from anchorpatch.runtime.device import use_threads
    from anchorpatch.runtime.distributed import rank_and_size, resolve_task
    from anchorpatch.runtime.progress import Reporter, reporter

    use_threads(threads)
    part = resolve_task(task)
    rank, ranks = rank_and_size()
    if ray is None and (ray_cpus is not None or collect):
        raise click.UsageError("--ray-cpus and --collect need --ray.")
    if ray is not None:
        if ranks > 1:
            raise click.UsageError("--ray starts its own processes: run it without torchrun.")
        options["data"] = options["data"].absolute()  # actors work in other folders
    config = ExtractConfig(
        weights=find_weights(weights, runs),
        task=part,
        ranks=ranks if rank == 0 else 1,
        **options,
    )
    if dry_run:
        _print_forecast(forecast(config, reporter()), config.lsp, as_json)
        return
    if part.total > 1:
        click.echo(f"extract: part {part.index} of {part.total} ({part.source})", err=True)
    elif part.job is not None:
        click.echo(f"extract: sharing the work with other jobs ({part.source})", err=True)
    if ray is None:
        summary = run(config, reporter() if rank == 0 else Reporter())
    else:
        from anchorpatch.jobs.extract_ray import RaySettings, connected

        source = click.get_current_context().get_parameter_source("workers")
        workers = None if source is ParameterSource.DEFAULT else config.workers
        settings = RaySettings(ray or None, ray_cpus, collect, workers, threads)
        with connected(settings, config.device) as cluster:
            summary = run(config, reporter(), cluster)
    if rank == 0:
        print_summary(summary, as_json)


def print_summary(summary: ExtractSummary, as_json: bool) -> None:
    """Print the closing summary of an extraction."""
    if as_json:
        print_json(summary.to_json())
        return
    facts = summary.facts
    print_tables([facts.table()])
    lines = [
        f"{counted(facts.images, 'image')} in {counted(facts.shards, 'shard')}, "
        f"{bytes_text(facts.bytes)}: {facts.folder}",
        f"skipped: {tally(facts.skipped)}",
    ]
    if summary.damaged:
        lines.append(f"decoded with damage: {summary.damaged:,}")
    if facts.top1 is not None:
        lines.append(f"top-1 of AnchorNet: {facts.top1:.2%}")
    if summary.images_run:
        speed = f"{summary.images_per_second:,.1f} images/s"
        lines.append(f"{counted(summary.images_run, 'image')} in {summary.seconds:,.1f} s: {speed}")
    else:
        lines.append("nothing to do")
    if summary.pending:
        lines.append(
            f"{summary.pending} of {facts.total_shards} shards of the split are pending: other "
            "jobs or tasks will write them, or run the same command without --task"
        )
    if summary.advice:
        waits = ", ".join(f"{stage} {share:.1%}" for stage, share in summary.waits.items())
        lines += [f"time spent waiting for {waits}", summary.advice]
    click.echo("\n".join(lines))


def _print_forecast(found: Mapping[str, Any], lsp: LspSettings | None, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    settings = found["settings"]
    click.echo(
        f"would write {found['pending']:,} of {counted(found['shards'], 'shard')} to "
        f"{found['folder']}: {counted(found['images'], 'image')} of "
        f"{counted(found['classes'], 'class')}\n"
        f"settings: preset {settings['preset'] or 'none'}, {lsp}, codec {settings['codec']}\n"
        f"about {bytes_text(found['bytes'])} in all, {bytes_text(found['bytes_per_image'])} per "
        f"image (estimated from {counted(found['sample'], 'image')})"
    )
