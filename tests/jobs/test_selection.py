from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch.errors import SettingsError
from anchorpatch.jobs.selection import Sample, coverage_of, taken, tune_counts
from anchorpatch.lsp import candidate_count, localize, select
from anchorpatch.settings import PRESETS, SCALES, LspSettings

GRIDS = dict(zip(SCALES, (21, 17, 15), strict=True))


def sample(scale: int, n: int, seed: int = 0, levels: int | None = None) -> Sample:
    """Smooth heatmaps with some noise, of few values where ``levels`` says so."""
    rng, side = np.random.default_rng(seed), GRIDS[scale]
    coarse = torch.from_numpy(rng.normal(size=(n, 1, 5, 5)))
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[:, 0].numpy()
    maps = smooth + 0.1 * rng.normal(size=smooth.shape)
    maps = maps if levels is None else np.round(maps * levels) / levels
    return Sample(np.arange(n), maps.astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SCALES),
    st.integers(0, 99),
    st.sampled_from([None, 2]),
    st.sampled_from([0.1, 0.3, 0.5, 0.8]),
    st.integers(1, 12),
    st.floats(0.002, 1),
)
def test_one_run_tells_the_patches_for_every_k_and_p(
    scale: int, seed: int, levels: int | None, threshold: float, most: int, coverage: float
):
    found = sample(scale, 4, seed, levels)
    patches = taken(found, scale, threshold, 20)
    side = GRIDS[scale]
    n = candidate_count(side, side, coverage)
    expected = select(torch.from_numpy(found.heatmaps), scale, most, threshold, coverage)
    counts = patches.counts(n, most)
    assert counts.tolist() == expected.counts.tolist()
    for i, count in enumerate(counts):
        assert patches.corners[i, :count].tolist() == expected.corners[i, :count].tolist()


def test_a_share_of_few_digits_gives_the_candidates():
    for scale, side in (*GRIDS.items(), (63, 41)):
        for n in range(1, side * side + 1):
            p = coverage_of(n, side * side)
            assert candidate_count(side, side, p) == n, scale
            assert 0 < p <= 1


def means_of(samples: dict[int, Sample], found: LspSettings) -> list[float]:
    means = []
    for j, scale in enumerate(SCALES):
        heatmaps = [torch.zeros(len(samples[scale].rows), s, s) for s in GRIDS.values()]
        heatmaps[j] = torch.from_numpy(samples[scale].heatmaps)
        branch = torch.full((len(samples[scale].rows),), j)
        means.append(float(localize(heatmaps, branch, found).counts.double().mean()))
    return means


def test_the_paper_s_numbers_are_met_within_3_percent():
    wanted = (5.6, 2.9, 2.1)
    samples = {scale: sample(scale, 120, seed=1) for scale in SCALES}
    found, means = tune_counts(samples, wanted, PRESETS["dense"])
    assert found.max_patches == PRESETS["dense"].max_patches
    assert means_of(samples, found) == pytest.approx(list(means.values()))
    assert list(means.values()) == pytest.approx(wanted, rel=0.03)
    others = {scale: sample(scale, 400, seed=2) for scale in SCALES}
    assert means_of(others, found) == pytest.approx(wanted, rel=0.06)


def test_k_is_raised_where_it_is_too_small_and_what_cannot_be_is_refused():
    samples = {scale: sample(scale, 60, seed=3) for scale in SCALES}
    base = LspSettings((2, 2, 2), 0.3, (0.3, 0.3, 0.3))
    found, means = tune_counts(samples, (5.6, 1.5, 2.1), base)
    assert found.max_patches[0] > 5
    assert found.max_patches[1] == 2
    assert list(means.values()) == pytest.approx([5.6, 1.5, 2.1], rel=0.03)
    for first, advice in ((99.0, "raise --iou-threshold"), (0.5, "at least one patch")):
        refused = rf"expected 1 to \d+\.\d\d at 63 px, .* got {first:g}; .*{advice}"
        with pytest.raises(SettingsError, match=refused):
            tune_counts(samples, (first, 2.0, 2.0), base)
    # A scale that no image has chosen keeps its P.
    none = Sample(np.zeros(0, np.int64), np.zeros((0, 15, 15), np.float32))
    found, means = tune_counts({**samples, 111: none}, (5.6, 1.5, 99.0), base)
    assert (found.coverage[2], means[111]) == (0.3, None)
