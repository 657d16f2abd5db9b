from __future__ import annotations

from anchorpatch.tables import Cell, count, decimal, facts_table, share, text
from tests.report.samples import DASH, texts


def test_cells_write_numbers_and_keep_what_is_none() -> None:
    assert count(1234567) == Cell("1,234,567", 1234567)
    assert decimal(0.12345, 3) == Cell("0.123", 0.12345)
    assert share(0.758) == Cell("75.80%", 0.758)
    assert share(None) == Cell(DASH, None)
    assert (decimal(-1e-9).text, share(-1e-9, 0).text) == ("0.00", "0%")
    for odd in ("many", float("nan"), True, [1]):
        assert decimal(odd) == Cell(str(odd), None)
    assert [text(words).long for words in ("some short words", "a" * 25, "")] == [
        False,
        True,
        False,
    ]


def test_any_facts_become_a_table() -> None:
    facts = facts_table("Facts", "what", {"x": {"lr": 0.1, "amp": False}, "y": {"amp": None}})
    assert texts(facts) == [["x", "0.1", "no"], ["y", "", "none"]]
