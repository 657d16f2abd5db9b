from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch import lsp
from anchorpatch.errors import NonFiniteError, SettingsError
from anchorpatch.settings import PRESETS, SCALES, LspSettings
from tests.lsp_oracle import algorithm_1, iou

GRIDS = {63: (21, 21), 95: (17, 17), 111: (15, 15)}


def as_lists(patches: lsp.Patches, i: int) -> list[tuple[tuple[int, int], float]]:
    n = int(patches.counts[i])
    corners, scores = patches.corners[i, :n].tolist(), patches.scores[i, :n].tolist()
    return [((y, x), s) for (y, x), s in zip(corners, scores, strict=True)]


def random_heatmaps(rng: np.random.Generator, n: int, shape: tuple[int, int]) -> torch.Tensor:
    """Heatmaps without ties, with some, and with little else (few levels, signed zeros)."""
    maps = rng.normal(size=(n, *shape)).astype(np.float32)
    levels = rng.integers(1, 40, size=n)
    for i in range(0, n, 2):
        maps[i] = np.round(maps[i] * levels[i]) / levels[i]
    return torch.from_numpy(maps)


@pytest.mark.parametrize("theta", SCALES)
def test_equals_algorithm_1_on_2000_heatmaps(theta: int) -> None:
    rng = np.random.default_rng(theta)
    ties = 0
    for _ in range(40):
        heatmaps = random_heatmaps(rng, 50, GRIDS[theta])
        k = int(rng.integers(1, 30))
        t = float(rng.choice([0, 1, rng.random(), iou((0, 0), (0, 8), theta)]))
        p = float(rng.choice([1.0, 0.3, rng.uniform(0.001, 1)]))
        found = lsp.select(heatmaps, theta, k, t, p)
        for i, heatmap in enumerate(heatmaps.tolist()):
            assert as_lists(found, i) == algorithm_1(heatmap, theta, k, t, p)
            if i < 4:
                as_printed = lsp.localize_one(heatmap, theta, k, t, p)
                assert as_printed == [corner for corner, _ in as_lists(found, i)]
            ties += len({v for row in heatmap for v in row}) < heatmaps[i].numel()
    assert ties > 500


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    height=st.one_of(st.integers(111, 300), st.sampled_from([111, 225, 256])),
    width=st.one_of(st.integers(111, 300), st.just(111)),
    k=st.tuples(*[st.integers(1, 12)] * 3),
    t=st.floats(0, 1),
    p=st.tuples(*[st.floats(0.001, 1)] * 3),
)
def test_mixed_scales_at_any_size_equal_algorithm_1(
    data: st.DataObject,
    height: int,
    width: int,
    k: tuple[int, int, int],
    t: float,
    p: tuple[float, float, float],
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shapes = [lsp.grid_size(height, width, theta) for theta in SCALES]
    heatmaps = [random_heatmaps(rng, 6, shape) for shape in shapes]
    branch = torch.from_numpy(rng.integers(0, 3, size=6))
    found = lsp.localize(heatmaps, branch, LspSettings(k, t, p))
    for i, j in enumerate(branch.tolist()):
        expected = algorithm_1(heatmaps[j][i].tolist(), SCALES[j], k[j], t, p[j])
        assert as_lists(found, i) == expected
        assert all(y + SCALES[j] <= height for (y, _), _ in expected)
        assert all(x + SCALES[j] <= width for (_, x), _ in expected)
    assert found.corners.shape == (6, max(k), 2)
    behind = torch.arange(max(k)) >= found.counts[:, None]
    assert not found.corners[behind].any()
    assert (found.scores[behind] == 0).all()


def test_rows_behind_the_count_are_zero() -> None:
    heatmap = torch.arange(441.0).view(1, 21, 21) + 1
    found = lsp.select(heatmap, 63, max_patches=24, iou_threshold=0.0, coverage=1.0)
    assert found.counts.tolist() == [1]
    assert found.corners[0, 1:].abs().sum() == 0
    assert found.scores[0, 1:].abs().sum() == 0


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_non_finite_heatmaps_are_refused(value: float) -> None:
    heatmaps = [torch.zeros(3, *GRIDS[theta]) for theta in SCALES]
    heatmaps[1][2, 4, 5] = value
    branch = torch.tensor([0, 2, 1])
    with pytest.raises(NonFiniteError, match="image 2 of the batch"):
        lsp.localize(heatmaps, branch, PRESETS["figure"])
    # A branch that was not chosen is not looked at.
    lsp.localize(heatmaps, torch.tensor([0, 2, 0]), PRESETS["figure"])


@given(st.integers(63, 400), st.integers(63, 400))
def test_grid_counts_the_patches_that_fit(height: int, width: int) -> None:
    rows = len([y for y in range(0, height, 8) if y + 63 <= height])
    columns = len([x for x in range(0, width, 8) if x + 63 <= width])
    assert lsp.grid_size(height, width, 63) == (rows, columns)


def test_an_image_smaller_than_the_patch_is_refused() -> None:
    with pytest.raises(SettingsError, match="110 x 300 px is smaller"):
        lsp.grid_size(110, 300, 111)


@pytest.mark.parametrize("theta", SCALES)
def test_iou_equals_counted_pixels(theta: int) -> None:
    for dh in (0, 1, 3, 7, 8, 15):
        for dw in (0, 1, 2, 9, 15):
            a = np.zeros((240, 240), bool)
            b = np.zeros_like(a)
            a[:theta, :theta] = True
            b[8 * dh : 8 * dh + theta, 8 * dw : 8 * dw + theta] = True
            expected = (a & b).sum() / (a | b).sum()
            assert expected == lsp.iou((0, 0), (8 * dh, 8 * dw), theta)


def decide_slowly(p: np.ndarray) -> tuple[int, int]:
    """Eq. 6-8 for one image, branch by branch: (gamma, index of theta)."""
    y = [int(np.argmax(row)) for row in p]
    top = [float(row.max()) for row in p]
    gamma = y[int(np.argmax(top))]
    for candidate in y:
        if sum(candidate == other for other in y) >= 2:
            gamma = candidate
    return gamma, int(np.argmax([(top[j] == p[j][gamma]) * top[j] for j in range(3)]))


@settings(max_examples=300)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_decision_equals_the_equations(classes: int, seed: int, levels: int) -> None:
    # Few levels give many ties, which go to the first class and the smaller scale.
    p = np.random.default_rng(seed).integers(1, levels + 1, (7, 3, classes)).astype(np.float32)
    p /= p.sum(-1, keepdims=True)
    decision = lsp.decide(torch.from_numpy(p))
    for i in range(7):
        found = (int(decision.predicted[i]), int(decision.branch[i]))
        assert found == decide_slowly(p[i])
        assert decision.branch_class[i].tolist() == [int(np.argmax(row)) for row in p[i]]
        assert decision.branch_prob[i].tolist() == p[i].max(-1).tolist()


class Recomputed(torch.Tensor):
    """Probabilities of which `gather` sees others than every other function, by the last bit.

    So does a compiler that fuses the softmax into each of its uses.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.gather and args[0].is_floating_point() and args[0].ndim == 3:
            args = (torch.nextafter(args[0], torch.tensor(2.0)), *args[1:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@settings(max_examples=100)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_decision_bears_a_softmax_that_is_computed_twice(classes: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(7, 3, classes)).astype(np.float32)
    p = torch.from_numpy(logits).softmax(-1)
    for found, expected in zip(lsp.decide(p.as_subclass(Recomputed)), lsp.decide(p), strict=True):
        assert found.tolist() == expected.tolist()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([5, 63]))
def test_crop_equals_slices(seed: int, theta: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (3, 80, 70, 3), dtype=np.uint8)
    image = rng.integers(0, 3, 9)
    corner = rng.integers(0, [80 - theta + 1, 70 - theta + 1], (9, 2))
    found = lsp.crop(*(torch.from_numpy(a) for a in (images, image, corner)), theta)
    for row, n, (y, x) in zip(found.numpy(), image, corner, strict=True):
        np.testing.assert_array_equal(row, images[n, y : y + theta, x : x + theta])
    assert found.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", PRESETS)
def test_gpu_equals_cpu_bit_for_bit(preset: str) -> None:
    rng = np.random.default_rng(1)
    heatmaps = [random_heatmaps(rng, 256, GRIDS[theta]) for theta in SCALES]
    branch = torch.from_numpy(rng.integers(0, 3, size=256))
    on_cpu = lsp.localize(heatmaps, branch, PRESETS[preset])
    on_gpu = lsp.localize([m.cuda() for m in heatmaps], branch.cuda(), PRESETS[preset])
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(a, b.cpu())


def test_arrays_are_taken_as_tensors_are() -> None:
    rng = np.random.default_rng(5)
    heatmaps = [random_heatmaps(rng, 4, GRIDS[theta]) for theta in SCALES]
    probabilities = torch.from_numpy(rng.random((4, 3, 7), np.float32)).softmax(-1)
    decision = lsp.decide(probabilities)
    found = lsp.localize(heatmaps, decision.branch, PRESETS["dense"])
    arrays = [heatmap.numpy() for heatmap in heatmaps]
    branch = lsp.decide(probabilities.numpy()).branch.numpy().astype(np.int32)
    assert all(map(torch.equal, found, lsp.localize(arrays, branch, PRESETS["dense"])))
    one = lsp.select(heatmaps[0], 63, 5, 0.3, 0.05)
    assert all(map(torch.equal, one, lsp.select(arrays[0], 63, 5, 0.3, 0.05)))


@given(height=st.integers(111, 400), width=st.integers(111, 400))
def test_the_grids_of_every_image_are_taken(height: int, width: int) -> None:
    heatmaps = [torch.zeros(1, *lsp.grid_size(height, width, theta)) for theta in SCALES]
    assert lsp.localize(heatmaps, torch.tensor([2]), PRESETS["figure"]).counts.item() >= 1


@pytest.mark.parametrize(
    ("shapes", "branch", "message"),
    [
        ([(2, 20, 21), (2, 17, 17), (2, 15, 15)], [0, 1], "20 x 21 for 63 px (an image of 215 x"),
        ([(2, 17, 17), (2, 21, 21), (2, 15, 15)], [0, 1], "the grids of one size of image, got 17"),
        ([(2, 21, 21), (2, 17, 17)], [0, 1], "expected (N, H, W) for each of the scales 63, 95,"),
        ([(2, 21), (2, 17), (2, 15)], [0, 1], "with N = 2 as in branch, got (2, 21), (2, 17)"),
        ([(3, 21, 21), (2, 17, 17), (2, 15, 15)], [0, 1], "got (3, 21, 21), (2, 17, 17)"),
        ([(2, 21, 21), (2, 17, 17), (2, 15, 15)], [0, 3], "indices from 0 to 2, got 0 to 3"),
        ([(2, 21, 21), (2, 17, 17), (2, 15, 15)], [0.0, 1.0], "expected whole numbers (N,), got"),
        ([(2, 21, 21), (2, 17, 17), (2, 15, 15)], [[0], [1]], "(N,), got torch.int64 (2, 1)"),
    ],
)
def test_heatmaps_of_another_size_are_refused(
    shapes: list[tuple[int, ...]], branch: list[float], message: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        lsp.localize([torch.zeros(s) for s in shapes], torch.tensor(branch), PRESETS["figure"])


def test_probabilities_of_another_shape_are_refused() -> None:
    with pytest.raises(SettingsError, match=re.escape("expected (N, 3, C), got (2, 10)")):
        lsp.decide(torch.zeros(2, 10))
