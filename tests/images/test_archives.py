"""Images in archives: the same as in a folder, or an error, and never a wrong picture."""

from __future__ import annotations

import errno
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import time
import zipfile
from bz2 import compress as bzip2
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch.errors import DataError, ImageError
from anchorpatch.images import index, members
from anchorpatch.images.archives import read_named
from anchorpatch.images.index import open_index
from anchorpatch.images.loader import load_batches
from anchorpatch.images.members import ArchiveReader
from anchorpatch.images.source import ImageSource, find_split, open_source, source_of
from anchorpatch.runtime.progress import Reporter
from tests.images.packing import (
    KINDS,
    add,
    sample,
    shard_bytes,
    tar_bytes,
    tree_of,
    write,
    zip_bytes,
)
from tests.oddities import encoded, picture

#: Pictures whose names an archive may have trouble with.
TREE = {
    **{
        f"{label}/{i}.jpg": encoded(picture(30 + i, 40 + len(label), i), "JPEG")
        for label in ("cat", "doge", "b c")
        for i in range(3)
    },
    "doge/ünï-中.JPEG": encoded(picture(30, 30, 8), "JPEG"),
    "b c/empty.png": b"",
    "cat/no image.jpg": b"no",
    f"cat/{'long' * 40}.png": encoded(picture(9, 9, 9), "PNG"),
}


class Notes(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANCHORPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> ImageSource:
    for name, data in TREE.items():
        write(tmp_path / "folder" / "val" / name, data)
    return open_source(tmp_path / "folder", "val")


def read(source: ImageSource, row: int) -> bytes | str:
    """An image's bytes, or why there are none."""
    try:
        return source.read(row)
    except ImageError as error:
        return error.reason


def found(source: ImageSource) -> dict[str, bytes | str]:
    return {source.path(row): read(source, row) for row in range(len(source))}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_as_in_a_folder(kind: str, folder: ImageSource, tmp_path: Path) -> None:
    # A folder of shards or of tars lists no folders in them.
    source = open_source(KINDS[kind](tmp_path / "packed", TREE), "val")
    assert found(source) == found(folder) == TREE
    assert source.digest() == folder.digest()
    assert source.classes == folder.classes == ("b c", "cat", "doge")
    assert source.labels.tolist() == folder.labels.tolist()
    for row in range(len(source)):
        assert read_named(source.name(row)) == source.read(row)
    half = source.limited(5)
    assert [half.read(row) for row in range(5)] == [folder.limited(5).read(row) for row in range(5)]


@pytest.mark.parametrize("kind", ["tar", "zip-deflated", "tar-of-tars", "shards"])
def test_images_of_known_paths(kind: str, folder: ImageSource, tmp_path: Path) -> None:
    data = KINDS[kind](tmp_path / "packed", TREE)
    rows = np.array([3, 0, 9])
    known = folder.paths[rows], folder.labels[rows], folder.classes
    source, missing = source_of(data, "val", *known)
    assert not missing
    assert [source.read(row) for row in range(3)] == [folder.read(int(row)) for row in rows]
    paths = np.array([b"cat/1.jpg", b"zebra/1.jpg"])
    source, missing = source_of(data, "val", paths, known[1][:2], folder.classes)
    assert missing == ["zebra/1.jpg"]
    assert [read(source, row) for row in range(2)] == [TREE["cat/1.jpg"], "missing"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["tar", "zip-deflated", "shards-by-pattern"])
def test_batches(kind: str, workers: int, folder: ImageSource, tmp_path: Path) -> None:
    source = open_source(KINDS[kind](tmp_path / "packed", TREE), "val")
    rows = [range(5), range(5, len(source))]
    both = (load_batches(images, rows, workers=workers) for images in (source, folder))
    for got, wanted in zip(*both, strict=True):
        assert got.index.tolist() == wanted.index.tolist()
        assert (got.pixels == wanted.pixels).all()
        assert got.bad == wanted.bad


def test_a_reader_crosses_processes_without_what_it_has_open(
    folder: ImageSource, tmp_path: Path
) -> None:
    source = open_source(KINDS["shards"](tmp_path / "packed", TREE), "val")
    reader = source.reader
    assert isinstance(reader, ArchiveReader)
    source.read(0)
    again = pickle.loads(pickle.dumps(reader))
    assert again._open == {} != reader._open
    places = source.places_of(slice(None)).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again, places * 20)) == [*TREE_SORTED] * 20
    child = os.fork()
    if child == 0:
        right = reader(places[0]) == TREE_SORTED[0]
        os._exit(0 if right and reader._open.keys() == {places[0][0]} else 1)
    assert os.waitpid(child, 0)[1] == 0


TREE_SORTED = [data for _, data in sorted(TREE.items(), key=lambda item: item[0].encode())]


def test_only_so_many_archives_are_open_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "_OPEN", 2)
    source = open_source(KINDS["shards-by-pattern"](tmp_path, TREE), "val")
    assert found(source) == TREE
    assert isinstance(source.read_at, ArchiveReader)
    assert len(source.read_at._open) == 2


def test_an_archive_that_cannot_be_closed_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(KINDS["tar"](tmp_path / "packed", TREE), "val")
    reader = source.reader
    assert isinstance(reader, ArchiveReader)
    assert source.read(0) == TREE_SORTED[0]
    close = os.close
    unraisable: list[object] = []
    tried: list[int] = []

    def fails(descriptor: int) -> None:
        close(descriptor)
        tried.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", fails)
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    reader._open.clear()
    assert len(tried) == 1
    assert unraisable == []


# --- the cache ------------------------------------------------------------------------------------


def aged(data: Path, seconds: int = 60) -> Path:
    """Archives that were last changed some time ago; indexes of newer ones are not kept."""
    for file in data.glob("*.*"):
        os.utime(file, (time.time(), time.time() - seconds))
    return data


def test_the_index_is_made_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = aged(KINDS["tar"](tmp_path, TREE))
    first = open_source(data, "val")
    (kept,) = cache.glob("*.index")
    whole = kept.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(index, "tar_members", None)
        assert found(open_source(data, "val")) == TREE
    # Damaged in any way, it is made again.
    for damaged in (b"", b"PK\3\4", whole[:-30], whole[:200] + b"\xff" * 40 + whole[240:]):
        kept.write_bytes(damaged)
        assert open_source(data, "val").digest() == first.digest()
        assert kept.read_bytes() == whole
    # Another archive under the same name has another index, even with the same size.
    other = {name: data[::-1] for name, data in TREE.items()}
    write(data / "val.tar", tar_bytes(dict(sorted(other.items()))))
    aged(data, 30)
    assert found(open_source(data, "val")) == other


def test_processes_index_several_archives(
    folder: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANCHORPATCH_CACHE", str(tmp_path / "none" / "of" / "it"))
    monkeypatch.setattr(index, "cpu_count", lambda: 2)
    data = KINDS["shards"](tmp_path / "data", tree_of(folder.root))
    files = sorted((data / "val").glob("*.tar"))
    write(files[0].with_name("z.tar"), tar_bytes({"cat/9.jpg": b"no", "cat/8.jpg": b"no"}))
    files.append(files[0].with_name("z.tar"))
    before = open_index(files)
    monkeypatch.setattr(index, "_MANY_BYTES", 0)
    shutil.rmtree(tmp_path / "none")
    after = open_index(files)
    assert len(after.names) == len(folder) + 2
    assert after.places["archive"].max() == len(files) - 1
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)
    files[1].write_bytes(files[1].read_bytes()[:700])
    with pytest.raises(DataError, match=f"{files[1]}: cut off"):
        open_index(files)


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "file", b"")
    monkeypatch.setenv("ANCHORPATCH_CACHE", str(tmp_path / "file" / "below"))
    notes = Notes()
    assert found(open_source(aged(KINDS["zip"](tmp_path, TREE)), "val", report=notes)) == TREE
    (message,) = notes.messages
    assert "cannot be kept" in message
    assert "$ANCHORPATCH_CACHE" in message


def test_the_cache_is_where_users_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANCHORPATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_source(aged(KINDS["tar"](tmp_path, TREE)), "val")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_source(tmp_path, "val")
    for folder in ("xdg/anchorpatch", "home/.cache/anchorpatch"):
        assert len(list((tmp_path / folder).glob("val-*.index"))) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_archive_that_changes_meanwhile(tmp_path: Path, workers: int) -> None:
    source = open_source(KINDS["tar"](tmp_path, TREE), "val")
    file = tmp_path / "val.tar"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with pytest.raises(Exception, match=r"val\.tar: has changed since this run began"):
        list(load_batches(source, [range(3)], workers=workers))
    file.unlink()
    with pytest.raises(DataError, match=r"val\.tar: cannot be read: No such file"):
        source.read(0)


# --- WebDataset -----------------------------------------------------------------------------------


def numbered(data: Path, numbers: list[int], how: str = "cls", width: int = 0) -> Path:
    """A shard of pictures whose class is a number, by which they are also named."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, number in enumerate(numbers):
            add(tar, f"{i:03d}.jpg", b"%d" % number)
            name, content = sample(f"{i:03d}.jpg", f"{number:0{width}d}", how)
            if how == "number":
                name, content = f"{i:03d}.json", json.dumps({"label": number}).encode()
            add(tar, name, content)
    write(data / "shards-0.tar", file.getvalue())
    return data / "shards-{0..0}.tar"


def test_numbers_beside_class_folders_of_train(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cat"):
        write(tmp_path / "train" / name / "1.jpg", A)
    numbered(tmp_path, [2, 0, 2]).with_name("shards-0.tar").rename(tmp_path / "val.tar")
    notes = Notes()
    source = open_source(tmp_path, "val", report=notes)
    assert source.classes == ("ant", "bee", "cat")
    assert source.labels.tolist() == [2, 0, 2]
    assert "taken as positions in the 3 classes of train: 0 is ant" in notes.messages[0]


def test_negative_numbers_are_no_labels(tmp_path: Path) -> None:
    data = numbered(tmp_path, [10, -1, 2])
    with pytest.raises(DataError, match=r"no label for 1 of 3 images, such as 001\.jpg"):
        open_source(data, "val")
    source = open_source(data, "val", only_labelled=True)
    assert source.labels.tolist() == [10, 2]


@pytest.mark.parametrize("how", ["cls", "json", "number"])
@pytest.mark.parametrize("width", [0, 4])
def test_numbers_are_the_indices_of_classes(tmp_path: Path, how: str, width: int) -> None:
    numbers = [0, 2, 10, 11, 9, 1, 3]
    source = open_source(numbered(tmp_path, numbers, how, width), "val")
    assert source.labels.tolist() == numbers == [int(source.read(i)) for i in range(7)]
    assert source.classes == tuple(map(str, range(12)))


def test_numbers_among_given_classes(tmp_path: Path) -> None:
    data = numbered(tmp_path, [2, 0, 2])
    notes = Notes()
    source = open_source(data, "val", classes=("ant", "bee", "cat"), report=notes)
    assert source.labels.tolist() == [2, 0, 2]
    assert "taken as positions in the 3 classes of train: 0 is ant" in notes.messages[0]
    # Classes that are numbers themselves are found by their names, in whatever order.
    source = open_source(data, "val", classes=("0", "1", "10", "2"))
    assert source.labels.tolist() == [3, 0, 3]
    with pytest.raises(DataError, match=r"only the 2 classes of train, found 2 more \(0, 2\)"):
        open_source(data, "val", classes=("ant", "bee"))
    with pytest.raises(DataError, match=r"expected numbers of classes below 1,000,000"):
        open_source(numbered(tmp_path / "large", [1_000_000]), "val")


def test_the_numbers_of_train_hold_for_other_splits(tmp_path: Path) -> None:
    for split, numbers in (("train", [0, 3, 11]), ("val", [3, 0])):
        numbered(tmp_path, numbers)
        (tmp_path / split).mkdir()
        (tmp_path / "shards-0.tar").rename(tmp_path / split / "shards-0.tar")
    source = open_source(tmp_path, "val")
    assert source.labels.tolist() == [3, 0]
    assert source.classes == tuple(map(str, range(12)))


def test_images_without_a_label(tmp_path: Path) -> None:
    items = sorted(TREE.items())
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in items:
            add(tar, name, data)
            if name.startswith("cat"):
                add(tar, *sample(name, "cat", "cls"))
    write(tmp_path / "val" / "0.tar", file.getvalue())
    with pytest.raises(DataError, match=r"no label for 8 of 13 images, such as b c/0\.jpg"):
        open_source(tmp_path, "val")
    source = open_source(tmp_path, "val", only_labelled=True)
    assert found(source) == {name: data for name, data in items if name.startswith("cat")}
    assert source.ignored == {"without a label": 8}


# --- hostile and damaged archives -----------------------------------------------------------------

A, B = (encoded(picture(side, 20, side), "JPEG") for side in (20, 60))
GOOD = {"cat/a.jpg": A, "dog/b.jpg": B}


def tar_with(*more: tarfile.TarInfo, first: bool = False, **options: int) -> bytes:
    """A tar of the good images and more members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:  # type: ignore[call-overload]
        for member in more if first else ():
            tar.addfile(member, io.BytesIO(bytes(member.size)))
        for name, data in GOOD.items():
            add(tar, name, data)
        for member in () if first else more:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return file.getvalue()


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def header_changed(data: bytes, at: int, new: bytes) -> bytes:
    """A tar with bytes of its first header changed, and a right checksum."""
    header = bytearray(data[:512])
    header[at : at + len(new)] = new
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def zip_changed(
    at: int, new: bytes, signature: bytes = b"PK\1\2", tree: dict[str, bytes] = GOOD
) -> bytes:
    """A zip with bytes of the first of its records of a kind changed."""
    data = bytearray(zip_bytes(tree))
    start = data.index(signature)
    data[start + at : start + at + len(new)] = new
    return bytes(data)


def zip_with(
    name: str | zipfile.ZipInfo, content: bytes, method: int = zipfile.ZIP_STORED
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for good, data in GOOD.items():
            archive.writestr(good, data)
        archive.writestr(name, content, method)
    return file.getvalue()


def zip_link(name: str, target: str) -> bytes:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return zip_with(info, target.encode())


def latin_zip() -> bytes:
    return zip_with("cat/k_fer.jpg", A).replace(b"k_fer", b"k\xe4fer")


def sparse_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in GOOD.items():
            add(tar, name, data)
        info = member("cat/sparse.jpg", size=4)
        info.pax_headers = {
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.name": "cat/sparse.jpg",
            "GNU.sparse.size": "9000",
            "GNU.sparse.numblocks": "1",
            "GNU.sparse.map": "8000,4",
        }
        tar.addfile(info, io.BytesIO(b"data"))
    return file.getvalue()


def reasons(**of_more: str) -> dict[str, str]:
    return {f"cat/{name}.jpg": reason for name, reason in of_more.items()}


TAR = tar_bytes(GOOD, format=tarfile.USTAR_FORMAT)
SIZE = slice(124, 136)

#: Name of an archive's suffix, its bytes, and what it must come to: an error, or images beside the
#: good ones that are skipped with a reason, or (links) are the bytes of another.
HOSTILE: dict[str, tuple[str, bytes, str | dict[str, str | bytes]]] = {
    "tar-empty-file": (".tar", b"", "found an empty file"),
    "tar-no-members": (".tar", bytes(10240), "no image;"),
    "tar-text": (".tar", b"x" * 2000, "neither a tar nor a zip file"),
    "tar-gzip": (".tar", gzip.compress(TAR), r"compressed by gzip.*\(gunzip\)"),
    "tar-bzip2": (".tar", bzip2(TAR), r"compressed by bzip2.*\(bunzip2\)"),
    "tar-xz": (".tar", lzma.compress(TAR), r"compressed by xz.*\(unxz\)"),
    "tar-zstd": (".tar", b"\x28\xb5\x2f\xfd" + bytes(99), r"compressed by zstd.*\(unzstd\)"),
    "tar-cut-in-a-header": (".tar", TAR[: 512 + 1024 + 100], "cut off|damaged"),
    "tar-cut-in-an-image": (".tar", TAR[:700], "cut off: dog/b.jpg|cut off: cat/a.jpg"),
    "tar-cut-after-an-image": (
        ".tar",
        TAR[: len(TAR.rstrip(b"\0")) // 512 * 512 + 512],
        "end mark",
    ),
    "tar-without-end-mark": (".tar", TAR[: 2 * 512 + 2 * 1024], "cut off|end mark is missing"),
    "tar-two-joined-by-cat": (".tar", TAR + tar_bytes({"cat/c.jpg": A}), "tar --concatenate"),
    "tar-damaged-header": (
        ".tar",
        TAR[: 512 + 1024 + 7] + b"\xff" + TAR[512 + 1024 + 8 :],
        "damaged",
    ),
    "tar-size-negative": (".tar", header_changed(TAR, 124, b"\xff" * 12), "damaged"),
    "tar-size-beyond-the-end": (".tar", header_changed(TAR, 124, b"00000777777\0"), "cut off"),
    "tar-size-no-number": (".tar", header_changed(TAR, 124, b"zzzzzzzzzzz\0"), "neither|damaged"),
    "tar-twice-the-same-name": (
        ".tar",
        tar_with(member("cat/a.jpg", size=3)),
        "there twice, such as cat/a.jpg",
    ),
    "tar-twice-by-a-dot": (".tar", tar_with(member("./cat//a.jpg", size=3)), "there twice"),
    "tar-climbs-out": (".tar", tar_with(member("../../cat/c.jpg")), "leads out of the archive"),
    "tar-climbs-out-within": (
        ".tar",
        tar_with(member("cat/../../c.jpg")),
        "leads out of the archive",
    ),
    "tar-absolute-name": (".tar", tar_with(member("/etc/c.jpg")), "leads out of the archive"),
    "tar-name-not-utf8": (
        ".tar",
        tar_with(member("cat/k\udce4fer.jpg"), format=tarfile.GNU_FORMAT),
        "is not UTF-8",
    ),
    "tar-symlink-to-a-member": (
        ".tar",
        tar_with(member("cat/l.jpg", tarfile.SYMTYPE, "../dog/b.jpg")),
        {"cat/l.jpg": B},
    ),
    "tar-symlink-out": (
        ".tar",
        tar_with(member("cat/l.jpg", tarfile.SYMTYPE, "/etc/passwd")),
        reasons(l="missing"),
    ),
    "tar-symlink-up": (
        ".tar",
        tar_with(member("cat/l.jpg", tarfile.SYMTYPE, "../../../a.jpg")),
        reasons(l="missing"),
    ),
    "tar-symlinks-in-a-circle": (
        ".tar",
        tar_with(
            member("cat/l.jpg", tarfile.SYMTYPE, "m.jpg"),
            member("cat/m.jpg", tarfile.SYMTYPE, "l.jpg"),
        ),
        reasons(l="missing", m="missing"),
    ),
    "tar-hard-link": (
        ".tar",
        tar_with(member("cat/l.jpg", tarfile.LNKTYPE, "dog/b.jpg")),
        {"cat/l.jpg": B},
    ),
    "tar-hard-link-ahead": (
        ".tar",
        tar_with(member("cat/l.jpg", tarfile.LNKTYPE, "dog/b.jpg"), first=True),
        {"cat/l.jpg": B},
    ),
    "tar-hard-link-to-nothing": (
        ".tar",
        tar_with(member("cat/l.jpg", tarfile.LNKTYPE, "dog/c.jpg")),
        reasons(l="missing"),
    ),
    "tar-pipe": (
        ".tar",
        tar_with(member("cat/p.jpg", tarfile.FIFOTYPE)),
        reasons(p="not a regular file"),
    ),
    "tar-device": (
        ".tar",
        tar_with(member("cat/p.jpg", tarfile.CHRTYPE)),
        reasons(p="not a regular file"),
    ),
    "tar-folder-named-as-an-image": (
        ".tar",
        tar_with(member("cat/p.jpg", tarfile.DIRTYPE)),
        reasons(p="not a regular file"),
    ),
    "tar-sparse": (".tar", sparse_tar(), reasons(sparse="sparse file")),
    "tar-empty-class": (
        ".tar",
        tar_with(member("eel/", tarfile.DIRTYPE)),
        r"1 of 3 class folders are empty \(eel: empty\)",
    ),
    "tar-flat": (".tar", tar_bytes({"a.jpg": A}), "images without a class"),
    "tar-too-deep": (
        ".tar",
        tar_bytes({"imagenet/cat/a.jpg": A, "imagenet/dog/b.jpg": B}),
        "all images in folders below imagenet",
    ),
    "tar-inner-cut": (".tar", tar_bytes({"cat.tar": TAR[:700]}), r"a tar at byte .*cut off"),
    "tar-inner-gzip": (".tar", tar_bytes({"cat.tar": gzip.compress(TAR)}), r"a tar at byte"),
    "tar-two-images-with-one-label": (
        ".tar",
        tar_bytes({"1.jpg": A, "1.png": B, "1.cls": b"3"}),
        "expected one image per sample",
    ),
    "tar-label-of-control-characters": (
        ".tar",
        tar_bytes({"1.jpg": A, "1.cls": b"a\x1bb"}),
        "expected the name or number of a class",
    ),
    "tar-long-name-for-ever": (
        ".tar",
        b"".join(header_changed(TAR[:512], 156, b"L") for _ in range(3000)),
        "damaged|cut off|neither",
    ),
    "zip-cut": (".zip", zip_bytes(GOOD)[:-10], "cut off"),
    "zip-cut-in-front": (".zip", zip_bytes(GOOD)[40:], "neither|damaged"),
    "zip-data-behind": (".zip", zip_bytes(GOOD) + b"xxxx", "cut off"),
    "zip-directory-damaged": (".zip", zip_changed(0, b"XX"), "damaged directory"),
    "zip-offset-beyond-the-end": (
        ".zip",
        zip_changed(42, b"\xff\xff\xff\x00"),
        "damaged directory",
    ),
    "zip-count-too-large": (".zip", zip_changed(10, b"\x09\x00", b"PK\5\6"), "damaged directory"),
    "zip-count-too-small": (".zip", zip_changed(10, b"\x01\x00", b"PK\5\6"), "damaged directory"),
    "zip-in-parts": (".zip", zip_changed(4, b"\x02\x00", b"PK\5\6"), "several parts"),
    "zip-twice-the-same-name": (".zip", zip_with("cat/./a.jpg", B), "there twice"),
    "zip-climbs-out": (".zip", zip_with("../c.jpg", A), "leads out of the archive"),
    "zip-absolute-name": (".zip", zip_with("/c.jpg", A), "leads out of the archive"),
    "zip-name-not-utf8": (".zip", latin_zip(), "is not UTF-8"),
    "zip-link": (".zip", zip_link("cat/l.jpg", "../dog/b.jpg"), {"cat/l.jpg": B}),
    "zip-link-out": (".zip", zip_link("cat/l.jpg", "/etc/passwd"), reasons(l="missing")),
    "zip-bzip2": (
        ".zip",
        zip_with("cat/z.jpg", A, zipfile.ZIP_BZIP2),
        reasons(z="unsupported compression"),
    ),
    "zip-encrypted": (".zip", zip_changed(8, b"\x01\x00"), {"cat/a.jpg": "encrypted"}),
    "zip-wrong-checksum": (".zip", zip_changed(16, b"\0\0\0\0"), {"cat/a.jpg": "damaged member"}),
    "zip-wrong-size": (".zip", zip_changed(24, b"\x05\0\0\0"), {"cat/a.jpg": "damaged member"}),
    "zip-offset-of-another": (
        ".zip",
        zip_changed(42, struct.pack("<I", zip_bytes(GOOD).index(b"PK\3\4", 1))),
        {"cat/a.jpg": "damaged member"},
    ),
    "zip-other-name-in-front": (
        ".zip",
        zip_changed(30, b"cow", b"PK\3\4"),
        {"cat/a.jpg": "damaged member"},
    ),
    "zip-header-damaged": (".zip", zip_changed(0, b"PK\3\5", b"PK\3\4"), "neither"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_damaged_archives(name: str, tmp_path: Path) -> None:
    suffix, data, wanted = HOSTILE[name]
    write(tmp_path / f"val{suffix}", data)
    if isinstance(wanted, str):
        with pytest.raises(DataError, match=wanted) as caught:
            open_source(tmp_path, "val")
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}/val{suffix}")
        assert "\n" not in message
        assert not re.search(r"Error\b|object at 0x", message)
        return
    assert found(open_source(tmp_path, "val")) == {**GOOD, **wanted}


def test_a_large_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets and sizes above 4 GiB, which are in extra fields."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    write(tmp_path / "val.zip", zip_bytes(TREE, method=zipfile.ZIP_DEFLATED))
    assert b"PK\6\6" in (tmp_path / "val.zip").read_bytes()
    assert found(open_source(tmp_path, "val")) == TREE


PACKED = {
    ".tar": tar_bytes(GOOD, format=tarfile.GNU_FORMAT),
    ".zip": zip_bytes(GOOD, method=zipfile.ZIP_DEFLATED),
}


@settings(max_examples=150, deadline=None)
@given(
    suffix=st.sampled_from([".tar", ".zip"]),
    place=st.floats(0, 1, exclude_max=True),
    change=st.integers(0, 255),
)
def test_damage_never_gives_another_picture(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    place: float,
    change: int,
) -> None:
    """The file is cut off (0) or one byte is changed: an error, a reason, or what is there."""
    packed = bytearray(PACKED[suffix])
    at, cut = int(place * len(packed)), not change
    packed[at] ^= change
    if cut:
        del packed[at:]
    folder = tmp_path_factory.mktemp("damaged")
    try:
        write(folder / f"val{suffix}", bytes(packed))
        source = open_source(folder, "val")
        images = found(source)
    except DataError:
        return
    finally:
        shutil.rmtree(folder)
    assert not cut or images == GOOD  # only some of the zeros behind the end mark are cut off
    read = {name: data for name, data in images.items() if isinstance(data, bytes)}
    if suffix == ".zip":  # names have no checksum, but are there twice
        assert read.items() <= GOOD.items()
        return
    # Data have no checksum, as in a folder; headers have.
    assert images.keys() == read.keys() == GOOD.keys()
    for name, data in read.items():
        assert sum(a != b for a, b in zip(data, GOOD[name], strict=True)) <= 1


# --- which archive --------------------------------------------------------------------------------


def test_a_folder_is_read_before_the_archive_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "val" / "cat" / "1.jpg", A)
    KINDS["tar"](tmp_path, TREE)
    notes = Notes()
    assert len(open_source(tmp_path, "val", report=notes)) == 1
    assert notes.messages == [f"reading the folder {tmp_path}/val, not val.tar beside it"]


def test_several_archives_could_be_meant(tmp_path: Path) -> None:
    KINDS["tar"](tmp_path, TREE)
    KINDS["zip"](tmp_path, TREE)
    with pytest.raises(DataError, match=r"val\.tar, val\.zip could all be the split 'val'"):
        open_source(tmp_path, "val")
    assert found(open_source(tmp_path / "val.zip", "val")) == TREE


@pytest.mark.parametrize(
    ("files", "data", "wanted"),
    [
        (["val.tar.gz"], "", r"val\.tar\.gz: compressed, .* \(gunzip"),
        (["ILSVRC2012_img_val.tgz"], "", r"ILSVRC2012_img_val\.tgz: compressed"),
        (["a-0.tar"], "a-*.tar", r"no such folder.* or a pattern such as train-"),
        (["VAL.ZIP", "a.TAR"], "", r"no folder or archive .*; there are VAL, a; choose one"),
        (["valid.tar"], "", r"no folder or archive for split .*did you mean --split valid\?"),
        (["a-0.tar"], "a-{0..2}.tar", r"2 of 3 archives are missing, such as .*a-1\.tar"),
        (["a-0.tar"], "a-{2..0}.tar", r"or expected a pattern such as"),
        (["a-0.tar"], "a-{0.tar", r"or expected a pattern such as"),
        (["val/0001.tar", "val/0002.tar"], "", r"images without a class"),
        (["val/0001.tar.gz", "val/0002.tar.gz"], "", r"0001\.tar\.gz: compressed, .* \(gunzip"),
    ],
)
def test_what_is_no_archive_of_the_split(
    tmp_path: Path, files: list[str], data: str, wanted: str
) -> None:
    for i, name in enumerate(files):
        write(tmp_path / name, tar_bytes({f"{i}.jpg": A}))
    with pytest.raises(DataError, match=wanted):
        open_source(tmp_path / data, "val")


def test_an_archive_of_several_splits(tmp_path: Path) -> None:
    """Its folders are never taken for classes."""
    splits = {
        f"{split}/{name}": data for split in ("train", "valid") for name, data in GOOD.items()
    }
    both = write(tmp_path / "train-and-val.zip", zip_bytes(splits))
    assert found(open_source(both, "valid")) == GOOD
    with pytest.raises(DataError, match=r"no folder for split 'val' in it; there are train, valid"):
        open_source(both, "val")


@pytest.mark.parametrize("name", ["data.zip", "val.zip"])
def test_splits_are_no_classes_beside_loose_images(tmp_path: Path, name: str) -> None:
    splits = {f"{split}/{path}": data for split in ("train", "val") for path, data in GOOD.items()}
    write(tmp_path / name, zip_bytes({**splits, "train/cover.jpg": A, "preview.jpg": B}))
    data = tmp_path if name == "val.zip" else tmp_path / name
    assert found(open_source(data, "val")) == GOOD
    with pytest.raises(DataError, match=r"no folder for split 'test' in it; there are train, val"):
        open_source(tmp_path / name, "test")
    write(
        tmp_path / name, zip_bytes({**{f"set/{path}": d for path, d in GOOD.items()}, "a.jpg": A})
    )
    with pytest.raises(DataError, match=r"no folder for split 'test' in it; there are set"):
        open_source(tmp_path / name, "test")


def test_a_class_that_is_called_as_a_split(tmp_path: Path) -> None:
    tree = {"car/1.jpg": A, "train/1.jpg": B}
    splits = {f"{split}/{name}": data for split in ("train", "val") for name, data in tree.items()}
    write(tmp_path / "data.zip", zip_bytes(splits))
    for split in ("train", "val"):
        assert found(open_source(tmp_path / "data.zip", split)) == tree


def test_each_image_of_a_sample_with_a_label_of_its_own(tmp_path: Path) -> None:
    """Names with dots, of which the first ends the key."""
    samples = {"a.jpg": A, "a.cls": b"cat", "a.1.jpg": B, "a.1.cls": b"dog"}
    write(tmp_path / "shards.tar", tar_bytes(samples))
    with pytest.raises(DataError, match=r"expected one label per sample, found .*a\.1\.cls"):
        open_source(tmp_path / "shards.tar", "val")
    # Of several labels of one image, key.cls is that of the class.
    several = {"a.jpg": A, "a.cls": b"cat", "a.order.cls": b"carnivora", "a.json": b"{}"}
    write(tmp_path / "labels.tar", tar_bytes(several))
    assert open_source(tmp_path / "labels.tar", "val").classes == ("cat",)
    del several["a.cls"]
    write(tmp_path / "labels.tar", tar_bytes(several))
    assert open_source(tmp_path / "labels.tar", "val").classes == ("carnivora",)
    write(tmp_path / "labels.tar", tar_bytes({**several, "a.genus.cls": b"felis"}))
    with pytest.raises(DataError, match=r"found a\.genus\.cls and a\.order\.cls; pack .* a\.cls"):
        open_source(tmp_path / "labels.tar", "val")


def test_links_in_tars_of_classes(tmp_path: Path) -> None:
    for label, data in (("ant", A), ("bee", B)):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            add(tar, "1.jpg", data)
            link = tarfile.TarInfo("2.jpg")
            link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
            tar.addfile(link)
        write(tmp_path / "val" / f"{label}.tar", file.getvalue())
    assert found(open_source(tmp_path, "val")) == {
        **{f"ant/{i}.jpg": A for i in (1, 2)},
        **{f"bee/{i}.jpg": B for i in (1, 2)},
    }


def test_one_of_several_archives_without_class_folders(tmp_path: Path) -> None:
    """Its images are not passed over as strays are."""
    write(tmp_path / "val" / "ant.tar", tar_bytes({"1.jpg": A}))
    write(tmp_path / "val" / "bee.tar", tar_bytes({"old/1.jpg": B}))
    with pytest.raises(DataError, match=r"ant\.tar: images without a class: .* \(old\)"):
        open_source(tmp_path, "val")
    write(tmp_path / "val" / "ant.tar", tar_bytes({"1.jpg": A, "ant/2.jpg": A}))
    assert open_source(tmp_path, "val").ignored == {".jpg outside the class folders": 1}


def test_a_zip_of_windows(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        for name, data in TREE.items():
            member = zipfile.ZipInfo("val\\" + name.replace("/", "\\"))
            member.create_system = 0
            archive.writestr(member, data)
    assert found(open_source(tmp_path, "val")) == TREE


def test_further_images_of_a_sample_are_passed_over(tmp_path: Path) -> None:
    sample_of_three = {"1.jpg": A, "1.seg.png": B, "1.cls": b"cat", "1.edge.jpg": B}
    write(tmp_path / "shards.tar", tar_bytes(sample_of_three))
    source = open_source(tmp_path / "shards.tar", "val")
    assert found(source) == {"1.jpg": A}
    assert source.ignored == {"further images of a sample": 2}


def test_the_classes_of_an_archive_of_train_hold_for_val(tmp_path: Path) -> None:
    write(tmp_path / "train.zip", zip_bytes({f"{name}/1.jpg": A for name in ("ant", "cat", "dog")}))
    write(tmp_path / "val.tar", TAR)
    assert open_source(tmp_path, "val").classes == ("ant", "cat", "dog")
    write(tmp_path / "train.zip", zip_bytes({"ant/1.jpg": A}))
    assert open_source(tmp_path, "val").classes == ("cat", "dog")


@pytest.mark.parametrize("how", ["tar", "zip"])
def test_flat_images_with_a_table_of_labels(tmp_path: Path, how: str) -> None:
    flat = {f"ILSVRC2012_val_0000000{i}.JPEG": b"%d" % i for i in range(3)}
    name = "ILSVRC2012_img_val.tar" if how == "tar" else "val.zip"
    write(tmp_path / name, tar_bytes(flat) if how == "tar" else zip_bytes(flat, prefix="val/"))
    table = write(
        tmp_path / "labels.csv", b"ILSVRC2012_val_00000002,n02\nILSVRC2012_val_00000000,n07\n"
    )
    with pytest.raises(DataError, match=r"no label for 1 of 3 images .*--only-labelled"):
        open_source(tmp_path, "val", table)
    source = open_source(tmp_path, "val", table, only_labelled=True)
    assert found(source) == {name: flat[name] for name in sorted(flat)[::2]}
    assert [source.classes[i] for i in source.labels] == ["n07", "n02"]
    assert source.ignored == {"without a label": 1}


def test_named_images(tmp_path: Path) -> None:
    write(tmp_path / "val.tar", TAR)
    assert read_named(f"{tmp_path}/val.tar::cat/a.jpg") == A
    with pytest.raises(ImageError, match="missing"):
        read_named(f"{tmp_path}/val.tar::cat/b.jpg")
    with pytest.raises(ImageError, match=r"missing: there is no archive .*none\.tar"):
        read_named(f"{tmp_path}/none.tar::cat/b.jpg")
    # As tar lists it, and in a folder whose name has colons.
    assert read_named(f"{tmp_path}/val.tar::./cat/a.jpg") == A
    write(tmp_path / "a::b" / "val.tar", TAR)
    assert read_named(f"{tmp_path}/a::b/val.tar::cat/a.jpg") == A
    write(tmp_path / "odd::name.jpg", B)
    assert read_named(f"{tmp_path}/odd::name.jpg") == B


def test_the_index_of_several_archives_names_both_that_clash(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.tar", TAR) for i in range(2)]
    with pytest.raises(DataError, match=r"0\.tar and .*1\.tar: 2 images there twice"):
        open_index(files)


def test_a_tree_on_disk_is_packed_as_it_is(folder: ImageSource) -> None:
    assert tree_of(folder.root) == TREE
    assert shard_bytes(sorted(TREE.items()), "cls") != shard_bytes(sorted(TREE.items()), "json")


def test_images_of_any_layout(tmp_path: Path) -> None:
    tree = {"cat/a.jpg": b"a", "dog/deep/b.jpg": b"b"}
    loose = {**tree, "c.png": b"c", "d.txt": b"d"}
    split = {f"{name}/{path}": data for name in ("train", "val") for path, data in tree.items()}
    packs: dict[str, bytes] = {
        "classes.zip": zip_bytes({f"val/{path}": data for path, data in tree.items()}),
        "album.tar": tar_bytes(loose),
        "packed/val.zip": zip_bytes(tree),
    }
    for top, files in {"set": tree, "mixed": loose, "data": split, "": packs}.items():
        for path, data in files.items():
            (tmp_path / top / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / top / path).write_bytes(data)
    found = {
        name: (found := find_split(tmp_path / name), open_source(*found, unlabelled=True))
        for name in ("set", "mixed", "data", "classes.zip", "album.tar", "packed")
    }
    assert {name: (data.name, split) for name, ((data, split), _) in found.items()} == {
        "set": (tmp_path.name, "set"),
        "mixed": (tmp_path.name, "mixed"),
        "data": ("data", "val"),
        "classes.zip": ("classes.zip", "val"),
        "album.tar": ("album.tar", "val"),
        "packed": ("packed", "val"),
    }
    labelled = {name: source for name, (_, source) in found.items() if len(source) == 2}
    assert labelled.keys() == {"set", "data", "classes.zip", "packed"}
    for source in labelled.values():
        assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0, 1])
    for name in ("mixed", "album.tar"):
        source = found[name][1]
        assert (source.classes, source.labels.tolist()) == ((name.split(".")[0],), [0, 0, 0])
        assert [source.read(i) for i in range(3)] == [b"c", b"a", b"b"]
    with pytest.raises(DataError, match="nope: no such folder or archive"):
        find_split(tmp_path / "nope")
