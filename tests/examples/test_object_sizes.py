"""The table of examples/object_sizes.py on objects whose sizes are known."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.writer import ShardWriter
from tests.shards.samples import digest_of, make_batch, make_header

SCRIPT = Path(__file__).parents[2] / "examples" / "object_sizes.py"
SIDES = np.array([32, 56, 112, 64, 168, 112])  # of the squares
CHOSEN = np.array([63, 63, 95, 95, 111, 111])


class Bright(nn.Module):
    """Every class is as likely as the image is bright, so that Grad-CAM marks what is white."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 1, 1), nn.Linear(1, 4)
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).mean((2, 3)))


def bright(num_classes: int) -> nn.Module:
    return Bright()


def write_squares(folder: Path, scale: np.ndarray) -> None:
    """Write an image for each side, with a white square of this side."""
    n = len(SIDES)
    batch = make_batch(n)
    pixels = np.zeros_like(batch.pixels)
    for image, side in zip(pixels, SIDES, strict=True):
        image[8 : 8 + side, 16 : 16 + side] = 255
    header = make_header("val", shard_size=n, store_images=True)
    paths = [path.decode() for path in batch.path.tolist()]
    files = digest_of(paths, n)
    manifest = open_manifest(folder, header, files)
    with ShardWriter(manifest.shard_path(0), header, files_sha256=files.shards[0]) as writer:
        still = {"corners": np.zeros_like(batch.corners), "scale": scale.astype(np.uint8)}
        writer.append(batch._replace(pixels=pixels, **still))
    manifest.commit(writer.entry)
    boxes = folder.parent / "boxes.csv"
    boxes.write_text(
        "path,class,size,x0,y0,x1,y1\n"
        + "".join(
            f"val/{path},cat,small,32,24,{32 + side},{24 + side}\n"
            for path, side in zip(paths, SIDES, strict=True)
        )
    )


def test_scales_by_true_boxes_and_by_gradcam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name / "val" for name in "ab"]
    write_squares(folders[0], CHOSEN)
    write_squares(folders[1], np.array([63, 63, 63, 63, 95, 111]))
    area = SIDES**2 / 224**2
    printed = {}
    for kind, options in (
        ("boxes", ("--boxes", str(tmp_path / "a" / "boxes.csv"))),
        ("gradcam", ("--network", f"{__name__}:bright", "--weights", "none", "--device", "cpu")),
    ):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folders[0]), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        printed[kind] = capsys.readouterr().out
    assert printed["boxes"] == printed["gradcam"]
    lines = printed["boxes"].splitlines()
    assert lines[2:5] == [
        f"| {scale} px | 33.3 % | {100 * area[scale == CHOSEN].mean():.1f} % |"
        for scale in (63, 95, 111)
    ]
    # Ranks of the areas 1, 2, 4.5, 3, 6, 4.5, of the scales 1.5, 1.5, 3.5, 3.5, 5.5, 5.5.
    ranks = [1, 2, 4.5, 3, 6, 4.5], [1.5, 1.5, 3.5, 3.5, 5.5, 5.5]
    assert f"rank correlation {np.corrcoef(*ranks)[0, 1]:.3f} (" in lines[-1]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, folders), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 63 px | 50.0 ± 16.7 % |")
    assert lines[3].startswith("| 95 px | 25.0 ± 8.3 % |")
