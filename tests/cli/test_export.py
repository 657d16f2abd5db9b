"""The real program exports, and the example runs the graph where there is no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anchorpatch.jobs.localizer import Localizer
from anchorpatch.runtime.checkpoint import load_weights, save_weights
from anchorpatch.settings import CropSettings, LspSettings
from tests.conftest import Program, draw_photo

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_patches.py"


def test_the_example_finds_the_same_patches_without_torch(
    program: Program, weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    trained = load_weights(weights)
    meta = trained.meta.cropped(CropSettings(img_size=160, crop_pct=1.0))
    sha256 = save_weights(tmp_path / "w", trained.tensors, meta)
    words = ("export", "--weights", "w", "--out", "net.onnx", "--max-patches", "3,2,2", "--json")
    result = program(*words)
    assert (result.returncode, result.stderr) == (0, "")
    written = json.loads(result.stdout)
    assert written["bytes"] == (tmp_path / "net.onnx").stat().st_size
    about = written["about"]
    assert about["weights_sha256"] == sha256
    assert about["classes"] == ["cat", "dog"]
    assert about["settings"]["max_patches"] == [3, 2, 2]
    assert (about["transform"]["img_size"], about["transform"]["resize"]) == (160, 160)

    images = [draw_photo(seed, (160, 160)) for seed in range(5)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    draw_photo(9, (300, 200)).save(tmp_path / "large.png")
    # None in place of a module makes its import fail.
    code = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'torchvision', 'anchorpatch'))\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    names = [*(f"{i}.png" for i in range(5)), "large.png"]
    result = subprocess.run(
        [sys.executable, "-c", code, "net.onnx", *names],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    settings = LspSettings((3, 2, 2), 0.3, (0.3, 0.3, 0.3))
    with Localizer(load_weights(tmp_path / "w"), settings, torch.device("cpu"), "torch") as ours:
        found = ours.submit(torch.from_numpy(np.stack([np.asarray(i) for i in images]))).result()
    *lines, large = result.stdout.splitlines()
    assert large.startswith("large.png ")
    for i, line in enumerate(lines):
        n, scale = int(found.counts[i]), int(found.scale[i])
        cls = about["classes"][found.predicted[i]]
        corners = found.corners[i, :n].tolist()
        assert line == f"{i}.png {cls} {n} {(scale, scale, 3)} {corners}"

    result = program(*words)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "anchorpatch: net.onnx exists: choose another --out, or replace it with --overwrite\n"
    )
    assert len(EXAMPLE.read_text().splitlines()) < 30
