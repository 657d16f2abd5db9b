from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anchorpatch.errors import ShardError, StorageError
from anchorpatch.settings import CODECS, SCALES
from anchorpatch.shards import layout
from anchorpatch.shards.header import ShardHeader
from anchorpatch.shards.layout import cut_patches
from anchorpatch.shards.writer import PatchBatch, ShardWriter
from tests.shards.samples import (
    make_batch,
    make_header,
    make_settings,
    make_split,
    split_batch,
)


def write(path: Path, batches: list[PatchBatch], header: ShardHeader | None = None) -> Path:
    with ShardWriter(path, header or make_header(), files_sha256="cd" * 32) as writer:
        for batch in batches:
            writer.append(batch)
        writer.skip("dog/z.jpg", "truncated")
        writer.skip("cat/a.jpg", "empty file")
    assert writer.entry.bytes == path.stat().st_size
    assert writer.entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return path


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("store_images", [False, True])
def test_plain_h5py_reads_back_what_was_appended(
    tmp_path: Path, codec: str, store_images: bool
) -> None:
    batch = make_batch(9)
    header = make_header(codec=codec, store_images=store_images)
    path = write(tmp_path / "val" / "val-00000.h5", list(split_batch(batch, [4, 5])), header)
    with h5py.File(path, "r") as file:
        for name in ("path", "label", "predicted", "scale", "branch_class", "branch_prob", "size"):
            np.testing.assert_array_equal(file[f"images/{name}"][:], getattr(batch, name))
        np.testing.assert_array_equal(file["images/count"][:], batch.counts)
        seen = dict.fromkeys(SCALES, 0)
        for i in range(9):
            scale, count = int(batch.scale[i]), int(batch.counts[i])
            first = int(file["images/first"][i])
            assert first == seen[scale]  # restarts per scale, image-major
            seen[scale] += count
            group = file[f"patches/{scale}"]
            for k in range(count):
                y, x = batch.corners[i, k]
                assert group["corner"][first + k].tolist() == [y, x]
                assert group["score"][first + k] == batch.scores[i, k]
                assert group["image"][first + k] == i
                if codec == "raw":
                    expected = batch.pixels[i, y : y + scale, x : x + scale]
                    np.testing.assert_array_equal(group["pixels"][first + k], expected)
        for scale in SCALES:
            assert file[f"patches/{scale}/corner"].shape == (seen[scale], 2)
            assert ("pixels" in file[f"patches/{scale}"]) == (codec == "raw")
        assert ("pixels" in file["images"]) == (store_images or codec == "image")
        if "pixels" in file["images"]:
            np.testing.assert_array_equal(file["images/pixels"][:], batch.pixels)
        assert file["skipped/path"][:].tolist() == [b"cat/a.jpg", b"dog/z.jpg"]
        assert file["skipped/reason"][:].tolist() == [b"empty file", b"truncated"]
        assert layout.read_attributes(file) == (header, "cd" * 32)
        assert file.attrs["classes"].tolist() == [b"cat", b"dog", b"hen", b"owl"]


def test_every_dataset_is_contiguous_and_uncompressed(tmp_path: Path) -> None:
    path = write(tmp_path / "val-00000.h5", [make_batch(3)], make_header(store_images=True))
    kinds = []
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: kinds.append(item) if "/" in name else None)
        datasets = [item for item in kinds if isinstance(item, h5py.Dataset)]
        assert len(datasets) == 9 + 1 + 2 + 3 * 4
        for dataset in datasets:
            assert dataset.chunks is None
            assert dataset.compression is None
            assert h5py.check_string_dtype(dataset.dtype) is None or (
                h5py.check_string_dtype(dataset.dtype).length is not None
            )


def test_jpeg_blobs_are_those_of_the_patches(tmp_path: Path) -> None:
    batch = make_batch(4)
    header = make_header(codec="jpeg", jpeg_quality=80)
    path = write(tmp_path / "val-00000.h5", [batch], header)
    with h5py.File(path, "r") as file:
        for i in range(4):
            scale, first = int(batch.scale[i]), int(file["images/first"][i])
            group = file[f"patches/{scale}"]
            start, stop = group["offset"][first], group["offset"][first + 1]
            blob = group["blob"][start:stop].tobytes()
            y, x = batch.corners[i, 0]
            crop = Image.fromarray(batch.pixels[i, y : y + scale, x : x + scale])
            oracle = tmp_path / "oracle.jpg"
            crop.save(oracle, quality=80, subsampling="4:2:0")
            assert blob == oracle.read_bytes()


@pytest.mark.parametrize("codec", CODECS)
def test_same_input_gives_the_same_bytes(tmp_path: Path, codec: str) -> None:
    header = make_header(codec=codec)
    batch = make_batch(12)
    first = write(tmp_path / "a" / "val-00000.h5", [batch], header)
    time.sleep(1.1)  # a time of day in the file would differ now
    others = [
        write(tmp_path / str(sizes) / "val-00000.h5", list(split_batch(batch, sizes)), header)
        for sizes in ([6, 6], [1] * 12, [0, 11, 1])
    ]
    assert {path.read_bytes() for path in others} == {first.read_bytes()}


def test_crops_may_wait_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = make_split(tmp_path / "a" / "val", shards=1)  # of codec raw
    monkeypatch.setenv("ANCHORPATCH_SPOOL", str(tmp_path / "disk"))
    with pytest.raises(StorageError, match=f"{tmp_path}/disk/val-00000.h5: cannot write: No such"):
        make_split(tmp_path / "b" / "val", shards=1)
    (tmp_path / "disk").mkdir()
    second, _ = make_split(tmp_path / "b" / "val", shards=1)
    assert second.entries == first.entries
    assert not list((tmp_path / "disk").iterdir())


def test_an_empty_shard_is_legal(tmp_path: Path) -> None:
    path = write(tmp_path / "val-00000.h5", [])
    with h5py.File(path, "r") as file:
        assert file["images/path"].shape == (0,)
        assert file["patches/63/pixels"].shape == (0, 63, 63, 3)


def test_a_list_of_21000_classes_fits(tmp_path: Path) -> None:
    names = tuple(f"n{i:08d} ein längerer Klassenname" for i in range(21_000))
    header = ShardHeader("val", names, names[::-1], make_settings(), "ab" * 32)
    path = write(tmp_path / "val-00000.h5", [make_batch(2)], header)
    with h5py.File(path, "r") as file:
        assert layout.read_attributes(file)[0] == header


def test_file_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    batch = make_batch(1)._replace(path=np.array([b"cat/\xff\xfe.jpg"]))
    with h5py.File(write(tmp_path / "val-00000.h5", [batch]), "r") as file:
        assert layout.decode_text(file["images/path"][0]) == "cat/\udcff\udcfe.jpg"
        assert layout.encode_text(["cat/\udcff\udcfe.jpg"])[0] == b"cat/\xff\xfe.jpg"


def test_a_failing_block_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.h5", make_header())
    with contextlib.suppress(RuntimeError), writer:
        writer.append(make_batch(3))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        writer.append(make_batch(3))


def test_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    clean = write(tmp_path / "clean" / "val-00000.h5", [make_batch(3)])
    (tmp_path / "val-00000.h5.lock").touch()
    (tmp_path / "val-00000.h5").write_bytes(b"an older shard without an entry")
    again = write(tmp_path / "val-00000.h5", [make_batch(3)])
    assert again.read_bytes() == clean.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "val-00000.h5"]


def test_two_writers_of_one_shard_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "val-00000.h5"
    with ShardWriter(path, make_header()) as writer:
        with pytest.raises(ShardError, match="another process is writing this shard"):
            ShardWriter(path, make_header())
        writer.append(make_batch(2))
    assert path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": np.zeros(2, np.int32)}, "expected 3 rows"),
        ({"scale": np.array([63, 64, 95], np.uint8)}, "expected scales"),
        ({"counts": np.array([1, 9, 1], np.int32)}, "expected 0 to 5 patches"),
        ({"pixels": np.zeros((3, 64, 64, 3), np.uint8)}, "expected crops"),
        ({"pixels": np.zeros((3, 224, 224, 3), np.float32)}, "expected crops"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(
    tmp_path: Path, change: dict, message: str
) -> None:
    writer = ShardWriter(tmp_path / "a.h5", make_header())
    with pytest.raises(ValueError, match=message):
        writer.append(make_batch(3)._replace(**change))
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", CODECS)
def test_a_patch_outside_its_crop_is_refused(tmp_path: Path, codec: str) -> None:
    batch = make_batch(1)
    batch.corners[0, 0] = (0, 224 - int(batch.scale[0]) + 1)
    with (
        pytest.raises(IndexError, match="reaches outside"),
        ShardWriter(tmp_path / "a.h5", make_header(codec=codec)) as writer,
    ):
        writer.append(batch)
    assert list(tmp_path.iterdir()) == []


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_cutting_equals_slicing(data: st.DataObject) -> None:
    theta = data.draw(st.integers(1, 12))
    height, width = (data.draw(st.integers(theta, 20)) for _ in range(2))
    n, m = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    crops = rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    image = rng.integers(0, n, m)
    corner = np.stack(
        [rng.integers(0, height - theta + 1, m), rng.integers(0, width - theta + 1, m)], 1
    )
    cut = cut_patches(crops, image, corner, theta)
    assert cut.shape == (m, theta, theta, 3)
    assert cut.flags.c_contiguous
    for k in range(m):
        y, x = corner[k]
        np.testing.assert_array_equal(cut[k], crops[image[k], y : y + theta, x : x + theta])


@pytest.mark.parametrize("corner", [(-1, 0), (0, -1), (9, 0), (0, 9)])
def test_cutting_outside_is_refused(corner: tuple[int, int]) -> None:
    crops = np.zeros((2, 12, 12, 3), np.uint8)
    with pytest.raises(IndexError, match="reaches outside"):
        cut_patches(crops, np.array([1]), np.array([corner]), 4)
    with pytest.raises(IndexError, match="reaches outside"):
        cut_patches(crops, np.array([2]), np.array([(0, 0)]), 4)
