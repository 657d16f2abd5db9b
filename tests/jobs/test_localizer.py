from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anchorpatch.errors import NonFiniteError, SettingsError, WeightsError
from anchorpatch.jobs import localizer
from anchorpatch.jobs.localizer import Localized, Localizer, load_anchornet, resolve_engine
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.networks import Normalization
from anchorpatch.runtime.checkpoint import WeightsMeta, load_weights, save_weights
from anchorpatch.settings import ENGINES, PRESETS, SCALES
from tests.conftest import draw_photo
from tests.lsp_oracle import algorithm_1
from tests.test_lsp import decide_slowly

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    photos = [np.asarray(draw_photo(seed, (224, 224))) for seed in range(21)]
    return torch.from_numpy(np.stack(photos))


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_the_straight_way(weights: Path, pixels: torch.Tensor, preset: str) -> None:
    """The whole F, Eq. 6-8 branch by branch, Algorithm 1 line by line."""
    loaded, s = load_weights(weights), PRESETS[preset]
    with Localizer(loaded, s, CPU) as localizer:
        found = localizer.submit(pixels).result()
    net = load_anchornet(loaded)
    with torch.no_grad():
        maps = net.full(Normalization(loaded.meta, CPU)(pixels))
    chosen, compared = set(), 0
    for i in range(len(pixels)):
        p = torch.stack([f[i].mean((1, 2)).softmax(0) for f in maps])
        gamma, j = decide_slowly(p.numpy())
        assert (found.predicted[i], found.scale[i]) == (gamma, SCALES[j])
        np.testing.assert_allclose(found.branch_prob[i], p.max(1).values, rtol=0.01)
        expected = algorithm_1(
            maps[j][i, gamma].tolist(), SCALES[j], s.max_patches[j], s.iou_threshold, s.coverage[j]
        )
        # Below that, activations are rounding errors of a peaked attention, in any order.
        strong = [patch for patch in expected if patch[1] > 1e-3 * expected[0][1]]
        n = len(strong)
        assert [tuple(c) for c in found.corners[i, :n]] == [corner for corner, _ in strong]
        scores = [score for _, score in strong]
        # An exponential of exponentials: rounding of the features grows.
        np.testing.assert_allclose(found.scores[i, :n], scores, rtol=0.02)
        compared += n
        chosen.add(j)
    assert len(chosen) > 1
    assert compared > 2 * len(pixels)


@pytest.mark.parametrize(
    ("size", "engine", "precision"),
    [
        (1, "torch", "float32"),
        (7, "torch", "bfloat16"),
        (7, "openvino", "float32"),
        (8, "openvino", "bfloat16"),
    ],
)
def test_an_image_does_not_depend_on_its_batch(
    weights: Path, pixels: torch.Tensor, size: int, engine: str, precision: str
) -> None:
    try:
        resolve_engine(engine, CPU, precision)
    except SettingsError as error:
        pytest.skip(str(error))
    options, pixels = {"engine": engine, "precision": precision}, pixels[:11]
    with Localizer(load_weights(weights), PRESETS["dense"], CPU, **options) as localizer:
        whole = localizer.submit(pixels).result()
        parts = [localizer.submit(part).result() for part in torch.split(pixels, size)]
    for name, column in zip(Localized._fields, whole, strict=True):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert column.dtype == joined.dtype
        np.testing.assert_array_equal(column, joined, err_msg=name)


def test_engines_find_the_same_patches(weights: Path, pixels: torch.Tensor) -> None:
    pytest.importorskip("openvino", reason="needs OpenVINO")
    found = []
    for engine in ENGINES:
        s = PRESETS["finetune"]
        with Localizer(load_weights(weights), s, CPU, engine=engine) as localizer:
            found.append(localizer.submit(pixels).result())
    a, b = found
    np.testing.assert_array_equal(a.scale, b.scale)
    np.testing.assert_array_equal(a.counts, b.counts)
    np.testing.assert_array_equal(a.corners, b.corners)
    np.testing.assert_allclose(a.branch_prob, b.branch_prob, rtol=1e-4)
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-3, atol=1e-4 * a.scores.max())


def test_auto_is_openvino_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="needs OpenVINO")
    assert resolve_engine("auto", CPU) == "openvino"
    assert resolve_engine("auto", CPU, compile=True) == "torch"
    assert resolve_engine("auto", torch.device("cuda")) == "torch"
    for device, compile, message in (("cuda", False, "is for CPUs"), ("cpu", True, "--compile")):
        with pytest.raises(SettingsError, match=f"--engine openvino .*{message}.*--engine torch"):
            resolve_engine("openvino", torch.device(device), compile=compile)

    def missing() -> None:
        raise ImportError("No module named 'openvino'")

    monkeypatch.setattr(localizer, "openvino_core", missing)
    assert resolve_engine("auto", CPU) == "torch"
    with pytest.raises(SettingsError, match=r"No module named 'openvino'.*pip install openvino"):
        resolve_engine("openvino", CPU)


def test_nan_names_the_image(tmp_path: Path, pixels: torch.Tensor) -> None:
    net = AnchorNet(2)
    net.branches[2].gate.bias.data[:] = float("nan")
    save_weights(tmp_path / "w", net.state_dict(), WeightsMeta("anchornet", ("a", "b")))
    with (
        Localizer(load_weights(tmp_path / "w"), PRESETS["figure"], CPU) as localizer,
        pytest.raises(NonFiniteError, match=r"^image 0: .* produced NaN .*w may be damaged"),
    ):
        localizer.submit(pixels).result()


def test_weights_for_another_transform_are_refused(tmp_path: Path) -> None:
    meta = WeightsMeta("anchornet", ("a", "b"), resize=288, crop=256)
    save_weights(tmp_path / "w", AnchorNet(2).state_dict(), meta)
    with pytest.raises(
        WeightsError, match="expected weights for the transform 292 -> 256, found 288"
    ):
        load_anchornet(load_weights(tmp_path / "w"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where it compiles
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_gpu_agrees_with_cpu(weights: Path, pixels: torch.Tensor, amp: bool, compile: bool) -> None:
    loaded, s, gpu = load_weights(weights), PRESETS["dense"], torch.device("cuda", 0)
    with Localizer(loaded, s, CPU) as localizer:
        expected = localizer.submit(pixels).result()
    precision = "bfloat16" if amp else "float32"
    with Localizer(loaded, s, gpu, batch_size=8, precision=precision, compile=compile) as localizer:
        found = localizer.submit(pixels).result()
    tolerance = 0.05 if amp else 1e-3
    np.testing.assert_allclose(found.branch_prob, expected.branch_prob, atol=tolerance)
    assert (found.predicted == expected.predicted).mean() > (0.8 if amp else 0.99)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_computes_the_same(weights: Path, pixels: torch.Tensor, precision: str) -> None:
    how = load_weights(weights), PRESETS["dense"], torch.device("cuda", 0)
    found = []
    for graph in (False, True):
        with Localizer(*how, batch_size=8, precision=precision, graph=graph) as localizer:
            # Several on their way, and a last one that does not fill its chunk.
            batches = [localizer.submit(part.pin_memory()) for part in pixels.split(5)]
            found.append([batch.result() for batch in batches])
    for eager, replayed in zip(*found, strict=True):
        for a, b in zip(eager, replayed, strict=True):
            np.testing.assert_array_equal(a, b)
