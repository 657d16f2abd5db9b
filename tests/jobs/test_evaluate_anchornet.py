from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anchorpatch.errors import NonFiniteError
from anchorpatch.images.source import open_source
from anchorpatch.jobs.evaluate_anchornet import EvaluateAnchorNetConfig, _Meter, run
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.runtime.distributed import World
from anchorpatch.runtime.progress import Reporter


class Lines(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        if "image" in text:
            self.lines.append(text)


def test_a_limit_is_spread_over_the_classes(
    image_folder: Path, weights: Path, tmp_path: Path
) -> None:
    lines = Lines()
    limited = run(EvaluateAnchorNetConfig(image_folder, weights, device="cpu", limit=4), lines)
    assert lines.lines == []
    for name in ("cat/00", "cat/10", "dog/00", "dog/10"):
        copy = tmp_path / "val" / f"{name}.JPEG"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.hardlink_to(image_folder / "val" / f"{name}.JPEG")
    assert len(open_source(tmp_path, "val")) == limited.images == 4
    alone = run(EvaluateAnchorNetConfig(tmp_path, weights, device="cpu"))
    assert (alone.loss, alone.top1, alone.mean_patches) == (
        limited.loss,
        limited.top1,
        limited.mean_patches,
    )
    run(EvaluateAnchorNetConfig(image_folder, weights, device="cpu", limit=1), lines)
    assert lines.lines == ["1 of 2 classes has no image among the 1 image taken: dog"]


def test_an_evaluation_refuses_nan(weights: Path) -> None:
    meter = _Meter(load_weights(weights), torch.device("cpu"))
    heatmaps = tuple(torch.ones(2, side, side) for side in (21, 17, 15))
    heatmaps[2][0, 3, 4] = float("nan")  # of a branch that is not chosen
    meter.count_patches(heatmaps, torch.tensor([0, 1]))
    assert meter.result(World())["mean_patches"]["figure"]["111"] is None
    meter.count_patches(heatmaps, torch.tensor([2, 2]))
    with pytest.raises(NonFiniteError, match="for 1 image;"):
        meter.result(World())
