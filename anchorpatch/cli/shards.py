"""``anchorpatch shards``: look at shards that `extract` wrote."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anchorpatch.classes import ClassNames
from anchorpatch.cli import options as opt
from anchorpatch.cli.output import bytes_text, print_json, print_tables
from anchorpatch.errors import DataError, ImageError, ShardError, WeightsError
from anchorpatch.settings import EXPORT_FORMATS, SCALES
from anchorpatch.storage import sha256_of, to_json
from anchorpatch.text import counted, did_you_mean, few, tally

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from anchorpatch.shards.manifest import Manifest, SplitFacts
    from anchorpatch.shards.reader import ShardReader

_folder = click.argument("folder", metavar="DIR", type=opt.PATH)


@click.group(cls=opt.Group)
def shards() -> None:
    """Inspect, verify, merge, show and export shards.

    DIR is the folder of one split, such as ./shards/val, or a folder with several of them.
    """


@shards.command(cls=opt.Command)
@_folder
@opt.class_names
@opt.as_json
def inspect(folder: Path, class_names: ClassNames, as_json: bool) -> None:
    """Print what shards contain: images, patches, classes, bytes, settings, skipped images.

    This is read from the manifest; the shards themselves are not opened.
    """
    from anchorpatch.shards.manifest import read_manifest, split_facts

    manifests = [read_manifest(split) for split in _splits(folder)]
    facts = [split_facts(manifest) for manifest in manifests]
    headers = [manifest.header for manifest in manifests]
    names = [class_names.of(header.classes, header.network_classes) for header in headers]
    if as_json:
        splits = [
            {**to_json(part), "class_names": {of: called.name(of) for of in header.classes}}
            for part, header, called in zip(facts, headers, names, strict=True)
        ]
        print_json({"splits": splits})
        return
    for i, (part, header, called) in enumerate(zip(facts, headers, names, strict=True)):
        click.echo(f"\n{part.folder}" if i else part.folder)
        print_tables([part.table()])
        click.echo("\n".join(_lines(part, few([called.shown(of) for of in header.classes]))))


@shards.command(cls=opt.Command)
@_folder
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Number of processes.  [default: one per CPU core]"
)
@opt.as_json
def verify(folder: Path, jobs: int | None, as_json: bool) -> int:
    """Verify shards: checksums, sizes, counts, and the bounds of every corner.

    Prints what is wrong with each bad shard and the command that rewrites it. The exit status
    is then 1.
    """
    from anchorpatch.runtime.progress import reporter
    from anchorpatch.shards.manifest import read_manifest
    from anchorpatch.shards.verify import verify_folder

    report = reporter()
    splits: list[dict[str, Any]] = []
    for split in _splits(folder):
        manifest: Manifest | None = None
        with suppress(ShardError):  # a damaged manifest is the problem that is found
            manifest = read_manifest(split)
        images = sum(entry.images for entry in manifest.entries) if manifest else 0
        with report.counting(f"verify {split.name}", images):
            problems = verify_folder(split, jobs=jobs or -1, done=report.advance)
        found = {"folder": str(split), "shards": None, "problems": [p._asdict() for p in problems]}
        splits.append({**found, "repair": None})
        if manifest is not None:
            ours = {manifest.shard_path(i).name for i in range(manifest.shard_count)}
            splits[-1]["shards"] = len(ours)
            if not ours.isdisjoint(problem.shard for problem in problems):
                splits[-1]["repair"] = _extract_command(manifest, "--repair")
    bad = any(of_split["problems"] for of_split in splits)
    if as_json:
        print_json({"ok": not bad, "splits": splits})
        return int(bad)
    for of_split in splits:
        for problem in of_split["problems"]:
            click.echo(f"{Path(of_split['folder'], problem['shard'])}: {problem['problem']}")
        wrong = len({problem["shard"] for problem in of_split["problems"]})
        shown = [] if of_split["shards"] is None else [counted(of_split["shards"], "shard")]
        shown.append(f"{wrong} bad" if wrong else "all good")
        click.echo(f"{of_split['folder']}: {', '.join(shown)}")
        if of_split["repair"]:
            click.echo(f"to rewrite them: {of_split['repair']}\n{_unknown(of_split['repair'])}")
    return int(bad)


@shards.command(cls=opt.Command)
@click.argument("folders", metavar="DIR...", type=opt.PATH, nargs=-1, required=True)
@click.option(
    "--out",
    type=opt.PATH,
    required=True,
    help="Folder for the merged shards, OUT/SPLIT/...; may be one of DIR.",
)
@opt.as_json
def merge(folders: tuple[Path, ...], out: Path, as_json: bool) -> int:
    """Merge shards of the same splits that were written to several folders.

    For example by `extract --task I/N` on several machines. Sizes and SHA-256 checksums are
    verified while the shards are copied. Shards that OUT already has are kept. The exit status is
    1 if a shard could not be copied.
    """
    from anchorpatch.runtime.progress import reporter
    from anchorpatch.shards.manifest import read_manifest
    from anchorpatch.shards.splits import merge_split

    if (out / "manifest.json").exists():
        above = (out if out.name else out.resolve()).parent
        raise click.BadParameter(
            f"{out} holds the shards of one split: give the folder above it, {above}",
            param_hint="'--out'",
        )
    parts = [
        {read_manifest(split).header.split: split for split in _splits(folder)}
        for folder in folders
    ]
    held = [", ".join(sorted(of_folder)) for of_folder in parts]
    for folder, names in zip(folders, held, strict=True):
        if names != held[0]:
            raise ShardError(
                f"{folders[0]} holds {held[0]} but {folder} holds {names}: expected parts of the "
                "same splits"
            )
    report = reporter()
    splits = []
    for name in sorted(parts[0]):
        sources = [of_folder[name] for of_folder in parts]
        with report.counting(f"merge {name}", read_manifest(sources[0]).files_count):
            splits.append(merge_split(sources, out / name, report.advance))
    failed = any(merged.problems for merged in splits)
    if as_json:
        print_json({"ok": not failed, "splits": [to_json(merged) for merged in splits]})
        return int(failed)
    for merged in splits:
        for problem in merged.problems:
            click.echo(problem)
        there = merged.shards - len(merged.missing)
        click.echo(
            f"{merged.folder}: {there} of {merged.shards} shards, {len(merged.copied)} of them "
            "copied now"
        )
        if merged.missing:
            command = _extract_command(read_manifest(merged.folder))
            click.echo(f"missing: {few(merged.missing)}\nto write them: {command}")
            click.echo(_unknown(command))
    return int(failed)


def _extract_command(manifest: Manifest, *options: str) -> str:
    """Return the command that writes the missing shards of a split, as far as it is known.

    Data and weights are those that `extract` takes by default where they fit; else they stand as
    DATA and WEIGHTS-SHA256, with the first digits of the checksum that the weights must have.
    """
    from anchorpatch.demo import BUNDLED, bundled_weights
    from anchorpatch.shards.header import extract_options

    split, wanted = manifest.header.split, manifest.header.weights_sha256
    data = Path(os.environ.get("ANCHORPATCH_DATA") or "data")
    runs = Path(os.environ.get("ANCHORPATCH_RUNS") or "runs")
    trained = runs / "anchornet" / "best.safetensors"
    candidates = {str(trained): trained}
    for bundled in BUNDLED:
        with suppress(WeightsError):
            candidates[bundled] = bundled_weights(bundled)
    weights = f"WEIGHTS-{wanted[:12]}"
    for name, path in candidates.items():
        with suppress(OSError), path.open("rb") as file:
            if sha256_of(file) == wanted:
                weights = name
    folder = manifest.folder if manifest.folder.name == split else manifest.folder.resolve()
    words = [*options, "--data", str(data) if (data / split).is_dir() else "DATA"]
    words += ["--weights", weights, "--out", str(folder.parent) if folder.name == split else "OUT"]
    return f"anchorpatch extract {shlex.join([*words, *extract_options(manifest.header)])}"


def _unknown(command: str) -> str:
    """Return a line about what no manifest knows of the command that wrote the shards."""
    words = command.split()
    notes = ["DATA stands for the images"] if "DATA" in words else []
    notes += [f"{w} for the weights with this SHA-256" for w in words if w.startswith("WEIGHTS-")]
    notes += ["add --labels, --limit and --allow-empty if they were used"]
    return f"({'; '.join(notes)})"


@shards.command(cls=opt.Command)
@_folder
@click.argument("image")
@click.option("--out", type=opt.PATH, required=True, help="Picture to write, such as patches.png.")
@click.option(
    "--original",
    is_flag=True,
    help="Frame the patches in the original image, read from DATA/SPLIT.",
)
@opt.data
@opt.class_names
def show(
    folder: Path, image: str, out: Path, original: bool, data: Path, class_names: ClassNames
) -> None:
    """Draw the patches of one image in descending order of their scores.

    IMAGE is its path within the split, such as n01440764/ILSVRC2012_val_00000293.JPEG, or its
    number, starting from 0. If the shards store images, the crop that AnchorNet saw is drawn too,
    with the patches framed; with --original, they are framed in the image that it was taken from.
    """
    from anchorpatch.figures.canvas import picture_kind, save_picture
    from anchorpatch.figures.frames import patch_figure
    from anchorpatch.shards.reader import ShardReader

    picture_kind(out)
    splits = _splits(folder)
    if len(splits) > 1:
        names = ", ".join(str(split) for split in splits)
        raise click.BadParameter(f"expected one split, found {names}", param_hint="'DIR'")
    reader = ShardReader(splits[0], partial=True)
    row = _find(reader, image)
    found = reader.image_patches(row)
    # A name that is no UTF-8 cannot be printed as it is.
    path = bytes(reader.path[row]).decode("utf-8", "replace")
    called = class_names.of(reader.classes, reader.network_classes)
    label = called.shown(reader.classes[reader.label[row]])
    predicted = called.shown(reader.network_classes[reader.predicted[row]])
    patches = counted(len(found.pixels), "patch")
    caption = f"{path}: label {label}, predicted {predicted}, {patches} of {found.scale} px"
    if original:
        whole = _original(reader, row, data)
        first = int(reader.first[row])
        boxes = reader.source_box(found.scale, range(first, first + len(found.pixels)))
    picture = patch_figure(
        found.pixels,
        found.corners,
        found.scores,
        image=whole if original else reader.image(row) if reader.has_images else None,
        boxes=boxes if original else None,
        caption=caption,
    )
    save_picture(picture, out)
    click.echo(f"{caption}: {out}")


def _original(reader: ShardReader, row: int, data: Path) -> NDArray[np.uint8]:
    """Read the image that patches were cut from, upright, uint8 (H, W, 3).

    Raises:
        DataError: it cannot be read, or has another size than the one that was extracted.
    """
    import numpy as np

    from anchorpatch.images.decode import decode_picture
    from anchorpatch.images.source import source_of

    one = slice(row, row + 1)
    found = reader.path[one], reader.label[one], reader.classes
    source, _ = source_of(data, reader.header.split, *found)
    expected = f"{source.name(0)}: expected the image that the shards were made from"
    try:
        image, _ = decode_picture(source.read(0), reader.settings.background)
    except ImageError as error:
        raise DataError(f"{expected}, found: {error.reason}; name its folder by --data") from error
    height, width = reader.size[row].tolist()
    if (image.height, image.width) != (height, width):
        raise DataError(
            f"{expected}, of {width} x {height} px, found {image.width} x {image.height} px; name "
            "its folder by --data"
        )
    return np.asarray(image.convert("RGB"))


@shards.command(cls=opt.Command)
@_folder
@click.option(
    "--to",
    type=click.Choice(EXPORT_FORMATS),
    required=True,
    help="folder: pictures CLASS/IMAGE__SCALE_RANK.png, as torchvision's ImageFolder reads them; "
    "webdataset: SPLIT-000000.tar, ... with KEY.png, KEY.cls and KEY.json; csv, parquet: a table "
    "with a row per patch.",
)
@click.option(
    "--out", type=opt.PATH, required=True, help="Folder to write to; the file of a table."
)
@click.option(
    "--format",
    "picture",
    type=click.Choice(["png", "jpg"]),
    default="png",
    help="Format of the pictures. As jpg, patches of codec jpeg are copied and not encoded again.",
)
@click.option(
    "--quality", type=click.IntRange(1, 100), help="Quality of jpg pictures.  [default: 95]"
)
@click.option(
    "--scale",
    "scales",
    type=click.Choice([str(scale) for scale in SCALES]),
    multiple=True,
    help="Export only images assigned to this scale; may be given several times.",
)
@opt.limit
@click.option(
    "--maxcount",
    type=click.IntRange(min=1),
    default=100_000,
    help="Maximum number of samples per WebDataset shard; the patches of an image stay together.",
)
@click.option(
    "--maxsize",
    type=click.FloatRange(min=1),
    default=3e9,
    show_default="3e9",
    help="Bytes after which the next WebDataset shard begins.",
)
@opt.class_names
@opt.as_json
def export(folder: Path, out: Path, scales: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Write the patches of shards as files for other programs.

    \b
    anchorpatch shards export shards/val --to folder --out patches/val
    anchorpatch shards export shards/train --to webdataset --out tars --format jpg
    anchorpatch shards export shards --to csv --out patches.csv

    RANK is 0 for the strongest patch of an image. Tables and KEY.json have the corner (y, x) in
    the crop that AnchorNet saw, and the box x0, y0, x1, y1 in pixels of the source image. With
    several splits in DIR, pictures go to OUT/SPLIT. OUT must be empty or hold the same export:
    run the same command again to complete one that was interrupted. A table that this command
    wrote is replaced.
    """
    from anchorpatch.jobs.export import ExportConfig, export_splits, taken_images
    from anchorpatch.runtime.progress import reporter
    from anchorpatch.shards.reader import ShardReader

    config = ExportConfig(scales=tuple(map(int, scales)) or SCALES, **options)
    readers = [ShardReader(split) for split in _splits(folder)]
    report = reporter()
    images = sum(len(taken_images(reader, config)) for reader in readers)
    with report.counting(f"export {folder}", images):
        found = export_splits(readers, out, config, report.advance)
    if as_json:
        print_json({"exports": [to_json(exported) for exported in found]})
        return
    for exported in found:
        click.echo(
            f"{exported.out}: {counted(exported.patches, 'patch')} of "
            f"{counted(exported.images, 'image')} in {counted(exported.files, 'file')}, "
            f"{bytes_text(exported.bytes)}"
        )
        for note in exported.notes:
            click.echo(note, err=True)


def _splits(folder: Path) -> list[Path]:
    """Return the folders of splits that DIR means.

    Raises:
        ShardError: there are none.
    """
    if (folder / "manifest.json").exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if not found:
        what = "no manifest.json in it or below" if folder.is_dir() else "no such folder"
        raise ShardError(
            f"{folder}: expected shards that `anchorpatch extract` wrote, found {what}"
        )
    return found


def _lines(facts: SplitFacts, classes: str) -> list[str]:
    """Return what `inspect` prints of a split below its table."""
    s = facts.settings
    each = f", {bytes_text(facts.bytes / facts.images)} per image" if facts.images else ""
    stored = "images stored" if s.store_images else "images not stored"
    quality = f" of quality {s.jpeg_quality}" if s.codec == "jpeg" else ""
    same = ", the same as" if facts.same_classes else "; other than"
    return [
        f"shards: {facts.shards} of {facts.total_shards}, {counted(s.shard_size, 'image')} each",
        f"images: {facts.images:,} in {bytes_text(facts.bytes)}{each}",
        f"skipped: {tally(facts.skipped)}",
        f"classes: {facts.classes:,} ({classes}){same} the network's {facts.network_classes:,}",
        f"settings: preset {s.preset or 'none'}, {s.lsp}, {s.precision}"
        + (f" on {s.device}" if s.device else "")
        + (f" by {s.engine}" if s.engine != "torch" else "")
        + (f" in batches of {s.batch_size}" if s.batch_size else "")
        + (", compiled" if s.compile else ""),
        f"crops: {s.crop}",
        f"codec: {s.codec}{quality}, {stored}",
        f"weights: SHA-256 {facts.weights_sha256[:12]}..., anchorpatch {facts.anchorpatch_version}",
    ]


def _find(reader: ShardReader, image: str) -> int:
    """Return the row of an image by its path or number.

    Raises:
        click.BadParameter: there is none, or it was skipped; names the nearest.
    """
    from anchorpatch.shards.layout import decode_text
    from anchorpatch.shards.manifest import read_manifest

    paths = [decode_text(path) for path in reader.path]
    if image in paths:
        return paths.index(image)
    if image.isdecimal() and int(image) < len(paths):
        return int(image)
    skipped = {p: r for e in read_manifest(reader.folder).entries for p, r in e.skipped}
    if image.isdecimal():
        problem = f"expected a number from 0 to {len(paths) - 1}, got {image}"
    elif image in skipped:
        problem = f"{image} was skipped: {skipped[image]}"
    else:
        images = counted(len(paths), "image")
        problem = f"{image!r} is not among the {images} of {reader.folder}." + did_you_mean(
            image, paths
        )
    raise click.BadParameter(problem, param_hint="'IMAGE'")
