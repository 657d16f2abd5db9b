from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from anchorpatch import storage
from anchorpatch.errors import CorruptShard, ManifestMismatch, ShardError
from anchorpatch.shards.manifest import Manifest, read_manifest
from anchorpatch.shards.merge import merge_split
from anchorpatch.shards.verify import verify_folder
from tests.shards.samples import edit_manifest, make_split


def take(manifest: Manifest, folder: Path, shards: list[int]) -> Path:
    """Copy a part of a split as a task with a disk of its own would have made it."""
    shutil.copytree(manifest.folder, folder)
    for i in range(manifest.shard_count):
        if i not in shards:
            (folder / manifest.shard_path(i).name).unlink()
    names = {manifest.shard_path(i).name for i in shards}
    part = read_manifest(folder)
    part.forget([entry for entry in part.entries if entry.name not in names])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


@pytest.fixture
def whole(tmp_path: Path) -> Manifest:
    return make_split(tmp_path / "whole" / "val", shards=4, per_shard=1, last=1)[0]


def test_parts_become_the_whole(tmp_path: Path, whole: Manifest) -> None:
    parts = [
        take(whole, tmp_path / "a" / "val", [0, 2]),
        take(whole, tmp_path / "b" / "val", [1, 2, 3]),
    ]
    images: list[int] = []
    merged = merge_split(parts, tmp_path / "out" / "val", images.append)
    assert merged.copied == tuple(f"val-0000{i}.h5" for i in range(4))
    assert (merged.missing, merged.problems, sum(images)) == ((), (), 4)
    assert contents(tmp_path / "out" / "val") == contents(whole.folder)
    assert merge_split(parts, tmp_path / "out" / "val").copied == ()
    # Into a folder that is a part itself.
    assert merge_split(parts, parts[0]).copied == ("val-00001.h5", "val-00003.h5")
    assert contents(parts[0]) == contents(whole.folder)


def test_what_lacks_is_said(tmp_path: Path, whole: Manifest) -> None:
    part = take(whole, tmp_path / "a" / "val", [1])
    merged = merge_split([part], tmp_path / "out" / "val")
    assert merged.missing == ("val-00000.h5", "val-00002.h5", "val-00003.h5")
    assert read_manifest(tmp_path / "out" / "val").missing() == [0, 2, 3]


def test_a_damaged_shard_is_taken_from_another_folder_or_named(
    tmp_path: Path, whole: Manifest
) -> None:
    parts = [take(whole, tmp_path / name / "val", [0, 1]) for name in "ab"]
    for part, shards in zip(parts, ([0, 1], [1]), strict=True):
        for i in shards:
            path = part / f"val-0000{i}.h5"
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    merged = merge_split(parts, tmp_path / "out" / "val")
    assert merged.copied == ("val-00000.h5",)
    assert merged.missing == ("val-00001.h5", "val-00002.h5", "val-00003.h5")
    assert [line.split(": ")[0] for line in merged.problems] == [
        str(part / "val-00001.h5") for part in parts
    ]
    assert all("its bytes have changed" in line for line in merged.problems)
    assert not (tmp_path / "out" / "val" / "val-00001.h5").exists()


def test_a_merge_that_was_interrupted_goes_on(
    tmp_path: Path, whole: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "val"
    for kill in range(12):
        left = kill
        real = storage.os.replace

        def dying(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            real(source, target)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(storage.os, "replace", dying)
            with contextlib.suppress(KeyboardInterrupt):
                merge_split([whole.folder], out)
                break
    assert contents(out) == contents(whole.folder)
    assert verify_folder(out, jobs=1) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "jpeg"}, "--codec was raw, now jpeg"),
        ({"last": 2}, "4 and 5 images"),
        ({"shards": 3}, "4 and 3 images"),
    ],
)
def test_other_splits_are_refused_by_name(
    tmp_path: Path, whole: Manifest, changes: dict, message: str
) -> None:
    arguments = {"shards": 4, "per_shard": 1, "last": 1, **changes}
    if "last" in changes:
        arguments |= {"shards": 2, "per_shard": 3}
    other, _ = make_split(tmp_path / "other" / "val", **arguments)
    out = tmp_path / "out" / "val"
    with pytest.raises(ManifestMismatch, match=message) as caught:
        merge_split([whole.folder, other.folder], out)
    assert f"{whole.folder} and {other.folder} are not parts of one split" in str(caught.value)
    assert not out.exists()
    shutil.copytree(other.folder, out)
    before = contents(out)
    with pytest.raises(ManifestMismatch, match="are not parts of one split"):
        merge_split([whole.folder], out)
    assert contents(out) == before


def test_other_lists_of_images_are_refused(tmp_path: Path, whole: Manifest) -> None:
    other = take(whole, tmp_path / "a" / "val", [0])
    edit_manifest(other, lambda data: data.update(files_sha256="12" * 32))
    with pytest.raises(ManifestMismatch, match="other lists of images"):
        merge_split([whole.folder, other], tmp_path / "out" / "val")


def test_shards_with_other_bytes_are_a_conflict(tmp_path: Path, whole: Manifest) -> None:
    other = take(whole, tmp_path / "a" / "val", [0, 1])
    part = read_manifest(other)
    part.commit(replace(part.entries[1], sha256="12" * 32))
    with pytest.raises(ShardError, match=r"val-00001\.h5 have different bytes"):
        merge_split([whole.folder, other], tmp_path / "out" / "val")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_manifest_is_refused(tmp_path: Path, whole: Manifest) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match=r"manifest\.json: not found"):
        merge_split([whole.folder, tmp_path / "empty"], tmp_path / "out" / "val")


def test_a_shard_that_cannot_be_read_is_a_problem_of_its_own(
    tmp_path: Path, whole: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chunks(path: Path) -> None:
        raise CorruptShard(f"{path}: cannot read: Input/output error")

    monkeypatch.setattr("anchorpatch.shards.merge._chunks", chunks)
    merged = merge_split([whole.folder], tmp_path / "out" / "val")
    assert len(merged.problems) == len(merged.missing) == 4
