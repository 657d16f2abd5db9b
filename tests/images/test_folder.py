"""Discovery of images and labels, against a plain walk, and every error it can raise."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch import storage
from anchorpatch.errors import DataError, SettingsError
from anchorpatch.images.labels import EXTENSIONS
from anchorpatch.images.source import ImageSource, open_source, spread_rows


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * len(file.name))


def error_of(data: Path, split: str = "val", labels: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        open_source(data, split, labels)
    message = str(caught.value)
    assert "\n" not in message
    return message


def relative(folder: ImageSource) -> list[str]:
    return [folder.path(i) for i in range(len(folder))]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    touch(*(tmp_path / "val" / f"ILSVRC2012_val_0000000{i}.JPEG" for i in range(3)))
    return tmp_path


def kaggle(data: Path, *rows: str) -> Path:
    file = data / "LOC_val_solution.csv"
    file.write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return file


def plain(data: Path, *rows: str) -> Path:
    file = data / "labels.csv"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


NAMES = st.text("aZ09 _-é.~\x7f中", min_size=1, max_size=4).filter(
    lambda name: not name.startswith(".")
)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        NAMES.map(str.lower).filter(lambda name: name.strip(".")),
        st.lists(st.tuples(NAMES, st.sampled_from(EXTENSIONS)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_scan_equals_a_plain_walk(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, list[tuple[str, str]]]
) -> None:
    root = tmp_path_factory.mktemp("data") / "val"
    for label, names in tree.items():
        touch(*(root / f"class {label}" / (name + extension) for name, extension in names))
    folder = open_source(root.parent, "val")
    files = [path for path in root.rglob("*") if path.is_file()]
    wanted = sorted(os.fsencode(path.relative_to(root)) for path in files)
    assert folder.paths.tolist() == wanted
    assert list(folder.classes) == sorted((f"class {label}" for label in tree), key=str.encode)
    for i, path in enumerate(relative(folder)):
        assert folder.classes[folder.labels[i]] == path.split("/")[0]
        assert folder.sizes[i] == (root / path).stat().st_size
    assert folder.paths.dtype.kind == "S"
    assert [str(array.dtype) for array in (folder.labels, folder.sizes)] == ["int32", "int64"]


def test_extensions_hidden_files_and_nested_folders(tmp_path: Path) -> None:
    a = tmp_path / "val" / "a"
    good = ["1.JPEG", "2.jpg", "3.PnG", "4.webp", "5.BMP", "deep/er/6.jpeg", "b.jpg.png"]
    good += ["c.jfif", "d.JPE", "e.tif", "f.TIFF", "g.avif", "h.GIF"]
    touch(*(a / name for name in good))
    touch(a / ".hidden.jpg", a / ".cache" / "7.jpg", a / "notes.txt", a / "8.svg", a / "jpg")
    touch(a / "deep" / "er" / "more.TXT", a / "b" / ".hidden.txt", tmp_path / "val" / "loose.jpg")
    touch(tmp_path / "val" / ".DS_Store", tmp_path / "val" / "list.csv")
    (tmp_path / "val" / ".git").mkdir()
    folder = open_source(tmp_path, "val")
    assert relative(folder) == sorted(f"a/{name}" for name in good)
    assert folder.classes == ("a",)
    passed_over = {".txt": 2, ".svg": 1, "jpg": 1, ".jpg outside the class folders": 1}
    assert folder.ignored == passed_over
    assert (folder.passed_over() or "").startswith(
        f"{tmp_path / 'val'}: 5 files passed over (2 .txt, 1 .jpg outside the class folders, "
    )
    assert folder.limited(1).ignored == passed_over


def test_order_is_that_of_the_bytes(tmp_path: Path) -> None:
    names = ["é/1.jpg", "z/1.jpg", "Z/1.jpg", "z z/1.jpg", "中/1.jpg", "z/1 .jpg", "z/10.jpg"]
    touch(*(tmp_path / "val" / name for name in names))
    folder = open_source(tmp_path, "val")
    assert relative(folder) == sorted(names, key=str.encode)
    assert folder.classes == ("Z", "z", "z z", "é", "中")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "1.jpg", tmp_path / "val" / "b" / "2.jpg")
    (tmp_path / "val" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "val" / "b" / "loop").symlink_to(tmp_path / "val" / "b")
    (tmp_path / "val" / "b" / "gone.jpg").symlink_to("nowhere")
    folder = open_source(tmp_path, "val")
    assert relative(folder) == ["a/1.jpg", "b/2.jpg", "b/gone.jpg"]
    assert folder.sizes.tolist() == [5, 5, 0]


def test_a_folder_or_pipe_named_like_an_image_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "val" / "a" / "1.jpg").mkdir(parents=True)
    os.mkfifo(tmp_path / "val" / "a" / "2.jpg")
    folder = open_source(tmp_path, "val")
    assert relative(folder) == ["a/1.jpg", "a/2.jpg"]
    assert folder.sizes.tolist() == [0, 0]


def test_newlines_are_just_bytes(tmp_path: Path) -> None:
    touch(tmp_path / "val" / "a" / "new\nline.jpg")
    assert relative(open_source(tmp_path, "val")) == ["a/new\nline.jpg"]


@pytest.mark.parametrize("name", [b"a/\xff.jpg", b"\xe9/1.jpg"])
def test_names_that_are_not_utf8_are_refused(tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"val", name)
    os.makedirs(os.path.dirname(path))
    with open(path, "wb"):
        pass
    message = error_of(tmp_path)
    assert "not UTF-8" in message
    assert "\\x" in message


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(1, 300))
def test_a_limit_gives_every_class_its_share(sizes: list[int], limit: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = spread_rows(len(labels), limit)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == min(limit, len(labels))
    found = np.bincount(labels[rows], minlength=len(sizes))
    share = np.array(sizes) * len(rows) / len(labels)
    assert (np.abs(found - share) < 1).all()


def test_limit_and_digest(tmp_path: Path) -> None:
    touch(*(tmp_path / "val" / name for name in ("a/1.jpg", "b/22.jpg", "c/333.jpg")))
    folder = open_source(tmp_path, "val")
    plain_digest = hashlib.sha256(
        b"a/1.jpg\0b/22.jpg\0c/333.jpg\0" + struct.pack("<3i3q", 0, 1, 2, 5, 6, 7)
    ).hexdigest()
    assert folder.digest() == folder.digest(0, 3) == plain_digest
    some = folder.limited(2)
    assert len(some) == 2
    assert some.classes == folder.classes
    assert some.digest() == folder.digest(0, 2) != folder.digest(1, 3)
    assert folder.limited(None).digest() == folder.limited(4).digest() == plain_digest
    # A longer name elsewhere widens the array, which must not be seen.
    touch(tmp_path / "val" / "d" / ("long" * 30 + ".jpg"))
    assert open_source(tmp_path, "val").digest(0, 3) == plain_digest


@pytest.mark.parametrize("change", ["name", "label", "size", "order"])
def test_digest_sees_every_change(tmp_path: Path, change: str) -> None:
    touch(*(tmp_path / "val" / name for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg")))
    before = open_source(tmp_path, "val")
    if change == "name":
        (tmp_path / "val" / "a" / "2.jpg").rename(tmp_path / "val" / "a" / "3.jpg")
    elif change == "label":
        touch(tmp_path / "val" / "0" / "1.jpg")
    elif change == "size":
        (tmp_path / "val" / "a" / "2.jpg").write_bytes(b"")
    after = open_source(tmp_path, "val")
    if change == "order":
        turned = [1, 0, 2]
        after = ImageSource(
            before.root,
            before.split,
            before.paths[turned],
            before.labels[turned],
            before.sizes[turned],
            before.classes,
        )
    assert before.digest() != after.digest()


def test_missing_data_folder(tmp_path: Path) -> None:
    message = error_of(tmp_path / "data")
    assert message.startswith(f"{tmp_path / 'data'}: no such folder; expected DATA/SPLIT/CLASS")
    touch(tmp_path / "file")
    assert "neither a tar nor a zip file" in error_of(tmp_path / "file")


def test_missing_split_names_those_that_exist(tmp_path: Path) -> None:
    touch(tmp_path / "train" / "a" / "1.jpg", tmp_path / "valid" / "a" / "1.jpg")
    message = error_of(tmp_path)
    assert "there are train, valid" in message
    assert "did you mean --split valid?" in message
    assert "choose one with --split" in error_of(tmp_path, "xyz")
    assert "nor any other" in error_of(tmp_path / "train" / "a")


@pytest.mark.parametrize("split", [".", "..", "../data/val", "val/", "/val"])
def test_a_split_is_the_name_of_a_folder(tmp_path: Path, split: str) -> None:
    (tmp_path / "data" / "val" / "a").mkdir(parents=True)
    with pytest.raises(SettingsError, match="--split: expected the name of a folder below --data"):
        open_source(tmp_path / "data", split)


def test_data_that_is_itself_a_split(tmp_path: Path) -> None:
    touch(tmp_path / "val" / "a" / "1.jpg", tmp_path / "val" / "b" / "1.jpg")
    assert f"did you mean --data {tmp_path} --split val?" in error_of(tmp_path / "val")


def test_flat_folder_without_labels(flat: Path) -> None:
    assert "--labels FILE" in error_of(flat)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    assert "no class folder and no image" in error_of(tmp_path)
    (tmp_path / "val" / "a").mkdir()
    assert "no image in its 1 class folders (a: empty)" in error_of(tmp_path)
    touch(tmp_path / "val" / "a" / "1.heic", tmp_path / "val" / "a" / "2.TXT")
    assert "(a: other files: .heic, .txt)" in error_of(tmp_path)


def test_empty_classes_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "val" / "z" / "1.jpg")
    for name in "abcdefg":
        (tmp_path / "val" / name).mkdir()
    message = error_of(tmp_path)
    assert "7 of 8 class folders are empty" in message
    assert "(a: empty, b: empty, c: empty, d: empty, e: empty and 2 more)" in message
    assert message.endswith("remove the folders, or accept them with --allow-empty")
    folder = open_source(tmp_path, "val", allow_empty=True)
    assert folder.classes == (*"abcdefg", "z")
    assert folder.labels.tolist() == [7]
    assert folder.passed_over() is None


@pytest.mark.parametrize("empty", [False, True])
def test_the_classes_of_train_hold_for_other_splits(tmp_path: Path, empty: bool) -> None:
    for name in ("ant", "bee", "cat"):
        touch(tmp_path / "train" / name / "1.jpg")
    touch(tmp_path / "val" / "cat" / "1.jpg", tmp_path / "val" / "ant" / "1.jpg")
    if empty:
        (tmp_path / "val" / "bee").mkdir()
    folder = open_source(tmp_path, "val")
    assert folder.classes == ("ant", "bee", "cat")
    assert folder.labels.tolist() == [0, 2]
    # A class of its own: the split stands for itself, unless the classes of train are asked for.
    touch(tmp_path / "val" / "dog" / "1.jpg")
    if empty:
        assert "1 of 4 class folders are empty (bee: empty)" in error_of(tmp_path)
    else:
        assert open_source(tmp_path, "val").classes == ("ant", "cat", "dog")
    with pytest.raises(DataError, match=r"only the 3 classes of train, found 1 more \(dog\)"):
        open_source(tmp_path, "val", classes=("ant", "bee", "cat"))


def test_given_classes_keep_their_order(tmp_path: Path) -> None:
    touch(tmp_path / "val" / "a" / "1.jpg", tmp_path / "val" / "b" / "1.jpg")
    folder = open_source(tmp_path, "val", classes=("b", "x", "a"))
    assert folder.classes == ("b", "x", "a")
    assert folder.labels.tolist() == [2, 0]


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "val" / "a" / "1.jpg")
    scandir = os.scandir

    def refuse(path: bytes) -> object:
        if path.endswith(b"/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert error_of(tmp_path) == f"{tmp_path}/val/a: cannot be listed: Permission denied"


def test_a_disk_that_falters_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "val" / "a" / "1.jpg")
    scandir, failures = os.scandir, []
    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))

    def falter(path: bytes) -> object:
        if path.endswith(b"/a") and len(failures) != times:
            failures.append(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", falter)
    times = 2
    assert len(open_source(tmp_path, "val")) == 1
    times = -1
    assert "/val/a: cannot be read: Stale file handle (tried 3 times)" in error_of(tmp_path)


def test_kaggle_labels(flat: Path) -> None:
    file = kaggle(
        flat,
        "ILSVRC2012_val_00000002,n03 0 0 9 9 n03 1 1 2 2 ",
        "ILSVRC2012_val_00000000,n02 111 108 230 366 ",
        "ILSVRC2012_val_00000001,n03 0 0 9 9",
    )
    folder = open_source(flat, "val", file)
    assert relative(folder) == [f"ILSVRC2012_val_0000000{i}.JPEG" for i in range(3)]
    assert folder.classes == ("n02", "n03")
    assert folder.labels.tolist() == [0, 1, 1]


def test_classes_are_those_of_train_where_they_include_all(flat: Path) -> None:
    file = plain(flat, *(f"ILSVRC2012_val_0000000{i}.JPEG,n0{i + 2}" for i in range(3)))
    for name in ("n01", "n02", "n03"):
        touch(flat / "train" / name / "1.jpg")
    assert open_source(flat, "val", file).classes == ("n02", "n03", "n04")
    touch(flat / "train" / "n04" / "1.jpg")
    folder = open_source(flat, "val", file)
    assert folder.classes == ("n01", "n02", "n03", "n04")
    assert folder.labels.tolist() == [1, 2, 3]


@pytest.mark.parametrize("header", ["path,label", "Path, Label", "file_name,class", ",0", None])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_plain_labels(tmp_path: Path, header: str | None, mark: str) -> None:
    touch(*(tmp_path / "val" / name for name in ("a, b.jpg", "deep/ünï.png", "c.jpg")))
    rows = ['"a, b.jpg","great ""white"" shark"', "", "deep/ünï.png,katze", "c.jpg, hund "]
    file = plain(tmp_path, *([mark + header] if header else []), *rows)
    if mark and not header:
        file.write_text(mark + file.read_text(encoding="utf-8"), encoding="utf-8")
    folder = open_source(tmp_path, "val", file)
    assert folder.classes == ('great "white" shark', "hund", "katze")
    assert [folder.classes[i] for i in folder.labels] == [
        'great "white" shark',
        "hund",
        "katze",
    ]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("header", ["ImageId,Class", '"file","label"', None])
@pytest.mark.parametrize("extension", ["", ".JPEG"])
def test_any_two_columns(flat: Path, separator: str, header: str | None, extension: str) -> None:
    rows = [f"ILSVRC2012_val_0000000{i}{extension},n0{i}" for i in (2, 0, 1)]
    lines = ["", *([header] if header else []), *rows]
    file = plain(flat, *(line.replace(",", separator) for line in lines))
    folder = open_source(flat, "val", file)
    assert folder.classes == ("n00", "n01", "n02")
    assert folder.labels.tolist() == [0, 1, 2]


def test_a_kaggle_file_with_semicolons(flat: Path) -> None:
    rows = [f"ILSVRC2012_val_0000000{i};n0{i} 1 2 3 4" for i in range(3)]
    folder = open_source(flat, "val", plain(flat, "ImageId;PredictionString", *rows))
    assert folder.classes == ("n00", "n01", "n02")


def test_a_first_row_that_names_no_image(flat: Path) -> None:
    rows = [f"ILSVRC2012_val_0000000{i},n0{i}" for i in range(3)]
    assert "line 1 was taken for the header" in error_of(
        flat, labels=plain(flat, "ILSVRC2012_val_0000000O,n00", *rows[1:])
    )
    assert ":1: there is no image 'x.JPEG'" in error_of(flat, labels=plain(flat, "x.JPEG,n00"))
    message = error_of(flat, labels=plain(flat, *rows[:1], "n01,ILSVRC2012_val_00000001"))
    assert ":2: there is no image 'n01'; expected paths relative to" in message
    assert "with or without extension, such as 'ILSVRC2012_val_00000000.JPEG'" in message


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (["ILSVRC2012_val_00000000,n01 1 2 3 4"], "no label for 2 of 3 images"),
        (["nobody,n01 1 2 3 4"], "LOC_val_solution.csv:2: there is no image 'nobody'"),
        (
            ["ILSVRC2012_val_00000000,n01 1 2 3 4"] * 2,
            ":3: 'ILSVRC2012_val_00000000' already has a label in line 2 too",
        ),
        (["ILSVRC2012_val_00000000,n01 1 2 3"], ":2: expected a class and four whole numbers"),
        (["ILSVRC2012_val_00000000,"], ":2: expected a class and four whole numbers"),
        (
            ["ILSVRC2012_val_00000000"],
            ":2: expected 2 fields, an image and its class",
        ),
        (["a,b,c"], "tab or semicolon, found 3"),
        ([",n01 1 2 3 4"], ":2: the path is empty"),
        (['"ILSVRC2012_val_00000000,n01'], "not CSV"),
        ([], "no label for 3 of 3 images"),
    ],
)
def test_bad_kaggle_labels(flat: Path, rows: list[str], wanted: str) -> None:
    assert wanted in error_of(flat, labels=kaggle(flat, *rows))


def test_bad_labels_files(flat: Path) -> None:
    assert "cannot be read: No such file" in error_of(flat, labels=flat / "none.csv")
    latin = flat / "latin.csv"
    latin.write_bytes("ILSVRC2012_val_00000000.JPEG,Käfer\n".encode("latin-1"))
    assert "not UTF-8 text" in error_of(flat, labels=latin)
    message = error_of(flat, labels=plain(flat, "val/ILSVRC2012_val_00000000.JPEG,n01"))
    assert "labels.csv:1: there is no image 'val/ILSVRC2012_val_00000000.JPEG'" in message
    assert f"expected paths relative to {flat / 'val'}" in message
    assert ":1: the label is empty" in error_of(
        flat, labels=plain(flat, "ILSVRC2012_val_00000000.JPEG,")
    )


def test_two_images_of_one_id(flat: Path) -> None:
    touch(flat / "val" / "ILSVRC2012_val_00000000.png")
    message = error_of(flat, labels=kaggle(flat, "ILSVRC2012_val_00000000,n01 1 2 3 4"))
    assert "have the same id 'ILSVRC2012_val_00000000'" in message


def test_labels_for_a_folder_without_images(tmp_path: Path) -> None:
    touch(tmp_path / "val" / "readme.txt")
    assert "no image, only: other files: .txt" in error_of(
        tmp_path, labels=kaggle(tmp_path, "a,b 1 2 3 4")
    )


def test_ten_thousand_images_take_no_time(tmp_path: Path) -> None:
    for label in range(10):
        below = tmp_path / "val" / str(label)
        below.mkdir(parents=True)
        for i in range(1000):
            os.close(os.open(below / f"{i}.jpg", os.O_CREAT | os.O_WRONLY))
    start = time.process_time()
    folder = open_source(tmp_path, "val")
    assert len(folder) == 10_000
    assert folder.digest() == folder.digest(0, 10**9) != folder.digest(0, -1)
    assert time.process_time() - start < 2  # about 0.05 s; a quadratic step would take longer
