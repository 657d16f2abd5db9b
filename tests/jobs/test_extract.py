from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorpatch import storage
from anchorpatch.errors import ManifestMismatch, ShardBusy, ShardError, TooManyBadImages
from anchorpatch.images import loader
from anchorpatch.images.source import ImageSource
from anchorpatch.jobs import extract
from anchorpatch.jobs.extract_plan import ExtractConfig, files_digest
from anchorpatch.jobs.localizer import Localized, Localizer
from anchorpatch.runtime.distributed import Task
from anchorpatch.shards.header import ShardHeader
from anchorpatch.shards.manifest import Manifest, read_manifest
from anchorpatch.shards.splits import open_manifest, wait_for_shards
from anchorpatch.shards.writer import ShardWriter
from tests.shards.samples import make_header


def folder_of(names: list[int]) -> ImageSource:
    """A folder of images that nobody reads."""
    paths = np.array([b"cat/%03d.jpg" % name for name in sorted(names)])
    n = len(paths)
    return ImageSource(
        Path("data/val"), "val", paths, np.zeros(n, np.int32), np.ones(n, np.int64), ("cat",)
    )


def begin(
    out: Path, images: ImageSource, header: ShardHeader, *, overwrite: bool = False
) -> Manifest:
    files = files_digest(images, header.settings.shard_size)
    return open_manifest(out, header, files, overwrite=overwrite)


def make(out: Path, images: ImageSource, shard_size: int, *, overwrite: bool = False) -> list[str]:
    """Do what the job does with images of which none can be read; return the shards it made."""
    header = make_header(shard_size=shard_size)
    digests = files_digest(images, shard_size).shards
    manifest = begin(out, images, header, overwrite=overwrite)
    pending = manifest.refreshed().missing()
    for shard in pending:
        with ShardWriter(
            manifest.shard_path(shard), manifest.header, files_sha256=digests[shard]
        ) as writer:
            for row in manifest.shard_range(shard):
                writer.skip(images.path(row), "truncated")
            writer.close(manifest.commit)
    return [manifest.shard_path(shard).name for shard in pending]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


lists = st.lists(st.integers(0, 99), min_size=1, max_size=60, unique=True)
sizes = st.integers(1, 20)


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "fsync", lambda file: None)


@pytest.mark.usefixtures("no_sync")
@given(lists, lists, sizes, st.one_of(st.none(), sizes), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_other_list_is_refused_and_remade(
    was: list[int], now: list[int], size: int, other_size: int | None, longer: bool
) -> None:
    if longer:
        now = sorted(was) + [100 + name for name in now]  # as more of one folder, or a --limit
    new_size = other_size or size
    with tempfile.TemporaryDirectory() as name:
        out, fresh = Path(name, "out"), Path(name, "fresh")
        make(out, folder_of(was), size)
        before = contents(out)
        entries = read_manifest(out).entries
        made = make(fresh, folder_of(now), new_size)
        if contents(fresh) != before:
            with pytest.raises(ManifestMismatch) as caught:
                make(out, folder_of(now), new_size)
            message = str(caught.value)
            assert f"--shard-size was {size}, now {new_size}" in message or new_size == size
            if sorted(was) != sorted(now):
                assert f"images were {len(was)}, now {len(now)}" in message
            if new_size == size:
                assert any(word in message for word in ("added", "removed", "are new"))
            assert contents(out) == before
        remade = make(out, folder_of(now), new_size, overwrite=True)
        assert contents(out) == contents(fresh)
        # Exactly those are made again whose part of the list has changed.
        kept = {e.name for e in entries if before[e.name] == contents(fresh).get(e.name)}
        assert set(remade) == set(made) - (kept if new_size == size else set())


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it on purpose."""


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("now", [[*range(9), 20], [*range(12), 20, 21], [1, 2, 3], range(30, 42)])
def test_a_kill_amid_an_update_is_made_good_by_the_next_run(tmp_path: Path, now: list[int]) -> None:
    make(tmp_path / "fresh", folder_of(list(now)), 3)
    for kill in range(100):
        out = tmp_path / str(kill)
        make(out, folder_of(list(range(12))), 3)
        steps = 0

        def step(function: object) -> object:
            def call(*args: object, **options: object) -> object:
                nonlocal steps
                steps += 1
                if steps > kill:  # noqa: B023
                    raise Killed
                return function(*args, **options)  # type: ignore[operator]

            return call

        with (
            mock.patch.object(Path, "unlink", step(Path.unlink)),
            mock.patch.object(storage.os, "replace", step(storage.os.replace)),
        ):
            try:
                begin(out, folder_of(list(now)), make_header(shard_size=3), overwrite=True)
                survived = True
            except Killed:
                survived = False
        for entry in read_manifest(out).entries if (out / "manifest.json").exists() else ():
            assert (out / entry.name).exists()
        make(out, folder_of(list(now)), 3, overwrite=True)
        assert contents(out) == contents(tmp_path / "fresh")
        if survived:
            break
    assert survived
    assert kill > 1


def test_no_shard_no_lock_in(tmp_path: Path) -> None:
    images = folder_of([1, 2, 3])
    begin(tmp_path, images, make_header(shard_size=2))
    # Failed before its first shard.
    other = make_header(shard_size=2, iou_threshold=0.8)
    assert begin(tmp_path, images, other).header == other
    assert begin(tmp_path, folder_of([1, 2]), other).files_count == 2
    make(tmp_path, folder_of([1, 2]), 2, overwrite=True)
    with pytest.raises(ManifestMismatch, match=r"--iou-threshold was 0\.3, now 0\.8"):
        begin(tmp_path, images, other)


def test_kept_shards_keep_the_version_that_wrote_them(tmp_path: Path) -> None:
    make(tmp_path, folder_of([1, 2, 3]), 2)
    newer = replace(make_header(shard_size=2), version="99.0")
    assert begin(tmp_path, folder_of([1, 2, 3, 4]), newer, overwrite=True).header.version != "99.0"
    assert begin(tmp_path, folder_of([5, 6]), newer, overwrite=True).header.version == "99.0"


def test_a_shard_that_lacks_a_batch_is_not_kept(
    tmp_path: Path, image_folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    append, seen = extract._append, []

    def fail_once(*args: Any, **kwargs: Any) -> int:
        seen.append(0)
        if len(seen) == 2:  # the third batch is waiting then
            raise ValueError("lost")
        return append(*args, **kwargs)

    monkeypatch.setattr(extract, "_append", fail_once)
    config = ExtractConfig(
        image_folder, "val", weights, tmp_path, limit=12, batch_size=4, shard_size=12, workers=0
    )
    with pytest.raises(ValueError, match="lost"):
        extract.run(config)
    assert not list(tmp_path.glob("val/*.h5"))
    monkeypatch.undo()
    assert extract.run(config).facts.images == 12


def test_ranks_that_no_longer_write_are_not_waited_for(
    tmp_path: Path, image_folder: Path, weights: Path
):
    config = ExtractConfig(
        image_folder, "val", weights, tmp_path, limit=8, shard_size=4, workers=0, task=Task(0, 2)
    )
    extract.run(config)
    with pytest.raises(ShardError, match="1 shard missing, and no rank has written for 0 s"):
        wait_for_shards(tmp_path / "val", Task().owns, patience=0.0)
    extract.run(replace(config, task=Task(1, 2)))
    assert not wait_for_shards(tmp_path / "val", Task().owns, patience=0.0).missing()


def test_the_images_of_all_ranks_are_counted(
    tmp_path: Path, image_folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = (
        ExtractConfig(
            image_folder, "val", weights, tmp_path, limit=10, shard_size=4, workers=0, task=task
        )
        for task in (Task(0, 2), Task(1, 2))
    )

    def others_write(*args: Any) -> Manifest:
        assert extract.run(second).images_run == 4
        return wait_for_shards(*args)

    monkeypatch.setattr(extract, "wait_for_shards", others_write)
    summary = extract.run(replace(first, ranks=2))
    assert (summary.images_run, summary.facts.images, summary.complete) == (10, 10, True)
    # One rank has nothing to do, the other has.
    (tmp_path / "val" / "val-00001.h5").unlink()
    assert extract.run(replace(first, ranks=2)).images_run == 4
    assert extract.run(first).images_run == 0


def test_a_shard_that_another_process_writes_is_left_to_it(
    tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    config = ExtractConfig(image_folder, "val", weights, tmp_path, shard_size=15, workers=0)
    extract.run(replace(config, task=Task(0, 3)))
    folder = tmp_path / "val"
    with ShardWriter(folder / "val-00001.h5", make_header()) as other:
        with pytest.raises(ShardBusy, match=r"val-00001\.h5: another process is writing this"):
            extract.run(config)
        assert read_manifest(folder).missing() == [1]
        # A job of an array need not see to it.
        summary = extract.run(replace(config, task=Task(job=7)))
        assert (summary.images_run, summary.pending, summary.complete) == (0, 1, False)
        other.abort()
    assert extract.run(replace(config, task=Task(job=7))).complete


def test_unreadable_images_of_other_jobs_and_earlier_runs_count(
    tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    for i in (0, 1, 19):
        (data / f"val/cat/{i:02d}.JPEG").write_bytes(b"")
    config = ExtractConfig(
        data, "val", weights, tmp_path, shard_size=5, workers=0, max_bad=0.05, batch_size=5
    )
    # Two of forty are allowed, and this part has two of ten.
    extract.run(replace(config, max_bad=0.2, task=Task(0, 4)))
    with pytest.raises(TooManyBadImages, match=r"3 of 40 .*: 3 empty file; the last"):
        extract.run(config)


SLOW = 0.1


def slowed(function: Callable[..., Any], seconds: float = SLOW) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


class Found:
    """What the network finds, at once."""

    def __init__(self, images: int) -> None:
        self.images = images

    def result(self, name: Callable[[int], str]) -> Localized:
        n = self.images
        return Localized(
            branch_class=np.zeros((n, 3), np.int32),
            branch_prob=np.ones((n, 3), np.float32),
            predicted=np.zeros(n, np.int32),
            scale=np.full(n, 63, np.uint8),
            counts=np.ones(n, np.int32),
            corners=np.zeros((n, 24, 2), np.int16),
            scores=np.ones((n, 24), np.float32),
        )


@pytest.fixture
def instant(
    image_folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ExtractConfig:
    """Eight batches of four images each, with a network that takes no time."""
    monkeypatch.setattr(Localizer, "submit", lambda localizer, pixels: Found(len(pixels)))
    return ExtractConfig(
        *(image_folder, "val", weights, tmp_path),
        **{"limit": 32, "shard_size": 16, "batch_size": 4, "workers": 0},
    )


# Every batch is slow in one place, but for a shard's beginning and end, of which there are two.
@pytest.mark.parametrize(
    ("stage", "where", "name", "times", "workers", "advice"),
    [
        ("decoding", loader, "_load", 8, 0, "decoding: more "),
        ("decoding", loader, "_load", 8, 1, "decoding: more "),
        ("network", Localizer, "submit", 8, 0, "the network: "),
        ("network", Found, "result", 8, 1, "the network: "),
        ("writing", ShardWriter, "append", 8, 1, "writing: a faster disk for --out"),
        ("writing", ShardWriter, "close", 2, 0, "writing: a faster disk for --out"),
        ("writing", ShardWriter, "__init__", 2, 0, "writing: a faster disk for --out"),
    ],
)
def test_a_slow_stage_is_what_was_waited_for(
    instant: ExtractConfig,
    stage: str,
    where: Any,
    name: str,
    times: int,
    workers: int,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pause = 8 * SLOW / times
    monkeypatch.setattr(where, name, slowed(getattr(where, name), pause))
    summary = extract.run(replace(instant, workers=workers))
    waits = summary.to_json()["waits"]
    assert list(waits) == ["decoding", "network", "writing"]
    assert waits[stage] == max(waits.values())
    # A worker begins before it is waited for, and writing goes on while others are waited for.
    least = times - 2 if times > 2 else 0.8
    assert waits[stage] * summary.seconds > least * pause
    assert sum(waits.values()) <= 1.001
    assert summary.advice.startswith(f"limited by {advice}")


def test_two_slow_stages_share_the_time(
    instant: ExtractConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_load", slowed(loader._load))
    monkeypatch.setattr(Found, "result", slowed(Found.result))
    summary = extract.run(instant)
    waits = summary.waits
    # They overlap, but for the first batch and the last.
    assert (waits["decoding"] + waits["network"]) * summary.seconds > 0.9 * 9 * SLOW
    assert sum(waits.values()) <= 1
    # Nothing was left to do: nothing was waited for, and nothing would help.
    again = extract.run(instant)
    assert (again.waits, again.advice) == (dict.fromkeys(extract.STAGES, 0.0), "")
    assert again.to_json()["advice"] is None
