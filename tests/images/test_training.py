from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anchorpatch.images.cache import SHORT_SIDE, build_cache
from anchorpatch.images.folder import ImageFolder, scan_folder
from anchorpatch.images.picture import decode_picture
from anchorpatch.images.training import (
    RandomCrop,
    epoch_order,
    load_training_batches,
    random_box,
    random_crop,
)
from tests.conftest import draw_photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """Nine pictures of two classes; row 4 is no image."""
    data = tmp_path_factory.mktemp("training")
    for name, n in (("a", 5), ("b", 4)):
        (data / "train" / name).mkdir(parents=True)
        for i in range(n):
            photo = draw_photo(i, (200 + 40 * i, 300 - 20 * i))
            photo.save(data / "train" / name / f"{i}.png")
    (data / "train" / "a" / "4.png").write_bytes(b"no image")
    return scan_folder(data, "train")


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
def test_batches_do_not_depend_on_workers(folder: ImageFolder, workers: int):
    crop = RandomCrop(size=64)
    expected = list(load_training_batches(folder, _plan(), crop, workers=0))
    found = list(load_training_batches(folder, _plan(), crop, workers=workers))
    assert len(expected) == len(found) == 6
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[1], b[1])
        assert a[0].tolist() == b[0].tolist()
        assert a[3] == b[3]


def test_batches_hold_the_crops_of_their_rows_and_name_the_bad(folder: ImageFolder):
    crop, bad = RandomCrop(size=64), []
    for (epoch, rows), batch in zip(
        _plan(), load_training_batches(folder, _plan(), crop, workers=0), strict=True
    ):
        found, pixels, _, missing = batch
        bad += missing
        assert found.tolist() == [row for row in rows if row != 4]
        for row, image in zip(found, pixels, strict=True):
            picture = decode_picture((folder.root / folder.path(int(row))).read_bytes())
            assert np.array_equal(image.numpy(), random_crop(picture, crop, epoch, int(row)))
    assert bad == [(4, "not an image")] * 2


def test_a_plan_may_begin_anywhere(folder: ImageFolder):
    crop = RandomCrop(size=64)
    whole = [b[1] for b in load_training_batches(folder, _plan(), crop, workers=0)]
    rest = [b[1] for b in load_training_batches(folder, _plan()[4:], crop, workers=0)]
    assert [torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True)] == [True, True]


def test_the_cache_holds_the_pictures(folder: ImageFolder, tmp_path: Path):
    cache = build_cache(folder, tmp_path / "cache", 2)
    assert cache.bad == {4: "not an image"}
    for row in range(9):
        if row == 4:
            continue
        picture = decode_picture((folder.root / folder.path(row)).read_bytes())
        short = min(picture.size)
        if short > SHORT_SIDE:
            size = tuple(round(side * SHORT_SIDE / short) for side in picture.size)
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        assert np.array_equal(np.asarray(cache[row]), np.asarray(picture.convert("RGB")))


def test_batches_from_the_cache_name_the_bad_too(folder: ImageFolder, tmp_path: Path):
    cache = build_cache(folder, tmp_path / "cache", 1)
    batches = list(
        load_training_batches(folder, _plan(), RandomCrop(size=64), workers=0, cache=cache)
    )
    assert [item for batch in batches for item in batch[3]] == [(4, "not an image")] * 2
    assert sum(len(batch[0]) for batch in batches) == 16


def test_the_cache_is_made_once_for_each_set_of_files(
    folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build_cache(folder, tmp_path, 1)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert len(made) == 2
    monkeypatch.setattr("anchorpatch.images.cache.decode_picture", None)  # it would fail
    build_cache(folder, tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    with pytest.raises(TypeError):
        build_cache(folder.limited(3), tmp_path, 1)


def test_a_cut_off_cache_is_refused(folder: ImageFolder, tmp_path: Path):
    from anchorpatch.errors import DataError

    cache = build_cache(folder, tmp_path, 1)
    cache.file.write_bytes(cache.file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"\.pixels: expected \d+ bytes"):
        build_cache(folder, tmp_path, 1)
