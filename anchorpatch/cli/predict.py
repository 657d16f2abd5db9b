"""``anchorpatch predict``."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import print_json
from anchorpatch.demo import find_weights
from anchorpatch.errors import DataError, reason_of
from anchorpatch.settings import LspSettings
from anchorpatch.text import counted

if TYPE_CHECKING:
    from anchorpatch.jobs.predict import Prediction


@click.command(cls=opt.Command)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option(
    "--network",
    metavar="NAME|FILE",
    help="Classifier: a name from `anchorpatch models`, or a weights file of "
    "`anchorpatch finetune`.  [required]",
)
@click.option(
    "--weights",
    metavar="FILE|default",
    help="Weights of the network NAME; default: the pretrained ones.  [default: "
    "RUNS/NAME/best.safetensors]",
)
@click.option(
    "--classes",
    type=opt.PATH,
    help="Text file with the classes of --weights, one per line, in the order of its outputs.  "
    "[default: those recorded in the weights, else those of AnchorNet]",
)
@opt.anchornet_weights
@opt.runs
@opt.lsp("evaluate")
@click.option(
    "--top", type=click.IntRange(min=1), default=5, help="Number of classes to print per image."
)
@click.option(
    "--out", type=opt.PATH, help="Write a picture of each image and its patches to this folder."
)
@opt.device
@opt.engine
@opt.precision
@opt.as_json
def predict(
    images: tuple[str, ...],
    network: str | None,
    weights: str | None,
    classes: Path | None,
    anchornet_weights: str | None,
    runs: Path,
    preset: str,
    lsp: LspSettings,
    top: int,
    out: Path | None,
    as_json: bool,
    **computing: Any,
) -> int:
    """Classify images by their patches, directly from image files.

    AnchorNet localizes the patches of each IMAGE, and the network classifies it by the sum of
    their softmax outputs, as `extract` and `evaluate` do for a whole split. Corners are pixels
    (y, x) in the 224 px crop. Use - as IMAGE to read file names from stdin, one per line.

    \b
    anchorpatch predict dog.jpg --network resnet50
    anchorpatch predict dog.jpg --network resnet50 --weights own.pth --classes names.txt
    find photos -name '*.jpg' | anchorpatch predict - --network best.safetensors --json

    Files that cannot be read as images are named on stderr and skipped; the exit status is then 1.
    """
    if network is None:
        raise click.UsageError(
            "Missing option '--network'. Name a network, such as resnet50, or weights that "
            f"`anchorpatch finetune` wrote, such as {runs / 'resnet50' / 'best.safetensors'}."
        )
    from anchorpatch.jobs.predict import PredictConfig, Predictor, Unreadable, names_file
    from anchorpatch.runtime.progress import reporter

    if weights is not None and names_file(network):
        raise click.UsageError(
            f"--network {network} is a weights file already: use --network NAME with --weights "
            "FILE, or --anchornet-weights for AnchorNet's weights."
        )
    if classes is not None and weights is None:
        raise click.UsageError("--classes needs --weights.")
    config = PredictConfig(
        network=network,
        anchornet_weights=find_weights(anchornet_weights, runs, "--anchornet-weights"),
        weights=weights,
        classes=None if classes is None else _class_names(classes),
        runs=runs,
        lsp=lsp,
        top=top,
        **computing,
    )
    predictor = Predictor(config, reporter().message)
    pictures: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    for result in predictor.predict(_names(images)):
        if isinstance(result, Unreadable):
            bad.append({"path": _printable(result.path), "reason": result.reason})
            click.echo(f"anchorpatch: {_printable(result.path)}: {result.reason}", err=True)
            continue
        drawn = None if out is None else _draw(result, out, pictures)
        if as_json:
            found.append(_facts(result, drawn))
        else:
            click.echo(_text(result, drawn))
    if as_json:
        meta = predictor.network.meta
        print_json(
            {
                "network": network,
                "weights": predictor.network.source,
                "architecture": meta.architecture,
                "classes": len(meta.classes),
                "settings": {"preset": preset, **asdict(lsp)},
                "images": found,
                "unreadable": bad,
            }
        )
    return int(bool(bad))


def _class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes, one per line.

    Raises:
        DataError: the file cannot be read or holds no names.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected a text file of class names, found: {reason_of(error)}"
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names or len(set(names)) < len(names):
        found = "none" if not names else f"{len(names) - len(set(names))} of them twice"
        raise DataError(f"{path}: expected class names, one per line and each once, found {found}")
    return names


def _names(images: Iterable[str]) -> Iterator[str]:
    for image in images:
        if image == "-":
            # Bytes: a file's name need not be text.
            lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
            yield from (os.fsdecode(line) for line in lines if line)
        else:
            yield image


def _printable(path: str) -> str:
    """Return a file's name with what is no text replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def _facts(result: Prediction, drawn: Path | None) -> dict[str, Any]:
    facts = {**result.to_json(), "path": _printable(result.path)}
    return facts if drawn is None else {**facts, "picture": _printable(str(drawn))}


def _text(result: Prediction, drawn: Path | None) -> str:
    (name, probability), *others = result.classes
    lines = [f"{_printable(result.path)}: {name} {probability:.1%}"]
    if others:
        lines.append("  then " + ", ".join(f"{name} {p:.1%}" for name, p in others))
    patches = ", ".join(
        f"({y}, {x}) {score:.3g}"
        for (y, x), score in zip(result.corners.tolist(), result.scores.tolist(), strict=True)
    )
    lines.append(f"  {_counted(result)} of {result.scale} px, (y, x) and score: {patches}")
    if drawn is not None:
        lines.append(f"  {_printable(str(drawn))}")
    return "\n".join(lines)


def _counted(result: Prediction) -> str:
    return counted(len(result.scores), "patch")


def _draw(result: Prediction, folder: Path, drawn: Counter[str]) -> Path:
    """Write a picture of an image and its patches into a folder, under a name of its own.

    Args:
        result: of the image.
        folder: for the picture.
        drawn: pictures by the image's name, of which several folders may have one.

    Raises:
        StorageError: the disk refuses.
    """
    from anchorpatch.figures.frames import patch_figure
    from anchorpatch.storage import write_atomically

    name, probability = result.classes[0]
    picture = patch_figure(
        result.patches,
        result.corners,
        result.scores,
        image=result.crop,
        caption=f"{_printable(Path(result.path).name)}: {name} {probability:.1%}, "
        f"{_counted(result)} of {result.scale} px",
    )
    stem = Path(result.path).stem
    drawn[stem] += 1
    path = folder / f"{stem}-patches{f'-{drawn[stem]}' if drawn[stem] > 1 else ''}.png"
    write_atomically(path, lambda file: picture.save(file, "PNG"))
    return path
