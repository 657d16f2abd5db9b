from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchorpatch.errors import DataError
from anchorpatch.jobs.results import Table3
from anchorpatch.report.collect import collect
from anchorpatch.tables import number
from tests.report.samples import (
    ANCHORNET,
    EVIL,
    TABLE_3,
    TABLE_4,
    records,
    write_all,
    write_figure,
    write_run,
)
from tests.shards.samples import make_split


def test_everything_comes_back_as_it_was_written(tmp_path: Path) -> None:
    contents = collect(write_all(tmp_path))
    assert contents.left_out == ()
    assert [run.name for run in contents.runs] == [EVIL, "anchornet"]
    assert list(contents.runs[1].records) == records(4)
    assert contents.runs[1].config["epochs"] == 5
    assert {type(table): table for table in contents.results} == {
        type(table): table for table in (TABLE_3, TABLE_4, ANCHORNET)
    }
    (split,) = contents.splits
    assert split.facts.images == 21
    assert [reason for _, reason in split.skipped] == ["truncated", "empty file"]
    assert sum(map(sum, split.histogram.values())) == 21
    for scale, counts in split.histogram.items():
        patches = sum(k * images for k, images in enumerate(counts))
        assert patches == split.facts.scales[scale]["patches"]
    assert [(f.number, f.facts["figure"]) for f in contents.figures] == [
        (3, "patches"),
        (6, "coverage"),
    ]
    assert contents.figures[0].encoded == (tmp_path / "figures" / "patches.png").read_bytes()


def test_runs_lie_in_several_places_and_count_once(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "saccader" / "reward")
    write_run(tmp_path / "runs" / "saccader" / "bagnet")
    write_run(tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    names = [run.name for run in collect(tmp_path).runs]
    assert sorted(names) in (
        ["link", "saccader/bagnet", "saccader/reward"],
        ["other", "saccader/bagnet", "saccader/reward"],
    )
    below = collect(tmp_path / "runs")
    assert [run.name for run in below.runs] == ["saccader/bagnet", "saccader/reward"]
    (itself,) = collect(tmp_path / "other").runs
    assert itself.name == "other"
    apart = collect(tmp_path / "runs" / "saccader" / "bagnet", runs=tmp_path / "runs")
    assert {run.name for run in apart.runs} == {"saccader/bagnet", "saccader/reward"}


def test_shards_lie_in_several_places_too(tmp_path: Path) -> None:
    make_split(tmp_path / "shards" / "val")
    make_split(tmp_path / "train", shards=1)
    found = {split.facts.split for split in collect(tmp_path).splits}
    assert found == {"val", "train"}
    (one,) = collect(tmp_path / "shards" / "val").splits
    assert one.facts.split == "val"


def test_an_empty_folder_is_one_clear_line(tmp_path: Path) -> None:
    for folder, what in ((tmp_path, "found none of them"), (tmp_path / "no", "no such folder")):
        with pytest.raises(DataError) as error:
            collect(folder)
        message = str(error.value)
        assert message.startswith(f"{folder}: expected training runs (runs/NAME/log.jsonl), ")
        assert what in message
        assert "\n" not in message
        for command in ("train", "extract", "evaluate NETWORK --result FILE", "demo"):
            assert command in message


def test_what_is_damaged_is_left_out_with_its_reason(tmp_path: Path) -> None:
    root = write_all(tmp_path)
    log = root / "runs" / "anchornet" / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"epoch": 5, "val": {"top\n\xff\xfe\n[1]\n')
    (root / "runs" / EVIL / "config.json").write_text("[]")
    cut = root / "results" / "cut.json"
    cut.write_text(json.dumps(TABLE_3.to_json())[:-40])
    wrong = {**TABLE_3.to_json(), "rows": [{"scale": "63"}]}
    (root / "results" / "rows.json").write_text(json.dumps(wrong))
    (root / "results" / "table9.json").write_text("")
    shard = next((root / "shards" / "val").glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:-5])
    (root / "figures" / "coverage.png").write_bytes(b"no picture")
    write_figure(root / "figures", "attention", 5, picture="../nowhere.png")
    write_figure(root / "figures", "errors", 4, caption=["text"])
    (root / "figures" / "broken.json").write_text("{")

    contents = collect(root)
    assert [len(run.records) for run in contents.runs] == [3, 4]
    assert len(contents.results) == 3
    assert [figure.facts["figure"] for figure in contents.figures] == ["patches"]
    assert contents.splits[0].histogram == {}
    reasons: dict[str, str] = {}
    for what in contents.left_out:
        name = Path(what.source).name
        reasons[name] = f"{reasons.get(name, '')}{what.reason}|"
    for name, reason in {
        "log.jsonl": "line 5: expected the record of an epoch",
        "config.json": "expected a JSON object, found list",
        "cut.json": "damaged: ",
        "rows.json": "missing",
        "table9.json": "damaged: ",
        "val": "bytes",
        "coverage.json": "its picture coverage.png: not an image",
        "attention.json": "its picture nowhere.png: No such file",
        "errors.json": "expected text as caption, found ['text']",
        "broken.json": "damaged: ",
    }.items():
        assert reason in reasons.pop(name), name
    assert reasons == {}
    assert all("\n" not in what.reason for what in contents.left_out)


def test_a_folder_of_damage_alone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "log.jsonl").write_text("nothing\n")
    with pytest.raises(DataError, match=r"log\.jsonl: line 1: expected .* holds nothing else"):
        collect(tmp_path)


def test_lines_of_another_run_are_no_epochs_of_this_one(tmp_path: Path) -> None:
    log = write_run(tmp_path / "runs" / "a", epochs=4) / "log.jsonl"
    lines = log.read_text().splitlines()
    other = json.dumps({"epoch": 14})
    log.write_text("\n".join([other, lines[0], "{", lines[2], lines[2], other, lines[3]]))
    contents = collect(tmp_path)
    assert [record["epoch"] for record in contents.runs[0].records] == [1, 3, 4]
    assert [what.reason for what in contents.left_out] == [
        "line 1: expected epoch 1, found 14, a line of another run",
        "line 3: expected the record of an epoch, found other text",
        "line 5: expected epoch 4, found 3, a line of another run",
        "line 6: expected epoch 4, found 14, a line of another run",
    ]


def test_json_of_other_programs_is_no_damage(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "package.json").write_text("// {{{")
    (tmp_path / "runs" / "a" / "notes.json").write_text("{")
    (tmp_path / "large.json").write_bytes(b'{"protocol": "patches"' + b" " * (5 << 20))
    contents = collect(tmp_path)
    assert (contents.left_out, contents.results) == ((), ())


def test_tables_keep_values_that_are_no_numbers(tmp_path: Path) -> None:
    document = {**TABLE_3.to_json(), "speed": None, "gmacs_whole": "many"}
    (tmp_path / "t.json").write_text(json.dumps(document))
    (found,) = collect(tmp_path).results
    assert isinstance(found, Table3)
    assert (found.speed, found.gmacs_whole) == (None, "many")


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), [1]])
def test_only_finite_numbers_of_a_record_count(value: object) -> None:
    assert number({"val": {"top1": value}}, "val", "top1") is None
    assert number({"val": value}, "val", "top1") is None
