from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tests.program import run_program

run = partial(run_program, "scenes")


def test_scenes_draws_a_set_and_says_so(tmp_path: Path) -> None:
    first = run("data", "--train", 20, "--val", 10, cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == (
        "20 train and 10 val pictures of 10 classes, 30 of them drawn now: data\n"
    )
    assert len(list((tmp_path / "data").rglob("*.JPEG"))) == 30

    again = run("data", "--train", 20, "--val", 10, "--json", cwd=tmp_path)
    assert again.returncode == 0
    result = json.loads(again.stdout)
    assert (result["train"], result["val"], result["seed"], result["drawn"]) == (20, 10, 0, 0)
    assert result["folder"] == "data"
    assert result["classes"] == sorted(p.name for p in (tmp_path / "data" / "val").iterdir())


def test_another_set_in_the_folder_ends_with_status_1_and_one_line(tmp_path: Path) -> None:
    run("data", "--train", 0, "--val", 2, cwd=tmp_path)
    other = run("data", "--train", 0, "--val", 2, "--seed", 1, cwd=tmp_path)
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr.count("\n") == 1
    assert "the folder holds another set" in other.stderr


def test_a_wrong_number_is_a_usage_error(tmp_path: Path) -> None:
    wrong = run("data", "--val", -1, cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--val" in wrong.stderr
    assert not (tmp_path / "data").exists()
