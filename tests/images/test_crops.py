from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anchorpatch import storage
from anchorpatch.errors import DataError
from anchorpatch.images.crops import (
    SHORT_SIDE,
    RandomCrop,
    build_cache,
    epoch_order,
    load_training_batches,
    open_cache,
    random_box,
    random_crop,
)
from anchorpatch.images.decode import Picture, decode_picture
from anchorpatch.images.source import ImageSource, open_source
from tests.conftest import draw_photo
from tests.oddities import encoded, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """Nine pictures of two classes; row 4 is no image."""
    data = tmp_path_factory.mktemp("training")
    for name, n in (("a", 5), ("b", 4)):
        (data / "train" / name).mkdir(parents=True)
        for i in range(n):
            photo = draw_photo(i, (200 + 40 * i, 300 - 20 * i))
            photo.save(data / "train" / name / f"{i}.png")
    (data / "train" / "a" / "4.png").write_bytes(b"no image")
    return open_source(data, "train")


@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    min_area=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_boxes_lie_in_the_picture(width: int, height: int, min_area: float, seed: int):
    rng = np.random.default_rng(seed)
    left, top, right, bottom = random_box(rng, width, height, RandomCrop(min_area=min_area))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_boxes_have_the_area_and_aspect_that_were_asked_for():
    crop = RandomCrop(min_area=0.2, aspect=(0.5, 2.0))
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(rng, 500, 400, crop) for _ in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = w * h / (500 * 400), w / h
    assert 0.19 < area.min() < 0.22
    assert area.max() > 0.9
    assert 0.48 < aspect.min() < 0.6
    assert 1.7 < aspect.max() < 2.1
    assert abs(np.median(boxes[:, 0] + boxes[:, 2]) / 2 - 250) < 10


def test_an_extreme_picture_falls_back_to_its_middle():
    box = random_box(np.random.default_rng(0), 1000, 10, RandomCrop(min_area=1.0))
    assert box == (493, 0, 506, 10)


@settings(max_examples=20, deadline=None)
@given(epoch=st.integers(0, 50), row=st.integers(0, 1000))
def test_a_crop_is_the_resized_box_or_its_mirror(epoch: int, row: int):
    picture = draw_photo(3, (180, 150))
    crop = RandomCrop(size=120, seed=7)
    plain = random_crop(picture, RandomCrop(size=120, flip=False, seed=7), epoch, row)
    flipped = random_crop(picture, crop, epoch, row)
    assert np.array_equal(flipped, plain) or np.array_equal(flipped, plain[:, ::-1])
    # The oracle: cut first, resize then. Only pixels at the border may see beyond the box.
    box = random_box(np.random.default_rng((7, epoch, row)), 180, 150, crop)
    slow = np.asarray(picture.crop(box).resize((120, 120), Image.Resampling.BILINEAR))
    difference = np.abs(slow.astype(int) - plain.astype(int))[4:-4, 4:-4]
    assert difference.max() <= 1


def test_half_of_the_crops_are_mirrored():
    picture = draw_photo(3, (130, 130))
    crops = [RandomCrop(size=120, flip=flip) for flip in (True, False)]
    same = [
        np.array_equal(*(random_crop(picture, crop, 0, row) for crop in crops))
        for row in range(300)
    ]
    assert 110 < sum(same) < 190


def test_order_is_a_permutation_of_its_own_for_each_epoch_and_seed():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 4
    assert tuple(epoch_order(50, 1, 1)) == orders[3]


def _plan() -> list[tuple[int, np.ndarray]]:
    return [(epoch, rows) for epoch in (0, 1) for rows in np.split(epoch_order(9, 0, epoch), 3)]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers(folder: ImageSource, workers: int):
    crop = RandomCrop(size=64)
    expected = list(load_training_batches(folder, _plan(), crop, workers=0))
    found = list(load_training_batches(folder, _plan(), crop, workers=workers))
    assert len(expected) == len(found) == 6
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[1], b[1])
        assert a[0].tolist() == b[0].tolist()
        assert a[3] == b[3]


def test_batches_hold_the_crops_of_their_rows_and_name_the_bad(folder: ImageSource):
    crop, bad = RandomCrop(size=64), []
    for (epoch, rows), batch in zip(
        _plan(), load_training_batches(folder, _plan(), crop, workers=0), strict=True
    ):
        found, pixels = batch.index, batch.pixels
        bad += batch.bad
        assert found.tolist() == [row for row in rows if row != 4]
        for row, image in zip(found, pixels, strict=True):
            picture = decode_picture((folder.root / folder.path(int(row))).read_bytes()).image
            assert np.array_equal(image.numpy(), random_crop(picture, crop, epoch, int(row)))
    assert bad == [(4, "not an image")] * 2


def test_a_plan_may_begin_anywhere(folder: ImageSource):
    crop = RandomCrop(size=64)
    whole = [b[1] for b in load_training_batches(folder, _plan(), crop, workers=0)]
    rest = [b[1] for b in load_training_batches(folder, _plan()[4:], crop, workers=0)]
    assert [torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True)] == [True, True]


def test_the_cache_holds_the_pictures(folder: ImageSource, tmp_path: Path):
    cache = build_cache(folder, tmp_path / "cache", 2)
    assert cache.bad == {4: "not an image"}
    for row in range(9):
        if row == 4:
            continue
        picture = decode_picture((folder.root / folder.path(row)).read_bytes()).image
        short = min(picture.size)
        if short > SHORT_SIDE:
            size = tuple(round(side * SHORT_SIDE / short) for side in picture.size)
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        assert np.array_equal(np.asarray(cache[row].image), np.asarray(picture.convert("RGB")))


def test_batches_from_the_cache_name_the_bad_too(folder: ImageSource, tmp_path: Path):
    cache = build_cache(folder, tmp_path / "cache", 1)
    batches = list(
        load_training_batches(folder, _plan(), RandomCrop(size=64), workers=0, cache=cache)
    )
    assert [item for batch in batches for item in batch[3]] == [(4, "not an image")] * 2
    assert sum(len(batch[0]) for batch in batches) == 16


def test_the_cache_is_made_once_for_each_set_of_files(
    folder: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build_cache(folder, tmp_path, 1)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert [name.rpartition(".")[2] for name in made] == ["lock", "json", "pixels"]
    decoded = []

    def count(data: bytes, background: str) -> Picture:
        decoded.append(data)
        return decode_picture(data, background)

    monkeypatch.setattr("anchorpatch.images.crops.decode_picture", count)
    build_cache(folder, tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    assert decoded == [b"no image"]
    build_cache(folder.limited(3), tmp_path, 1)
    assert len(decoded) == 4


def test_a_cut_off_cache_is_refused(folder: ImageSource, tmp_path: Path):
    cache = build_cache(folder, tmp_path, 1)
    cache.file.write_bytes(cache.file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"\.pixels: expected \d+ bytes"):
        build_cache(folder, tmp_path, 1)


def _with_bad_files(data: Path) -> dict[str, bytes]:
    """Damage two files of a copy of a folder, and return what they held."""
    good = {}
    for name in ("a/1.png", "b/3.png"):
        path = data / "train" / name
        good[name] = path.read_bytes()
        path.write_bytes(bytes(len(good[name])))
    return good


def test_restored_files_of_the_same_size_get_into_the_cache(folder: ImageSource, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(folder.root.parent, data)
    copied = open_source(data, "train")
    undisturbed = build_cache(copied, tmp_path / "undisturbed", 1)
    good = _with_bad_files(data)
    cache = build_cache(copied, tmp_path / "cache", 1)
    assert cache.bad == {1: "not an image", 4: "not an image", 8: "not an image"}
    for name in reversed(good):  # one at a time, each by a run of its own
        (data / "train" / name).write_bytes(good[name])
        build_cache(copied, tmp_path / "cache", 2)
    restored = open_cache(copied, tmp_path / "cache")
    assert restored.bad == undisturbed.bad == {4: "not an image"}
    for row in range(9):
        if row != 4:
            assert np.array_equal(restored[row].image, undisturbed[row].image)
        if row not in (1, 4, 8):  # a run that had it open goes on with what it knows
            assert np.array_equal(cache[row].image, undisturbed[row].image)
    crop = RandomCrop(size=64)
    ours, theirs = (
        load_training_batches(copied, _plan(), crop, workers=0, cache=c)
        for c in (restored, undisturbed)
    )
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))


def test_a_disk_that_falters_is_not_written_into_the_cache(
    folder: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read, faltering = os.open, True

    def fail(path: str, *arguments: int, **options: int) -> int:
        if faltering and os.fsdecode(path).endswith("b/2.png"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return read(path, *arguments, **options)

    monkeypatch.setattr(storage, "_PAUSES", (0.0,))
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(DataError, match=r"b/2\.png: cannot be read: Stale file handle"):
        build_cache(folder, tmp_path, 2)
    assert not [path for path in tmp_path.iterdir() if path.name != ".lock"]
    faltering = False
    assert build_cache(folder, tmp_path, 2).bad == {4: "not an image"}


def test_damage_is_known_from_files_and_from_the_cache(tmp_path: Path):
    data = encoded(picture(300, 300), "JPEG")
    start = data.index(b"\xff\xda") + 200
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.jpg").write_bytes(data)
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(data[:start] + data[start + 40 :])
    folder = open_source(tmp_path, "train")
    plan = [(0, np.array([1, 0]))]
    for cache in (None, build_cache(folder, tmp_path / "cache", 1)):
        crop = RandomCrop(size=64)
        (batch,) = load_training_batches(folder, plan, crop, workers=0, cache=cache)
        assert (batch.index.tolist(), batch.damaged) == ([1, 0], [1])


@pytest.mark.parametrize("height", [300, 400])
def test_a_damaged_picture_restored_at_the_same_size_gets_into_the_cache(
    tmp_path: Path, height: int
):
    data = encoded(picture(300, 300), "JPEG")
    start = data.index(b"\xff\xda") + 200
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name in ("0", "1", "2"):
        path = tmp_path / "train" / "a" / f"{name}.jpg"
        path.write_bytes(data[:start] + bytes(40) + data[start + 40 :])
    folder = open_source(tmp_path, "train")
    before = build_cache(folder, tmp_path / "cache", 1)
    assert before.damaged == {0, 1, 2}
    # Another picture of as many bytes: what stands behind its end says nothing.
    restored = encoded(picture(300, height), "JPEG", quality=50)
    assert len(restored) <= len(data)
    path.with_name("1.jpg").write_bytes(restored.ljust(len(data), b"\0"))
    after = build_cache(folder, tmp_path / "cache", 1)
    assert after.damaged == {0, 2}
    for row in range(3):
        intact = decode_picture((folder.root / folder.path(row)).read_bytes()).image
        shape = tuple(round(side * SHORT_SIDE / min(intact.size)) for side in intact.size)
        shrunk = intact.resize(shape, Image.Resampling.BILINEAR)
        assert np.array_equal(after[row].image, shrunk)


@pytest.mark.parametrize("cached", [False, True])
def test_crops_show_the_background(tmp_path: Path, cached: bool):
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.new("RGBA", (50, 40)).save(tmp_path / "train" / "a" / "0.png")
    folder = open_source(tmp_path, "train")
    for color, value in (("#ffffff", 255), ("#0000ff", (0, 0, 255))):
        cache = build_cache(folder, tmp_path / "cache", 1, color) if cached else None
        crop = RandomCrop(size=64, background=color)
        plan = [(0, np.array([0]))]
        (batch,) = load_training_batches(folder, plan, crop, workers=0, cache=cache)
        assert (batch.pixels == torch.tensor(value)).all()
