from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anchorpatch.errors import ShardError
from anchorpatch.settings import CODECS
from anchorpatch.shards.verify import ShardProblem, verify_folder
from tests.shards.samples import adopt, edit_manifest, make_split


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


def test_any_flipped_bit_of_the_manifest_is_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=1, per_shard=1, last=1)
    path = manifest.folder / "manifest.json"
    whole = path.read_bytes()
    for at in (*range(0, len(whole), 3), *range(len(whole) - 90, len(whole))):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        (problem,) = verify_folder(manifest.folder, jobs=1)
        assert problem.shard == "manifest.json"
        assert "\n" not in problem.problem
    for at in range(1, len(whole), 29):
        path.write_bytes(whole[:at])
        assert [p.shard for p in verify_folder(manifest.folder, jobs=1)] == ["manifest.json"], at
    path.write_bytes(whole)
    assert verify_folder(manifest.folder, jobs=1) == []


def test_missing_cut_and_foreign_files_are_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=4)
    manifest.shard_path(0).unlink()
    data = manifest.shard_path(1).read_bytes()
    manifest.shard_path(1).write_bytes(data[:-10])
    (manifest.folder / "val-00009.h5").write_bytes(b"x")
    (manifest.folder / "val-00003.h5.tmp").write_bytes(b"left by a killed run")
    edit_manifest(manifest.folder, lambda data: data["shards"].pop(2))
    assert verify_folder(manifest.folder, jobs=1) == [
        ShardProblem("val-00000.h5", "missing: run the same extract again"),
        ShardProblem(
            "val-00001.h5",
            f"expected {len(data):,} bytes, found {len(data) - 10:,}: run the same extract again",
        ),
        ShardProblem(
            "val-00002.h5",
            "has no entry in manifest.json: if it comes from another folder, join the folders with "
            "`anchorpatch shards merge`, else run the same extract again",
        ),
        ShardProblem("val-00009.h5", "has no entry in manifest.json"),
    ]


def test_a_split_without_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json: not found"):
        verify_folder(tmp_path)


def test_attributes_of_other_shards_are_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=1, last=8)
    other, _ = make_split(tmp_path / "other" / "val", shards=1, last=8, iou_threshold=0.8)
    manifest.shard_path(0).write_bytes(other.shard_path(0).read_bytes())
    adopt(manifest)
    assert verify_folder(manifest.folder, jobs=1) == [
        ShardProblem("val-00000.h5", "its settings are not those of manifest.json")
    ]
