from __future__ import annotations

from pathlib import Path

import pytest

from anchorpatch import demo
from anchorpatch.demo import NAME, demo_weights
from anchorpatch.errors import WeightsError


def test_missing_weights_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NAME", "no-such.safetensors")
    with pytest.raises(WeightsError, match=r"no-such\.safetensors: expected the bundled weights"):
        demo_weights()


def test_the_file_lies_beside_the_module() -> None:
    try:
        path = demo_weights()
    except WeightsError as error:
        pytest.skip(str(error))
    assert path == Path(demo.__file__).with_name(NAME)
    assert 1_000_000 < path.stat().st_size < 7_000_000
