from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from anchorpatch.demo import bundled_weights
from anchorpatch.demo.scenes import CLASSES
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.runtime.checkpoint import WeightsMeta, load_weights, save_weights
from anchorpatch.shards.reader import ShardReader
from tests.program import run_program

run = partial(run_program, "demo")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that have learnt nothing: enough to walk the whole way."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_weights(path, AnchorNet(len(CLASSES)).state_dict(), WeightsMeta("anchornet", CLASSES))
    return path


def test_demo_walks_the_whole_way_and_again(tmp_path: Path, weights: Path) -> None:
    first = run("--images", 33, "--weights", weights, "--workers", 0, "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    assert result["scenes"]["drawn"] == 33
    assert result["extract"]["images"] == result["score"]["images"] == 33
    assert result["verified_shards"] == result["extract"]["shards"] == 1
    assert result["score"]["top1"] == pytest.approx(result["extract"]["top1"])
    rows = {size: sum(row.values()) for size, row in result["score"]["counts"].items()}
    assert rows == {"small": 13, "medium": 10, "large": 10}
    picture = tmp_path / "anchorpatch-demo" / "patches.png"
    assert result["picture"] == "anchorpatch-demo/patches.png"
    with Image.open(picture) as image:
        image.load()
        assert image.width > 3 * 336
    drawn = picture.read_bytes()

    again = run("--images", 33, "--weights", weights, "--workers", 0, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert picture.read_bytes() == drawn
    lines = again.stdout.splitlines()
    assert "nothing to do" in lines
    assert "all 1 shard verified" in lines
    assert lines[-1] == "picture: anchorpatch-demo/patches.png"
    assert again.stderr.endswith(
        "anchorpatch report anchorpatch-demo puts everything on one page\n"
    )
    for start in ("strongest ", "random, same scale ", "small ", "medium ", "large "):
        assert any(line.startswith(start) for line in lines), start

    shard = next((tmp_path / "anchorpatch-demo" / "shards" / "val").glob("*.h5"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    broken = run("--images", 33, "--weights", weights, "--workers", 0, cwd=tmp_path)
    assert (broken.returncode, broken.stdout) == (1, "")
    assert f"{shard.name}: expected SHA-256" in broken.stderr


def test_missing_weights_end_before_anything_is_drawn(tmp_path: Path) -> None:
    missing = run("--weights", "no.safetensors", cwd=tmp_path)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "no.safetensors" in missing.stderr
    assert not list(tmp_path.iterdir())


def test_bundled_weights_find_the_objects(tmp_path: Path) -> None:
    done = run("--images", 120, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    score = json.loads(done.stdout)["score"]
    assert score["top1"] > 0.95
    assert score["strongest"]["hit"] > 0.95
    assert score["strongest"]["hit"] > score["center"]["hit"] > score["random"]["hit"]
    assert score["grows"]
    assert score["ordered"] > 0.6


def test_photographs_of_ones_own(tmp_path: Path, image_folder: Path) -> None:
    pictures = tmp_path / "My pictures"
    pictures.mkdir()
    for i, source in enumerate(sorted((image_folder / "val").rglob("*.JPEG"))[:6]):
        shutil.copy(source, pictures / f"{i}.jpg")
    (pictures / "broken.jpg").write_bytes(b"x")
    done = run("--photos", pictures, "--workers", 0, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["photos"] == {"folder": str(tmp_path), "split": "My pictures"}
    extracted, score = result["extract"], result["score"]
    assert (extracted["images"], extracted["skipped"]) == (6, {"not an image": 1})
    assert (score["images"], score["labelled"], score["top1"]) == (6, 0, None)
    assert sum(row["images"] for row in score["predicted"].values()) == 6
    reader = ShardReader(tmp_path / "anchorpatch-photos" / "shards" / "My pictures")
    assert reader.classes == ("My pictures",)
    assert reader.network_classes == load_weights(bundled_weights("photos")).meta.classes
    assert result["picture"] == "anchorpatch-photos/figures/patches.png"
    assert (tmp_path / result["picture"]).is_file()
    assert (tmp_path / result["picture"]).with_suffix(".json").is_file()


def test_a_folder_without_a_readable_image(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"x")
    done = run("--photos", "bad", "--workers", 0, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("anchorpatch: bad: no image can be read: 1 (1 not an image)\n")
