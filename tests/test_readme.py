"""README's examples in Python run as they stand, in a folder with what they read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import draw_photo
from tests.shards.samples import make_split

README = Path(__file__).parents[1] / "README.md"
BLOCKS = {
    f"line {README.read_text()[: found.start()].count(chr(10)) + 2}": found[1]
    for found in re.finditer(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readme")
    draw_photo(1, (320, 260)).save(root / "dog.jpg")
    for split in ("train", "val"):
        make_split(root / "shards" / split)
    return root


def test_readme_shows_the_main_ways_in() -> None:
    text = "\n".join(BLOCKS.values())
    for name in ("anchorpatch.localize(", "ShardReader(", "PatchDataset(", "collate_bags"):
        assert name in text


@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(BLOCKS[block], f"README.md, {block}", "exec"), names)
    if "def tiny" in BLOCKS[block]:
        # What the text says of it: a network for `anchorpatch finetune nets:tiny`.
        from anchorpatch.models.complexity import check_sides
        from anchorpatch.models.registry import build

        Path("nets.py").write_text(BLOCKS[block])
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "nets", raising=False)
        check_sides("nets:tiny", build("nets:tiny", 10))
