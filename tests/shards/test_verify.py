from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from anchorpatch.errors import ShardError
from anchorpatch.shards.layout import CODECS
from anchorpatch.shards.manifest import Manifest, read_manifest
from anchorpatch.shards.verify import ShardProblem, verify_folder
from tests.shards.samples import make_split


@pytest.mark.parametrize("codec", CODECS)
def test_whole_shards_have_no_problems(tmp_path: Path, codec: str) -> None:
    make_split(tmp_path / "val", codec=codec, store_images=True)
    assert verify_folder(tmp_path / "val", jobs=1) == []


def test_over_processes_as_in_one(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    flip(manifest.shard_path(1), 5000)
    assert verify_folder(tmp_path / "val", jobs=2) == verify_folder(tmp_path / "val", jobs=1)
    assert [p.shard for p in verify_folder(tmp_path / "val", jobs=2)] == ["val-00001.h5"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_any_flipped_byte_is_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=2, per_shard=2, last=2)
    path = manifest.shard_path(1)
    size = path.stat().st_size
    rng = np.random.default_rng(0)
    for at in [*range(0, 48), *rng.integers(0, size, 60).tolist(), size - 1]:
        flip(path, at)
        (problem,) = verify_folder(tmp_path / "val", jobs=1)
        assert problem.shard == "val-00001.h5"
        assert "its bytes have changed" in problem.problem
        flip(path, at)
    assert verify_folder(tmp_path / "val", jobs=1) == []


def test_missing_cut_and_foreign_files_are_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=4)
    manifest.shard_path(0).unlink()
    data = manifest.shard_path(1).read_bytes()
    manifest.shard_path(1).write_bytes(data[:-10])
    (manifest.folder / "val-00009.h5").write_bytes(b"x")
    (manifest.folder / "val-00003.h5.tmp").write_bytes(b"left by a killed run")
    path = manifest.folder / "manifest.json"
    contents = json.loads(path.read_text())
    del contents["shards"][2]
    path.write_text(json.dumps(contents))
    assert verify_folder(manifest.folder, jobs=1) == [
        ShardProblem("val-00000.h5", "missing: run the same extract again"),
        ShardProblem(
            "val-00001.h5",
            f"expected {len(data):,} bytes, found {len(data) - 10:,}: run the same extract again",
        ),
        ShardProblem("val-00002.h5", "has no entry in manifest.json: run the same extract again"),
        ShardProblem("val-00009.h5", "is not in manifest.json"),
    ]


def test_a_split_without_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json: not found"):
        verify_folder(tmp_path)


def adopt(manifest: Manifest, index: int = 0) -> None:
    """Enter a changed shard into the manifest, so that only its contents can tell."""
    path = manifest.shard_path(index)
    data = path.read_bytes()
    entry = next(e for e in manifest.entries if e.name == path.name)
    changed = replace(entry, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    read_manifest(manifest.folder).commit(changed)


CHANGES = [
    ("images/label", 0, 4, "images/label: expected 0 to 3, found others"),
    ("images/label", 0, -1, "images/label: expected 0 to 3, found others"),
    ("images/predicted", 0, 5, "images/predicted: expected 0 to 4, found others"),
    ("images/branch_class", (1, 2), 5, "images/branch_class: expected 0 to 4, found others"),
    ("images/scale", 0, 64, "images/scale: expected (63, 95, 111), found others"),
    ("images/branch_prob", (0, 0), 1.5, "images/branch_prob: expected 0 to 1, found others"),
    ("images/branch_prob", (0, 0), np.nan, "images/branch_prob: expected 0 to 1, found others"),
    ("images/size", (0, 1), 0, "images/size: expected at least 1 px, found others"),
    ("images/path", 0, b"zebra", "images/path: expected each once, in order, found others"),
    ("images/first", 3, 9, "images/first, images/count: expected to divide"),
    ("images/count", 3, 0, "images/first, images/count: expected to divide"),
    ("patches/63/image", 0, 7, "patches/63/image: expected the image whose slice it is"),
    ("patches/63/corner", (0, 0), -1, "patches/63/corner: expected 0 to 161, found others"),
    ("patches/63/corner", (0, 1), 162, "patches/63/corner: expected 0 to 161, found others"),
    ("patches/95/corner", (0, 1), 130, "patches/95/corner: expected 0 to 129, found others"),
    ("patches/63/score", 0, np.nan, "patches/63/score: expected numbers, found NaN"),
    ("patches/63/score", 0, np.inf, "patches/63/score: expected numbers, found NaN"),
    ("patches/63/score", 0, -99.0, "patches/63/score: expected the strongest first"),
]


@pytest.mark.parametrize(("name", "at", "value", "message"), CHANGES)
def test_contents_that_do_not_fit_are_named(
    tmp_path: Path, name: str, at: object, value: object, message: str
) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=1, last=8)
    with h5py.File(manifest.shard_path(0), "r+") as file:
        if name == "patches/63/score" and value == -99.0:
            image = file["patches/63/image"][:]
            at = int(np.flatnonzero(image[1:] == image[:-1])[0])  # one that has a weaker one
        file[name][at] = value
    adopt(manifest)
    problems = verify_folder(manifest.folder, jobs=1)
    assert any(message in p.problem for p in problems), problems
    assert {p.shard for p in problems} == {"val-00000.h5"}


@pytest.mark.parametrize("name", ["images/label", "patches/95/pixels", "skipped/path", "patches"])
def test_a_missing_dataset_is_named(tmp_path: Path, name: str) -> None:
    manifest, _ = make_split(tmp_path / "val")
    with h5py.File(manifest.shard_path(0), "r+") as file:
        del file[name]
    adopt(manifest)
    (problem,) = verify_folder(manifest.folder, jobs=1)
    assert problem.shard == "val-00000.h5"
    assert problem.problem.startswith("expected a shard, cannot be read: ")


def test_a_table_of_another_type_is_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=1, last=8)
    with h5py.File(manifest.shard_path(0), "r+") as file:
        labels = file["images/label"][:]
        del file["images/label"]
        file["images/label"] = labels.astype("int64")
    adopt(manifest)
    (problem,) = verify_folder(manifest.folder, jobs=1)
    assert "images/label: expected 8 rows as format 1 has them, found int64 (8,)" in problem.problem


def test_attributes_of_other_shards_are_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=1, last=8)
    other, _ = make_split(tmp_path / "other" / "val", shards=1, last=8, iou_threshold=0.8)
    manifest.shard_path(0).write_bytes(other.shard_path(0).read_bytes())
    adopt(manifest)
    assert verify_folder(manifest.folder, jobs=1) == [
        ShardProblem("val-00000.h5", "its settings are not those of manifest.json")
    ]
