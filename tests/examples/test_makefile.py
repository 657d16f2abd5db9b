"""The graph of examples/Makefile, run by make with a program that only notes what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "examples" / "Makefile"

#: Stands in for anchorpatch: writes the files that the command would, and a line of its words.
PROGRAM = """\
import sys
from pathlib import Path

words = sys.argv[1:]
with open("log", "a") as log:
    log.write(" ".join(words) + "\\n")


def after(name, default=None):
    return Path(words[words.index(name) + 1]) if name in words else default


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


runs = after("--runs", Path("runs"))
if words[0] == "train":
    touch(runs / "anchornet" / "best.safetensors")
elif words[0] == "finetune":
    touch(runs / (words[1] + "-baseline" * ("--baseline" in words)) / "best.safetensors")
elif words[0] == "evaluate":
    touch(after("--result"))
elif words[0] == "extract":
    after("--out").mkdir(exist_ok=True)
elif words[0] == "figure":
    touch(after("--out"))
    touch(after("--out").with_suffix(".json"))
elif words[0] == "report":
    touch(after("--out"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if shutil.which("make") is None:
        pytest.skip("needs make on PATH")
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def make(folder: Path, *goals: str) -> list[str]:
    """Run make and return the commands that it gave, as the program took them."""
    (folder / "log").write_text("")
    program = f"{sys.executable} program.py"
    done = subprocess.run(
        [
            *("make", "-f", MAKEFILE, f"ANCHORPATCH={program}", f"EVALUATE={program}"),
            *("NETWORKS=small large", "BASELINES=small", *goals),
        ],
        cwd=folder,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "log").read_text().splitlines()


def first_words(commands: list[str]) -> list[str]:
    """The commands, sorted, with what they are about where they are about something."""
    words = [command.split() for command in commands]
    return sorted(" ".join(w for w in some[:2] if not w.startswith(("-", "."))) for some in words)


def test_everything_is_made_once_and_in_order(folder: Path) -> None:
    commands = make(folder, "report")
    assert first_words(commands) == sorted(
        [
            *("train", "extract", "extract", "shards verify", "report"),
            *("finetune small", "finetune small", "finetune large"),
            *(f"evaluate {network}" for network in ("small", "large") * 2),
            *(f"figure {name}" for name in ("patches", "errors", "attention", "coverage")),
        ]
    )
    assert commands[0].startswith("train ")
    assert commands[-1].startswith("report . --runs runs --shards shards --figures figures ")
    baseline = next(i for i, c in enumerate(commands) if "--baseline" in c)
    coverage = next(i for i, c in enumerate(commands) if c.startswith("figure coverage small"))
    assert baseline < coverage
    for name in ("table3", "table4"):
        for network in ("small", "large"):
            assert (folder / "runs" / network / f"{name}.md").is_file()
            assert (folder / "runs" / network / f"{name}.json").is_file()
    assert (folder / "report.html").is_file()
    assert make(folder, "report", "all") == []


def test_only_what_has_changed_is_made_again(folder: Path) -> None:
    make(folder, "report")
    assert first_words(make(folder, "report", "TABLE3_FLAGS=--no-speed")) == [
        *("evaluate large", "evaluate small", "report"),
    ]
    again = make(folder, "report", "TABLE3_FLAGS=--no-speed", "COVERAGE_FLAGS=--limit 9")
    assert first_words(again) == ["figure coverage", "report"]
    assert again[0].endswith("--limit 9")
    flags = ("TABLE3_FLAGS=--no-speed", "COVERAGE_FLAGS=--limit 9", "REPORT_FLAGS=--no-figures")
    assert first_words(make(folder, "report", *flags)) == ["report"]
    assert make(folder, "report", *flags) == []


def test_each_split_is_extracted_with_its_options(folder: Path) -> None:
    first = [c for c in make(folder, "extract") if c.startswith("extract ")]
    assert sorted(c.split("--overwrite ")[1] for c in first) == [
        *("--codec image", "--max-patches 6,3,2"),
    ]
    again = make(folder, "extract", "EXTRACT_VAL_FLAGS=--preset figure")
    assert [c.split("--split ")[1].split()[0] for c in again] == ["val"]
    # What is for both comes last, so that it decides.
    both = make(folder, "extract", "EXTRACT_VAL_FLAGS=--preset figure", "EXTRACT_FLAGS=--amp")
    assert sorted(c.split("--overwrite ")[1] for c in both) == [
        *("--codec image --amp", "--preset figure --amp"),
    ]


def test_folders_may_lie_elsewhere_and_tables_need_no_figure(folder: Path) -> None:
    commands = make(folder, "RUNS=r", "SHARDS=s", "FIGURES=f", "REPORT=pages/page.html")
    assert "figure" not in " ".join(commands)
    commands = make(folder, "report", "RUNS=r", "SHARDS=s", "FIGURES=f", "REPORT=pages/page.html")
    assert first_words(commands) == [
        *(f"figure {name}" for name in ("attention", "coverage", "errors", "patches")),
        "report pages",
    ]
    assert commands[-1] == "report pages --runs r --shards s --figures f --out pages/page.html"
