"""``anchorpatch tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import print_json, print_tables
from anchorpatch.demo import find_weights


@click.command(cls=opt.Command)
@opt.data
@click.option("--split", default="train", help="Name of the split's folder or archive.")
@opt.labels
@opt.weights
@opt.runs
@opt.patches("Find --coverage")
@click.option(
    "--budget",
    metavar="GMACS",
    type=click.FloatRange(min=0, min_open=True),
    help="Find --max-patches, --iou-threshold and --coverage of the best top-1 of --network that "
    "cost at most so many GMACs per image, AnchorNet's included.",
)
@click.option(
    "--network",
    metavar="NAME|FILE",
    help="--budget: classifier, a name from `anchorpatch models` or a weights file of finetune.",
)
@click.option(
    "--network-weights",
    **opt.file_or("default"),
    help="--budget: weights of the network NAME; default: the pretrained ones.  [default: "
    "RUNS/NAME/best.safetensors]",
)
@opt.matching()
@opt.lsp("dense")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=2000,
    help="Number of images in the sample, evenly spaced in the sorted list.",
)
@click.option(
    "--write",
    is_flag=True,
    help="Write the settings to the table [extract] of ./anchorpatch.toml.",
)
@opt.batch_size("64", "patches")
@opt.workers
@opt.threads
@opt.device
@opt.engine
@opt.precision
@opt.as_json
def tune(
    weights: str | None,
    preset: str,
    threads: int | None,
    write: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find settings of LSP for mean numbers of patches, or for a budget of GMACs.

    AnchorNet runs once over a sample of images, whose heatmaps are kept while settings are tried.
    Prints the options for `anchorpatch extract`. --patches keeps --iou-threshold, and raises
    --max-patches only where it is too small. --budget chooses all three by the accuracy of a
    network, on images that it was not trained on: those that `finetune --holdout` kept out, or any
    where the weights are not from finetune.

    \b
    anchorpatch tune --patches 5.6,2.9,2.1
    anchorpatch tune --budget 1.5 --network resnet50 --write
    anchorpatch extract --split val --patches 5.6,2.9,2.1      both in one go
    """
    if (options["patches"] is None) == (options["budget"] is None):
        raise click.UsageError("Give either --patches or --budget.")
    if options["network"] is None and options["budget"] is not None:
        raise click.UsageError("--budget needs --network.")
    from anchorpatch.jobs.tune import TuneConfig, run, with_options
    from anchorpatch.runtime.device import use_threads
    from anchorpatch.runtime.progress import reporter
    from anchorpatch.storage import write_atomically

    use_threads(threads)
    given = {name: value for name, value in options.items() if value is not None}
    config = TuneConfig(weights=find_weights(weights, options["runs"]), **given)
    found = run(config, reporter())
    path = Path("anchorpatch.toml")
    if write:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        text = with_options(text, "extract", found.options) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))
    if as_json:
        print_json(found.to_json())
        return
    print_tables([found.table()])
    click.echo(f"\nanchorpatch extract {found.arguments}")
    if write:
        click.echo(f"written to [extract] of {path}")
