from __future__ import annotations

from pathlib import Path

import pytest

from anchorpatch import demo
from anchorpatch.classes import imagenet_names
from anchorpatch.demo import BUNDLED, bundled_weights, find_weights
from anchorpatch.demo.scenes import CLASSES
from anchorpatch.errors import WeightsError
from anchorpatch.runtime.checkpoint import load_weights

PHOTOS = (
    *("tench", "English springer", "cassette player", "chain saw", "church", "French horn"),
    *("garbage truck", "gas pump", "golf ball", "parachute"),
)


def test_missing_weights_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED, "demo", "no-such.safetensors")
    with pytest.raises(WeightsError, match=r"no-such\.safetensors: expected the bundled weights"):
        bundled_weights()


@pytest.mark.parametrize("name", BUNDLED)
def test_the_file_lies_beside_the_module(name: str) -> None:
    path = bundled_weights(name)
    assert path == find_weights(name, Path("runs")) == Path(demo.__file__).with_name(BUNDLED[name])
    assert path.stat().st_size < 7_000_000
    classes = load_weights(path).meta.classes
    known = tuple(imagenet_names().get(of, of) for of in classes)
    assert known == (CLASSES if name == "demo" else PHOTOS)
