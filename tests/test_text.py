from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch.text import decimal, percent

FINITE = st.floats(-1e12, 1e12) | st.floats(-1e-3, 1e-3)


def without_negative_zero(text: str, instead: str = "") -> str:
    return re.sub(r"^-(?=0(\.0*)?%?$)", instead, text)


@settings(deadline=None)
@given(FINITE, st.integers(0, 6))
def test_numbers_are_those_of_format_without_a_negative_zero(value: float, digits: int) -> None:
    assert decimal(value, digits) == without_negative_zero(f"{value:,.{digits}f}")
    assert decimal(value, digits, sign=True) == without_negative_zero(f"{value:+,.{digits}f}", "+")
    assert percent(value, digits) == without_negative_zero(f"{100 * value:,.{digits}f}%")
