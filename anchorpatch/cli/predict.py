"""``anchorpatch predict``."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from anchorpatch.classes import ClassNames, Matching
from anchorpatch.cli import options as opt
from anchorpatch.cli.output import print_json, print_table
from anchorpatch.demo import find_weights
from anchorpatch.errors import DataError
from anchorpatch.settings import LspSettings
from anchorpatch.text import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    **opt.file_or("default"),
    help="Weights of the network NAME; default: the pretrained ones.  [default: "
    "RUNS/NAME/best.safetensors]",
)
@opt.matching(all_classes=False)
@click.option("--classes", type=opt.PATH, hidden=True)  # as --class-map was called
@opt.class_names
@opt.anchornet_weights
@opt.runs
@opt.lsp("evaluate")
@click.option(
    "--top", type=click.IntRange(min=1), default=5, help="Number of classes to print per image."
)
@click.option(
    "--stop-at",
    metavar="X",
    type=click.FloatRange(0, 1),
    help="Look at the patches one by one and stop at this confidence; the others are not computed. "
    "`anchorpatch evaluate NETWORK --protocol dynamic --budget` finds a value.",
)
@opt.confidence
@click.option(
    "--out", type=opt.PATH, help="Write a picture of each image and its patches to this folder."
)
@click.option(
    "--original",
    is_flag=True,
    help="With --out: frame the patches in the image as it is, not in the crop AnchorNet saw.",
)
@opt.batch_size("64", "patches")
@opt.workers
@opt.device
@opt.engine
@opt.precision
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "table", "csv", "jsonl", "json"]),
    default="text",
    help="Output format: a few lines per image, a row per image, or JSON, as one object or an "
    "object per image and line. All but table and json are written as images are classified.",
)
@opt.as_json
def predict(
    images: tuple[str, ...],
    network: str | None,
    weights: str | None,
    matching: Matching,
    classes: Path | None,
    anchornet_weights: str | None,
    runs: Path,
    preset: str,
    lsp: LspSettings,
    out: Path | None,
    original: bool,
    form: str,
    as_json: bool,
    **options: Any,
) -> int:
    """Classify images by their patches, directly from image files.

    AnchorNet localizes the patches of each IMAGE, and the network classifies it by the sum of
    their softmax outputs, as `extract` and `evaluate` do for a whole split. Corners are pixels
    (y, x) in the crop that AnchorNet saw; in JSON, `box` is x0, y0, x1, y1 in pixels of the upright
    image. An IMAGE may be a folder, whose images are found at any depth, a tar or zip file, one
    image in it as archive.tar::member, or - to read names from stdin, one per line.

    \b
    anchorpatch predict dog.jpg --network resnet50
    anchorpatch predict photos --network resnet50 --weights default --format csv
    anchorpatch predict dog.jpg --network resnet50 --weights own.pth --class-map names.txt
    find photos -name '*.jpg' | anchorpatch predict - --network best.safetensors --json
    anchorpatch predict photos --network resnet50 --stop-at 0.95

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
    if classes is not None:
        matching = Matching.read(classes)
    if matching.class_map is not None and weights is None:
        raise click.UsageError("--class-map needs --weights.")
    if original and out is None:
        raise click.UsageError("--original needs --out.")
    config = PredictConfig(
        network=network,
        anchornet_weights=find_weights(anchornet_weights, runs, "--anchornet-weights"),
        weights=weights,
        matching=matching,
        runs=runs,
        lsp=lsp,
        **{name: value for name, value in options.items() if value is not None},
    )
    predictor = Predictor(config, reporter().message)
    form = "json" if as_json else form
    pictures: Counter[str] = Counter()
    found: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    short = _TABLE if config.stop_at is None else (*_TABLE, "localized", "gmacs")
    columns = _columns(short, min(config.top, len(predictor.network.meta.classes)))
    if form == "csv":
        click.echo(_csv(columns), nl=False)

    def unreadable(path: str, reason: str) -> None:
        bad.append({"path": _printable(path), "reason": reason})
        click.echo(f"anchorpatch: {_printable(path)}: {reason}", err=True)
        if form == "jsonl":
            click.echo(json.dumps({"path": _printable(path), "error": reason}))
        elif form == "csv":
            row = {"path": _printable(path), "error": reason}
            click.echo(_csv([row.get(name, "") for name in columns]), nl=False)

    for result in predictor.predict(_names(images, unreadable)):
        if isinstance(result, Unreadable):
            unreadable(result.path, result.reason)
            continue
        drawn = None
        if out is not None:
            whole = predictor.picture(result.path) if original else None
            drawn = _draw(result, whole, out, pictures, predictor.class_names)
        facts = _facts(result, drawn)
        if form == "text":
            click.echo(_text(result, drawn, predictor.class_names))
        elif form == "jsonl":
            click.echo(json.dumps(facts, allow_nan=False))
        elif form == "csv":
            click.echo(_csv(list(_row(facts, columns))), nl=False)
        else:
            found.append(facts)
    if form == "table":
        print_table(short, [_row(facts, short) for facts in found])
    elif form == "json":
        meta = predictor.network.meta
        stopping = {"stop_at": config.stop_at, "confidence": config.confidence}
        print_json(
            {
                "network": network,
                "weights": predictor.network.source,
                "architecture": meta.architecture,
                "classes": len(meta.classes),
                "settings": {
                    "preset": preset,
                    **asdict(lsp),
                    **({} if config.stop_at is None else stopping),
                },
                "images": found,
                "unreadable": bad,
            }
        )
    return int(bool(bad))


#: Bytes of an image's name in that of its picture, which may have 255 with what is added.
_LONGEST_STEM: Final = 200

#: Columns of a table for people.
_TABLE: Final = ("path", "class", "name", "probability", "scale", "patches")


def _columns(table: tuple[str, ...], top: int) -> tuple[str, ...]:
    """Return the columns of CSV, with the classes that follow the likeliest one."""
    more = (f"{what}{k}" for k in range(2, top + 1) for what in ("class", "name", "probability"))
    return (*table, *more, "error")


def _row(facts: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Return what stands in columns, of an image's facts."""
    values = {**facts, "error": "", "patches": len(facts["patches"])}
    for k, of_rank in enumerate(facts["top"], 1):
        values |= {f"{key}{k}": value for key, value in of_rank.items()}
    cells = (values[name] for name in columns)
    return [f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in cells]


def _csv(row: Sequence[str]) -> str:
    """Return a line of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue()


def _names(images: Iterable[str], unreadable: Callable[[str, str], None]) -> Iterator[str]:
    """Yield the images, those of folders, archives and lists on stdin too."""
    from anchorpatch.jobs.predict import images_in

    for image in images:
        if image == "-":
            # Bytes: a file's name need not be text.
            none = True
            for line in sys.stdin.buffer:
                if name := os.fsdecode(line.rstrip(b"\r\n")):
                    none = False
                    yield from [name] if name == "-" else _names([name], unreadable)
            if none:
                unreadable("-", "no name of an image on stdin")
        elif os.path.isdir(image) or (
            image.lower().endswith((".tar", ".zip")) and os.path.isfile(image)
        ):
            found = images_in(image)
            try:
                first = next(found, None)
            except DataError as error:  # the archive is damaged
                unreadable(image, str(error))
                continue
            if first is None:
                unreadable(image, "no image in it")
            else:
                yield first
                yield from found
        else:
            yield image


def _printable(path: str) -> str:
    """Return a file's name with what is no text replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def _facts(result: Prediction, drawn: Path | None) -> dict[str, Any]:
    facts = {**result.to_json(), "path": _printable(result.path)}
    return facts if drawn is None else {**facts, "picture": _printable(str(drawn))}


def _text(result: Prediction, drawn: Path | None, names: ClassNames) -> str:
    first, *others = (f"{names.shown(of)} {p:.1%}" for of, p in result.classes)
    lines = [f"{_printable(result.path)}: {first}"]
    if others:
        lines.append("  then " + ", ".join(others))
    patches = ", ".join(
        f"({y}, {x}) {score:.3g}"
        for (y, x), score in zip(result.corners.tolist(), result.scores.tolist(), strict=True)
    )
    lines.append(f"  {_counted(result)} of {result.scale} px, (y, x) and score: {patches}")
    if result.gmacs is not None:
        looks = f"looked at {len(result.scores)} of {counted(result.localized, 'patch')}"
        lines.append(f"  {looks}: {result.gmacs:.3f} GMACs")
    if drawn is not None:
        lines.append(f"  {_printable(str(drawn))}")
    return "\n".join(lines)


def _counted(result: Prediction) -> str:
    return counted(len(result.scores), "patch")


def _draw(
    result: Prediction,
    whole: NDArray[np.uint8] | None,
    folder: Path,
    drawn: Counter[str],
    names: ClassNames,
) -> Path:
    """Write a picture of an image and its patches into a folder, under a name of its own.

    Args:
        result: of the image.
        whole: the image itself, to frame the patches in it; None for the crop.
        folder: for the picture.
        drawn: pictures by the image's name, of which several folders may have one.
        names: what classes are called.

    Raises:
        StorageError: the disk refuses.
    """
    from anchorpatch.figures.frames import patch_figure
    from anchorpatch.storage import write_atomically

    of, probability = result.classes[0]
    picture = patch_figure(
        result.patches,
        result.corners,
        result.scores,
        image=result.crop if whole is None else whole,
        boxes=None if whole is None else result.boxes,
        caption=f"{_printable(Path(result.path).name)}: {names.shown(of)} {probability:.1%}, "
        f"{_counted(result)} of {result.scale} px",
    )
    stem = Path(result.path).stem
    if len(whole_name := os.fsencode(stem)) > _LONGEST_STEM:
        stem = whole_name[:_LONGEST_STEM].decode(errors="ignore")
    drawn[stem] += 1
    path = folder / f"{stem}-patches{f'-{drawn[stem]}' if drawn[stem] > 1 else ''}.png"
    write_atomically(path, lambda file: picture.save(file, "PNG"))
    return path
