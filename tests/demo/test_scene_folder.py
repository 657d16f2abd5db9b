from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anchorpatch.demo import scene_folder
from anchorpatch.demo.scene_folder import make_scenes, read_boxes, scene_path
from anchorpatch.demo.scenes import CLASSES, SIDE, SIZES, draw_scene, object_box
from anchorpatch.errors import DataError, SettingsError, StorageError


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_set_is_balanced_and_laid_out_as_imagenet(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "set"
    assert make_scenes(folder, train=60, val=30, seed=5, jobs=1) == 90
    for split, count in (("train", 60), ("val", 30)):
        assert sorted(p.name for p in (folder / split).iterdir()) == list(CLASSES)
        for name in CLASSES:
            assert len(list((folder / split / name).glob("*.JPEG"))) == count // 10
    with (folder / "boxes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert Counter((r["path"].split("/")[0], r["class"], r["size"]) for r in rows) == {
        (split, name, size): count
        for split, count in (("train", 2), ("val", 1))
        for name in CLASSES
        for size in SIZES
    }
    for row in rows:
        assert row["path"].split("/")[1] == row["class"]
        with Image.open(folder / row["path"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE, SIDE))
    boxes = read_boxes(folder / "boxes.csv")
    size, box = boxes[scene_path("val", 7)]
    image, drawn_box = draw_scene([5, 1, 7], 7, size)
    assert box == drawn_box == object_box([5, 1, 7], 7, size)
    with Image.open(folder / scene_path("val", 7)) as file:  # JPEG loses a little
        assert np.abs(np.asarray(file, int) - image).mean() < 8


def test_a_picture_depends_on_nothing_but_seed_split_and_index(tmp_path: Path) -> None:
    make_scenes(tmp_path / "one", train=30, val=60, seed=1, jobs=1)
    make_scenes(tmp_path / "two", train=10, val=70, seed=1, jobs=2)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    shared = {p for p in one if p.endswith(".JPEG")} & set(two)
    assert len(shared) == 70
    assert all(one[path] == two[path] for path in shared)
    make_scenes(tmp_path / "other", train=1, val=1, seed=2, jobs=1)
    assert (tmp_path / "other" / scene_path("val", 0)).read_bytes() != one[scene_path("val", 0)]
    assert one[scene_path("val", 0)] != one[scene_path("train", 0)]


def test_the_same_call_again_writes_nothing(tmp_path: Path) -> None:
    make_scenes(tmp_path, train=3, val=12, jobs=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert make_scenes(tmp_path, train=3, val=12, jobs=1) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_interrupted_call_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_scenes(tmp_path / "whole", train=4, val=9, jobs=1)
    real, left = scene_folder._write, [8]

    def failing(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            path.with_name(path.name + ".tmp").write_bytes(data[:5])
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(scene_folder, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "cut", train=4, val=9, jobs=1)
    monkeypatch.undo()
    assert not any(path.endswith(".tmp") for path in contents(tmp_path / "cut"))
    for name in (scene_path("val", 8), "boxes.csv"):  # as a process that is killed leaves them
        (tmp_path / "cut" / f"{name}.tmp").write_bytes(b"half a file")
    assert make_scenes(tmp_path / "cut", train=4, val=9, jobs=1) == 6
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["photo.jpg", "train/disc_dots/x.JPEG", "val/cat/000001.JPEG"])
def test_foreign_content_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(DataError, match=r"expected an empty folder or a set of scenes, found"):
        make_scenes(tmp_path, train=0, val=2, jobs=1)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_foreign_file_in_a_set_is_refused(tmp_path: Path) -> None:
    make_scenes(tmp_path, train=0, val=2, jobs=1)
    (tmp_path / "val" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"expected scenes alone, found val/notes\.txt"):
        make_scenes(tmp_path, train=0, val=2, jobs=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", [{"val": 3}, {"seed": 1}, {"train": 1}])
def test_another_set_in_the_folder_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    make_scenes(tmp_path, train=0, val=2, jobs=1)
    before = contents(tmp_path)
    with pytest.raises(DataError, match="the folder holds another set"):
        make_scenes(tmp_path, **{"train": 0, "val": 2, "seed": 0, "jobs": 1, **change})
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(DataError, match="expected a folder for scenes, found a file"):
        make_scenes(tmp_path / "set", train=0, val=2, jobs=1)


@pytest.mark.parametrize(("train", "val", "seed"), [(-1, 5, 0), (0, 0, 0), (1, 1, -1)])
def test_impossible_numbers_are_refused(tmp_path: Path, train: int, val: int, seed: int) -> None:
    with pytest.raises(SettingsError, match="at least one picture"):
        make_scenes(tmp_path, train=train, val=val, seed=seed)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scene_folder, "_write", full)
    with pytest.raises(StorageError, match="No space left on device"):
        make_scenes(tmp_path / "set", train=0, val=2, jobs=1)


LIMITED = """
import resource, sys
from pathlib import Path
from anchorpatch.demo.scene_folder import make_scenes
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    make_scenes(Path(sys.argv[1]), train=0, val=60, jobs=int(sys.argv[3]))
except Exception as error:
    print(type(error).__name__, error)
"""


# As a full disk: a write that stops in the middle of a picture, or of the first file.
@pytest.mark.parametrize(("size", "jobs"), [(4000, 1), (4000, 2), (10, 1)])
def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path, size: int, jobs: int) -> None:
    folder = tmp_path / "set"
    command = [sys.executable, "-c", LIMITED, folder, size, jobs]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    message = f"StorageError {folder}: cannot write: File too large: raise the limit of file sizes"
    assert result.stdout.startswith(message)
    assert not [path for path in contents(folder) if path.endswith(".tmp")]
    make_scenes(folder, train=0, val=60, jobs=1)
    assert len(list(folder.glob("val/*/*.JPEG"))) == 60


@pytest.mark.parametrize(
    "text", ["", "path,class\n", "path,class,size,x0,y0,x1,y1\na,b,small,1,2,x,4\n"]
)
def test_a_damaged_table_of_boxes_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(text)
    with pytest.raises(DataError, match="expected a table path,class,size,x0,y0,x1,y1"):
        read_boxes(path)
    with pytest.raises(DataError, match=r"missing\.csv"):
        read_boxes(tmp_path / "missing.csv")


def test_the_marker_names_the_parameters(tmp_path: Path) -> None:
    make_scenes(tmp_path, train=1, val=2, seed=3, jobs=1)
    marker = json.loads((tmp_path / "scenes.json").read_text())
    assert marker == {"scenes": 2, "train": 1, "val": 2, "seed": 3}
