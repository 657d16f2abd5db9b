from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anchorpatch.errors import ShardError
from anchorpatch.images.decode import decode
from anchorpatch.jobs.crops import Crops, CropSource
from anchorpatch.settings import CropSettings
from anchorpatch.shards.reader import ShardReader
from tests.jobs.patch_shards import Drawn, classes_of, write_shards


def test_a_folder_gives_its_crops_in_the_order_asked_for(image_folder: Path):
    source = CropSource.of_folder(image_folder, "val")
    assert len(source) == 40
    assert source.classes == ("cat", "dog")
    rows = [39, 0, 17, 3, 21]
    batches = list(source.batches(rows, 2))
    assert [batch.rows.tolist() for batch in batches] == [[39, 0], [17, 3], [21]]
    for batch in batches:
        for row, pixels, label in zip(batch.rows, batch.pixels, batch.labels, strict=True):
            path = source.path(int(row))
            assert source.classes[label] == path.split("/")[0]
            expected = decode((image_folder / "val" / path).read_bytes()).pixels
            assert np.array_equal(pixels.numpy(), expected)


def test_images_are_cropped_as_asked_for(image_folder: Path):
    crop = CropSettings("squash")
    source = CropSource.of_folder(image_folder, "val", crop=crop)
    expected = decode((image_folder / "val" / source.path(5)).read_bytes(), crop).pixels
    assert np.array_equal(source.read([5]).pixels[0], expected)


def test_an_image_that_cannot_be_decoded_is_left_out(tmp_path: Path, image_folder: Path):
    folder = tmp_path / "val" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.JPEG").write_bytes((image_folder / "val" / "cat" / "00.JPEG").read_bytes())
    (folder / "b.JPEG").write_bytes(b"no picture")
    source = CropSource.of_folder(tmp_path, "val")
    found = [row for batch in source.batches([1, 0], 1) for row in batch.rows]
    assert found == [0]


def test_shards_give_the_crops_they_store(tmp_path: Path):
    images = [Drawn(63, i % 3, [[i] * 3]) for i in range(5)]
    write_shards(tmp_path / "val", images, classes_of(3), store_images=True)
    reader = ShardReader(tmp_path / "val")
    source = CropSource.of_shards(reader)
    (batch,) = source.batches([4, 1], 8)
    assert batch.labels.tolist() == [1, 1]
    assert source.path(4) == reader.path[4].decode()
    assert np.array_equal(batch.pixels[0].numpy(), reader.image(4))


def test_shards_without_crops_say_what_to_do(tmp_path: Path):
    write_shards(tmp_path / "val", [Drawn(63, 0, [[1] * 3])], classes_of(1))
    with pytest.raises(ShardError, match="--store-images"):
        CropSource.of_shards(ShardReader(tmp_path / "val"))


def test_images_are_rescaled_as_their_network_was_trained():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8))
    crops = Crops(np.arange(2), pixels, np.zeros(2, np.int64), np.ones((2, 2), np.int32))
    for how, filter in (
        ("bilinear", Image.Resampling.BILINEAR),
        ("bicubic", Image.Resampling.BICUBIC),
        ("lanczos", Image.Resampling.BICUBIC),
    ):
        for image, source in zip(crops.rescaled(95, how).pixels.numpy(), pixels, strict=True):
            expected = np.asarray(Image.fromarray(source.numpy()).resize((95, 95), filter))
            assert np.abs(image.astype(int) - expected).max() <= 1
    assert crops.rescaled(63).pixels.equal(crops.rescaled(63, "bilinear").pixels)
