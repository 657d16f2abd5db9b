from __future__ import annotations

import sys
from pathlib import Path

import pytest

from anchorpatch.classes import (
    ClassNames,
    Matching,
    _ids_by_name,
    imagenet_ids,
    imagenet_names,
    match_classes,
)
from anchorpatch.errors import DataError

SPRINGER, TENCH = "n02102040", "n01440764"


def test_imagenets_ids_are_the_published_ones() -> None:
    from torchvision.models import get_weight

    ids, names = imagenet_ids(), imagenet_names()
    assert list(ids) == sorted(set(ids))
    assert (ids[0], ids[-1]) == (TENCH, "n15075141")
    assert list(names.values()) == get_weight("ResNet18_Weights.DEFAULT").meta["categories"]
    timm_data = pytest.importorskip("timm.data")
    assert list(ids) == timm_data.ImageNetInfo("imagenet-1k").label_names()


@pytest.mark.parametrize(
    "text",
    [
        "n02102040\tSpringer, English\ncat\tCat\n",
        "n02102040, Springer, English\n\ncat,Cat\n",
        '\ufeffn02102040,"Springer, English"\r\ncat, Cat\r\n',
        "n02102040;Springer, English\ncat; Cat\n",
    ],
)
def test_names_by_class(tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_bytes(text.encode())
    names = ClassNames.read(tmp_path / "names").of(("cat", "dog"), (SPRINGER,))
    assert names.shown(SPRINGER) == "Springer, English (n02102040)"
    assert names.shown("cat") == "Cat (cat)"
    assert (names.name("dog"), names.shown("dog")) == (None, "dog")
    assert names.shown(TENCH) == "tench (n01440764)"  # which the file does not name
    assert ClassNames.read(None).shown(SPRINGER) == "English springer (n02102040)"


def test_imagenets_own_file_of_names(tmp_path: Path) -> None:
    lines = f"{TENCH} tench, Tinca tinca\n{SPRINGER} English springer, English springer spaniel\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(lines)
    names = ClassNames.read(tmp_path / "LOC_synset_mapping.txt")
    assert names.name(TENCH) == "tench, Tinca tinca"


def test_names_in_the_order_of_the_classes(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Cat, domestic\nDog\n")
    names = ClassNames.read(tmp_path / "names.txt")
    assert names.of(("a", "b")).shown("a") == "Cat, domestic (a)"
    with pytest.raises(DataError, match=r"names\.txt: expected a name for each of the 3 classes"):
        names.of(("a", "b", "c"))
    # A table that lacks a comma is no list.
    with pytest.raises(DataError, match=r"names\.txt:2: expected a class, a tab or a comma, and"):
        names.of(("Cat", "Dog"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"names: expected class names, one per line, found none"),
        ("a\tA\nb\n", r"names:2: expected a class, a tab or a comma, and its name, found 'b'"),
        ("a\tA\n\tB\n", r"names:2: expected a class"),
        ('x,"A\ny,B\n', r"names: expected names of classes such as a, b, found only x, y"),
        ("a,A\n\na,B\n", r"names:3: a has a name already, 'A'"),
        ("x,A\ny,B\n", r"names: expected names of classes such as a, b, found only x, y"),
    ],
)
def test_files_that_name_nothing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "names").write_text(text)
    with pytest.raises(DataError, match=message):
        ClassNames.read(tmp_path / "names").of(("a", "b"))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    for name in ("latin", "none", "."):
        for read in (ClassNames.read, Matching.read):
            with pytest.raises(DataError, match="expected a text file of class names, found"):
                read(tmp_path / name)


def test_class_maps(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("cat\n dog \n\n")
    assert Matching.read(tmp_path / "map.txt").class_map == ("cat", "dog")
    assert Matching.read(None, all_classes=True) == Matching(all_classes=True)
    (tmp_path / "map.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\ncat 1\n")
    assert Matching.read(tmp_path / "map.txt").class_map == ("n01440764", "n01443537", "cat 1")
    (tmp_path / "map.txt").write_text("cat\n\ndog\ncat\n")
    with pytest.raises(DataError, match=r"map\.txt:4: .* each once, found 'cat' also in line 1"):
        Matching.read(tmp_path / "map.txt")


def test_a_name_that_two_classes_share_matches_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    crane, bird = "n03126707", "n02012849"
    assert match_classes(("crane", "maillot", "cardigan"), imagenet_ids()) == [None, None, None]
    # As torchvision names them, they are told apart where both are there.
    names = tuple(imagenet_names().values())
    assert match_classes(imagenet_ids(), names) == list(range(1000))
    assert match_classes(names, imagenet_ids()) == list(range(1000))
    assert match_classes(("crane_bird",), imagenet_ids()) == [134]
    shared = {**imagenet_names(), bird: "crane"}  # as older torchvisions have it
    monkeypatch.setattr("anchorpatch.classes.imagenet_names", lambda: shared)
    _ids_by_name.cache_clear()
    try:
        assert match_classes(("crane", bird), imagenet_ids()) == [None, 134]
        assert match_classes((crane,), ("crane",)) == [None]
        assert match_classes((crane, bird), ("crane", "tench")) == [None, None]
    finally:
        monkeypatch.undo()
        _ids_by_name.cache_clear()


def test_each_output_is_one_class() -> None:
    assert match_classes(("b", "a", "x"), ("a", "b", "c")) == [1, 0, None]
    # Both mean the same output: neither by its name, one by its id.
    assert match_classes(("tench", "Tench"), imagenet_ids()) == [None, None]
    assert match_classes(("tench", TENCH), imagenet_ids()) == [None, 0]
    assert match_classes((TENCH, SPRINGER), ("English springer", "tench")) == [1, 0]
    # Ids are never taken for other ids, nor words for other words.
    assert match_classes(("n00000001", "cat"), ("n00000002", "Cat")) == [None, None]


def test_names_need_no_torch() -> None:
    import subprocess

    code = (
        "import sys; from anchorpatch.classes import ClassNames; "
        f"assert ClassNames().name({SPRINGER!r}) == 'English springer'; "
        "assert 'torch' not in sys.modules and 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
