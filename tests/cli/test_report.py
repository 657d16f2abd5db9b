"""The real program on folders to report on."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Program
from tests.report.samples import EVIL, write_all, write_run


def test_it_says_what_it_wrote_and_the_same_bytes_twice(program: Program, tmp_path: Path) -> None:
    write_all(tmp_path / "run")
    env = {"SOURCE_DATE_EPOCH": "1700000000"}
    done = program("report", "run", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    page = tmp_path / "run" / "report.html"
    *lines, last = done.stdout.splitlines()
    assert lines == [
        "training: 2 runs",
        "tables: table 3, table 4, anchornet",
        "figures: figure 3, figure 6 (figures 4, 5: the shards store no images: extract with "
        "--store-images)",
        "shards: 1 split, 21 images",
        "settings: 3 tables",
    ]
    assert last.startswith("run/report.html: ")
    assert "2023-11-14 22:13 UTC" in page.read_text()

    apart = ("--runs", "run/runs", "--shards", "run/shards", "--figures", "run/figures")
    again = program("report", "run", *apart, "--out", "again.html", "--json", env=env)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
    document = json.loads(again.stdout)
    assert document["report"] == "again.html"
    assert document["bytes"] == page.stat().st_size
    assert document["sections"]["training"] == {"runs": 2}
    assert document["left_out"] == []


def test_damage_is_one_line_and_status_1_and_the_page_is_there(
    program: Program, tmp_path: Path
) -> None:
    write_run(tmp_path / "runs" / EVIL)
    with (tmp_path / "runs" / EVIL / "log.jsonl").open("a") as file:
        file.write('{"epoch"')
    done = program("report")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("left out: runs/<b>&amp;")
    assert line.endswith("line 5: expected the record of an epoch, found other text")
    lines = done.stdout.splitlines()
    assert lines[0] == "training: 1 run"
    assert "figures: nothing (figures 3, 4, 5: there are no shards)" in lines
    assert "shards: nothing (no shards)" in lines
    assert (tmp_path / "report.html").is_file()


def test_errors_write_nothing(program: Program, tmp_path: Path) -> None:
    empty = program("report")
    assert (empty.returncode, empty.stdout) == (1, "")
    assert empty.stderr.startswith("anchorpatch: .: expected training runs (runs/NAME/log.jsonl)")
    assert empty.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

    write_run(tmp_path / "runs" / "a")
    date = program("report", env={"SOURCE_DATE_EPOCH": "today"})
    assert (date.returncode, date.stdout) == (2, "")
    assert "SOURCE_DATE_EPOCH: expected seconds since 1970, got 'today'" in date.stderr
    assert not (tmp_path / "report.html").exists()
