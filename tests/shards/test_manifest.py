from __future__ import annotations

import errno
import multiprocessing
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anchorpatch.errors import ShardError
from anchorpatch.shards import manifest as manifests
from anchorpatch.shards import verify
from anchorpatch.shards.header import ShardHeader
from anchorpatch.shards.manifest import (
    Manifest,
    ShardEntry,
    read_manifest,
    split_facts,
    write_manifest,
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


def test_a_disk_that_fails_does_not_say_that_a_shard_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = make_split(tmp_path / "val")
    stat = Path.stat

    def fail(path: Path, **options: bool) -> os.stat_result:
        if path.name == "val-00001.h5":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", fail)
    assert manifest.has(0)
    for ask in (manifest.missing, lambda: manifest.has(1)):
        with pytest.raises(ShardError, match=r"val-00001.h5: cannot be looked at: Input/output"):
            ask()


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


# --- the journal of a large manifest -------------------------------------------------------------


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(manifests, "_WITH_JOURNAL", 16)
    return manifests.JOURNAL_NAME


def _begun(folder: Path, shards: int, done: int) -> Manifest:
    found = open_manifest(folder, make_header(), digest_of([str(i) for i in range(8 * shards)]))
    return write_manifest(replace(found, entries=tuple(entry(i) for i in range(done))))


def test_a_large_manifest_is_replaced_only_now_and_then(tmp_path: Path, journal: str) -> None:
    plain = _begun(tmp_path / "plain", 40, 40)
    manifest = _begun(tmp_path / "val", 40, 16)
    replaced = set()
    for index in [*range(30, 40), *range(16, 30)]:
        manifest = manifest.commit(entry(index))
        assert manifest == read_manifest(manifest.folder) == manifest.refreshed()
        assert [e.name for e in manifest.entries] == sorted(e.name for e in manifest.entries)
        replaced.add((manifest.folder / "manifest.json").stat().st_ino)
    assert manifest.entries == plain.entries
    assert len(replaced) <= 9
    names = {path.name for path in manifest.folder.iterdir()}
    assert names == {"manifest.json", ".manifest.lock"}
    whole = (plain.folder / "manifest.json").read_bytes()
    assert (manifest.folder / "manifest.json").read_bytes() == whole


def test_what_is_left_of_a_journal_counts_line_by_line(tmp_path: Path, journal: str) -> None:
    before = _begun(tmp_path, 60, 32)
    after = before.commit(entry(50)).commit(entry(40))
    path = tmp_path / journal
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 3
    for size in range(0, len(whole), 61):
        path.write_bytes(whole[:size])
        left = read_manifest(tmp_path)
        assert len(left.entries) == 32 + sum(end <= size for end in ends[1:]), size
        again = left.commit(entry(45)).commit(entry(40))
        assert again == read_manifest(tmp_path)
        assert _names(again) == _names(before) | {40, 45} | ({50} if size >= ends[1] - 1 else set())
        write_manifest(before)
    for position in range(0, len(whole), 59):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        assert _names(before) <= _names(read_manifest(tmp_path)) < _names(after)
    path.write_bytes(whole)
    assert read_manifest(tmp_path) == after


def _names(manifest: Manifest) -> set[int]:
    return {int(e.name[4:9]) for e in manifest.entries}


def test_the_journal_of_a_manifest_that_was_replaced_is_void(tmp_path: Path, journal: str) -> None:
    before = _begun(tmp_path, 60, 32)
    after = before.commit(entry(50)).commit(entry(40))
    path = tmp_path / journal
    whole = path.read_bytes()
    assert after.forget([entry(40), entry(3)]) == (found := read_manifest(tmp_path))
    assert _names(found) == _names(before) - {3} | {50}
    assert not path.exists()
    path.write_bytes(whole)  # as if the system had stopped between the two
    assert read_manifest(tmp_path) == found == after.refreshed()
    assert _names(after.commit(entry(44))) == _names(found) | {44}
    assert not [found for found in verify.verify_folder(tmp_path, 1) if "journal" in found.shard]
    assert after.folded() == read_manifest(tmp_path)
    assert not path.exists()


def test_a_manifest_that_is_replaced_while_it_is_read(
    tmp_path: Path, journal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = _begun(tmp_path, 60, 32).commit(entry(50))
    read_journal = manifests._with_journal

    def too_late(known: Manifest) -> Manifest:
        monkeypatch.setattr(manifests, "_with_journal", read_journal)
        after.folded()
        return read_journal(known)

    monkeypatch.setattr(manifests, "_with_journal", too_late)
    assert read_manifest(tmp_path) == after
    assert not (tmp_path / journal).exists()


def test_a_foreign_line_with_a_checksum_is_one_clear_line(tmp_path: Path, journal: str) -> None:
    _begun(tmp_path, 60, 32).commit(entry(50))
    with (tmp_path / journal).open("ab") as file:
        file.write(manifests._line({"name": 5}))
    with pytest.raises(ShardError, match=r"manifest\.journal: damaged .name: expected text"):
        read_manifest(tmp_path)


def _commit_all(folder: Path, log: int, start: int) -> None:
    manifest = read_manifest(folder)
    for index in range(start, 160, 4):
        if index not in _names(manifest):
            manifest = manifest.commit(entry(index))
            os.write(log, b"%d\n" % index)


def test_nothing_committed_is_lost_when_processes_are_killed(tmp_path: Path, journal: str) -> None:
    _begun(tmp_path, 160, 16)
    context = multiprocessing.get_context("fork")
    seen, reader = {*range(16)}, read_manifest(tmp_path)
    rng = random.Random(0)
    with (tmp_path / "log").open("w+b") as log:
        for _ in range(3):
            args = [(tmp_path, log.fileno(), start) for start in range(4)]
            processes = [context.Process(target=_commit_all, args=some) for some in args]
            for process in processes:
                process.start()
            until = time.monotonic() + rng.uniform(0.05, 0.15)
            while time.monotonic() < until:  # beside them, without the lock
                found = _names(read_manifest(tmp_path))
                reader = reader.refreshed()
                assert seen <= found <= (seen := _names(reader))
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            log.seek(0)
            assert {int(line) for line in log} <= _names(read_manifest(tmp_path))
            log.seek(0, os.SEEK_END)
    for start in range(4):
        _commit_all(tmp_path, os.open(os.devnull, os.O_WRONLY), start)
    assert read_manifest(tmp_path).folded().entries == tuple(entry(i) for i in range(160))
    assert not (tmp_path / journal).exists()


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
    assert document["settings"]["preset"] == "dense"
    assert document["top1"] == 1.0
