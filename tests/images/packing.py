"""The same images as a folder and in archives of every kind."""

from __future__ import annotations

import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

#: Relative path -> bytes.
Tree = Mapping[str, bytes]


def tree_of(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def shuffled(tree: Tree) -> list[tuple[str, bytes]]:
    """Return the files of a tree in an order that is not sorted."""
    items = sorted(tree.items())
    random.Random(0).shuffle(items)
    return items


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mtime = 1.5 if tar.format == tarfile.PAX_FORMAT else 1  # type: ignore[assignment]
    tar.addfile(member, io.BytesIO(data))


def tar_bytes(tree: Tree, *, prefix: str = "", format: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of a tree."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in shuffled(tree):
            add(tar, prefix + name, data)
    return file.getvalue()


def zip_bytes(tree: Tree, *, prefix: str = "", method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip of a tree."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in shuffled(tree):
            archive.writestr(prefix + name, data)
    return file.getvalue()


def by_class(tree: Tree) -> dict[str, dict[str, bytes]]:
    """Return the files of each class folder, relative to it."""
    found: dict[str, dict[str, bytes]] = {}
    for name, data in tree.items():
        label, _, rest = name.partition("/")
        found.setdefault(label, {})[rest] = data
    return found


def sample(name: str, label: str, how: str) -> tuple[str, bytes]:
    """Return name and content of what bears the label of an image in a WebDataset shard."""
    folder, slash, base = name.rpartition("/")
    key = folder + slash + base.partition(".")[0]
    if how == "cls":
        return f"{key}.cls", f"{label}\n".encode()
    return f"{key}.json", json.dumps({"label": label, "width": 3}).encode()


def shard_bytes(items: list[tuple[str, bytes]], how: str, before: bool = False) -> bytes:
    """Return a WebDataset shard; the label is the class folder's name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in items:
            pair = [(name, data), sample(name, name.partition("/")[0], how)]
            for part in reversed(pair) if before else pair:
                add(tar, *part)
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    """Write a file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def one(name: str, pack: Callable[[Tree], bytes]) -> Callable[[Path, Tree], Path]:
    """Return what writes a tree into one archive of DATA."""

    def make(data: Path, tree: Tree) -> Path:
        write(data / name, pack(tree))
        return data

    return make


def _tar_of_tars(tree: Tree) -> bytes:
    return tar_bytes({f"{label}.tar": tar_bytes(files) for label, files in by_class(tree).items()})


def _folder_of_tars(data: Path, tree: Tree) -> Path:
    for label, files in by_class(tree).items():
        write(data / "val" / f"{label}.tar", tar_bytes(files))
    return data


def _shards(data: Path, tree: Tree) -> Path:
    items = shuffled(tree)
    for number in range(3):
        write(data / "val" / f"{number:05d}.tar", shard_bytes(items[number::3], "cls"))
    return data


def _pattern(data: Path, tree: Tree) -> Path:
    items = shuffled(tree)
    for number in range(11):
        shard = shard_bytes(items[number::11], "json", before=number % 2 == 1)
        write(data / f"images-val-{number}.tar", shard)
    return data / "images-{split}-{0..10}.tar"


def _archive(name: str, pack: Callable[[Tree], bytes]) -> Callable[[Path, Tree], Path]:
    return lambda data, tree: write(data / name, pack(tree))


#: What packs a tree as the split val and returns --data.
KINDS: dict[str, Callable[[Path, Tree], Path]] = {
    "tar": one("val.tar", tar_bytes),
    "tar-gnu-in-folder": one(
        "val.tar", lambda tree: tar_bytes(tree, prefix="./val/", format=tarfile.GNU_FORMAT)
    ),
    "tar-itself": _archive("pictures.tar", tar_bytes),
    "tar-of-tars": one("ILSVRC2012_img_val.tar", _tar_of_tars),
    "tars-of-classes": _folder_of_tars,
    "zip": one("val.zip", zip_bytes),
    "zip-deflated": one("val.zip", lambda tree: zip_bytes(tree, method=zipfile.ZIP_DEFLATED)),
    "zip-of-splits": _archive(
        "kaggle.zip",
        lambda tree: zip_bytes(
            {
                **{f"ILSVRC/Data/CLS-LOC/val/{name}": data for name, data in tree.items()},
                "ILSVRC/Data/CLS-LOC/train/ant/1.JPEG": b"of another split",
                "ILSVRC/Annotations/val/cat/00.xml": b"<annotation>",
            }
        ),
    ),
    "shards": _shards,
    "shards-by-pattern": _pattern,
}
