from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from anchorpatch import storage
from anchorpatch.errors import CorruptShard, ManifestMismatch, ShardBusy, ShardError
from anchorpatch.shards.header import ShardSettings
from anchorpatch.shards.layout import decode_text
from anchorpatch.shards.manifest import FilesDigest, Manifest, read_manifest
from anchorpatch.shards.splits import merge_split, open_manifest
from anchorpatch.shards.verify import verify_folder
from anchorpatch.shards.writer import ShardWriter
from tests.shards.samples import (
    CLASSES,
    begin,
    digest_of,
    edit_manifest,
    entry,
    make_header,
    make_split,
)


def test_the_same_inputs_continue(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    files = FilesDigest(21, "f0" * 32, ())
    newer = replace(manifest.header, version="99.0")
    assert open_manifest(manifest.folder, newer, files) == manifest


SETTINGS = [
    ({"crop_mode": "squash"}, "--crop-mode was center, now squash"),
    ({"img_size": 256}, "--img-size was 224, now 256"),
    ({"crop_pct": 0.9}, "--crop-pct was none, now 0.9"),
    ({"patches": (5.6, 2.9, 2.1)}, "--patches was none, now 5.6,2.9,2.1"),
    ({"background": "black"}, "--background was #ffffff, now #000000"),
    ({"damaged": "skip"}, "--damaged was keep, now skip"),
    ({"iou_threshold": 0.8}, "--iou-threshold was 0.3, now 0.8"),
    ({"max_patches": (24, 10, 8)}, "--max-patches was 5,3,2, now 24,10,8"),
    ({"coverage": (0.3, 0.3, 0.3)}, "--coverage was 0.05,0.04,0.03, now 0.3,0.3,0.3"),
    ({"codec": "jpeg"}, "--codec was raw, now jpeg"),
    ({"store_images": True}, "--store-images was off, now on"),
    ({"shard_size": 9}, "--shard-size was 8, now 9"),
    ({"precision": "bfloat16"}, "--precision was float32, now bfloat16"),
    ({"engine": "openvino"}, "--engine was torch, now openvino"),
    ({"decoder": "nvjpeg"}, "--decoder was libjpeg, now nvjpeg"),
    ({"preset": None}, "--preset was figure, now none"),
    ({"device": "cuda", "batch_size": 256}, "--device was not recorded, now cuda"),
    ({"compile": True}, "--compile was off, now on"),
]


@pytest.mark.parametrize(("change", "message"), SETTINGS, ids=[str(c) for c, _ in SETTINGS])
def test_other_settings_are_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    manifest, _ = make_split(tmp_path / "val")
    before = {p.name: p.read_bytes() for p in manifest.folder.iterdir()}
    other = replace(manifest.header, settings=replace(manifest.header.settings, **change))
    with pytest.raises(ManifestMismatch) as caught:
        open_manifest(manifest.folder, other, FilesDigest(21, "f0" * 32, ()))
    assert str(caught.value) == (
        f"{manifest.folder} holds shards made from other inputs: {message}. "
        "Choose another --out, or --overwrite to replace what differs"
    )
    assert {p.name: p.read_bytes() for p in manifest.folder.iterdir()} == before


def test_every_setting_is_compared() -> None:
    tested = {name for change, _ in SETTINGS for name in change}
    assert tested | {"jpeg_quality"} == set(ShardSettings.__dataclass_fields__)


def test_jpeg_quality_counts_for_jpeg_alone(tmp_path: Path) -> None:
    assert make_header(jpeg_quality=50) == make_header()
    files = digest_of(["a"])
    begin(tmp_path, make_header(codec="jpeg"), files)
    with pytest.raises(ManifestMismatch, match="--jpeg-quality was 95, now 50"):
        open_manifest(tmp_path, make_header(codec="jpeg", jpeg_quality=50), files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_sha256": "12" * 32}, r"--weights had SHA-256 abababababab\.\.\., now 1212"),
        ({"split": "train"}, "--split was val, now train"),
        (
            {"classes": ("ape", *CLASSES)},
            r"classes of the folder were 4, now 5 \(ape added\)",
        ),
        ({"classes": CLASSES[1:]}, r"classes of the folder were 4, now 3 \(cat removed\)"),
        (
            {"network_classes": ("elk", *CLASSES)},
            r"classes of the weights were 5, now 5 \(in another order\)",
        ),
    ],
)
def test_other_inputs_are_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    files = digest_of(["a"])
    begin(tmp_path, make_header(), files)
    with pytest.raises(ManifestMismatch, match=message):
        open_manifest(tmp_path, replace(make_header(), **change), files)


def test_all_differences_are_named(tmp_path: Path) -> None:
    begin(tmp_path, make_header(), digest_of(["a"]))
    other = make_header("train", codec="jpeg", preset=None)
    with pytest.raises(ManifestMismatch) as caught:
        open_manifest(tmp_path, other, digest_of(["a", "b"]))
    for part in ("--codec was", "--preset was", "--split was", "images were 1, now 2"):
        assert part in str(caught.value)


@pytest.fixture
def files_of(tmp_path: Path) -> tuple[Manifest, list[str]]:
    """A split whose shards hold the files that its digests are of, one of them skipped."""
    manifest, batches = make_split(tmp_path / "first" / "val")
    paths = [decode_text(path) for batch in batches for path in batch.path]
    folder = tmp_path / "val"
    manifest = open_manifest(folder, manifest.header, digest_of(paths))
    for index, batch in enumerate(batches):
        digest = digest_of(paths).shards[index]
        with ShardWriter(
            manifest.shard_path(index), manifest.header, files_sha256=digest
        ) as writer:
            writer.append(type(batch)(*(array[1:] for array in batch)))
            writer.skip(decode_text(batch.path[0]), "truncated")
        manifest = manifest.commit(writer.entry)
    return manifest, paths


def test_the_first_removed_and_added_file_are_named(
    files_of: tuple[Manifest, list[str]],
) -> None:
    manifest, paths = files_of

    def message(now: list[str], digest: FilesDigest | None = None) -> str:
        with pytest.raises(ManifestMismatch) as caught:
            open_manifest(manifest.folder, manifest.header, digest or digest_of(now))
        return str(caught.value)

    assert open_manifest(manifest.folder, manifest.header, digest_of(paths)) == manifest
    gone = [*paths[:9], *paths[10:]]
    assert (
        f"images were 21, now 20 (first in val-00001.h5: {paths[9]} removed, {paths[16]} added)"
    ) in message(gone)
    renamed = [*paths[:10], "dog/new.jpg", *paths[11:]]
    assert (
        f"images were 21, now 21 (first in val-00001.h5: {paths[10]} removed, dog/new.jpg added)"
    ) in message(renamed)
    added = [*paths, "zebra/1.jpg"]
    assert "now 22 (first in val-00002.h5: zebra/1.jpg added)" in message(added)
    resized = replace(digest_of(paths), sha256="0" * 64, shards=("1" * 64, "2" * 64, "3" * 64))
    assert "val-00000.h5 has the same names, but a file's size or label" in message(paths, resized)
    manifest.shard_path(1).unlink()
    assert "images were 21, now 20. Choose" in message(gone)
    assert "21, now 21, with other names, sizes or labels. Choose" in message(renamed)


def test_files_added_after_the_last_full_shard(files_of: tuple[Manifest, list[str]]) -> None:
    manifest, paths = files_of
    whole = open_manifest(
        manifest.folder.with_name("whole"), manifest.header, digest_of(paths[:16])
    )
    for index in range(2):
        shutil.copy(manifest.shard_path(index), whole.shard_path(index))
        whole = whole.commit(manifest.entries[index])
    with pytest.raises(ManifestMismatch, match=r"16, now 21 \(those after number 16 are new\)"):
        open_manifest(whole.folder, manifest.header, digest_of(paths))


def test_overwrite_with_equal_inputs_continues(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    files = FilesDigest(21, "f0" * 32, ())
    assert open_manifest(manifest.folder, manifest.header, files, overwrite=True) == manifest
    assert manifest.refreshed().missing() == []


def test_overwrite_removes_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    ours = {"val-00000.h5", "val-00001.h5", "val-00002.h5"}
    others = {"notes.txt", "val-1.h5", "val-00000.h5.bak", "train-00000.h5", "my-val-00000.h5"}
    for name in others:
        (manifest.folder / name).write_text("not ours")
    other = make_header(iou_threshold=0.8)
    begun = open_manifest(manifest.folder, other, digest_of(["a"]), overwrite=True)
    names = {p.name for p in manifest.folder.iterdir()}
    assert names & ours == set()
    assert names >= others
    assert (begun.header, begun.entries, begun.missing()) == (other, (), [0])


def test_overwrite_mends_a_truncated_manifest_but_spares_a_foreign_one(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text('{"format": "anchorp')
    open_manifest(tmp_path, make_header(), digest_of(["a"]), overwrite=True)
    assert read_manifest(tmp_path).files_count == 1
    path.write_text('{"name": "site"}')
    with pytest.raises(ShardError, match="--overwrite does not touch"):
        open_manifest(tmp_path, make_header(), digest_of(["a"]), overwrite=True)
    assert path.read_text() == '{"name": "site"}'


def test_shards_without_a_manifest_are_not_overwritten(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    (manifest.folder / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"holds 3 shards \(val-00000.h5, ...\) but no manifest"):
        open_manifest(manifest.folder, manifest.header, digest_of(["a"]))
    assert manifest.shard_path(0).exists()


def test_a_folder_begun_anew_refuses_old_entries(tmp_path: Path) -> None:
    old = open_manifest(tmp_path, make_header(), digest_of(["a"]))
    new = open_manifest(tmp_path, make_header(codec="jpeg"), digest_of(["a"]), overwrite=True)
    with pytest.raises(ManifestMismatch, match="another run has started this folder over"):
        old.commit(entry(0))
    assert new.commit(entry(0)).entries == (entry(0),)


def test_shards_that_a_process_is_writing_are_not_overwritten(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    other = make_header(iou_threshold=0.8)
    before = {p.name: p.read_bytes() for p in manifest.folder.iterdir()}
    with ShardWriter(manifest.folder / "val-00007.h5", manifest.header) as writer:
        with pytest.raises(ShardBusy, match=r"val-00007\.h5: another process is writing"):
            open_manifest(manifest.folder, other, digest_of(["a"]), overwrite=True)
        writer.abort()
    assert {p.name: p.read_bytes() for p in manifest.folder.iterdir()} == before


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    other, files = make_header(iou_threshold=0.8), digest_of(["a"])
    assert open_manifest(tmp_path / "new", other, files, dry_run=True).missing() == [0]
    assert not (tmp_path / "new").exists()
    manifest, _ = make_split(tmp_path / "val")
    before = {p.name: p.read_bytes() for p in manifest.folder.iterdir()}
    with pytest.raises(ManifestMismatch):
        open_manifest(manifest.folder, other, files, dry_run=True)
    again = open_manifest(manifest.folder, other, files, overwrite=True, dry_run=True)
    assert (again.header, again.missing()) == (other, [0])
    assert {p.name: p.read_bytes() for p in manifest.folder.iterdir()} == before


def test_old_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    old = [".val-00000.h5.0123456789ab.tmp", ".manifest.json.0123456789ab.tmp", "val-00001.h5.tmp"]
    kept = [".val-00002.h5.0123456789ab.tmp", ".notes.tmp"]
    for name in (*old, *kept):
        (manifest.folder / name).touch()
    for name in (*old, ".notes.tmp"):
        os.utime(manifest.folder / name, (0, 0))
    open_manifest(manifest.folder, manifest.header, FilesDigest(21, "f0" * 32, ()))
    names = {p.name for p in manifest.folder.iterdir()}
    assert names.isdisjoint(old)
    assert names.issuperset(kept)


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
    assert all("the file has changed" in line for line in merged.problems)
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

    monkeypatch.setattr("anchorpatch.shards.splits._chunks", chunks)
    merged = merge_split([whole.folder], tmp_path / "out" / "val")
    assert len(merged.problems) == len(merged.missing) == 4
