"""Tuning, and extracting for numbers of patches, as a user does it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.complexity import macs
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import WeightsMeta, load_weights, save_weights
from anchorpatch.settings import SCALES
from anchorpatch.shards import ShardReader
from tests.conftest import Program
from tests.jobs.small_networks import save_small_network

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """Lively, and for the classes of the images."""
    path = save_small_network(tmp_path_factory.mktemp("network") / "three.safetensors")
    tensors = dict(load_weights(path, None).tensors)
    for name in ("fc.weight", "fc.bias"):
        tensors[name] = tensors[name][:2]
    meta = WeightsMeta("shufflenet_v2_x0_5", ("cat", "dog"))
    save_weights(path.with_name("two.safetensors"), tensors, meta)
    return path.with_name("two.safetensors")


def test_extracting_for_numbers_of_patches_is_recorded(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path
):
    common = ("--data", image_folder, "--weights", weights, "--workers", 0, "--split", "val")
    tuned = program("tune", *common, "--patches", "4.1,2.5,1.8", "--json")
    assert tuned.returncode == 0, tuned.stderr
    found = json.loads(tuned.stdout)
    extract = ("extract", *common, "--codec", "image", "--patches", "4.1,2.5,1.8")
    done = program(*extract)
    assert done.returncode == 0, done.stderr
    assert "--patches: K 24/10/8, T 0.3, P " in done.stderr
    reader = ShardReader(tmp_path / "shards" / "val")
    assert reader.settings.patches == (4.1, 2.5, 1.8)
    assert reader.settings.preset is None
    assert list(reader.settings.coverage) == found["settings"]["coverage"]
    for scale, wanted in zip(SCALES, (4.1, 2.5, 1.8), strict=True):
        if (of_scale := reader.scale == scale).any():
            mean = reader.counts[of_scale].mean()
            assert mean == pytest.approx(found["mean_patches"][str(scale)])
            assert abs(mean - wanted) <= 0.6 / of_scale.sum() + 0.03 * wanted
    again = program(*extract)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
    assert "gives" not in again.stderr  # the shards say it
    other = program(*extract[:-1], "3,2,1.5")
    assert other.returncode == 1
    assert "--patches was 4.1,2.5,1.8, now 3.0,2.0,1.5" in other.stderr
    assert program(*extract, "--coverage", 0.3).returncode == 2
    (tmp_path / "anchorpatch.toml").write_text("[extract]\ncoverage = 0.3\n")
    assert program(*extract, "--dry-run").returncode == 0
    (tmp_path / "anchorpatch.toml").write_text("[extract]\npatches = [4, 2, 2]\n")
    planned = program(*extract[:-2], "--coverage", 0.3, "--out", "o", "--dry-run", "--json")
    assert json.loads(planned.stdout)["settings"]["coverage"] == [0.3] * 3, planned.stderr
    (tmp_path / "anchorpatch.toml").unlink()
    shown = program("shards", "inspect", "shards")
    assert shown.returncode == 0, shown.stderr


def test_the_best_settings_within_a_budget(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, network: Path
):
    (tmp_path / "anchorpatch.toml").write_text(
        '# ours\n[extract]\ncoverage = 0.3\ncodec = "image"\n[train]\nepochs = 2\n'
    )
    own, net = AnchorNet(2), build("shufflenet_v2_x0_5", 2)
    anchornet = macs(own, 224, own.localize) / 1e9
    budget = anchornet + 3 * macs(net, 95) / 1e9
    command = ("tune", "--data", image_folder, "--weights", weights, "--workers", 0)
    command += ("--split", "val", "--budget", budget, "--network", network, "--write", "--json")
    done = program(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["gmacs"] <= budget
    settings = tomllib.loads((tmp_path / "anchorpatch.toml").read_text())
    assert settings["extract"]["codec"] == "image"
    assert settings["train"] == {"epochs": 2}
    assert settings["extract"]["coverage"] == found["settings"]["coverage"]
    # The program itself, with these settings, finds the same accuracy and cost.
    extracted = program("extract", "--data", image_folder, "--weights", weights, "--split", "val")
    assert extracted.returncode == 0, extracted.stderr
    evaluated = program(
        *("evaluate", "shufflenet_v2_x0_5", "--weights", network, "--no-whole", "--no-speed"),
        "--json",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    row = json.loads(evaluated.stdout)["rows"][-1]
    assert row["top1"] == pytest.approx(found["top1"])
    assert row["gmacs_with_anchornet"] == pytest.approx(found["gmacs"])


def test_wrong_usage_and_what_cannot_be(
    program: Program, image_folder: Path, weights: Path, network: Path
):
    common = ("--data", image_folder, "--weights", weights, "--split", "val", "--workers", 0)
    assert program("tune", *common).returncode == 2
    assert program("tune", *common, "--budget", 1).returncode == 2
    for options, pattern in (
        (("--patches", "99,2,2"), r"--patches: expected 1 to \d+\.\d\d at (63|95|111) px"),
        (("--budget", 0.1, "--network", network), r"--budget 0\.1: expected at least 0\.\d+ GMACs"),
    ):
        done = program("tune", *common, *options)
        assert done.returncode == 2
        assert re.search(pattern, done.stderr), done.stderr
