from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anchorpatch.errors import SettingsError
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.jobs.figures.attention import AttentionConfig, AttentionExamples, find_attention
from anchorpatch.jobs.figures.examples import Choice
from anchorpatch.jobs.localizer import Localizer, load_anchornet, normalize
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.settings import PRESETS, SCALES

CPU = torch.device("cpu")

NAMES = ("dog/07.JPEG", "cat/11.JPEG", "dog/00.JPEG")

SIDES = (21, 17, 15)


@pytest.fixture(scope="module")
def loaded(weights: Path) -> Weights:
    return load_weights(weights)


@pytest.fixture(scope="module")
def source(image_folder: Path) -> ImageSource:
    return ImageSource.of_folder(image_folder, "val")


@pytest.fixture(scope="module")
def found(source: ImageSource, loaded: Weights) -> AttentionExamples:
    return find_attention(source, loaded, AttentionConfig(Choice(NAMES), 1, "cpu"))


def full(loaded: Weights, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """F of each branch as the network was trained, nothing folded."""
    mean, std = torch.tensor(loaded.meta.mean), torch.tensor(loaded.meta.std)
    with torch.inference_mode():
        return load_anchornet(loaded).full(normalize(pixels, mean, std))


def test_maps_are_those_of_the_whole_network(source: ImageSource, loaded: Weights):
    """More images than a chunk has, and several classes each, in an order of their own."""
    pixels = torch.from_numpy(source.pixels(list(range(11, 29))))
    classes = torch.tensor([[i % 2, 1 - i % 2, 1] for i in range(18)])
    with Localizer(loaded, PRESETS["figure"], CPU) as localizer:
        maps = localizer.maps(pixels, classes)
        decided = localizer.submit(pixels).result()
    assert maps.probabilities.shape == (18, 3, 2)
    assert np.array_equal(maps.probabilities.argmax(2), decided.branch_class)
    np.testing.assert_allclose(maps.probabilities.max(2), decided.branch_prob, rtol=1e-6)
    every = torch.arange(18)[:, None]
    for j, whole in enumerate(full(loaded, pixels)):
        expected = whole[every, classes].numpy()
        assert maps.heatmaps[j].shape == (18, 3, SIDES[j], SIDES[j])
        largest = np.abs(expected).max((1, 2, 3), keepdims=True)
        # Rounding of the features grows through an exponential.
        assert (np.abs(maps.heatmaps[j] - expected) <= 1e-3 * largest).all()
        np.testing.assert_array_equal(maps.heatmaps[j][1::2, 0], maps.heatmaps[j][1::2, 2])


@pytest.mark.parametrize("weighted_mean", [True, False])
def test_attention_averages_one_and_is_the_networks(
    source: ImageSource, loaded: Weights, weighted_mean: bool
):
    """The network's S sums to 1 or to H * W, as its weights say."""
    loaded = replace(loaded, meta=replace(loaded.meta, weighted_mean=weighted_mean))
    pixels = torch.from_numpy(source.pixels([3, 30]))
    with Localizer(loaded, PRESETS["figure"], CPU) as localizer:
        maps = localizer.maps(pixels, torch.zeros(2, 1, dtype=torch.int64))
    mean, std = torch.tensor(loaded.meta.mean), torch.tensor(loaded.meta.std)
    net = load_anchornet(loaded)
    with torch.inference_mode():
        _, features = net.localize(normalize(pixels, mean, std))
    for side, s, network in zip(SIDES, maps.attention, features.attention, strict=True):
        assert s.shape == (2, side, side)
        assert (s >= 0).all()
        np.testing.assert_allclose(s.mean((1, 2)), 1, rtol=1e-4)
        expected = network[:, 0].numpy()
        total = side * side if weighted_mean else 1
        np.testing.assert_allclose(expected.sum((1, 2)), total, rtol=1e-4)
        share = expected / expected.sum((1, 2), keepdims=True) * side * side
        assert (np.abs(s - share) <= 1e-3 * share.max((1, 2), keepdims=True)).all()


def test_named_images_are_shown_in_their_order(found: AttentionExamples, image_folder: Path):
    assert tuple(example.image.path for example in found.examples) == NAMES
    assert (found.looked.images, found.looked.unreadable) == (3, 0)
    assert found.looked.source == str(image_folder / "val")


def test_heatmaps_are_those_of_the_decided_class(found: AttentionExamples, loaded: Weights):
    pixels = torch.from_numpy(np.stack([example.image.pixels for example in found.examples]))
    whole = full(loaded, pixels)
    for i, example in enumerate(found.examples):
        c = loaded.meta.classes.index(example.image.predicted)
        j = SCALES.index(example.image.scale)
        assert example.branch_class[j] == example.image.predicted
        assert example.branch_prob[j] == pytest.approx(example.image.probability)
        assert example.branch_prob[j] == max(
            p
            for p, name in zip(example.branch_prob, example.branch_class, strict=True)
            if name == example.image.predicted
        )
        for k in range(3):
            expected = whole[k][i, c].numpy()
            assert example.heatmaps[k].shape == expected.shape
            error = np.abs(example.heatmaps[k] - expected).max()
            assert error <= 1e-3 * np.abs(expected).max()


def test_the_strongest_patch_lies_at_the_largest_value_of_its_heatmap(found: AttentionExamples):
    for example in found.examples:
        j = SCALES.index(example.image.scale)
        branch = example.to_json()["branches"][j]
        assert [8 * at for at in branch["heatmap_at"]] == example.image.corners[0].tolist()
        assert branch["heatmap_max"] == pytest.approx(float(example.image.scores[0]), rel=1e-5)


def test_chosen_images_are_spread_over_scales(source: ImageSource, loaded: Weights):
    config = AttentionConfig(Choice(seed=1, limit=16), 2, "cpu")
    found = find_attention(source, loaded, config)
    assert found.looked.images == 16
    assert len(found.examples) == 2
    assert len({example.image.scale for example in found.examples}) == 2


def test_no_image_at_all_is_refused():
    with pytest.raises(SettingsError, match="count: expected at least one image, got 0"):
        AttentionConfig(count=0)
