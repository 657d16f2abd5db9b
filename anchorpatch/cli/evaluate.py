"""``anchorpatch evaluate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import print_result
from anchorpatch.demo import BUNDLED, find_weights
from anchorpatch.settings import SCALES
from anchorpatch.storage import write_atomically

if TYPE_CHECKING:
    from anchorpatch.jobs.results import AnchorNetFigures, Table3, Table4
    from anchorpatch.jobs.tradeoff import Dynamic

#: Options that only one of the two kinds of evaluation has.
_OF_ANCHORNET = ("labels", "files", "only_labelled", "max_bad")
_OF_DYNAMIC = (
    "confidence",
    "thresholds",
    "budgets",
    "glance",
    "calibrate_on",
    "calibrate_images",
)
_OF_TABLE_4 = ("localizers", "seed")
_OF_NETWORKS = (
    "shards",
    "protocol",
    "scale",
    "per_scale",
    "whole_weights",
    "whole",
    "anchornet_weights",
    "speed",
    "predictions",
    "class_map",
    "all_classes",
    "class_names",
    *_OF_TABLE_4,
    *_OF_DYNAMIC,
)

#: Options without a meaning for one patch against a rescaled image.
_OF_TABLE_3 = ("per_scale", "whole", "anchornet_weights", "speed", "predictions")


@click.command(cls=opt.Command)
@click.argument("network")
@opt.shards
@opt.data
@opt.split
@opt.labels
@click.option(
    "--weights",
    **opt.file_or("default", *BUNDLED),
    help="Weights; default: the pretrained weights of NETWORK; photos, demo: bundled ones of "
    "anchornet.  [default: RUNS/NETWORK/best.safetensors, or one network per scale as with "
    "--per-scale]",
)
@opt.runs
@click.option(
    "--protocol",
    type=click.Choice(["patches", "rescale", "dynamic"]),
    default="patches",
    help="Compare all patches with whole images (Table 3), the strongest patch with the image "
    "rescaled to its size (Table 4), or accuracy with cost where an image is looked at patch by "
    "patch until the network is sure.",
)
@click.option(
    "--localizers",
    type=opt.Names(),
    default=(),
    metavar="NAME[,NAME...]",
    help="--protocol rescale: compare with a patch as large at other places, center or random.",
)
@opt.seed("--localizers random")
@opt.confidence
@click.option(
    "--threshold",
    "thresholds",
    type=opt.NumberList(float, length=None),
    default=(),
    show_default=False,
    help="--protocol dynamic: confidence at which to stop, from 0 (after the first look) to 1 "
    "(never).  [default: ten thresholds, unless --budget is given]",
)
@click.option(
    "--budget",
    "budgets",
    type=opt.NumberList(float, length=None),
    default=(),
    show_default=False,
    help="--protocol dynamic: GMACs per image, AnchorNet's included, to find thresholds for on "
    "images that are neither measured nor trained on.",
)
@click.option(
    "--glance",
    metavar="SIDE",
    type=click.IntRange(min=16),
    help="--protocol dynamic: first look at the whole image, resized to SIDE px.",
)
@click.option(
    "--calibrate-on",
    default="train",
    help="--budget: split of the shards to calibrate on: the images that `finetune --holdout` kept "
    "out, or any images where the weights are not from finetune.",
)
@click.option(
    "--calibrate-images",
    type=click.IntRange(min=1),
    default=2000,
    help="--budget: maximum number of images to calibrate on.",
)
@click.option(
    "--scale",
    type=click.Choice([str(scale) for scale in SCALES]),
    help="Evaluate only images assigned to this scale.",
)
@click.option(
    "--per-scale",
    is_flag=True,
    help="Use one network per scale: RUNS/NETWORK-63, -95 and -111.  [default: on if these exist "
    "and RUNS/NETWORK does not]",
)
@click.option(
    "--whole-weights",
    **opt.file_or("default"),
    help="Weights for whole images, and for --protocol rescale.  [default: "
    "RUNS/NETWORK-baseline/best.safetensors if it exists, else --weights unless fine-tuned on "
    "patches, else the pretrained weights if their classes match]",
)
@click.option("--whole/--no-whole", default=True, help="Evaluate whole images as well.")
@click.option(
    "--anchornet-weights",
    **opt.file_or(*BUNDLED),
    help="AnchorNet weights, to measure speed.  [default: RUNS/anchornet/best.safetensors]",
)
@click.option("--speed/--no-speed", default=True, help="Measure images per second.")
@click.option(
    "--predictions",
    type=opt.PATH,
    help="Write the prediction for each image to this .csv or .npz file.",
)
@opt.matching()
@opt.class_names
@opt.batch_size("32 on CPU (anchornet: 16), 256 on a GPU", "patches or images")
@opt.workers
@opt.threads
@opt.device
@opt.engine
@opt.precision
@opt.limit
@opt.max_bad
@click.option(
    "--format",
    type=click.Choice(["table", "markdown", "csv", "json"]),
    default="table",
    help="Output format.",
)
@click.option(
    "--result",
    type=opt.PATH,
    help="Also write the result to this .json file, for `anchorpatch report`.",
)
@opt.as_json
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    network: str,
    format: str,
    as_json: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Evaluate a classifier on patches, or anchornet on images.

    NETWORK is a name from `anchorpatch models`, that of any other classifier of torchvision or
    timm, or MODULE:FUNCTION. A classifier is evaluated on the shards of a split: top-1 and top-5
    accuracy by the sum of the softmax outputs of an image's patches, MACs and speed, compared with
    whole images.

    anchornet is evaluated on a labeled split of images: top-1 and top-5 accuracy of every branch
    and of the decision of Eq. 7, the share of images assigned to each branch, patches per image
    for each preset, and MACs. --labels, --files, --only-labelled and --max-bad are only for
    anchornet; --shards, --protocol, --scale, --per-scale, --whole-weights, --whole,
    --anchornet-weights, --speed, --predictions, --class-map, --all-classes, --class-names and the
    options of --protocol rescale and dynamic only for classifiers.

    Classes are matched by name, so pretrained weights of ImageNet can be evaluated on a folder
    with some of its classes: the logits of the others are left out, or kept with --all-classes.

    Whole images (row 224) and --protocol rescale use a network that was not trained on patches,
    as in the paper: RUNS/NETWORK-baseline, or the pretrained weights if they are for the classes
    of the shards. The result names the weights of each row.

    \b
    anchorpatch evaluate resnet50
    anchorpatch evaluate resnet50 --protocol rescale
    anchorpatch evaluate resnet50 --protocol dynamic --budget 0.8,1.2
    anchorpatch evaluate resnet50 --weights default
    anchorpatch evaluate resnet50 --scale 63 --predictions 63.csv
    anchorpatch evaluate anchornet --data imagenet --split val
    """
    form = "json" if as_json else format
    if network == "anchornet":
        _refuse(ctx, _OF_NETWORKS, "is only for classifiers, not for anchornet")
        if form in ("markdown", "csv"):
            raise click.UsageError(f"--format {form} is only for classifiers.", ctx)
    else:
        _refuse(ctx, _OF_ANCHORNET, "is only for anchornet")
        if options["protocol"] == "rescale":
            _refuse(ctx, _OF_TABLE_3, "needs --protocol patches")
        else:
            _refuse(ctx, _OF_TABLE_4, "needs --protocol rescale")
        if options["protocol"] != "dynamic":
            _refuse(ctx, _OF_DYNAMIC, "needs --protocol dynamic")
        else:
            _refuse(ctx, ("predictions",), "needs --protocol patches")
        if options["per_scale"] and options["weights"] is not None:
            raise click.UsageError("--per-scale and --weights are mutually exclusive.", ctx)
    from anchorpatch.runtime.device import use_threads  # torch is slow to import
    from anchorpatch.runtime.distributed import is_main

    use_threads(threads)
    result = options.pop("result")
    found = _anchornet(options) if network == "anchornet" else _network(network, options)
    if is_main():
        document = found.to_json()
        if result is not None:
            text = json.dumps(document, indent=2, allow_nan=False) + "\n"
            write_atomically(result, lambda file: file.write(text.encode()))
        print_result(document, found.tables(), form)


def _refuse(ctx: click.Context, names: tuple[str, ...], why: str) -> None:
    """Refuse options of the other kind; a settings file may hold those of both."""
    for param in ctx.command.params:
        given = ctx.get_parameter_source(param.name or "")
        if param.name in names and given is click.core.ParameterSource.COMMANDLINE:
            off = ctx.params[param.name] is False and param.secondary_opts
            raise click.UsageError(f"{(off or param.opts)[0]} {why}.", ctx)


def _anchornet(options: dict[str, Any]) -> AnchorNetFigures:
    from anchorpatch.jobs.evaluate_anchornet import EvaluateAnchorNetConfig, run
    from anchorpatch.runtime.progress import reporter

    weights = find_weights(options.pop("weights"), options.pop("runs"))
    known = {k: v for k, v in options.items() if k not in (*_OF_NETWORKS, "matching")}
    return run(EvaluateAnchorNetConfig(weights=weights, **known), reporter())


def _network(network: str, options: dict[str, Any]) -> Table3 | Table4 | Dynamic:
    from anchorpatch.jobs import dynamic
    from anchorpatch.jobs.evaluate import EvaluateConfig, run, run_rescale
    from anchorpatch.runtime.progress import reporter

    scale, anchornet = options.pop("scale"), options.pop("anchornet_weights")
    protocol = options.pop("protocol")
    given = {
        "network": network,
        "scales": SCALES if scale is None else (int(scale),),
        "anchornet_weights": find_weights(anchornet, options["runs"]) if anchornet else None,
        **{k: v for k, v in options.items() if k not in (*_OF_ANCHORNET, *_OF_DYNAMIC)},
    }
    if protocol == "dynamic":
        given |= {k: v for k, v in options.items() if k in _OF_DYNAMIC}
        return dynamic.run(dynamic.DynamicConfig(**given), reporter())
    return (run_rescale if protocol == "rescale" else run)(EvaluateConfig(**given), reporter())
