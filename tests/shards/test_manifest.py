from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from anchorpatch.errors import ManifestMismatch, ShardBusy, ShardError
from anchorpatch.settings import CropSettings
from anchorpatch.shards.compare import header_differences
from anchorpatch.shards.layout import ShardHeader, ShardSettings, decode_text
from anchorpatch.shards.manifest import (
    FilesDigest,
    Manifest,
    ShardEntry,
    open_manifest,
    read_manifest,
)
from anchorpatch.shards.writer import ShardWriter
from tests.shards.samples import (
    CLASSES,
    edit_manifest,
    make_header,
    make_settings,
    make_split,
)


def digest_of(paths: list[str], size: int = 8) -> FilesDigest:
    def sha256(part: list[str]) -> str:
        return hashlib.sha256("\0".join(part).encode()).hexdigest()

    parts = [paths[i : i + size] for i in range(0, len(paths), size)]
    return FilesDigest(
        len(paths), sha256(paths), tuple(map(sha256, parts)), lambda a, b: paths[a:b]
    )


def entry(index: int, **changes: object) -> ShardEntry:
    values: dict = dict(
        name=f"val-{index:05d}.h5",
        images=7,
        patches={63: 1, 95: 2, 111: 3},
        chosen={63: 4, 95: 2, 111: 1},
        correct=5,
        bytes=4,
        sha256="ab" * 32,
        skipped=(("cat/bäd.jpg", "truncated"), ("cat/\udcff.jpg", "empty file")),
        files_sha256="cd" * 32,
    )
    return ShardEntry(**{**values, **changes})


def begin(folder: Path, header: ShardHeader, files: FilesDigest) -> Manifest:
    """Begin a split that has a shard, which other inputs may not take the place of."""
    manifest = open_manifest(folder, header, files)
    for split in ("val", "train"):
        (folder / f"{split}-00000.h5").write_bytes(b"h5")
    return manifest.commit(entry(0, bytes=2, files_sha256=files.shards[0]))


def test_entries_and_header_survive_the_file(tmp_path: Path) -> None:
    header = make_header()
    begun = open_manifest(tmp_path, header, digest_of([f"{i}" for i in range(20)]))
    after = begun.commit(entry(1)).commit(entry(0))
    assert after.entries == (entry(0), entry(1))
    again = read_manifest(tmp_path)
    assert again == after
    assert (again.header, again.files_count, again.shard_count) == (header, 20, 3)
    assert [again.shard_range(i) for i in range(3)] == [(0, 8), (8, 16), (16, 20)]


def test_the_first_files_of_version_1_stay_readable() -> None:
    settings = make_header().settings
    old = settings.to_json()
    for name in ("crop_mode", "background", "damaged"):
        del old[name]
    assert ShardSettings.from_json(old) == settings
    assert settings.crop == CropSettings()
    for odd in ({**old, "crop_mode": "stretch"}, {**old, "background": 7}):
        with pytest.raises(ValueError, match="expected"):
            ShardSettings.from_json(odd)
    for odd in ({**old, "cropping": "center"}, {k: v for k, v in old.items() if k != "codec"}):
        with pytest.raises(ShardError, match=r"cropping|codec"):
            ShardSettings.from_json(odd)
    document = entry(0, damaged=("cat/1.jpg",)).to_json()
    assert ShardEntry.from_json(document) == entry(0, damaged=("cat/1.jpg",))
    del document["damaged"]
    assert ShardEntry.from_json(document) == entry(0)


def test_the_file_has_one_line_a_shard(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    lines = (tmp_path / "val" / "manifest.json").read_text().splitlines()
    assert sum('"name": "val-0' in line for line in lines) == 3
    assert len(lines) == 19
    assert manifest.pending() == []


def test_pending_are_shards_without_entry_or_of_another_size(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=4)
    assert manifest.pending() == []
    manifest.shard_path(0).unlink()
    with manifest.shard_path(2).open("ab") as file:
        file.write(b"x")
    assert manifest.pending() == [0, 2]
    # A run that was killed between the shard and its entry.
    edit_manifest(manifest.folder, lambda data: data["shards"].pop(3))
    assert manifest.shard_path(3).exists()
    assert manifest.pending() == [0, 2, 3]


def test_an_entry_replaces_the_older_one(tmp_path: Path) -> None:
    manifest = open_manifest(tmp_path, make_header(), digest_of(["a"]))
    manifest.commit(entry(0))
    assert manifest.commit(entry(0, images=2)).entries == (entry(0, images=2),)


def test_the_same_inputs_continue(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    files = FilesDigest(21, "f0" * 32, ())
    newer = replace(manifest.header, version="99.0")
    assert open_manifest(manifest.folder, newer, files) == manifest


SETTINGS = [
    ({"crop_mode": "squash"}, "crop mode (of the weights) was center, now squash"),
    ({"background": "black"}, "--background was #ffffff, now #000000"),
    ({"damaged": "skip"}, "--damaged was keep, now skip"),
    ({"iou_threshold": 0.8}, "--iou-threshold was 0.3, now 0.8"),
    ({"max_patches": (24, 10, 8)}, "--max-patches was 5,3,2, now 24,10,8"),
    ({"coverage": (0.3, 0.3, 0.3)}, "--coverage was 0.05,0.04,0.03, now 0.3,0.3,0.3"),
    ({"codec": "jpeg"}, "--codec was raw, now jpeg"),
    ({"store_images": True}, "--store-images was off, now on"),
    ({"shard_size": 9}, "--shard-size was 8, now 9"),
    ({"precision": "bfloat16"}, "precision (--amp) was float32, now bfloat16"),
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


CPU, GPU = {"device": "cpu"}, {"device": "cuda", "batch_size": 256}


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({}, CPU, []),  # an older version's, whose bytes on CPU are the same
        (CPU, {"device": "cpu", "batch_size": 7}, []),  # changes nothing there
        (CPU, GPU, ["--device was cpu, now cuda"]),
        (GPU, CPU, ["--device was cuda, now cpu"]),
        (GPU, {"device": "cuda", "batch_size": 64}, ["--batch-size was 256, now 64"]),
    ],
)
def test_what_computed_is_compared_where_it_decides_bytes(
    old: dict, new: dict, difference: list[str]
) -> None:
    assert header_differences(make_header(**old), make_header(**new)) == difference


def test_settings_of_older_versions_are_read() -> None:
    settings = make_settings(**GPU, compile=True)
    assert ShardSettings.from_json(settings.to_json()) == settings
    older = {
        name: value
        for name, value in settings.to_json().items()
        if name not in ("device", "batch_size", "compile")
    }
    assert ShardSettings.from_json(older) == make_settings()


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
    assert manifest.pending() == []


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
    assert (begun.header, begun.entries, begun.pending()) == (other, (), [0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged, not JSON"),
        ('{"format": "anchorpatch shards", "format_ver', "damaged, not JSON"),
        ("[1, 2]", "expected a manifest of anchorpatch, found other JSON"),
        ('{"name": "site", "icons": []}', "expected a manifest of anchorpatch, found other JSON"),
        ('{"format": "anchorpatch shards", "format_version": 2}', "expected format version 1"),
        ('{"format": "anchorpatch shards", "format_version": 1}', r"damaged \(no 'split'\)"),
        ("\x00\x01", "damaged, not JSON"),
    ],
)
def test_a_damaged_manifest_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match=message) as caught:
        open_manifest(tmp_path, make_header(), digest_of(["a"]))
    assert str(tmp_path / "manifest.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "manifest.json").read_text() == text


def test_bytes_that_are_no_text_are_a_damaged_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ShardError, match="damaged, not JSON"):
        read_manifest(tmp_path)


DAMAGED = [
    (field, value)
    for field in ("settings", "shards", "classes", "files_count")
    for value in (None, 5, "x", {"a": 1}, [1])
    if (field, value) != ("files_count", 5)
]


@pytest.mark.parametrize(("field", "value"), DAMAGED)
def test_fields_of_another_kind_are_a_damaged_manifest(
    tmp_path: Path, field: str, value: object
) -> None:
    open_manifest(tmp_path, make_header(), digest_of(["a"])).commit(entry(0))
    edit_manifest(tmp_path, lambda data: data.update({field: value}))
    with pytest.raises(ShardError, match="damaged"):
        read_manifest(tmp_path)


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
    with pytest.raises(ManifestMismatch, match="another run began this folder anew"):
        old.commit(entry(0))
    assert new.commit(entry(0)).entries == (entry(0),)


def test_manifests_of_earlier_versions_lack_the_checksum_and_are_read(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    edit_manifest(manifest.folder, lambda data: None)
    assert read_manifest(manifest.folder) == manifest
    manifest.commit(manifest.entries[0])
    assert b'"sha256": "' in (manifest.folder / "manifest.json").read_bytes()[-80:]


def test_forgotten_shards_are_pending(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    other = replace(manifest.entries[2], sha256="12" * 32)  # was made again meanwhile
    assert manifest.forget([manifest.entries[1], other]).entries == (
        manifest.entries[0],
        manifest.entries[2],
    )
    assert manifest.pending() == [1]
    assert manifest.shard_path(1).exists()


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


def _commit_some(folder: Path, header: ShardHeader, start: int) -> None:
    manifest = open_manifest(folder, header, digest_of([str(i) for i in range(400)]))
    for index in range(start, 40, 4):
        manifest = manifest.commit(entry(index))


def test_processes_commit_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    processes = [
        context.Process(target=_commit_some, args=(tmp_path, make_header(), start))
        for start in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    names = [e.name for e in read_manifest(tmp_path).entries]
    assert names == [f"val-{i:05d}.h5" for i in range(40)]
    assert {p.name for p in tmp_path.iterdir()} == {"manifest.json", ".manifest.lock"}
