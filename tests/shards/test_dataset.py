from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from anchorpatch.errors import CorruptShard, SettingsError, ShardError
from anchorpatch.settings import SCALES
from anchorpatch.shards import BagDataset, PatchDataset, ShardReader, collate_bags
from anchorpatch.shards.dataset import batches_of, epoch_rows, load_rows, pieces_of, visited
from tests.shards.samples import make_split


class Request(NamedTuple):
    scale: int
    rows: np.ndarray


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same split by codec, and once with crops."""
    root = tmp_path_factory.mktemp("shards")
    for codec in ("raw", "jpeg", "image"):
        make_split(root / codec, codec=codec)
    make_split(root / "both", store_images=True)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def reader(folders: dict[str, Path]) -> ShardReader:
    return ShardReader(folders["raw"])


def epoch(reader: ShardReader, seed: int, number: int, per_image: int | None, size: int):
    rng = np.random.default_rng((seed, number))
    return batches_of(epoch_rows(reader, rng, SCALES, per_image), size, rng)


@pytest.mark.parametrize("per_image", [None, 1, 2, 9])
def test_an_epoch_visits_each_patch_once(reader: ShardReader, per_image: int | None):
    batches = epoch(reader, 0, 0, per_image, 4)
    seen = {(scale, row) for scale, rows in batches for row in rows.tolist()}
    assert len(seen) == sum(len(rows) for _, rows in batches)
    of_image = Counter(int(reader.patch_image(s, [row])[0]) for s, row in seen)
    limit = per_image or 99
    assert [of_image[i] for i in range(len(reader))] == [min(limit, n) for n in reader.counts]
    per_scale = Counter(scale for scale, _ in seen)
    assert dict(per_scale) == visited(reader, SCALES, per_image)


def test_other_patches_of_an_image_each_epoch(reader: ShardReader):
    rows = [set(np.concatenate([r for _, r in epoch(reader, 0, e, 1, 4)])) for e in range(3)]
    assert len({frozenset(found) for found in rows}) == 3


def test_order_follows_from_seed_and_epoch(reader: ShardReader):
    def flat(*key: int) -> list:
        return [(scale, rows.tolist()) for scale, rows in epoch(reader, *key, None, 4)]

    assert flat(1, 2) == flat(1, 2)
    assert flat(1, 2) != flat(1, 3)
    assert flat(1, 2) != flat(2, 2)


@given(
    st.dictionaries(st.sampled_from(SCALES), st.integers(1, 300), min_size=1),
    st.integers(1, 64),
)
def test_batches_are_nearly_equal(counts: dict[int, int], size: int):
    rows = {scale: np.arange(n) for scale, n in counts.items()}
    batches = batches_of(rows, size, np.random.default_rng(0))
    for scale, n in counts.items():
        sizes = [len(batch) for s, batch in batches if s == scale]
        assert sum(sizes) == n
        assert len(sizes) == -(-n // size)
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 200), st.integers(1, 16))
def test_pieces_stand_for_the_whole_batch(n: int, pieces: int):
    found = pieces_of(np.arange(n), pieces)
    assert len(found) == pieces
    assert sum(counted for _, counted in found) == n
    assert all(len(rows) >= 2 for rows, _ in found)
    assert all(counted in (0, len(rows), 1) for rows, counted in found)
    real = [rows for rows, counted in found if counted]
    assert sorted({row for rows in real for row in rows.tolist()}) == list(range(n))
    if n >= 2 * pieces:
        assert max(map(len, real)) - min(map(len, real)) <= 1
        assert [len(rows) for rows, _ in found] == [counted for _, counted in found]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("codec", ["raw", "jpeg", "image"])
def test_loading_is_gathering(folders: dict[str, Path], codec: str, threads: int):
    reader = ShardReader(folders[codec])
    requests = [Request(*batch) for batch in epoch(reader, 0, 0, None, 3)]
    done = list(load_rows(reader, iter(requests), threads=threads))
    assert [request for request, _ in done] == requests
    for request, loaded in done:
        assert np.array_equal(loaded.pixels, reader.patches(request.scale, request.rows))
        images = reader.patch_image(request.scale, request.rows)
        assert loaded.labels.tolist() == reader.label[images].tolist()


def test_whole_crops(folders: dict[str, Path]):
    rows = np.array([3, 0, 11])
    for name in ("image", "both"):
        reader = ShardReader(folders[name])
        [(_, loaded)] = load_rows(reader, [Request(224, rows)], threads=1, whole=True)
        assert np.array_equal(loaded.pixels, np.stack([reader.image(i) for i in rows]))
        assert loaded.labels.tolist() == reader.label[rows].tolist()
    with pytest.raises(ShardError, match="--store-images"):
        list(load_rows(ShardReader(folders["raw"]), [Request(224, rows)], threads=1, whole=True))


def test_requests_are_taken_a_few_at_a_time(reader: ShardReader):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield Request(63, np.arange(2))

    loaded = load_rows(reader, endless(), threads=2, ahead=3)
    assert not taken
    for n in range(1, 5):
        next(loaded)
        assert len(taken) == 5 + n
    loaded.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("anchorpatch-read")]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_corrupt_shard_is_named_when_its_turn_comes(tmp_path: Path, threads: int):
    manifest, _ = make_split(tmp_path / "train", codec="jpeg")
    reader = ShardReader(tmp_path / "train")
    reader.patches(63, np.arange(reader.patch_count(63)))  # the tables are read
    path = manifest.shard_path(1)
    offset = reader._shard(1).places["patches/63/blob"][0]
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 64)
    start = reader._starts["patches/63"]
    requests = [Request(63, np.arange(start[i], start[i] + 1)) for i in (0, 2, 1, 0)]
    loaded = load_rows(reader, requests, threads=threads)
    next(loaded)
    next(loaded)
    with pytest.raises(CorruptShard, match="train-00001"):
        next(loaded)


# --- datasets for loops of one's own ----------------------------------------------------------


@pytest.mark.parametrize("scale", [95, None])
@pytest.mark.parametrize("codec", ["raw", "jpeg", "image"])
def test_a_dataset_has_each_patch_with_its_label(
    folders: dict[str, Path], codec: str, scale: int | None
):
    reader = ShardReader(folders[codec])
    dataset = PatchDataset(folders[codec], scale)
    scales = SCALES if scale is None else (scale,)
    rows = [(s, row) for s in scales for row in range(reader.patch_count(s))]
    assert len(dataset) == len(rows) == len(list(dataset))
    order = np.random.default_rng(0).permutation(len(rows))
    for i, (patch, label) in zip(order, dataset.__getitems__(order.tolist()), strict=True):
        s, row = rows[i]
        image = int(reader.patch_image(s, [row])[0])
        assert np.array_equal(patch, reader.patches(s, [row])[0])
        assert (label, dataset.images[i]) == (reader.label[image], image)
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError, match="expected rows from 0 to"):
            dataset[outside]
    with pytest.raises(SettingsError, match="scale: expected one of"):
        PatchDataset(reader, 64)


def test_transforms_are_given_what_those_of_torchvision_datasets_are(reader: ShardReader):
    plain = PatchDataset(reader)
    transform = v2.Compose(
        [v2.Resize((96, 96)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    dataset = PatchDataset(reader, transform=transform, target_transform=lambda label: label + 100)
    loader = DataLoader(dataset, batch_size=7, num_workers=0)
    patches, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert patches.shape == (len(plain), 3, 96, 96)
    assert labels.tolist() == (plain.labels + 100).tolist()
    seen = PatchDataset(reader, 63, transform=lambda image: (type(image).__name__, image.mode))
    assert seen[0][0] == ("Image", "RGB")
    same = PatchDataset(reader, 63, transform=v2.PILToTensor())
    assert np.array_equal(same[5][0].permute(1, 2, 0), PatchDataset(reader, 63)[5][0])


@pytest.mark.parametrize("max_patches", [None, 2])
def test_bags_are_the_patches_of_images(reader: ShardReader, max_patches: int | None):
    dataset = BagDataset(reader, max_patches)
    assert len(dataset) == len(reader) == len(list(dataset))
    for i, (bag, label) in enumerate(dataset):
        assert np.array_equal(bag, reader.image_patches(i).pixels[:max_patches])
        assert label == reader.label[i]
    loader = DataLoader(dataset, batch_size=6, collate_fn=collate_bags, num_workers=1)
    start = 0
    for batch in loader:
        n = len(batch.labels)
        assert batch.labels.tolist() == reader.label[start : start + n].tolist()
        assert len(batch.groups) == len(set(reader.scale[start : start + n].tolist()))
        for row in range(n):
            (bag,) = (patches[of == row] for patches, of in batch.groups if (of == row).any())
            assert torch.equal(bag, dataset[start + row][0])
            assert len(bag) == batch.counts[row]
        start += n
    assert start == len(reader)
    small = BagDataset(reader, max_patches, v2.Compose([v2.Resize((32, 32)), v2.PILToTensor()]))
    ((patches, bag),) = collate_bags([small[i] for i in range(5)]).groups
    assert patches.shape[1:] == (3, 32, 32)
    assert bag.tolist() == sorted(bag.tolist())
    with pytest.raises(SettingsError, match="max_patches: expected at least 1, got 0"):
        BagDataset(reader, 0)
