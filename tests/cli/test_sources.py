"""The real program on images in a folder, in archives and in a list: the same results."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest

from anchorpatch.errors import DataError
from anchorpatch.jobs import extract
from anchorpatch.jobs.crops import CropSource
from anchorpatch.jobs.extract_plan import ExtractConfig
from anchorpatch.shards import ShardReader
from tests.cli.test_extract import contents
from tests.conftest import Program
from tests.images.packing import KINDS, tar_bytes, tree_of, write, zip_bytes
from tests.jobs.small_networks import save_small_network
from tests.program import run_ranks, start_program


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> dict[str, Path]:
    """What is given as --data, by the kind of archive."""
    folder, tree = tmp_path_factory.mktemp("packed"), tree_of(image_folder / "val")
    kinds = ("tar", "tar-of-tars", "zip-deflated", "shards", "shards-by-pattern")
    return {kind: KINDS[kind](folder / kind, tree) for kind in kinds}


SETTINGS = {"limit": 14, "shard_size": 4, "batch_size": 3, "engine": "torch"}


def options(weights: Path) -> list[object]:
    words = ((f"--{name.replace('_', '-')}", value) for name, value in SETTINGS.items())
    return ["--weights", weights, *itertools.chain(*words)]


def extracted(data: Path, weights: Path, out: Path, workers: int) -> dict[str, bytes]:
    extract.run(
        ExtractConfig(data, "val", weights, out, workers=workers, **SETTINGS)  # type: ignore[arg-type]
    )
    return contents(out / "val")


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, image_folder: Path, weights: Path
) -> dict[str, bytes]:
    """The shards of the folder."""
    return extracted(image_folder, weights, tmp_path_factory.mktemp("reference"), 0)


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        *(("tar", 0), ("tar", 2), ("tar-of-tars", 1), ("zip-deflated", 2)),
        *(("shards", 0), ("shards-by-pattern", 1)),
    ],
)
def test_the_same_shards(
    packed: dict[str, Path],
    weights: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
    kind: str,
    workers: int,
) -> None:
    assert extracted(packed[kind], weights, tmp_path, workers) == reference


def test_killed_and_gone_on_with_from_another_archive(
    program: Program,
    packed: dict[str, Path],
    weights: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
) -> None:
    arguments = ["extract", *options(weights), "--out", tmp_path, "--workers", 1]
    process = start_program(*arguments, "--data", packed["tar"], cwd=tmp_path)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("val/*.h5")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = program(*arguments, "--data", packed["shards-by-pattern"])
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "val") == reference


def test_ranks_make_one_index(
    packed: dict[str, Path], weights: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    data = packed["zip-deflated"]
    old = (data / "val.zip").stat().st_mtime - 60
    os.utime(data / "val.zip", (old, old))
    arguments = ["extract", *options(weights), "--data", data, "--out", tmp_path, "--workers", 1]
    cache = {"ANCHORPATCH_CACHE": str(tmp_path / "cache")}
    result = run_ranks(*arguments, cwd=tmp_path, env=cache)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "val") == reference
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".index", ".lock"]


def test_a_list_of_the_same_images(
    program: Program, image_folder: Path, weights: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """Relative to the working directory: the shards have the paths as the list has them."""
    names = [*tree_of(image_folder / "val")]
    (tmp_path / "cat").symlink_to(image_folder / "val" / "cat")
    (tmp_path / "dog").symlink_to(image_folder / "val" / "dog")
    write(tmp_path / "list", "\n".join([*reversed(names), ""]).encode())
    result = program("extract", *options(weights), "--files", "list", "--workers", 0)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "shards" / "val") == reference
    missing = write(tmp_path / "list", b"cat/00.JPEG\ncat/none.JPEG\n")
    arguments = ["extract", *options(weights), "--files", missing, "--out", "other"]
    result = program(*arguments, "--workers", 0)
    assert result.returncode == 1
    assert "1 of 2 images cannot be read" in result.stderr
    assert "1 missing; the last is cat/none.JPEG" in result.stderr


def test_anchornet_is_evaluated_alike(
    program: Program, image_folder: Path, packed: dict[str, Path], weights: Path
) -> None:
    found = []
    for data in (image_folder, packed["tar-of-tars"]):
        arguments = ["evaluate", "anchornet", "--weights", weights, "--data", data, "--json"]
        result = program(*arguments, "--workers", 0, "--limit", 6, "--engine", "torch")
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout))
        del found[-1]["images_per_second"]
    assert found[0] == found[1]


def test_training_on_archives(
    program: Program, image_folder: Path, weights: Path, tmp_path: Path
) -> None:
    tree = tree_of(image_folder / "val")
    splits = {f"{split}/{name}": data for split in ("train", "val") for name, data in tree.items()}
    both = write(tmp_path / "both.zip", zip_bytes(splits))
    arguments = ["train", "--recipe", "small", "--epochs", 1, "--batch-size", 20, "--crop-size"]
    arguments += [111, "--workers", 1, "--json", "--image-cache", "cache"]
    result = program(*arguments, "--data", both, "--init", weights)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["images"] == [40, 40]
    one = write(tmp_path / "one.zip", zip_bytes(tree))
    result = program(*arguments, "--data", one)
    assert result.returncode == 1
    assert "one.zip: expected a train and a val split, found the same images" in result.stderr


def test_images_in_an_archive_are_classified(
    program: Program, image_folder: Path, packed: dict[str, Path], weights: Path, tmp_path: Path
) -> None:
    archive = packed["tar-of-tars"] / "ILSVRC2012_img_val.tar"
    network = save_small_network(tmp_path / "best.safetensors")
    arguments = ["--network", network, "--anchornet-weights", weights, "--json"]
    names = [image_folder / "val/cat/03.JPEG", f"{archive}::cat/03.JPEG", f"{archive}::cat/x.JPEG"]
    result = program("predict", *names, *arguments)
    assert result.returncode == 1
    found = json.loads(result.stdout)
    first, second = found["images"]
    assert {**first, "path": ""} == {**second, "path": ""}
    assert found["unreadable"] == [{"path": str(names[2]), "reason": "missing"}]
    result = program("predict", archive, *arguments)
    assert result.returncode == 0, result.stderr
    images = json.loads(result.stdout)["images"]
    assert len(images) == 40
    assert images[3] == second


def test_whole_images_of_shards_are_found_in_an_archive(
    packed: dict[str, Path], image_folder: Path, weights: Path, tmp_path: Path
) -> None:
    """As fine-tuning a baseline, row 224 of Table 3, and Table 4 read them."""
    extracted(image_folder, weights, tmp_path, 0)
    reader = ShardReader(tmp_path / "val")
    wanted = CropSource.of_shards(reader, image_folder, split="val")
    for data in packed.values():
        found = CropSource.of_shards(reader, data, split="val")
        assert (found.read([0, 13, 3]).pixels == wanted.read([0, 13, 3]).pixels).all()
    gone = tmp_path / "gone"
    write(gone / "val.tar", tar_bytes({"cat/00.JPEG": b"x"}))
    with pytest.raises(DataError, match=r"13 of its 14 images are not in .*gone/val\.tar"):
        CropSource.of_shards(reader, gone, split="val")
