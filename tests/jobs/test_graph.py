from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anchorpatch import lsp
from anchorpatch.errors import MissingDependency, NonFiniteError, SettingsError, StorageError
from anchorpatch.jobs import graph
from anchorpatch.jobs.localizer import Localized, Localizer
from anchorpatch.models.anchornet_openvino import openvino_core
from anchorpatch.runtime.checkpoint import load_weights, save_weights
from anchorpatch.settings import PRESETS, SCALES, LspSettings
from tests.conftest import draw_photo
from tests.lsp_oracle import algorithm_1
from tests.test_lsp import GRIDS, decide_slowly, random_heatmaps

#: At 63 px neighbors do not conflict, at 111 px all locations are candidates.
SETTINGS = LspSettings((7, 3, 2), 0.8, (0.3, 0.2, 1.0))


class FromMaps(nn.Module):
    """Decision and Algorithm 1 of the localizer, without its network."""

    def forward(self, probabilities: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        decision = lsp.decide(probabilities)
        found = lsp.localize((a, b, c), decision.branch, SETTINGS, check=False)
        scale = torch.tensor(SCALES)[decision.branch]
        return (*decision[:3], scale, *found)


def maps(n: int) -> list[Tensor]:
    """Probabilities and heatmaps of n images, with and without ties."""
    rng = np.random.default_rng(n)
    p = rng.integers(1, 5, (n, 3, 4)).astype(np.float32)
    heatmaps = [random_heatmaps(rng, n, GRIDS[theta]) for theta in SCALES]
    heatmaps[0][0] = torch.tensor([0.0, -0.0]).repeat(221)[:441].view(21, 21)
    return [torch.from_numpy(p / p.sum(-1, keepdims=True)), *heatmaps]


def check(inputs: list[Tensor], found: Localized) -> None:
    """Compare with Eq. 6-8 branch by branch and Algorithm 1 line by line."""
    for i, p in enumerate(inputs[0].numpy()):
        gamma, j = decide_slowly(p)
        assert (found.predicted[i], found.scale[i]) == (gamma, SCALES[j])
        k, coverage = SETTINGS.max_patches[j], SETTINGS.coverage[j]
        heatmap = inputs[1 + j][i].tolist()
        expected = algorithm_1(heatmap, SCALES[j], k, SETTINGS.iou_threshold, coverage)
        n = int(found.counts[i])
        corners = [tuple(corner) for corner in found.corners[i, :n].tolist()]
        assert list(zip(corners, found.scores[i, :n].tolist(), strict=True)) == expected
        assert not found.corners[i, n:].any()
        assert not found.scores[i, n:].any()


def test_lsp_in_a_graph_equals_algorithm_1() -> None:
    program = graph.traced(FromMaps(), *maps(2))
    for n in (1, 30):
        check(maps(n), Localized(*(out.numpy() for out in program.module()(*maps(n)))))
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    names = ("p", *"abc")
    content = graph.onnx_bytes(program, "{}", names)
    session, core = onnxruntime.InferenceSession(content), openvino_core()
    # Its sort puts equal values in another order than that of ONNX Runtime.
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(content), "CPU", precision)
    for n in (1, 200):
        values = [tensor.numpy() for tensor in maps(n)]
        check(maps(n), Localized(*session.run(None, dict(zip(names, values, strict=True)))))
        check(maps(n), Localized(*compiled(values).values()))


def test_an_exported_program_equals_the_localizer(weights: Path, tmp_path: Path) -> None:
    settings, path = LspSettings((2, 2, 2), 0.3, (0.3, 0.3, 0.3)), tmp_path / "anchornet.pt2"
    written = graph.export(weights, path, settings)
    assert written.bytes == path.stat().st_size
    extra = {graph.KEY: ""}
    module = torch.export.load(str(path), extra_files=extra).module()
    assert json.loads(extra[graph.KEY]) == json.loads(json.dumps(written.about))
    photos = [np.asarray(draw_photo(seed, (224, 224))) for seed in range(9)]
    pixels = torch.from_numpy(np.stack(photos))
    with Localizer(load_weights(weights), settings, torch.device("cpu"), "torch") as localizer:
        expected = localizer.submit(pixels).result()
    for n in (1, 9):
        found = Localized(*(out.numpy() for out in module(pixels[:n])))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            if a.dtype == np.float32:
                np.testing.assert_allclose(a, b[:n], rtol=1e-3, atol=1e-4 * abs(b).max())
            else:
                np.testing.assert_array_equal(a, b[:n])


def test_what_cannot_be_exported_is_one_line(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PRESETS["figure"]
    with pytest.raises(SettingsError, match=r"ends with \.onnx or \.pt2, got .*a\.pt$"):
        graph.export(weights, tmp_path / "a.pt", settings)
    (tmp_path / "a.pt2").write_text("mine")
    with pytest.raises(StorageError, match=r"a\.pt2 exists: choose .* replace it with --overwrite"):
        graph.export(weights, tmp_path / "a.pt2", settings)
    assert (tmp_path / "a.pt2").read_text() == "mine"
    broken = load_weights(weights)
    broken.tensors["branches.2.gate.bias"].fill_(float("nan"))
    save_weights(tmp_path / "nan", broken.tensors, broken.meta)
    with pytest.raises(NonFiniteError, match="nan may be damaged or badly trained"):
        graph.export(tmp_path / "nan", tmp_path / "b.pt2", settings)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependency, match=r"pip install 'anchorpatch\[onnx\]', or .*\.pt2"):
        graph.export(weights, tmp_path / "a.onnx", settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt2", "nan"]
