"""The graph of examples/Makefile, run by make with a program that only notes what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "examples" / "Makefile"

NETWORKS = ("small", "large")

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
if words[0] in ("train", "finetune"):
    name = "anchornet" if words[0] == "train" else words[1] + "-baseline" * ("--baseline" in words)
    touch(runs / name / "config.json")
    touch(runs / name / "best.safetensors")
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
    done = run(folder, *goals)
    assert done.returncode == 0, done.stderr
    return (folder / "log").read_text().splitlines()


def run(folder: Path, *goals: str) -> subprocess.CompletedProcess[str]:
    program = f"{sys.executable} program.py"
    return subprocess.run(
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


def planned(folder: Path, *goals: str) -> list[str]:
    """The commands that make would give, by -n; it runs nothing."""
    (folder / "log").write_text("")
    done = run(folder, "-n", *goals)
    assert done.returncode == 0, done.stderr
    assert (folder / "log").read_text() == ""
    joined = done.stdout.replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in joined.splitlines()]
    return [line.split("program.py ")[1] for line in lines if "program.py " in line]


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
    # What is up to date is seen without running anything.
    nothing = run(folder, "-n", "report", "all").stdout.splitlines()
    assert all(line.startswith("make: Nothing to be done for") for line in nothing), nothing
    assert run(folder, "-q", "report", "all").returncode == 0
    assert run(folder, "-q", "report", "TABLE3_FLAGS=--no-speed").returncode == 1
    assert run(folder, "-q", "report", "all").returncode == 0


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


def test_other_patches_of_val_train_nothing_again(folder: Path) -> None:
    make(folder, "report")
    flags = "EXTRACT_VAL_FLAGS=--max-patches 4,3,2"
    tables = [f"evaluate {network}" for network in ("large", "large", "small", "small")]
    expected = [*tables, "extract", "report", "shards verify"]
    assert first_words(planned(folder, "report", flags)) == expected
    assert first_words(make(folder, "report", flags)) == expected
    assert make(folder, "report", flags) == []
    (folder / "data" / "val" / "dog").mkdir()
    again = first_words(make(folder, "report", flags))
    figures = [f"figure {name}" for name in ("attention", "coverage", "errors", "patches")]
    assert again == sorted([*expected, *figures])
    (folder / "data" / "train" / "dog").mkdir()
    again = first_words(make(folder, "report", flags))
    assert {"train", "finetune small", "finetune large"} < set(again)


def test_quotes_in_options_are_kept(folder: Path) -> None:
    flags = "EXTRACT_FLAGS=--limit 5 --task '0/2' \"--amp\" # a,b"
    assert len(make(folder, "extract", flags)) == 3
    assert make(folder, "extract", flags) == []
    assert run(folder, "-q", "extract", flags).returncode == 0


def test_weights_that_one_has_are_never_trained_over(folder: Path) -> None:
    best = folder / "runs" / "anchornet" / "best.safetensors"
    best.parent.mkdir(parents=True)
    best.write_text("a colleague's")
    assert first_words(make(folder, "extract")) == ["extract", "extract"]
    assert make(folder, "train") == []
    # The commands below would refuse to: without --overwrite, they say what is in the way.
    tuned = folder / "runs" / "large" / "best.safetensors"
    tuned.parent.mkdir()
    tuned.write_text("a colleague's")
    commands = make(folder, "finetune")
    assert {c.split()[1]: "--overwrite" in c for c in commands} == {"large": False, "small": False}
    # A run of our own begins anew.
    again = make(folder, "finetune", "FINETUNE_FLAGS=--amp")
    assert {c.split()[1]: "--overwrite" in c for c in again} == {"large": True, "small": True}
    (folder / "own.safetensors").write_text("")
    for name in ("own.safetensors", "photos"):
        found = make(folder, "report", "RUNS=other", "FIGURES=f", f"WEIGHTS={name}")
        assert "train" not in first_words(found)
        extracts = [c for c in found if c.startswith("extract ")]
        assert len(extracts) == 2
        assert all(f"--weights {name} " in c for c in extracts)
        assert any(c.startswith("figure patches") and f"--weights {name} " in c for c in found)
        assert make(folder, "report", "RUNS=other", "FIGURES=f", f"WEIGHTS={name}") == []
    assert best.read_text() == "a colleague's"
    assert not (folder / "other" / "anchornet").exists()


def test_an_interrupted_run_is_not_taken_for_a_finished_one(folder: Path) -> None:
    program = folder / "program.py"
    program.write_text(PROGRAM + 'if words[0] == "train":\n    sys.exit(1)\n')
    assert run(folder, "train").returncode == 2
    best = folder / "runs" / "anchornet" / "best.safetensors"
    assert best.is_file()  # of the best epoch until then, and may stay so
    program.write_text(PROGRAM)
    assert first_words(make(folder, "extract")) == ["extract", "extract", "train"]


def test_whole_images_are_asked_of_a_baseline_or_the_published_network(folder: Path) -> None:
    def asked(*options: str) -> dict[str, str]:
        found = {}
        for command in planned(folder, "report", *options):
            words = command.split()
            if words[0] == "evaluate" or words[:2] == ["figure", "coverage"]:
                option = "--weights" if words[0] == "figure" else "--whole-weights"
                name = " ".join(w for w in words[:4] if w in ("rescale", "coverage", *NETWORKS))
                found[name] = words[words.index(option) + 1] if option in words else ""
        return found

    baseline = "runs/small-baseline/best.safetensors"
    assert asked() == {
        **{"small": baseline, "small rescale": baseline, "large": "", "large rescale": ""},
        "coverage small": baseline,
    }
    (folder / "own.pth").write_text("")
    assert set(asked("BASELINES=", "WHOLE_WEIGHTS=own.pth").values()) == {"own.pth"}
    for number in (1440764, *range(1440765, 1441763), 15075141):
        (folder / "imagenet" / "train" / f"n{number:08d}").mkdir(parents=True)
    (folder / "imagenet" / "val").mkdir()
    options = ("DATA=imagenet", "COVERAGE=large")
    assert asked(*options) == {
        **{"small": baseline, "small rescale": baseline},
        **{"large": "default", "large rescale": "default", "coverage large": "default"},
    }


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
