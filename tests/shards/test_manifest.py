from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anchorpatch.errors import ShardError
from anchorpatch.shards.header import ShardHeader
from anchorpatch.shards.manifest import (
    ShardEntry,
    read_manifest,
    split_facts,
)
from anchorpatch.shards.splits import open_manifest
from anchorpatch.storage import from_json, to_json
from tests.jobs.patch_shards import Drawn, classes_of, write_shards
from tests.shards.samples import (
    digest_of,
    edit_manifest,
    entry,
    make_header,
    make_split,
)


def test_entries_and_header_survive_the_file(tmp_path: Path) -> None:
    header = make_header()
    begun = open_manifest(tmp_path, header, digest_of([f"{i}" for i in range(20)]))
    after = begun.commit(entry(1)).commit(entry(0))
    assert after.entries == (entry(0), entry(1))
    again = read_manifest(tmp_path)
    assert again == after
    assert (again.header, again.files_count, again.shard_count) == (header, 20, 3)
    assert [again.shard_range(i) for i in range(3)] == [range(8), range(8, 16), range(16, 20)]


def test_entries_without_damaged_images_stay_readable() -> None:
    document = to_json(entry(0, damaged=("cat/1.jpg",)))
    assert from_json(ShardEntry, document) == entry(0, damaged=("cat/1.jpg",))
    del document["damaged"]
    assert from_json(ShardEntry, document) == entry(0)


def test_the_file_has_one_line_a_shard(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    lines = (tmp_path / "val" / "manifest.json").read_text().splitlines()
    assert sum('"name": "val-0' in line for line in lines) == 3
    assert len(lines) == 19
    assert manifest.refreshed().missing() == []


def test_pending_are_shards_without_entry_or_of_another_size(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=4)
    assert manifest.refreshed().missing() == []
    manifest.shard_path(0).unlink()
    with manifest.shard_path(2).open("ab") as file:
        file.write(b"x")
    assert manifest.refreshed().missing() == [0, 2]
    # A run that was killed between the shard and its entry.
    edit_manifest(manifest.folder, lambda data: data["shards"].pop(3))
    assert manifest.shard_path(3).exists()
    assert manifest.refreshed().missing() == [0, 2, 3]


def test_an_entry_replaces_the_older_one(tmp_path: Path) -> None:
    manifest = open_manifest(tmp_path, make_header(), digest_of(["a"]))
    manifest.commit(entry(0))
    assert manifest.commit(entry(0, images=2)).entries == (entry(0, images=2),)


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
    assert manifest.refreshed().missing() == [1]
    assert manifest.shard_path(1).exists()


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


def test_facts_are_the_sums_over_what_was_written(tmp_path: Path) -> None:
    manifest, batches = make_split(tmp_path / "val", store_images=True)
    facts = split_facts(manifest)
    scale = np.concatenate([batch.scale for batch in batches])
    counts = np.concatenate([batch.counts for batch in batches])
    for theta, found in facts.scales.items():
        assert found["images"] == int((scale == theta).sum())
        assert found["patches"] == int(counts[scale == theta].sum())
    assert (facts.images, facts.shards, facts.total_shards) == (21, 3, 3)
    assert facts.bytes == sum(path.stat().st_size for path in tmp_path.glob("val/*.h5"))
    # The network knows a class more than there are folders.
    assert (facts.same_classes, facts.top1) == (False, None)

    next(tmp_path.glob("val/*.h5")).unlink()
    assert split_facts(read_manifest(tmp_path / "val")).shards == 2


def test_accuracy_has_a_meaning_where_the_classes_are_the_same(tmp_path: Path) -> None:
    images = [Drawn(scale, 0, [[1, 0]]) for scale in (63, 63, 95)]
    folder = write_shards(tmp_path / "val", images, classes_of(2))
    facts = split_facts(read_manifest(folder))
    assert (facts.same_classes, facts.top1) == (True, 1.0)
    document = to_json(facts)
    assert document["scales"]["63"] == {"images": 2, "patches": 2}
    assert document["settings"]["preset"] == "evaluate"
    assert document["top1"] == 1.0
