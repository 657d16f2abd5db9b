"""Lists of images, and labels of a subset; the labels of whole splits are tested with folders."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from anchorpatch.errors import DataError
from anchorpatch.images.source import ImageSource, open_source


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, with images and without DATA."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/cat/1.jpg", "photos/dog/1.jpg", "photos/dog/a, b.JPEG", "2.png", "ü.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(name.encode())


def listed(*lines: str | bytes, end: bytes = b"\n", **more: object) -> ImageSource:
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    Path("list").write_bytes(end.join([*raw, b""]))
    return open_source(Path("data"), "val", files=Path("list"), **more)  # type: ignore[arg-type]


def facts(source: ImageSource) -> dict[str, str]:
    for row in range(len(source)):
        path = source.path(row)
        if os.path.exists(path):
            assert source.read(row) == Path(path).name.encode() or source.read(row).decode() in path
        assert source.name(row) == path
    return {source.path(i): source.classes[source.labels[i]] for i in range(len(source))}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_paths_have_the_class_of_their_folder(tmp_path: Path, end: bytes) -> None:
    source = listed("photos/dog/1.jpg", "", "./photos/cat//1.jpg", "photos/dog/a, b.JPEG", end=end)
    assert facts(source) == {
        "photos/cat/1.jpg": "cat",
        "photos/dog/1.jpg": "dog",
        "photos/dog/a, b.JPEG": "dog",
    }
    assert source.sizes.tolist() == [16, 16, 20]
    source = listed(str(tmp_path / "photos/dog/1.jpg"))
    assert facts(source) == {str(tmp_path / "photos/dog/1.jpg"): "dog"}


@pytest.mark.parametrize("separator", [",", "\t", ";", ", ", " "])
@pytest.mark.parametrize("header", [[], ["path,label"], ["\ufefffile_name;class"]])
def test_paths_with_labels(separator: str, header: list[str]) -> None:
    lines = (("photos/dog/1.jpg", "hund"), ("2.png", "katze"), ("ü.png", "hund"))
    source = listed(*header, *(separator.join(line) for line in lines))
    assert facts(source) == {"2.png": "katze", "photos/dog/1.jpg": "hund", "ü.png": "hund"}
    assert source.classes == ("hund", "katze")


def test_quoted_paths() -> None:
    assert facts(listed('"photos/dog/a, b.JPEG",great dog', '"2.png","cat"')) == {
        "2.png": "cat",
        "photos/dog/a, b.JPEG": "great dog",
    }


def test_numbers_are_the_indices_of_classes() -> None:
    source = listed("photos/dog/1.jpg 10", "2.png 2", "ü.png 0")
    assert source.classes == tuple(map(str, range(11)))
    assert source.labels.tolist() == [2, 10, 0]
    source = listed("photos/dog/1.jpg 1", "2.png 0", classes=("cat", "dog"))
    assert facts(source) == {"2.png": "cat", "photos/dog/1.jpg": "dog"}


def test_a_list_on_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(b"photos/cat/1.jpg\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    assert facts(open_source(Path("data"), "val", files=Path("-"))) == {"photos/cat/1.jpg": "cat"}


def test_what_is_not_there_is_an_image_all_the_same() -> None:
    source = listed("photos/cat/1.jpg", "photos/cat/none.jpg", "photos/cat/folder.jpg")
    assert source.sizes.tolist() == [16, 0, 0]


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([], "list: expected a path of an image per line, found none"),
        (["# images"], "list:1: expected path or path,label with the path of an image"),
        (["photos/cat/1.jpg", "notes.txt"], "list:2: expected path or path,label .*'notes.txt'"),
        (["photos/cat/1.jpg,cat", "2.png"], "list:2: expected a label, as in line 1"),
        (["photos/cat/1.jpg", "2.png,cat"], "list:2: expected no label, as in line 1"),
        (["2.png,cat", "", "./2.png,dog"], "list:3: '2.png' is in line 1 too"),
        (["2.png"], "list: '2.png' has no label and lies in no class folder; expected path,label"),
        ([b"k\xe4fer/1.jpg"], "list:1: not UTF-8"),
    ],
)
def test_bad_lists(lines: list[str | bytes], wanted: str) -> None:
    with pytest.raises(DataError, match=wanted):
        listed(*lines)
    with pytest.raises(DataError, match=r"none: cannot be read: No such file .*check --files"):
        open_source(Path("data"), "val", files=Path("none"))


def test_a_list_with_a_table_of_labels() -> None:
    Path("labels.csv").write_text("path,label\n2.png,cat\n")
    table = Path("labels.csv")
    source = listed("2.png", labels=table)
    assert facts(source) == {"2.png": "cat"}
    with pytest.raises(DataError, match="no label for 1 of 2 images"):
        listed("2.png", "ü.png", labels=table)
    assert facts(listed("2.png", "ü.png", labels=table, only_labelled=True)) == {"2.png": "cat"}


@pytest.mark.parametrize("lines", [("2.png,cat", "ü.png"), ("ü.png", "2.png,cat")])
def test_a_list_of_which_only_the_labelled_are_taken(lines: tuple[str, ...]) -> None:
    source = listed(*lines, only_labelled=True)
    assert (facts(source), source.ignored) == ({"2.png": "cat"}, {"without a label": 1})


def test_labels_of_a_subset() -> None:
    Path("data").mkdir()
    Path("photos").rename("data/val")
    table = Path("labels.csv")
    table.write_text("path,label\ndog/1,hund\n")
    source = open_source(Path("data"), "val", table, only_labelled=True)
    assert {source.path(0): source.classes[0]} == {"dog/1.jpg": "hund"}
    assert (len(source), source.ignored) == (1, {"without a label": 2})
    # A name that is mistyped in the first line is not taken for a header.
    table.write_text("dog-1,hund\ncat/1,katze\n")
    with pytest.raises(DataError, match=r"labels\.csv:1: expected a header such as path,label"):
        open_source(Path("data"), "val", table, only_labelled=True)
    table.write_text("path,label\n")
    with pytest.raises(DataError, match="no label for 3 of 3 images"):
        open_source(Path("data"), "val", table, only_labelled=True)


def test_the_classes_of_train_hold_for_a_list() -> None:
    Path("data").mkdir()
    Path("photos").rename("data/train")
    assert listed("data/train/dog/1.jpg").classes == ("cat", "dog")
    assert listed("data/train/dog/1.jpg,wolf").classes == ("wolf",)
