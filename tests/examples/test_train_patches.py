"""The training loop of examples/train_patches.py learns what patches show."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.writer import ShardWriter
from tests.shards.samples import digest_of, make_batch, make_header

SCRIPT = Path(__file__).parents[2] / "examples" / "train_patches.py"


def write_split(folder: Path, images: int) -> None:
    """Write images whose patches show their label as a color, with noise."""
    files = digest_of([f"{i:02d}.jpg" for i in range(images)], images)
    manifest = open_manifest(folder, make_header(folder.name, shard_size=images), files)
    batch = make_batch(images, seed=images)
    colors = np.array([[40, 40, 40], [200, 40, 40], [40, 200, 40], [40, 40, 200]])
    noise = np.random.default_rng(0).integers(-30, 30, batch.pixels.shape)
    pixels = (colors[batch.label][:, None, None] + noise).astype(np.uint8)
    path = manifest.shard_path(0)
    with ShardWriter(path, manifest.header, files_sha256=files.shards[0]) as writer:
        writer.append(batch._replace(pixels=pixels))
    manifest.commit(writer.entry)


def test_it_learns_and_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    import torch

    torch.manual_seed(0)
    write_split(tmp_path / "train", 64)
    write_split(tmp_path / "val", 20)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), "test_resnet.r160_in1k", "4"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"epoch {n}" for n in range(1, 5)]
    assert max(lines[1:], key=lambda line: float(line.split()[2][:-1])).endswith(
        ": 100.0% of 20 images right"
    )
    assert len(SCRIPT.read_text().splitlines()) < 30
