from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anchorpatch.jobs import extract
from anchorpatch.jobs.extract import ExtractConfig


def test_a_shard_that_lacks_a_batch_is_not_kept(
    tmp_path: Path, image_folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    append, seen = extract._append, []

    def fail_once(*args: Any, **kwargs: Any) -> int:
        seen.append(0)
        if len(seen) == 2:  # the third batch is waiting then
            raise ValueError("lost")
        return append(*args, **kwargs)

    monkeypatch.setattr(extract, "_append", fail_once)
    config = ExtractConfig(
        image_folder, "val", weights, tmp_path, limit=12, batch_size=4, shard_size=12, workers=0
    )
    with pytest.raises(ValueError, match="lost"):
        extract.run(config)
    assert not list(tmp_path.glob("val/*.h5"))
    monkeypatch.undo()
    assert extract.run(config).images == 12
