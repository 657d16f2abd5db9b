"""The plan for a billion pictures: its table is what its own lines of Python compute."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "examples" / "scale.md").read_text()


def test_the_table_is_what_the_page_computes(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    exec(compile(block, "examples/scale.md", "exec"), {})
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 11
    assert f"\n\n{table}\n" in PAGE
