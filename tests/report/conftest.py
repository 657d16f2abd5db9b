from __future__ import annotations

from pathlib import Path

import pytest

from anchorpatch.demo import bundled_weights
from anchorpatch.demo.scene_folder import make_scenes
from anchorpatch.jobs.extract import run
from anchorpatch.jobs.extract_plan import ExtractConfig


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `anchorpatch demo` leaves, of 12 scenes and without its picture. Nobody writes there."""
    folder = tmp_path_factory.mktemp("demo")
    make_scenes(folder / "scenes", 0, 12, 1)
    run(
        ExtractConfig(
            data=folder / "scenes",
            split="val",
            weights=bundled_weights(),
            out=folder / "shards",
            store_images=True,
            device="cpu",
        )
    )
    return folder
