"""The real program on pictures, as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anchorpatch.classes import ClassNames
from anchorpatch.geometry import source_box
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.settings import CropSettings
from tests.conftest import Program
from tests.jobs.small_networks import save_small_network


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_network(tmp_path_factory.mktemp("network") / "best.safetensors")


def test_classes_patches_and_pictures(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, network: Path
) -> None:
    good = [image_folder / "val" / name / "00.JPEG" for name in ("cat", "dog")]
    (tmp_path / "bad.jpg").write_text("no picture")
    images = [good[0], "bad.jpg", good[1], "none.jpg"]
    arguments: list[object] = [
        "predict",
        *images,
        "--network",
        network,
        "--anchornet-weights",
        weights,
    ]
    lsp = ("--max-patches", 5, "--iou-threshold", 0.2, "--coverage", "0.1,0.2,0.3")
    result = program(*arguments, "--out", "drawn", "--top", 2, "--json", *lsp)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "anchorpatch: bad.jpg: not an image",
        "anchorpatch: none.jpg: missing",
    ]
    report = json.loads(result.stdout)
    assert (report["architecture"], report["classes"]) == ("shufflenet_v2_x0_5", 3)
    assert report["weights"] == report["network"] == str(network)
    assert report["settings"] == {
        **{"preset": "evaluate", "max_patches": [5, 5, 5], "iou_threshold": 0.2},
        "coverage": [0.1, 0.2, 0.3],
    }
    assert report["unreadable"] == [
        {"path": "bad.jpg", "reason": "not an image"},
        {"path": "none.jpg", "reason": "missing"},
    ]
    assert [image["path"] for image in report["images"]] == [str(path) for path in good]
    for image in report["images"]:
        corners = [[patch["y"], patch["x"]] for patch in image["patches"]]
        boxes = source_box(image["size"], corners, image["scale"], CropSettings())
        np.testing.assert_array_equal([patch["box"] for patch in image["patches"]], boxes)
    # A name as long as filesystems allow; that of its picture is cut between characters.
    long = tmp_path / f"x{'é' * 123}.jpg"
    long.write_bytes(good[0].read_bytes())
    original = program(*arguments[:2], long, *arguments[-4:], "--out", "whole", "--original")
    assert original.returncode == 0, original.stderr
    assert (tmp_path / f"whole/x{'é' * 99}-patches.png").is_file()
    assert (tmp_path / "whole/00-patches.png").read_bytes() != (
        tmp_path / "drawn/00-patches.png"
    ).read_bytes()
    assert program(*arguments, "--original").returncode == 2
    # Both are called 00.JPEG: neither picture may replace the other.
    assert [image["picture"] for image in report["images"]] == [
        "drawn/00-patches.png",
        "drawn/00-patches-2.png",
    ]
    for image in report["images"]:
        with Image.open(tmp_path / image["picture"]) as picture:
            assert picture.width > 448
        assert image["class"] == image["top"][0]["class"]
        assert 1 >= image["top"][0]["probability"] >= image["top"][1]["probability"] >= 0
        scores = [patch["score"] for patch in image["patches"]]
        assert 1 <= len(scores) <= 5
        assert scores == sorted(scores, reverse=True)
        for patch in image["patches"]:
            assert min(patch["y"], patch["x"]) >= 0
            assert max(patch["y"], patch["x"]) <= 224 - image["scale"]


def test_names_from_stdin_and_plain_text(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, network: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"odd \xff name.jpg")
    odd.write_bytes((image_folder / "val/cat/01.JPEG").read_bytes())
    names = os.fsencode(odd) + b"\n\n" + os.fsencode(image_folder / "val/cat/02.JPEG") + b"\n"
    arguments = ["predict", "-", "--network", network, "--anchornet-weights", weights]
    result = program(*arguments, stdin=names)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(f"{tmp_path}/odd \ufffd name.jpg: ")
    assert lines[3].startswith(f"{image_folder / 'val/cat/02.JPEG'}: ")
    for begin in (0, 3):
        assert lines[begin].endswith("%")
        assert lines[begin + 1].startswith("  then ")
        count, of, what = lines[begin + 2].split()[:3]
        assert (what, of) == ("of", "patches")
        assert lines[begin + 2].count("(") == int(count) + 1


def test_an_empty_list_on_stdin_is_a_failure(
    program: Program, weights: Path, network: Path
) -> None:
    arguments = ["predict", "-", "--network", network, "--anchornet-weights", weights]
    result = program(*arguments, stdin=b"\n")
    assert (result.returncode, result.stdout) == (1, "")
    assert "-: no name of an image on stdin" in result.stderr


def test_another_programs_weights(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, network: Path
) -> None:
    own, name = tmp_path / "own.pth", "shufflenet_v2_x0_5"
    torch.save(load_weights(network, name).tensors, own)
    picture = image_folder / "val" / "cat" / "00.JPEG"
    common = ("predict", picture, "--anchornet-weights", weights, "--network")

    def line(*options: object) -> str:
        done = program(*common, *options)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        return done.stderr

    # The advice of each error is the next command.
    assert f"give --network NAME --weights {own}" in line(own)
    assert "names no classes for its 3 outputs: give their names with --class-map FILE" in line(
        *(name, "--weights", own)
    )
    (tmp_path / "names.txt").write_text("a\nb\n\nc \n")
    expected = program(*common, network, "--json")
    for option in ("--class-map", "--classes"):  # the latter is how it was called
        found = program(*common, name, "--weights", own, option, "names.txt", "--json")
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["images"] == json.loads(expected.stdout)["images"]
    (tmp_path / "names.txt").write_text("a\nb\na\n")
    assert "names.txt:3: expected class names, one per line and each once, found 'a'" in line(
        *(name, "--weights", own, "--class-map", "names.txt")
    )


def test_folders_and_formats(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, network: Path
) -> None:
    for i, path in enumerate(("b/2.jpg", "b/10.JPEG", "a.png", "b/c/1.jpg", ".hidden/1.jpg")):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        picture = image_folder / "val" / "cat" / f"0{i}.JPEG"
        (tmp_path / "in" / path).write_bytes(picture.read_bytes())
    (tmp_path / "in/b/notes.txt").write_text("no picture")
    (tmp_path / "in/b/x.jpg").write_text("no picture")
    (tmp_path / "in/b/again").symlink_to("..")
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.csv").write_text("a,Ape\nb,Bee\nc,Cat\n")
    (tmp_path / "cut.tar").write_bytes(b"no archive")
    archives = ["cut.tar", "cut.tar::a.png", "none.tar::a.png"]
    command: list[object] = ["predict", *archives, "in", "empty", "--network", network, "--top", 2]
    command += ["--anchornet-weights", weights, "--class-names", "names.csv", "--workers", 1]
    paths = [f"in/{name}" for name in ("a.png", "b/10.JPEG", "b/2.jpg", "b/x.jpg", "b/c/1.jpg")]
    lines: dict[str, list[str]] = {}
    stopping = program(*command[:2], *command[3:], "--stop-at", 0, "--format", "csv")
    for row in csv.DictReader(stopping.stdout.splitlines()):
        if not row["error"]:
            assert (row["patches"], float(row["gmacs"]) > 0.39) == ("1", True)
    told = program(*command[:2], *command[3:], "--stop-at", 0)
    assert re.search(r"^  looked at 1 of \d+ patch(es)?: 0\.\d+ GMACs$", told.stdout, re.MULTILINE)
    for form in ("jsonl", "csv", "table", "text"):
        result = program(*command, "--format", form)
        assert result.returncode == 1, result.stderr
        damaged, member, *others = sorted(result.stderr.splitlines())
        assert damaged.startswith(f"anchorpatch: cut.tar: {tmp_path}/cut.tar: neither a tar nor")
        assert member.startswith(f"anchorpatch: cut.tar::a.png: {tmp_path}/cut.tar: neither a tar")
        assert others == [
            "anchorpatch: empty: no image in it",
            "anchorpatch: in/b/x.jpg: not an image",
            "anchorpatch: none.tar::a.png: missing: there is no archive none.tar",
        ]
        lines[form] = result.stdout.splitlines()
    facts = [json.loads(line) for line in lines["jsonl"]]
    assert sorted(fact["path"] for fact in facts) == sorted([*paths, *archives, "empty"])
    good = [fact for fact in facts if "error" not in fact]
    assert [fact["path"] for fact in good] == [path for path in paths if "x.jpg" not in path]
    table = {row["path"]: row for row in csv.DictReader(lines["csv"])}
    assert table["in/b/x.jpg"]["error"] == "not an image"
    assert table["empty"]["error"] == "no image in it"
    for fact in good:
        row = table[fact["path"]]
        assert {"a": "Ape", "b": "Bee", "c": "Cat"}[fact["class"]] == fact["name"] == row["name"]
        assert (row["class"], row["class2"]) == tuple(one["class"] for one in fact["top"])
        assert float(row["probability"]) == pytest.approx(fact["probability"], rel=1e-5)
        assert (row["patches"], row["error"]) == (str(len(fact["patches"])), "")
    assert [line.split()[0] for line in lines["table"][1:]] == [fact["path"] for fact in good]
    assert lines["text"][0].startswith(f"in/a.png: {good[0]['name']} ({good[0]['class']}) ")


def test_pretrained_weights_know_imagenets_classes(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    torch.manual_seed(0)
    torch.save(build("shufflenet_v2_x0_5", 1000).state_dict(), tmp_path / "own.pth")
    picture = image_folder / "val" / "cat" / "00.JPEG"
    result = program(
        *("predict", picture, "--anchornet-weights", weights, "--batch-size", 7, "--json"),
        *("--network", "shufflenet_v2_x0_5", "--weights", "own.pth", "--max-patches", 2),
    )
    assert result.returncode == 0, result.stderr
    assert "its 1,000 outputs are assumed to be ImageNet's" in result.stderr
    (image,) = json.loads(result.stdout)["images"]
    assert len(image["patches"]) <= 2
    assert image["name"] == ClassNames().name(image["class"])
    assert image["name"]


def test_wrong_usage(program: Program, weights: Path) -> None:
    result = program("predict", "a.jpg")
    assert (result.returncode, result.stdout) == (2, "")
    assert "Missing option '--network'. Name a network, such as resnet50, or" in result.stderr
    result = program("predict", "a.jpg", "--network", weights, "--weights", weights)
    assert (result.returncode, result.stdout) == (2, "")
    assert "or --anchornet-weights for AnchorNet" in result.stderr
    result = program("predict", "a.jpg", "--network", "resnet50", "--anchornet-weights", weights)
    assert (result.returncode, result.stdout) == (1, "")
    assert "best.safetensors does not exist: run `anchorpatch finetune resnet50`" in result.stderr
    assert result.stderr.count("\n") == 1
