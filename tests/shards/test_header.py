from __future__ import annotations

import pytest

from anchorpatch.errors import ShardError
from anchorpatch.settings import PRESETS, CropSettings
from anchorpatch.shards.header import ShardSettings, header_differences
from anchorpatch.storage import to_json
from tests.shards.samples import make_header, make_settings

CPU, GPU = {"device": "cpu"}, {"device": "cuda", "batch_size": 256}


def test_settings_of_the_first_files_of_version_1_are_read() -> None:
    settings = make_header().settings
    old = to_json(settings)
    for name in ("crop_mode", "background", "damaged"):
        del old[name]
    assert ShardSettings.from_json(old) == settings
    assert settings.crop == CropSettings()
    for odd in ({**old, "crop_mode": "stretch"}, {**old, "background": 7}):
        with pytest.raises(ValueError, match="expected"):
            ShardSettings.from_json(odd)
    for odd in ({**old, "cropping": "center"}, {k: v for k, v in old.items() if k != "codec"}):
        with pytest.raises(ShardError, match=r"cropping|codec"):
            ShardSettings.from_json(odd)


def test_settings_of_older_versions_are_read() -> None:
    settings = make_settings(device="cuda", batch_size=256, compile=True)
    assert ShardSettings.from_json(to_json(settings)) == settings
    older = {
        name: value
        for name, value in to_json(settings).items()
        if name not in ("device", "batch_size", "compile")
    }
    assert ShardSettings.from_json(older) == make_settings()


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({}, CPU, []),  # an older version's, whose bytes on CPU are the same
        (CPU, {"device": "cpu", "batch_size": 7}, []),  # changes nothing there
        (CPU, GPU, ["--device was cpu, now cuda"]),
        (GPU, CPU, ["--device was cuda, now cpu"]),
        (GPU, {"device": "cuda", "batch_size": 64}, ["--batch-size was 256, now 64"]),
    ],
)
def test_what_computed_is_compared_where_it_decides_bytes(
    old: dict, new: dict, difference: list[str]
) -> None:
    assert header_differences(make_header(**old), make_header(**new)) == difference


def test_the_preset_that_was_called_evaluate_is_dense() -> None:
    settings = ShardSettings(**vars(PRESETS["dense"]), preset="dense")
    data = settings.to_json() | {"preset": "evaluate"}
    assert ShardSettings.from_json(data) == settings
    now = ShardSettings(**vars(PRESETS["evaluate"]), preset="evaluate")
    assert ShardSettings.from_json(now.to_json()) == now
