from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from anchorpatch.runtime.checkpoint import load_weights
from tests.conftest import Program

#: Of a figure's JSON, for whichever command.
KEYS = {
    *("figure", "number", "title", "caption", "picture"),
    *("weights_sha256", "source", "settings", "images"),
}

COMMANDS = {"patches": ("--per-scale", 1), "attention": ("--count", 1)}


@pytest.fixture
def options(image_folder: Path, weights: Path) -> list[object]:
    return [
        *("--data", image_folder, "--weights", weights, "--limit", 12),
        *("--workers", 0, "--device", "cpu"),
    ]


@pytest.mark.parametrize(("name", "number"), [("patches", 3), ("attention", 5)])
def test_a_picture_and_what_it_shows(
    program: Program,
    options: list[object],
    image_folder: Path,
    weights: Path,
    tmp_path: Path,
    name: str,
    number: int,
):
    # Matplotlib tells where it cannot keep its cache.
    env = {"MPLCONFIGDIR": "/dev/null/nowhere"}
    done = program("figure", name, *options, *COMMANDS[name], env=env)
    assert (done.returncode, "matplotlib" in done.stderr.lower()) == (0, False), done.stderr
    folder = tmp_path / "figures"
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}.json", f"{name}.png"]
    with Image.open(folder / f"{name}.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 224
    facts = json.loads((folder / f"{name}.json").read_text())
    assert facts.keys() >= KEYS
    assert (facts["figure"], facts["number"]) == (name, number)
    assert facts["picture"] == f"{name}.png"
    assert facts["weights_sha256"] == load_weights(weights).sha256
    assert facts["source"] == str(image_folder / "val")
    assert (facts["settings"]["seed"], facts["settings"]["limit"]) == (0, 12)
    assert (facts["looked_at"], facts["unreadable"]) == (12, 0)
    assert 1 <= len(facts["images"]) <= 3
    lines = done.stdout.splitlines()
    assert lines[-2] == facts["caption"]
    assert lines[-1] == f"figures/{name}.png"
    listed = [line.split()[:3] for line in lines[-2 - len(facts["images"]) : -2]]
    assert listed == [[i["path"], i["label"], i["predicted"]] for i in facts["images"]]


def test_json_is_one_object_and_shows_the_named_images(
    program: Program, options: list[object], tmp_path: Path
):
    names = ["dog/07.JPEG", "cat/11.JPEG", "dog/00.JPEG"]
    out = tmp_path / "some" / "figure.webp"
    chosen = ("--images", ", ".join(names), "--out", out, "--json")
    done = program("figure", "attention", *options, *chosen)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    written = json.loads(out.with_suffix(".json").read_text())
    assert written == {**facts, "picture": "figure.webp"}
    assert facts["picture"] == str(out)
    assert [image["path"] for image in facts["images"]] == names
    with Image.open(out) as picture:
        assert picture.format == "WEBP"


@pytest.mark.parametrize(
    ("name", "wrong", "status", "why"),
    [
        ("patches", ("--out", "three.gif"), 2, "expected a name that ends in .png"),
        ("attention", ("--classes", "dgo"), 2, "did you mean dog?"),
    ],
)
def test_wrong_options_fail_in_one_line_and_leave_nothing(
    program: Program,
    options: list[object],
    tmp_path: Path,
    name: str,
    wrong: tuple[str, ...],
    status: int,
    why: str,
):
    done = program("figure", name, *options, *wrong)
    assert done.returncode == status
    assert why in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_weights_of_other_classes_are_named(program: Program, image_folder: Path, tmp_path: Path):
    options = ("--data", image_folder, "--weights", "demo", "--limit", 4, "--workers", 0)
    done = program("figure", "errors", *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "knows none of its classes (cat, dog), only cross_dots" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
