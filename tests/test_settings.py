import math

import pytest

from anchorpatch.errors import SettingsError
from anchorpatch.settings import PRESETS, LspSettings


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"max_patches": (0, 1, 1)}, "max_patches"),
        ({"max_patches": (1, 1)}, "max_patches"),
        ({"iou_threshold": 1.1}, "iou_threshold"),
        ({"iou_threshold": math.nan}, "iou_threshold"),
        ({"coverage": (0.0, 0.1, 0.1)}, "coverage"),
        ({"coverage": (0.1, 0.1, math.nan)}, "coverage"),
    ],
)
def test_settings_outside_their_range_are_refused(change: dict[str, object], name: str) -> None:
    values = {"max_patches": (1, 1, 1), "iou_threshold": 0.3, "coverage": (0.1, 0.1, 0.1)}
    with pytest.raises(SettingsError, match=f"^{name}: expected"):
        LspSettings(**{**values, **change})  # type: ignore[arg-type]


def test_presets_are_the_papers() -> None:
    assert PRESETS["figure"] == LspSettings((5, 3, 2), 0.3, (0.05, 0.04, 0.03))
    assert PRESETS["finetune"] == LspSettings((24, 10, 8), 0.8, (0.3, 0.3, 0.3))
