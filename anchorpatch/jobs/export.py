"""The patches of shards for other programs: folders of images, WebDataset shards and tables.

Images are taken in their order, and the patches of an image from the strongest to the weakest.
Memory does not depend on how many there are. Files get their names when they are whole, and
``export.json`` in the folder notes what has been written, so that an interrupted export goes on
and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from anchorpatch import storage
from anchorpatch.classes import IMAGENET_NAMES, ClassNames
from anchorpatch.errors import ManifestMismatch, SettingsError, ShardBusy, ShardError
from anchorpatch.images.source import spread_rows
from anchorpatch.jobs.patch_files import (
    Block,
    PatchRows,
    PatchTable,
    Pictures,
    class_folders,
    facts_of,
    is_csv,
    parquet_format,
    picture_names,
    rows_of,
    write_csv,
)
from anchorpatch.settings import EXPORT_FORMATS, SCALES
from anchorpatch.shards.reader import ShardReader
from anchorpatch.text import counted, few

#: What a folder holds that an export has begun, and the digits of its form.
RECORD_NAME: Final = "export.json"
_RECORD_FORMAT: Final = 1

#: Images in a part of a folder, and of a table that is made at a time.
_PART: Final = 1024


@dataclass(frozen=True)
class ExportConfig:
    """What is exported, and as what.

    Attributes:
        to: one of `anchorpatch.settings.EXPORT_FORMATS`.
        picture: "png" or "jpg", the files of the patches.
        quality: of JPEG, 1 to 100; None for 95. Patches that the shards store as JPEG are copied.
        scales: of the images that are taken.
        limit: take only so many images, evenly spread over the split.
        maxcount: samples in a WebDataset shard; the patches of an image stay together.
        maxsize: bytes of samples in a WebDataset shard, after which the next one begins.
        class_names: what classes are called.

    Raises:
        SettingsError: a value outside its range.
    """

    to: str
    picture: str = "png"
    quality: int | None = None
    scales: tuple[int, ...] = SCALES
    limit: int | None = None
    maxcount: int = 100_000
    maxsize: float = 3e9
    class_names: ClassNames = IMAGENET_NAMES

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("to", self.to in EXPORT_FORMATS, f"one of {', '.join(EXPORT_FORMATS)}"),
            ("format", self.picture in ("png", "jpg"), "png or jpg"),
            ("quality", self.quality is None or 1 <= self.quality <= 100, "1 to 100"),
            ("scale", self.scales and set(self.scales) <= set(SCALES), f"some of {SCALES}"),
            ("maxcount", self.maxcount >= 1, "at least 1"),
            ("maxsize", self.maxsize >= 1, "at least 1"),
        ):
            if not fits:
                raise SettingsError(f"--{name}: expected {expected}")
        if self.quality is not None and self.picture != "jpg":
            raise SettingsError("--quality is of JPEG files: give --format jpg too")


@dataclass(frozen=True)
class Exported:
    """What an export has come to.

    Attributes:
        split: name of the split.
        out: the folder, or the file of a table.
        images: that were taken.
        patches: of these images.
        files: that hold them.
        bytes: of these files.
        notes: what its readers may not expect, a sentence each.
    """

    split: str
    out: Path
    images: int
    patches: int
    files: int
    bytes: int
    notes: tuple[str, ...] = ()


# --- the folder --------------------------------------------------------------------------


class _Record:
    """``export.json``: what an export is made from, and which parts of it are whole.

    Args:
        out: the folder, which is made. Half-written files of a run that was killed are removed.
        inputs: what decides the bytes.

    Attributes:
        parts: what is noted of each, in their order.

    Raises:
        ManifestMismatch: the folder holds an export of other inputs; says how they differ.
        ShardError: the folder holds something else.
        StorageError: the disk refuses.
    """

    def __init__(self, out: Path, inputs: Mapping[str, Any]) -> None:
        self.path, self._inputs = out / RECORD_NAME, inputs
        self.parts: list[dict[str, Any]] = []
        with storage.refusals(out):
            names = sorted(os.listdir(out))
        if RECORD_NAME in names:
            self._continue()
        elif foreign := [name for name in names if not name.startswith(".")]:
            raise ShardError(
                f"{out}: expected an empty folder, or one that the same export has begun, found "
                f"{few(foreign, 5)}: choose another --out"
            )
        with storage.refusals(out):
            for name in names:
                if name.startswith(".") and name.endswith(".tmp"):
                    (out / name).unlink(missing_ok=True)
        if not self.parts:
            self._write()

    def _continue(self) -> None:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            then, parts = dict(document["inputs"]), list(document["parts"])
            if document["format"] != _RECORD_FORMAT:
                raise ValueError(f"found format {document['format']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(
                f"{self.path}: expected the record of an export ({error!r}): choose another --out"
            ) from error
        now = storage.to_json(self._inputs)
        changed = [name for name in now if then.get(name) != now[name]]
        if changed:
            said = "; ".join(_change(name, then.get(name), now[name]) for name in changed)
            raise ManifestMismatch(
                f"{self.path.parent} holds an export of other inputs: {said}. Choose another "
                "--out, or remove the folder"
            )
        self.parts = parts

    def note(self, index: int, part: dict[str, Any]) -> None:
        """Note a part that is whole."""
        if self.parts[index : index + 1] != [part]:
            self.parts[index : index + 1] = [part]
            self._write()

    def _write(self) -> None:
        document = {"format": _RECORD_FORMAT, "inputs": self._inputs, "parts": self.parts}
        text = json.dumps(storage.to_json(document), indent=1) + "\n"
        storage.write_atomically(self.path, lambda file: file.write(text.encode()))


def _change(name: str, was: Any, now: Any) -> str:
    """Say what differs in one of the inputs."""
    if name == "shards":
        return "the shards have changed"
    if name == "class_names":
        return "--class-names gives other names"
    was, now = ("none" if value is None else value for value in (was, now))
    return f"--{name.replace('_', '-')} was {was}, now {now}"


def export_splits(
    readers: Sequence[ShardReader],
    out: Path,
    config: ExportConfig,
    done: Callable[[int], object] = lambda images: None,
) -> list[Exported]:
    """Export the patches of splits.

    Args:
        readers: of the splits.
        out: the file of a table. Else the folder, if there are several splits with a folder for
            each.
        config: what is exported, and as what.
        done: called with numbers of images that are done.

    Returns:
        What came of each split, or of the table.

    Raises:
        ManifestMismatch: the folder holds an export of other inputs.
        ShardBusy: another process is exporting to the same place.
        ShardError: the folder or the file is none that an export has begun.
        MissingDependency: Parquet is asked for, and pyarrow is not installed.
        DataError: the names of the classes are for others.
        StorageError: the disk refuses.
    """
    out = Path(out)
    if config.to in ("csv", "parquet"):
        return [_to_table(readers, out, config, done)]
    folders = [out if len(readers) == 1 else out / reader.header.split for reader in readers]
    return [
        _to_files(reader, folder, config, done)
        for reader, folder in zip(readers, folders, strict=True)
    ]


def taken_images(reader: ShardReader, config: ExportConfig) -> NDArray[np.int64]:
    """Return the rows of the images that are exported."""
    rows: NDArray[np.int64] = spread_rows(len(reader), config.limit)
    return rows[np.isin(reader.scale[rows], config.scales)]


def _busy(out: Path) -> ShardBusy:
    return ShardBusy(f"{out}: another process is exporting to it: wait for it or end it")


def _to_files(
    reader: ShardReader, out: Path, config: ExportConfig, done: Callable[[int], object]
) -> Exported:
    """Export a split as pictures."""
    images = taken_images(reader, config)
    pictures = Pictures(reader, config.picture, config.quality)
    inputs: dict[str, Any] = {
        "split": reader.header.split,
        "shards": hashlib.sha256(" ".join(reader.sha256).encode()).hexdigest(),
        "to": config.to,
        "format": config.picture,
        "quality": config.quality,
        "scale": config.scales,
        "limit": config.limit,
    }
    write = _write_folder
    if config.to == "webdataset":
        write = _write_tars
        inputs |= {"maxcount": config.maxcount, "maxsize": config.maxsize}
        inputs |= {"class_names": PatchTable(reader, config.class_names).digest}
    with storage.refusals(out):
        out.mkdir(parents=True, exist_ok=True)
    with storage.lock_file(out / ".export.lock", _busy(out)):
        record = _Record(out, inputs)
        write(reader, out, config, images, pictures, record, done)
    return Exported(
        reader.header.split,
        out,
        images=len(images),
        patches=int(reader.counts[images].sum()),
        files=sum(part.get("files", 1) for part in record.parts),
        bytes=sum(part["bytes"] for part in record.parts),
        notes=_notes(reader, images) if config.to == "folder" else (),
    )


def _notes(reader: ShardReader, images: NDArray[np.int64]) -> tuple[str, ...]:
    """Say where torchvision's ImageFolder does not number the classes as the shards do."""
    notes = []
    absent = np.setdiff1d(np.arange(len(reader.classes)), reader.label[images]).tolist()
    if absent:
        classes = few([reader.classes[i] for i in absent])
        notes.append(
            f"the folders of {counted(len(absent), 'class')} are empty ({classes}): ImageFolder "
            "needs allow_empty=True"
        )
    folders = class_folders(reader.classes)
    for i, (ours, theirs) in enumerate(zip(folders, sorted(folders), strict=True)):
        if ours != theirs:
            notes.append(
                f"ImageFolder numbers the classes in the order of their names: its class {i} is "
                f"{theirs}, that of the shards {ours}"
            )
            break
    return tuple(notes)


# --- folders of pictures ---------------------------------------------------------------


def _write_folder(
    reader: ShardReader,
    out: Path,
    config: ExportConfig,
    images: NDArray[np.int64],
    pictures: Pictures,
    record: _Record,
    done: Callable[[int], object],
) -> None:
    """Write CLASS/IMAGE__SCALE_RANK.png for each patch, a part of the images after another."""
    folders, names = class_folders(reader.classes), picture_names(reader)
    digits = max(2, len(str(int(reader.counts.max(initial=1)) - 1)))
    with storage.refusals(out):
        # Of classes without a patch too, or those after them would have other numbers.
        for folder in folders:
            (out / folder).mkdir(exist_ok=True)
    made: set[str] = set()

    def paths(rows: PatchRows) -> list[str]:
        labels = reader.label[rows.image].tolist()
        columns = rows.image.tolist(), labels, rows.scale.tolist(), rows.rank.tolist()
        return [
            f"{out}/{folders[label]}/{names[image].decode()}__{scale}_{rank:0{digits}d}"
            f".{config.picture}"
            for image, label, scale, rank in zip(*columns, strict=True)
        ]

    def write(block: Block) -> tuple[int, int, int]:
        temporary = f"{out}/.{block.images[0]}.tmp"
        for path, data in zip(paths(block.rows), block.files, strict=True):
            with storage.refusals(Path(path)):
                above = path.rpartition("/")[0]
                if above not in made:
                    os.makedirs(above, exist_ok=True)
                    made.add(above)
                with open(temporary, "wb", buffering=0) as file:
                    file.write(data)
                os.replace(temporary, path)
        return len(block.images), len(block.files), sum(map(len, block.files))

    for index, start in enumerate(range(0, len(images), _PART)):
        part = images[start : start + _PART]
        if index < len(record.parts) and all(map(_is_there, paths(rows_of(reader, part)))):
            done(len(part))
            continue
        files = size = 0
        for wrote, of_block, bytes_of_block in pictures.of(part, write):
            files, size = files + of_block, size + bytes_of_block
            done(wrote)
        # Once for all these files, that the record tells of none that a crash takes away.
        os.sync()
        record.note(index, {"images": len(part), "files": files, "bytes": size})


def _is_there(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except OSError:
        return False


# --- WebDataset --------------------------------------------------------------------------


def _write_tars(
    reader: ShardReader,
    out: Path,
    config: ExportConfig,
    images: NDArray[np.int64],
    pictures: Pictures,
    record: _Record,
    done: Callable[[int], object],
) -> None:
    """Write SPLIT-000000.tar, ..., each with KEY.cls, KEY.json and KEY.png of its patches."""
    table = PatchTable(reader, config.class_names)
    index = position = 0
    samples: Iterator[_Samples] | None = None
    while position < len(images):
        path = out / f"{reader.header.split}-{index:06d}.tar"
        part = record.parts[index] if index < len(record.parts) else None
        if part is not None and _size(path) == part["bytes"]:
            samples = None
            done(part["images"])
        else:
            if samples is None:
                blocks = pictures.of(
                    images[position:], lambda block: _samples(block, table, config)
                )
                samples = chain.from_iterable(blocks)
            fill = partial(_fill, samples=samples, config=config, done=done)
            counts, following = storage.write_atomically(path, fill)
            if following is not None:
                samples = chain([following], samples)
            part = {"name": path.name, **counts, "bytes": _size(path)}
            record.note(index, part)
        position += part["images"]
        index += 1


def _size(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_size
    return None


#: The members of the samples of one image, by their names.
_Samples: TypeAlias = list[dict[str, bytes]]


def _samples(block: Block, table: PatchTable, config: ExportConfig) -> list[_Samples]:
    """Return the samples of each image. Keys are the image's number in the split, and the rank."""
    columns = table.columns(block.rows)
    of_image: dict[int, _Samples] = {image: [] for image in block.images.tolist()}
    pairs = zip(block.rows.image.tolist(), block.rows.rank.tolist(), strict=True)
    for k, (image, rank) in enumerate(pairs):
        text = json.dumps(facts_of(columns, k), separators=(",", ":"), allow_nan=False)
        key = f"{image:08d}_{rank:03d}"
        of_image[image].append(
            {
                f"{key}.cls": str(columns["label"][k]).encode(),
                f"{key}.json": text.encode(),
                f"{key}.{config.picture}": block.files[k],
            }
        )
    return list(of_image.values())


def _fill(
    file: BinaryIO,
    samples: Iterator[_Samples],
    config: ExportConfig,
    done: Callable[[int], object],
) -> tuple[dict[str, int], _Samples | None]:
    """Write one tar file; return how much it holds, and the image that the next one begins with."""
    counts, size = {"images": 0, "samples": 0}, 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for of_image in samples:
            full = counts["samples"] + len(of_image) > config.maxcount or size >= config.maxsize
            if counts["images"] and full:
                return counts, of_image
            for name, data in chain.from_iterable(sample.items() for sample in of_image):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
                size += len(data)
            counts["images"] += 1
            counts["samples"] += len(of_image)
            done(1)
    return counts, None


# --- tables ------------------------------------------------------------------------------


def _to_table(
    readers: Sequence[ShardReader],
    out: Path,
    config: ExportConfig,
    done: Callable[[int], object],
) -> Exported:
    """Export splits as one table, a row for each patch."""
    write, begins = (write_csv, is_csv) if config.to == "csv" else parquet_format()
    if out.suffix.lower() != f".{config.to}":
        raise SettingsError(
            f"--out {out}: expected a file that ends with .{config.to}, found "
            f"{out.suffix or 'no suffix'}"
        )
    tables = [PatchTable(reader, config.class_names) for reader in readers]
    taken = [taken_images(reader, config) for reader in readers]
    with storage.refusals(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with storage.lock_file(out.with_name(f".{out.name}.lock"), _busy(out)):
        if out.exists() and not (out.is_file() and begins(out)):
            raise ShardError(
                f"{out}: expected no file, or a table that this command wrote, found something "
                "else: choose another --out"
            )
        with storage.refusals(out):
            for path in out.parent.glob(f".{out.name}.*.tmp"):
                path.unlink(missing_ok=True)

        def parts() -> Iterator[dict[str, list[Any]]]:
            for table, images in zip(tables, taken, strict=True):
                for start in range(0, len(images), _PART):
                    part = images[start : start + _PART]
                    yield table.columns(rows_of(table.reader, part))
                    done(len(part))

        storage.write_atomically(out, lambda file: write(file, parts()))
    return Exported(
        ", ".join(reader.header.split for reader in readers),
        out,
        images=sum(map(len, taken)),
        patches=sum(int(r.counts[rows].sum()) for r, rows in zip(readers, taken, strict=True)),
        files=1,
        bytes=out.stat().st_size,
    )
