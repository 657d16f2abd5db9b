from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anchorpatch.errors import DataError, SettingsError, WeightsError
from anchorpatch.jobs.dynamic import DynamicConfig, run
from anchorpatch.jobs.looks import LookCosts, Looks
from anchorpatch.jobs.tradeoff import Dynamic, savings
from anchorpatch.models import registry
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.complexity import macs
from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights
from anchorpatch.settings import SCALES
from anchorpatch.shards import ShardReader
from anchorpatch.shards.dataset import held_out
from tests.jobs.patch_shards import Drawn, Spelled, classes_of, write_shards
from tests.jobs.test_looks import softmax

FIVE = classes_of(5)


class Costly(Spelled):
    """Spells logits, and has something to multiply: a number per pixel."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        torch.nn.functional.conv2d(inputs[:, :1], self.weight.view(1, 1, 1, 1))
        return super().forward(inputs)


def drawn(n: int, seed: int) -> list[Drawn]:
    """Images whose patches favor the label, some more than others."""
    rng = random.Random(seed)
    images = []
    for _ in range(n):
        label = rng.randrange(5)
        patches = [[rng.randrange(60) for _ in FIVE] for _ in range(rng.randint(2, 6))]
        for patch in patches:
            patch[label] += rng.randrange(50)
        images.append(Drawn(rng.choice(SCALES), label, patches))
    return images


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    registry.NETWORKS["costly"] = Costly
    root = tmp_path_factory.mktemp("dynamic")
    for split, n, seed in (("val", 60, 0), ("train", 80, 1)):
        write_shards(root / "shards" / split, drawn(n, seed), FIVE, per_shard=32, store_images=True)
    for name, training in (
        ("foreign", {}),
        ("all", {"settings": {"train_shards": {}}}),
        ("held", {"settings": {"train_shards": {}, "holdout": 0.5}}),
    ):
        none = dict(mean=(0.0,) * 3, std=(1.0,) * 3)
        meta = WeightsMeta("costly", FIVE, **none, training=training)
        save_weights(root / f"{name}.safetensors", Costly(5).state_dict(), meta)
    return root


def config_of(root: Path, **changes: object) -> DynamicConfig:
    config = DynamicConfig(
        "costly",
        shards=root / "shards",
        runs=root / "runs",
        weights=root / "foreign.safetensors",
        speed=False,
        device="cpu",
        batch_size=8,
        thresholds=(0.0, 0.6, 1.0),
    )
    return replace(config, **changes)


def anchornet() -> float:
    net = AnchorNet(5)
    return macs(net, 224, net.localize) / 1e9


def plain(image: Drawn, threshold: float) -> tuple[int, bool]:
    """Patches that are looked at, and whether the decision is right."""
    parts = [softmax(patch) for patch in image.logits]
    for k in range(1, len(parts) + 1):
        mean = [sum(column) / k for column in zip(*parts[:k], strict=True)]
        if threshold < 1 and max(mean) >= threshold - 1e-7:  # which may be one of these values
            break
    return k, mean.index(max(mean)) == image.label


def test_rows_equal_image_by_image(root: Path):
    found = run(config_of(root))
    images = drawn(60, 0)
    rows = [row for row in found.rows if row.way == "dynamic"]
    assert [row.threshold for row in rows] == [0.0, 0.6, 1.0]
    for row in rows:
        decided = [plain(image, row.threshold) for image in images]
        spent = [k * image.scale**2 / 1e9 for (k, _), image in zip(decided, images, strict=True)]
        assert row.mean_patches == pytest.approx(sum(k for k, _ in decided) / 60)
        assert row.top1 == pytest.approx(sum(right for _, right in decided) / 60)
        assert row.gmacs == pytest.approx(sum(spent) / 60)
        assert row.gmacs_with_anchornet == pytest.approx(row.gmacs + found.gmacs_anchornet)
        assert row.stopped[0] == pytest.approx(sum(k == 1 for k, _ in decided) / 60)
        assert sum(row.stopped) == pytest.approx(1)
    fixed = [row for row in found.rows if row.way == "fixed"]
    numbers = "1/1/1 2/1/1 3/2/1 4/2/2 6/3/2 8/4/3 12/5/4 16/7/6"
    assert [row.setting for row in fixed] == numbers.split()
    first, last = replace(fixed[0], way="", setting=""), replace(fixed[-1], way="", setting="")
    assert replace(rows[0], way="", setting="", threshold=None) == first
    assert replace(rows[-1], way="", setting="", threshold=None) == last
    whole = [row for row in found.rows if row.way == "whole"]
    assert [row.setting for row in whole] == ["224", "192", "160", "128", "96"]
    assert whole[0].gmacs == pytest.approx(224**2 / 1e9)
    again = Dynamic.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert len(found.curve) > 20
    assert [point[1] for point in found.curve] == sorted(point[1] for point in found.curve)


def test_budgets_are_calibrated_on_other_images(root: Path):
    own = anchornet()
    found = run(config_of(root, thresholds=(), budgets=(own + 2e-5, own + 1.5e-5)))
    rows = [row for row in found.rows if row.way == "dynamic"]
    assert [row.budget for row in rows] == [own + 1.5e-5, own + 2e-5]
    assert found.calibration.images == 80
    train = drawn(80, 1)
    for row in rows:
        spent = [plain(image, row.threshold)[0] * image.scale**2 / 1e9 for image in train]
        met = sum(spent) / 80 + found.gmacs_anchornet
        assert row.calibrated == pytest.approx(met)
        assert met <= row.budget
        assert met - own == pytest.approx(row.budget - own, rel=0.05)
        assert row.gmacs == pytest.approx(row.budget - own, rel=0.2)  # of 60 other images
    with pytest.raises(SettingsError, match=r"--budget 0.1: expected at least 0\.39"):
        run(config_of(root, budgets=(0.1,)))
    with pytest.raises(SettingsError, match="--calibrate-on val: the images of this split"):
        config_of(root, budgets=(1.0,), calibrate_on="val")


def test_images_that_were_trained_on_are_refused(root: Path):
    held = root / "held.safetensors"
    found = run(config_of(root, weights=held, budgets=(anchornet() + 2e-5,), whole=False))
    reader = ShardReader(root / "shards" / "train")
    out = np.flatnonzero(held_out(reader.path, 0.5))
    assert (found.calibration.images, found.calibration.holdout) == (len(out), 0.5)
    train, row = drawn(80, 1), found.rows[-1]
    spent = [plain(train[i], row.threshold)[0] * train[i].scale ** 2 / 1e9 for i in out]
    assert row.calibrated == pytest.approx(np.mean(spent) + found.gmacs_anchornet)
    with pytest.raises(DataError, match=r"all\.safetensors: was trained .* --holdout 0\.05"):
        run(config_of(root, weights=root / "all.safetensors", budgets=(anchornet() + 2e-5,)))


def test_shards_of_other_settings_need_anchornet(root: Path, tmp_path: Path):
    for split, threshold in (("val", 0.3), ("train", 0.8)):
        write_shards(tmp_path / split, drawn(6, 2), FIVE, iou_threshold=threshold, preset=None)
    with pytest.raises(WeightsError, match=r"selected otherwise .* give --anchornet-weights FILE"):
        run(config_of(root, shards=tmp_path, budgets=(anchornet() + 2e-5,), whole=False))


def test_a_glance_comes_first(root: Path):
    found = run(config_of(root, glance=95, thresholds=(0.0, 0.9, 1.0)))
    none, some, every = (row for row in found.rows if row.way == "dynamic")
    assert none.mean_patches == 0
    assert none.gmacs_with_anchornet == none.gmacs == pytest.approx(95**2 / 1e9)
    # Fixed numbers of patches go without.
    assert [row for row in found.rows if row.way == "fixed"] == [
        row for row in run(config_of(root)).rows if row.way == "fixed"
    ]
    budget = (some.gmacs_with_anchornet + every.gmacs_with_anchornet) / 2
    asked = run(config_of(root, glance=95, thresholds=(), budgets=(budget,), whole=False)).rows[-1]
    assert asked.calibrated == pytest.approx(budget, rel=0.05)
    assert asked.gmacs_with_anchornet == pytest.approx(budget, rel=0.15)
    going = 1 - some.stopped[0]
    assert some.gmacs_with_anchornet - some.gmacs == pytest.approx(going * found.gmacs_anchornet)
    assert every.stopped[0] == 0


def test_savings_worked_out_by_hand():
    # All images stop right after one look when sure at 0.5, and are right after both.
    n = 40
    sure = np.tile([[0.6, 0.7]], (n, 1))
    place = np.zeros((n, 2), np.int32)
    looks = Looks(np.full(n, 63, np.uint8), np.full(n, 2), sure, place, place)
    costs = LookCosts({63: 1.0}, anchornet=2.0)
    one, two = savings(looks, looks, costs, {"1": np.ones(n, int), "2": np.full(n, 2)})
    assert (one.top1, one.gmacs, two.gmacs) == (1.0, 1.0, 2.0)
    assert (one.saved, one.low, one.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    assert (two.saved, two.low, two.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)
    assert two.saved_with_anchornet == pytest.approx(0.25)
    # Half of them need the second look, which is sure from 0.9 on.
    sure[::2, 0], place[::2, 0] = 0.3, 1
    looks = replace(looks, confidence=sure, place=place)
    (both,) = savings(looks, looks, costs, {"2": np.full(n, 2)})
    assert both.saved == pytest.approx(0.25, abs=0.01)
    assert both.low < 0.25 < both.high


def test_held_out_images_are_a_share_by_path_alone(root: Path):
    train = ShardReader(root / "shards" / "train")
    some, more = held_out(train.path, 0.3), held_out(train.path, 0.6)
    assert (more | ~some).all()
    assert not held_out(train.path, 0.0).any()
    assert held_out(train.path, 1.0).all()
    assert 0.15 < some.mean() < 0.45
