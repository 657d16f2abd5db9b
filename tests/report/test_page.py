from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import pytest

from anchorpatch.errors import DataError, SettingsError, StorageError
from anchorpatch.report.collect import Split, collect
from anchorpatch.report.page import (
    ReportConfig,
    _shards,
    histogram_table,
    key_figures,
    page_date,
    run,
    sections,
)
from anchorpatch.report.pictures import Made
from anchorpatch.settings import SCALES
from tests.figures.test_tradeoff import sample as dynamic_sample
from tests.report.samples import (
    SHOWN,
    TABLE_3,
    Parsed,
    sheet,
    texts,
    write_all,
    write_figure,
    write_run,
)

DATE = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
SECTIONS = ["training", "tables", "figures", "shards", "settings"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("all"))


@pytest.fixture(scope="module")
def page(root: Path) -> bytes:
    out = root / "report.html"
    summary = run(ReportConfig(root, date=DATE))
    assert (summary.report, summary.bytes, summary.left_out) == (out, out.stat().st_size, ())
    return out.read_bytes()


@pytest.fixture(scope="module")
def parsed(page: bytes) -> Parsed:
    return Parsed(page)


def test_the_page_has_its_sections_landmarks_and_headings(parsed: Parsed) -> None:
    assert [section["id"] for section in parsed.all("section")] == SECTIONS
    for tag in ("header", "nav", "main", "footer", "h1", "title"):
        assert len(parsed.all(tag)) == 1, tag
    assert parsed.elements[0][0] == "html"
    assert parsed.all("html")[0]["lang"] == "en"
    links = [str(link["href"]) for link in parsed.all("a")]
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert links == ["#content", *(f"#{key}" for key in SECTIONS)]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    for _, attributes in parsed.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_tables_have_what_the_files_say(parsed: Parsed) -> None:
    table_3 = parsed.tables["Table 3: resnet<18>"]
    assert table_3[0][0] == "scale"
    assert table_3[-1][-2:] == ["43.75%", "68.75%"]
    runs = parsed.tables["Training runs"]
    assert [row[0] for row in runs[1:]] == [SHOWN, "anchornet"]
    assert [row[2] for row in runs[1:]] == ["75.00%", "75.00%"]
    numbers = parsed.tables["Figure 6 in numbers"]
    assert [row[:3] for row in numbers[1:]] == [
        ["AnchorNet", "0.7100", "± 0.0100"],
        ["<random>", "0.5200", "–"],  # noqa: RUF001
    ]
    assert "Left out: BagNet-33: no <weights>." in parsed.text
    assert parsed.tables["Skipped images"][1][0] == "cat/<img src=x onerror=alert(1)>.jpg"
    assert "ab" * 32 in parsed.text
    assert "Caption of <patches> & more" in parsed.text
    for number in (4, 5):
        assert f"Figure {number} (" in parsed.text
    assert "anchorpatch figure errors" in parsed.text


def test_the_cards_count_what_anchornet_costs(root: Path, parsed: Parsed) -> None:
    cards = [(key.value, key.label) for key in key_figures(collect(root))]
    assert cards[:3] == [
        ("43.8%", "top-1 of resnet<18> on patches"),
        (
            "1.232",
            "GMACs per image of resnet<18> in all, AnchorNet's 0.394 included: 32% less than a "
            "whole image's 1.814",
        ),
        ("1.24 times", "the speed of resnet<18> on whole images, measured, AnchorNet included"),
    ]
    assert cards[1][1] in parsed.text
    # Where patches cost more than the whole image, the card says so, as the table does.
    rows = [replace(row, saved_with_anchornet=-0.04) for row in TABLE_3.rows if row.scale == "all"]
    dear = replace(TABLE_3, rows=tuple(rows), speed=None)
    _, cost, *rest = key_figures(replace(collect(root), results=(dear,)))
    assert cost.label.endswith("included: 4% more than a whole image's 1.814")
    assert not [key for key in rest if "speed" in key.label]


def test_every_heading_of_a_column_is_a_button_and_every_picture_has_words(parsed: Parsed) -> None:
    columns = [th for th in parsed.all("th") if th.get("scope") == "col"]
    buttons = parsed.all("button")
    assert len(columns) == len(buttons) > 50
    assert all(button["type"] == "button" for button in buttons)
    pictures = parsed.all("img")
    assert len(pictures) == 2
    for picture in pictures:
        assert str(picture["alt"]).startswith("Title of ")
        assert (picture["width"], picture["height"]) == ("96", "64")
    drawn = [a for _, a in parsed.elements if a.get("role") == "img"]
    assert len(drawn) == len(parsed.all("svg")) == 7
    assert all("at epoch" in str(chart["aria-label"]) for chart in drawn)


def test_the_page_begins_with_its_kind(page: bytes) -> None:
    # Anything else would let browsers fall back to the rules of old pages.
    assert page.startswith(b"<!doctype html>\n<html")


def test_nothing_is_asked_of_any_network(page: bytes, parsed: Parsed) -> None:
    for _, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:"))
    style = re.search(rb"<style>(.*?)</style>", page, re.DOTALL)
    assert style
    assert b"url(" not in style[1]
    assert b"@import" not in style[1]
    addresses = set(re.findall(rb"https?://[^\s\"'<]+", page))
    assert addresses <= {b"http://www.w3.org/2000/svg", b"http://www.w3.org/1999/xlink"}


def test_the_policy_lets_only_the_page_s_own_script_run(page: bytes, parsed: Parsed) -> None:
    policy = next(
        str(meta["content"])
        for meta in parsed.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == len(parsed.all("script")) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0]).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")]


def test_names_from_files_are_text_and_nothing_else(page: bytes, parsed: Parsed) -> None:
    assert SHOWN in parsed.text
    assert b"<b>&amp;amp;" not in page.replace(b"&lt;b&gt;", b"")
    assert len(parsed.all("img")) == 2
    assert "\udcff" not in page.decode()
    assert "cat/caf\ufffd.jpg" in parsed.text


def test_the_same_folder_gives_the_same_bytes(
    root: Path, page: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "deep" / "again.html"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(DATE.timestamp())))
    run(ReportConfig(root, out=again))
    assert again.read_bytes() == page
    assert [path.name for path in again.parent.iterdir()] == ["again.html"]


def test_the_date_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert abs((page_date() - datetime.now(timezone.utc)).total_seconds()) < 60
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert page_date().year == 1970
    for wrong in ("soon", "1e9", str(10**20)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(SettingsError, match="SOURCE_DATE_EPOCH: expected seconds since 1970"):
            page_date()


def test_a_folder_with_little_in_it_says_what_would_fill_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    summary = run(ReportConfig(tmp_path))
    parsed = Parsed(summary.report.read_bytes())
    # What there is comes first.
    assert [section["id"] for section in parsed.all("section")] == SECTIONS
    for command in (
        "anchorpatch extract",
        "anchorpatch evaluate NETWORK --result runs/NETWORK/table3.json",
        "anchorpatch evaluate NETWORK --protocol rescale --result runs/NETWORK/table4.json",
        "anchorpatch figure patches",
        "anchorpatch figure coverage NETWORK",
    ):
        assert command in parsed.text
    assert parsed.all("aside") == []


def test_accuracy_against_cost_is_drawn_and_told(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    path = tmp_path / "runs" / "a" / "dynamic.json"
    path.write_text(json.dumps(dynamic_sample("<b>net").to_json()))
    summary = run(ReportConfig(tmp_path))
    assert summary.left_out == ()
    assert summary.sections["tables"]["dynamic"] == 1
    parsed = Parsed(summary.report.read_bytes())
    assert "Accuracy against cost: <b>net" in parsed.text
    assert "Saved by stopping early" in parsed.text
    assert "33% (20% to 40%)" in parsed.text
    told = [div.get("aria-label", "") for div in parsed.all("div")]
    begins = "Top-1 of <b>net by GMACs per image. whole image, by size: 50.0% at 0.8 GMACs"
    assert any(label.startswith(begins) for label in told)


def test_one_thing_is_not_counted_in_the_plural(root: Path) -> None:
    (split,) = collect(root).splits
    facts = replace(split.facts, images=1, classes=1, shards=1, total_shards=1)
    contents = replace(collect(root), splits=(replace(split, facts=facts),))
    shards = next(s for s in sections(contents, Made()) if s.key == "shards")
    assert shards.blocks[0].blocks[0].startswith("1 image of 1 class in 1 shard.")


def test_damage_is_named_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "x<y.json").write_text("{")
    summary = run(ReportConfig(tmp_path))
    (left_out,) = summary.left_out
    parsed = Parsed(summary.report.read_bytes())
    assert len(parsed.all("aside")) == 1
    assert left_out.source.endswith("x<y.json")
    assert left_out.source in parsed.text
    assert left_out.reason in parsed.text


def test_six_large_pictures_stay_below_5_mb(tmp_path: Path) -> None:
    picture = sheet(1000, 900)
    for number in (3, 4, 5, 6, 7, 8):
        path = write_figure(tmp_path / "figures", f"figure{number}", number)
        picture.save(path.with_suffix(".png"), compress_level=1)
    summary = run(ReportConfig(tmp_path))
    assert 2_000_000 < summary.bytes < 5_000_000


def test_errors_leave_nothing_and_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected training runs"):
        run(ReportConfig(tmp_path))
    assert list(tmp_path.iterdir()) == []
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="report"):
        run(ReportConfig(tmp_path, out=tmp_path / "file" / "report.html"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return collect(write_all(tmp_path_factory.mktemp("all"))).splits[0]


def test_shards_by_scale(split: Split) -> None:
    table = split.facts.table()
    for row, scale in zip(table.rows, SCALES, strict=True):
        found = split.facts.scales[scale]
        assert [cell.key for cell in row] == [
            *(scale, found["images"], found["images"] / 21),
            *(found["patches"], found["patches"] / found["images"]),
        ]
    assert max(cell.bar or 0 for row in table.rows for cell in row) == 1
    assert table.foot[0][1].text == "21"
    (part,) = _shards([split]).blocks
    assert texts(part.blocks[-1])[0][1] == "truncated"


def test_the_histogram_counts_every_image_once(split: Split) -> None:
    table = histogram_table(split)
    assert sum(cell.key for row in table.rows for cell in row[1:]) == 21
    assert not table.folded
    wide = Split(split.folder, split.facts, (), {63: (0, *[2] * 100), 95: (0, 5), 111: ()})
    binned = histogram_table(wide)
    assert len(binned.rows) <= 24
    assert binned.folded
    assert sum(row[1].key for row in binned.rows) == 200
    assert sum(row[2].key for row in binned.rows) == 5
    assert binned.rows[0][0].text == "1 to 5"
