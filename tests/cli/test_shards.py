"""The real program on shards, as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anchorpatch import __version__
from anchorpatch.cli.output import bytes_text
from anchorpatch.shards import ShardReader
from anchorpatch.shards.manifest import read_manifest
from tests.conftest import Program
from tests.shards.samples import make_split


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    make_split(folder / "val", store_images=True)
    make_split(folder / "train", shards=2, codec="jpeg")
    return folder


def test_classes_are_shown_with_their_names(program: Program, out: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("dog\tCanis familiaris\n")
    names = ("--class-names", tmp_path / "names.txt")
    result = program("shards", "inspect", out / "val", *names)
    assert "classes: 4 (cat, Canis familiaris (dog), hen and 1 more); other" in result.stdout
    (split,) = json.loads(program("shards", "inspect", out / "val", *names, "--json").stdout)[
        "splits"
    ]
    assert list(split["class_names"]) == list(ShardReader(out / "val").classes)
    assert split["class_names"]["dog"] == "Canis familiaris"
    assert split["class_names"]["cat"] is None
    result = program("shards", "show", out / "val", 0, "--out", "patches.png", *names)
    assert result.returncode == 0
    reader = ShardReader(out / "val")
    label = reader.classes[reader.label[0]]
    assert f"label {'Canis familiaris (dog)' if label == 'dog' else label}, " in result.stdout
    (tmp_path / "names.txt").write_text("x\tX\n")
    result = program("shards", "inspect", out / "val", *names)
    assert (result.returncode, result.stdout) == (1, "")
    assert "names.txt: expected names of classes such as cat, dog, hen and 1 more" in result.stderr


def test_inspect_prints_a_plain_table_into_a_pipe(program: Program, out: Path) -> None:
    result = program("shards", "inspect", out / "val")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == str(out / "val")
    assert lines[1].split() == ["scale", "images", "share", "patches", *("patches", "per", "image")]
    assert [line.split()[0] for line in lines[2:6]] == ["63", "95", "111", "all"]
    assert lines[6] == "shards: 3 of 3, 8 images each"
    assert lines[7].startswith("images: 21 in ")
    assert lines[8:] == [
        "skipped: 0",
        "classes: 4 (cat, dog, hen and 1 more); other than the network's 5",
        "settings: preset figure, K 5/3/2, T 0.3, P 0.05/0.04/0.03, float32",
        "crops: center, short side 256 px, crop 224 px",
        "codec: raw, images stored",
        f"weights: SHA-256 abababababab..., anchorpatch {__version__}",
    ]
    assert "\x1b" not in result.stdout


def test_inspect_json_of_several_splits(program: Program, out: Path) -> None:
    result = program("shards", "inspect", out, "--json")
    assert result.returncode == 0, result.stderr
    train, val = json.loads(result.stdout)["splits"]
    assert (train["split"], val["split"]) == ("train", "val")
    assert (val["images"], train["images"], val["shards"]) == (21, 13, 3)
    assert sum(scale["images"] for scale in val["scales"].values()) == 21
    assert train["settings"]["codec"] == "jpeg"
    assert val["bytes"] == sum(path.stat().st_size for path in (out / "val").glob("*.h5"))
    assert (
        "codec: jpeg of quality 95, images not stored" in program("shards", "inspect", out).stdout
    )


def test_a_folder_without_shards(program: Program, tmp_path: Path) -> None:
    for name in ("inspect", "verify"):
        result = program("shards", name, tmp_path)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr == (
            f"anchorpatch: {tmp_path}: expected shards that `anchorpatch extract` wrote, "
            "found no manifest.json in it or below\n"
        )
    assert "found no such folder" in program("shards", "inspect", tmp_path / "none").stderr


def test_verify_says_all_good(program: Program, out: Path) -> None:
    result = program("shards", "verify", out, "--jobs", 1)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{out / 'train'}: 2 shards, all good",
        f"{out / 'val'}: 3 shards, all good",
    ]


def test_verify_names_each_bad_shard_and_fails(program: Program, tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    data = bytearray(manifest.shard_path(2).read_bytes())
    data[len(data) // 2] ^= 1
    manifest.shard_path(2).write_bytes(data)
    manifest.shard_path(0).unlink()
    result = program("shards", "verify", tmp_path / "val", "--jobs", 2)
    assert (result.returncode, result.stderr) == (1, "")
    first, second, last, advice, note = result.stdout.splitlines()
    assert first == f"{manifest.shard_path(0)}: missing: run the same extract again"
    assert second.startswith(f"{manifest.shard_path(2)}: expected SHA-256 ")
    assert second.endswith("the file has changed")
    assert last == f"{tmp_path / 'val'}: 3 shards, 2 bad"
    command = (
        f"anchorpatch extract --repair --data DATA --weights WEIGHTS-abababababab --out {tmp_path} "
        "--split val --shard-size 8 --preset figure"
    )
    assert advice == f"to rewrite them: {command}"
    assert note == (
        "(DATA stands for the images; WEIGHTS-abababababab for the weights with this SHA-256; "
        "add --labels, --limit and --allow-empty if they were used)"
    )
    result = program("shards", "verify", tmp_path, "--json", "--jobs", 1)
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert found["splits"][0]["repair"] == command
    assert [p["shard"] for p in found["splits"][0]["problems"]] == ["val-00000.h5", "val-00002.h5"]


def test_a_damaged_manifest_is_named_beside_other_splits(program: Program, tmp_path: Path) -> None:
    for name in ("train", "val"):
        make_split(tmp_path / name, shards=1, per_shard=1, last=1)
    path = tmp_path / "train" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"files_count": 1', b'"files_count": 3'))
    result = program("shards", "verify", tmp_path, "--jobs", 1)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.splitlines() == [
        f"{path}: damaged (its bytes are not those of its own checksum): restore it, or write "
        "it and its shards again with --overwrite",
        f"{tmp_path / 'train'}: 1 bad",
        f"{tmp_path / 'val'}: 1 shard, all good",
    ]


def test_parts_made_on_two_disks_are_merged(program: Program, tmp_path: Path) -> None:
    whole, _ = make_split(tmp_path / "whole" / "val", shards=3, per_shard=1, last=1)
    for name, gone in (("a", [1, 2]), ("b", [0, 2])):
        part = shutil.copytree(whole.folder, tmp_path / name / "val")
        forgotten = [whole.entries[i] for i in gone]
        read_manifest(part).forget(forgotten)
        for entry in forgotten:
            (part / entry.name).unlink()
    # By hand, one manifest takes the place of the other.
    by_hand = shutil.copytree(tmp_path / "a", tmp_path / "by hand")
    shutil.copytree(tmp_path / "b", by_hand, dirs_exist_ok=True)
    verified = program("shards", "verify", "by hand").stdout.splitlines()
    assert verified[0] == (
        "by hand/val/val-00000.h5: has no entry in manifest.json: if it comes from another folder, "
        "join the folders with `anchorpatch shards merge`, else run the same extract again"
    )
    assert verified[2] == "by hand/val: 3 shards, 2 bad"
    result = program("shards", "merge", "a", "b", "--out", "out")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:2] == ["out/val: 2 of 3 shards, 2 of them copied now", "missing: val-00002.h5"]
    assert lines[2].startswith("to write them: anchorpatch extract --data DATA --weights WEIGHTS-")
    again = json.loads(
        program("shards", "merge", "a", "whole/val", "--out", "out", "--json").stdout
    )
    assert again["ok"] is True
    assert again["splits"][0]["copied"] == ["val-00002.h5"]
    assert (tmp_path / "out/val/manifest.json").read_bytes() == (
        (whole.folder / "manifest.json").read_bytes()
    )
    refused = program("shards", "merge", "a/val", "b/val", "--out", "out/val")
    assert refused.returncode == 2
    assert "out/val holds the shards of one split: give the folder above it, out" in refused.stderr
    make_split(tmp_path / "c" / "train", shards=1, per_shard=1, last=1)
    refused = program("shards", "merge", "a", "c", "--out", "other")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "a holds val but c holds train: expected parts of the same splits" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_show_by_path_and_by_number(program: Program, out: Path, tmp_path: Path) -> None:
    by_path, by_number = tmp_path / "path.png", tmp_path / "number.png"
    result = program("shards", "show", out / "val", "cat/000003é.jpg", "--out", by_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("cat/000003é.jpg: label ")
    assert result.stdout.endswith(f": {by_path}\n")
    assert program("shards", "show", out / "val", "3", "--out", by_number).returncode == 0
    with Image.open(by_path) as a, Image.open(by_number) as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.width > 448


def test_show_without_stored_images_shows_the_patches(
    program: Program, out: Path, tmp_path: Path
) -> None:
    result = program("shards", "show", out / "train", "0", "--out", tmp_path / "a.jpg")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == "JPEG"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("000003é.jpg", "not among the 21 images of {val}. Did you mean 'cat/000003é.jpg'?"),
        ("cat/000003e.jpg", "Did you mean 'cat/000003é.jpg'?"),
        ("21", "expected a number from 0 to 20, got 21"),
    ],
)
def test_show_of_an_image_that_is_not_there(
    program: Program, out: Path, tmp_path: Path, image: str, message: str
) -> None:
    result = program("shards", "show", out / "val", image, "--out", tmp_path / "a.png")
    assert (result.returncode, result.stdout) == (2, "")
    assert message.format(val=out / "val") in result.stderr
    assert not (tmp_path / "a.png").exists()


def test_show_wants_one_split_and_a_picture_name(
    program: Program, out: Path, tmp_path: Path
) -> None:
    result = program("shards", "show", out, "0", "--out", tmp_path / "a.png")
    assert result.returncode == 2
    assert "expected one split, found" in result.stderr
    result = program("shards", "show", out / "val", "0", "--out", tmp_path / "a.h5")
    assert result.returncode == 2
    assert "expected a name that ends in .png" in result.stderr


def test_show_makes_the_folder_of_the_picture(program: Program, out: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "a.png"
    assert program("shards", "show", out / "val", "0", "--out", picture).returncode == 0
    assert picture.is_file()
    (tmp_path / "file").write_text("in the way")
    wrong = tmp_path / "file" / "a.png"
    result = program("shards", "show", out / "val", "0", "--out", wrong)
    assert result.returncode == 1
    assert result.stderr.startswith(f"anchorpatch: {wrong}: cannot write: ")
    assert result.stderr.count("\n") == 1


def test_export_writes_what_it_says_and_goes_on_where_it_stopped(
    program: Program, out: Path, tmp_path: Path
) -> None:
    words = ("shards", "export", out / "val", "--to", "folder", "--out", "patches")
    done = program(*words, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["exports"]
    files = sorted((tmp_path / "patches").rglob("*.png"))
    assert found["images"] == 21
    assert found["patches"] == found["files"] == len(files)
    files[3].unlink()
    again = program(*words)
    assert again.stdout == (
        f"patches: {found['patches']:,} patches of 21 images in {found['files']:,} files, "
        f"{bytes_text(found['bytes'])}\n"
    )
    assert sorted((tmp_path / "patches").rglob("*.png")) == files
    refused = program(*words, "--format", "jpg")
    assert refused.returncode == 1
    assert refused.stderr == (
        "anchorpatch: patches holds an export of other inputs: --format was png, now jpg. Choose "
        "another --out, or remove the folder\n"
    )
    table = program("shards", "export", out, "--to", "csv", "--out", "patches.csv")
    assert table.returncode == 0, table.stderr
    assert "of 34 images in 1 file, " in table.stdout
    lines = (tmp_path / "patches.csv").read_text().splitlines()
    assert sum(line.startswith("val,") for line in lines) == found["patches"]
    usage = program("shards", "export", out, "--to", "csv", "--out", "patches.txt")
    assert usage.returncode == 2
    assert "expected a file that ends with .csv, found .txt" in usage.stderr
