from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from anchorpatch.errors import CorruptShard, SettingsError, ShardError
from anchorpatch.geometry import source_box
from anchorpatch.settings import CODECS, SCALES
from anchorpatch.shards import PatchDataset, ShardReader
from anchorpatch.shards.manifest import FilesDigest
from anchorpatch.shards.reader import _mapped
from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.verify import verify_folder
from tests.shards.samples import CLASSES, edit_manifest, make_header, make_split


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shards")
    for codec in CODECS:
        make_split(root / codec / "val", codec=codec)
    return {codec: root / codec / "val" for codec in CODECS}


def plain_patches(folder: Path, scale: int) -> np.ndarray:
    """All patches of a scale by h5py alone, cut from the image where it has only that."""
    found = [np.empty((0, scale, scale, 3), np.uint8)]
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path, "r") as file:
            group = file[f"patches/{scale}"]
            if "pixels" in group:
                found.append(group["pixels"][:])
                continue
            crops = file["images/pixels"][:]
            for row, (y, x) in zip(group["image"][:], group["corner"][:], strict=True):
                found.append(crops[row, y : y + scale, x : x + scale][None])
    return np.concatenate(found)


def plain_table(folder: Path, name: str) -> np.ndarray:
    parts = []
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path, "r") as file:
            parts.append(file[name][:])
    return np.concatenate(parts)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
def test_gather_equals_h5py(splits: dict[str, Path], data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(["raw", "image"]))
    scale = data.draw(st.sampled_from(SCALES))
    reader = ShardReader(splits[codec])
    oracle = plain_patches(splits["raw"], scale)
    assert reader.patch_count(scale) == len(oracle) > 0
    rows = data.draw(st.lists(st.integers(0, len(oracle) - 1), max_size=40))
    got = reader.patches(scale, rows)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, oracle[np.array(rows, int)])
    for name, method in (("corner", reader.corners), ("score", reader.scores)):
        table = plain_table(splits[codec], f"patches/{scale}/{name}")
        np.testing.assert_array_equal(method(scale, rows), table[np.array(rows, int)])


@pytest.mark.parametrize("codec", CODECS)
def test_tables_run_over_all_shards(splits: dict[str, Path], codec: str) -> None:
    reader = ShardReader(splits[codec])
    assert len(reader) == 21
    assert reader.classes == CLASSES
    assert reader.network_classes == (*CLASSES, "elk")
    assert reader.settings.codec == codec
    for name in ("path", "label", "predicted", "scale", "branch_class", "branch_prob", "size"):
        assert name in dir(reader)
        column = getattr(reader, name)
        np.testing.assert_array_equal(column, plain_table(splits[codec], f"images/{name}"))
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0
    np.testing.assert_array_equal(reader.counts, plain_table(splits[codec], "images/count"))
    with pytest.raises(AttributeError, match="no attribute 'labels'"):
        _ = reader.labels


@pytest.mark.parametrize("codec", CODECS)
def test_image_patches_are_those_of_the_batch(tmp_path: Path, codec: str) -> None:
    _, batches = make_split(tmp_path / "val", codec=codec, store_images=True)
    reader = ShardReader(tmp_path / "val")
    i = 0
    for batch in batches:
        for row in range(len(batch.path)):
            got = reader.image_patches(i)
            count, scale = int(batch.counts[row]), int(batch.scale[row])
            assert got.scale == scale
            np.testing.assert_array_equal(got.corners, batch.corners[row, :count])
            np.testing.assert_array_equal(got.scores, batch.scores[row, :count])
            np.testing.assert_array_equal(reader.image(i), batch.pixels[row])
            rows = np.arange(reader.first[i], reader.first[i] + count)
            assert reader.patch_image(scale, rows).tolist() == [i] * count
            for k, (y, x) in enumerate(batch.corners[row, :count]):
                original = batch.pixels[row, y : y + scale, x : x + scale]
                if codec == "jpeg":  # noise is the hardest there is for JPEG
                    assert abs(got.pixels[k].mean() - original.mean()) < 3
                    assert np.corrcoef(got.pixels[k].ravel(), original.ravel())[0, 1] > 0.6
                else:
                    np.testing.assert_array_equal(got.pixels[k], original)
            i += 1
    assert i == len(reader)


@pytest.mark.parametrize("side", [111, 225, 256])
@pytest.mark.parametrize("codec", CODECS)
def test_crops_of_other_sizes(tmp_path: Path, codec: str, side: int) -> None:
    """Patches are cut from them, boxes are of their transform, and others are errors."""
    crop = {"img_size": side, "crop_mode": "border", "crop_pct": 0.9}
    manifest, batches = make_split(tmp_path / "val", codec=codec, **crop)
    assert not verify_folder(manifest.folder, jobs=1)
    reader, settings = ShardReader(manifest.folder), manifest.header.settings
    for i, (scale, label) in enumerate(zip(reader.scale.tolist(), reader.label, strict=True)):
        batch, k = batches[i // 8], i % 8
        found, n = reader.image_patches(i), batch.counts[k]
        assert label == batch.label[k]
        np.testing.assert_array_equal(found.corners, batch.corners[k, :n])
        for patch, (y, x) in zip(found.pixels, found.corners, strict=True):
            cut = batch.pixels[k, y : y + scale, x : x + scale]
            assert patch.shape == cut.shape
            if codec != "jpeg":
                np.testing.assert_array_equal(patch, cut)
        rows = np.arange(reader.first[i], reader.first[i] + n)
        expected = source_box(batch.size[k], batch.corners[k, :n], scale, settings.crop)
        np.testing.assert_array_equal(reader.source_box(scale, rows), expected)
    assert reader.source_box(63, []).shape == (0, 4)
    with pytest.raises(ValueError, match=rf"expected crops uint8 \(n, {side}, {side}, 3\)"):
        make_split(tmp_path / "other", codec=codec, **crop, crops=224)


def test_jpeg_patches_are_what_pillow_decodes(splits: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    reader = ShardReader(splits["jpeg"])
    with h5py.File(splits["jpeg"] / "val-00000.h5", "r") as file:
        group = file["patches/63"]
        for row in range(len(group["image"])):
            blob = group["blob"][group["offset"][row] : group["offset"][row + 1]]
            (tmp_path / "patch.jpg").write_bytes(blob.tobytes())
            with Image.open(tmp_path / "patch.jpg") as image:
                np.testing.assert_array_equal(reader.patches(63, [row])[0], np.asarray(image))


@pytest.mark.parametrize("rows", [[-1], [10**6], [0.5], [[0, 1]]])
def test_rows_that_are_not_there_are_refused(splits: dict[str, Path], rows: list) -> None:
    with pytest.raises(IndexError):
        ShardReader(splits["raw"]).patches(63, rows)


def test_images_that_are_not_stored_are_an_error(splits: dict[str, Path]) -> None:
    with pytest.raises(ShardError, match="images are not stored"):
        ShardReader(splits["raw"]).image(0)


def test_a_reader_can_be_pickled_after_use(splits: dict[str, Path]) -> None:
    reader = ShardReader(splits["raw"])
    before = reader.patches(63, [3, 0])
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy.patches(63, [3, 0]), before)
    np.testing.assert_array_equal(copy.label, reader.label)


@pytest.mark.parametrize("codec", CODECS)
def test_threads_may_share_a_reader(splits: dict[str, Path], codec: str) -> None:
    reader = ShardReader(splits[codec])
    reader._map = lru_cache(1)(_mapped)  # maps come and go all the time
    count = reader.patch_count(63)
    oracle = ShardReader(splits[codec]).patches(63, range(count))
    start = threading.Barrier(4)

    def work(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        start.wait()
        return all(
            np.array_equal(reader.patches(63, rows), oracle[rows])
            for rows in rng.integers(0, count, (30, 8))
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_maps_are_given_up_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (40, 40))
    make_split(tmp_path / "val")
    reader = ShardReader(tmp_path / "val")
    assert reader._map.cache_parameters()["maxsize"] == 20
    views = []
    for i in range(25):
        path = tmp_path / str(i)
        path.write_bytes(bytes([i]) * 5000)
        views.append(reader._map(path))
    assert reader._map.cache_info().currsize == 20
    assert [int(view.sum()) for view in views] == [5000 * i for i in range(25)]


def test_no_file_stays_open_but_the_maps(splits: dict[str, Path]) -> None:
    reader = ShardReader(splits["raw"])
    assert len(reader.label) == 21
    opened = (
        [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{fd}")
        ]
        if os.path.isdir("/proc/self/fd")
        else []
    )
    assert not [name for name in opened if name.startswith(str(splits["raw"]))]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("workers", [0, 2])
def test_dataset_in_a_dataloader(splits: dict[str, Path], codec: str, workers: int) -> None:
    dataset = PatchDataset(splits[codec], 63)
    pixel, label = dataset[1]
    assert pixel.shape == (63, 63, 3)
    assert pixel.dtype == torch.uint8
    assert label == dataset.labels[1]
    dataset.reader.patches(63, [0])  # maps exist before the workers are forked
    loader = DataLoader(dataset, batch_size=4, num_workers=workers, shuffle=False)
    pixels, labels = zip(*loader, strict=True)
    rows = np.arange(len(dataset))
    np.testing.assert_array_equal(torch.cat(pixels).numpy(), dataset.reader.patches(63, rows))
    image = dataset.reader.patch_image(63, rows)
    assert torch.cat(labels).tolist() == dataset.reader.label[image].tolist()


def test_a_scale_that_is_none(splits: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match="scale: expected one of"):
        PatchDataset(splits["raw"], 64)


def test_reading_does_not_import_torch() -> None:
    code = "import sys; from anchorpatch.shards import ShardReader; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_an_empty_split(tmp_path: Path) -> None:
    open_manifest(tmp_path, make_header(), FilesDigest(0, "0" * 64, ()))
    reader = ShardReader(tmp_path)
    assert len(reader) == len(reader.path) == reader.patch_count(95) == 0
    assert reader.patches(95, []).shape == (0, 95, 95, 3)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    manifest.shard_path(1).unlink()
    with pytest.raises(CorruptShard, match=r"val-00001\.h5: missing"):
        ShardReader(tmp_path / "val")


def test_shards_that_are_not_made_yet(tmp_path: Path) -> None:
    header = make_header(shard_size=8)
    manifest, _ = make_split(tmp_path / "val", shards=1, last=8)
    edit_manifest(manifest.folder, lambda data: data.update(files_count=30))
    with pytest.raises(ShardError, match=r"3 of 4 shards are missing \(first val-00001.h5\)"):
        ShardReader(manifest.folder)
    reader = ShardReader(manifest.folder, partial=True)
    assert len(reader) == 8
    assert reader.header == header


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "expected .* bytes, found"),
        (lambda data: b"\0" * len(data), "expected a shard, cannot be read"),
        (lambda data: data[:8] + b"\xff" * 100 + data[108:], "expected a shard, cannot be read"),
        (lambda data: data.replace(b"format_version", b"format_versixn"), "cannot be read|another"),
    ],
)
def test_damaged_shards_are_one_clear_line(
    tmp_path: Path, codec: str, damage: object, message: str
) -> None:
    manifest, _ = make_split(tmp_path / "val", codec=codec)
    path = manifest.shard_path(0)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ShardError, match=message) as caught:
        ShardReader(tmp_path / "val").patches(63, [0])
    assert "val-00000.h5" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_format_version(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    with h5py.File(manifest.shard_path(0), "r+") as file:
        file.attrs.modify("format_version", 2)
    with pytest.raises(ShardError, match="expected format version 1, found 2"):
        ShardReader(tmp_path / "val").patches(63, [0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"codec": "raw"}', "val-00000.h5: settings: expected exactly the fields of format 1"),
        ("{", "val-00000.h5: expected a shard, cannot be read"),
    ],
)
def test_settings_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    manifest, _ = make_split(tmp_path / "val")
    path = manifest.shard_path(0)
    with h5py.File(path, "r+") as file:
        length = len(file.attrs["settings"])
        file.attrs.modify("settings", np.bytes_(text.ljust(length)))
    entry = replace(manifest.entries[0], bytes=path.stat().st_size)
    manifest.commit(entry)
    with pytest.raises(ShardError, match=message):
        ShardReader(tmp_path / "val").patches(63, [0])


def test_a_pickled_reader_is_small(tmp_path: Path) -> None:
    """Workers get their own copy: it must not grow with the classes of every shard."""
    make_split(tmp_path / "val", shards=6, per_shard=2, last=2)
    reader = ShardReader(tmp_path / "val")
    reader.patches(63, range(reader.patch_count(63)))
    assert len(pickle.dumps(reader)) < 20_000
