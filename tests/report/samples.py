"""Folders to report on, with names that would break a page which does not escape them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from anchorpatch.jobs.results import AnchorNetFigures, Speed, Table3, Table3Row, Table4, Table4Row
from anchorpatch.metrics import OUTPUTS
from anchorpatch.tables import Table
from tests.conftest import draw_photo
from tests.shards.samples import edit_manifest, make_split

#: A folder's name that is no UTF-8 on disk, with all that HTML and mathtext make something of.
EVIL = "<b>&amp;\"'$x^{_`🦊\udcff"

#: The same in a page: what was no UTF-8 has become U+FFFD.
SHOWN = EVIL.replace("\udcff", "\ufffd")

VOID = {"meta", "link", "img", "br", "hr", "input"}

DASH = "–"  # noqa: RUF001 (an en dash)


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in (*table.rows, *table.foot)]


def records(epochs: int, *, anchornet: bool = True, best: float = 0.75) -> list[dict[str, Any]]:
    """Epochs as the trainer logs them, with smooth figures."""
    found = []
    for epoch in range(1, epochs + 1):
        top1 = best * epoch / epochs
        val: dict[str, Any] = {"loss": 9 / epoch, "top1": top1, "top5": min(1.0, top1 + 0.2)}
        if anchornet:
            val["top1_by_output"] = {name: top1 - 0.01 * i for i, name in enumerate(OUTPUTS)}
        unit = "images" if anchornet else "patches"
        found.append(
            {
                "epoch": epoch,
                "lr": 0.1 / epoch,
                "train": {"loss": 10 / epoch},
                "val": val,
                f"{unit}_per_second": 40.0 + epoch,
                "seconds": 60.0,
                "waiting": 0.01,
                "peak_memory": 2_000_000_000,
            }
        )
    return found


def write_run(folder: Path, epochs: int = 4, **more: Any) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(record) for record in records(epochs, **more)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    config = {"epochs": 5, "lr": 0.1, "amp": False, "data": None, "versions": {"torch": "2.6.0"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TABLE_3 = Table3(
    network="resnet<18>",
    shards="shards/val",
    weights="runs/a & b/best.safetensors",
    whole_weights="default",
    whole_source="the crops",
    gmacs_whole=1.814,
    gmacs_anchornet=0.394,
    rows=(
        Table3Row("224", 8, None, 1.814, None, None, None, 0.5, 0.875, 1.0),
        Table3Row("63", 3, 6.0, 0.9, 0.504, 1.294, 0.287, 0.75, 1.0, 1.0),
        Table3Row("95", 0, None, None, None, None, None, None, None, None),
        Table3Row("111", 5, 2.0, 0.8, 0.559, 1.194, 0.342, 0.25, 0.5, 1.0),
        Table3Row("all", 8, 3.5, 0.8375, 0.538, 1.2315, 0.321, 0.4375, 0.6875, 1.0),
    ),
    speed=Speed(32, 3, 61.24, 75.9, 1.24, 3.4),
    left_out=("row 95: no image",),
)

TABLE_4 = Table4(
    "resnet<18>",
    "shards/val",
    "w",
    "the crops",
    (
        Table4Row("63", 3, 0.1, 0.4, 0.5, 0.7),
        Table4Row("all", 3, 0.1, 0.4, 0.5, 0.7),
    ),
)

ANCHORNET = AnchorNetFigures(
    images=600,
    skipped=1,
    loss=11.0,
    top1=0.74,
    top5=0.96,
    top1_by_output=dict.fromkeys(OUTPUTS, 0.7),
    top5_by_output=dict.fromkeys(OUTPUTS, 0.9),
    branch_share={"63": 0.2, "95": 0.5, "111": 0.3},
    mean_patches={"figure": {"63": 4.8, "95": 2.9, "111": None, "all": 3.1}},
    gmacs=0.394,
    images_per_second=71.2,
)


def write_figure(folder: Path, name: str, number: int, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw_photo(number, (96, 64)).save(folder / f"{name}.png")
    facts = {
        "figure": name,
        "number": number,
        "title": f"Title of {name}",
        "caption": f"Caption of <{name}> & more",
        "picture": f"{name}.png",
        "weights_sha256": "cd" * 32,
        "source": "images/val",
        "settings": {"seed": 0, "max_patches": [5, 3, 2]},
        **more,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(facts))
    return path


def write_all(root: Path) -> Path:
    """Everything a folder can hold: two runs, a split, three results, two figures."""
    write_run(root / "runs" / "anchornet")
    write_run(root / "runs" / EVIL, epochs=3, anchornet=False)
    make_split(root / "shards" / "val")
    skip_images(root / "shards" / "val")
    results = {"table3": TABLE_3, "table4": TABLE_4}
    for name, table in results.items():
        path = root / "runs" / "anchornet" / f"{name}.json"
        path.write_text(json.dumps(table.to_json()))
    (root / "results").mkdir()
    (root / "results" / "anchornet.json").write_text(json.dumps(ANCHORNET.to_json()))
    (root / "results" / "notes.json").write_text('{"protocol": "of another program"}')
    write_figure(root / "figures", "patches", 3)
    summary = [
        {"localizer": "anchornet", "covered_auc": 0.71, "covered_auc_error": 0.01},
        {"localizer": "<random>", "covered_auc": 0.52, "covered_auc_error": None},
    ]
    left_out = ["BagNet-33: no <weights>"]
    write_figure(root / "figures", "coverage", 6, summary=summary, left_out=left_out)
    return root


def skip_images(split: Path) -> None:
    """Let the manifest tell of two images that could not be read."""
    skipped = [
        ["cat/<img src=x onerror=alert(1)>.jpg", "truncated"],
        ["cat/caf\udce9.jpg", "empty file"],
    ]
    edit_manifest(split, lambda document: document["shards"][0].update(skipped=skipped))


def sheet(width: int = 1400, height: int = 1200) -> Image.Image:
    """A sheet of noisy photographs, which PNG stores badly."""
    picture = draw_photo(5, (width, height))
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.asarray(picture) // 2 + noise)


class Parsed(HTMLParser):
    """A page's elements with their attributes and text; knows whether they are nested well."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, Mapping[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(page.decode("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))
        if "caption" in self.open:
            self.tables[data] = self._rows
        elif ("td" in self.open or "th" in self.open) and data.strip():
            self._rows[-1][-1] += data

    def all(self, tag: str) -> list[Mapping[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "".join(text for tag, text in self.texts if tag not in ("style", "script"))
