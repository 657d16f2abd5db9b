"""JPEGs decoded in batches: on a GPU by nvJPEG, here also on a CPU, where pixels must be equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anchorpatch.errors import SettingsError
from anchorpatch.images import decode, loader, nvjpeg
from anchorpatch.images.decode import size_for_nvjpeg
from anchorpatch.images.loader import Batch, load_batches
from anchorpatch.images.nvjpeg import NvJpeg
from anchorpatch.images.source import ImageSource, open_source
from anchorpatch.settings import CropSettings
from tests.images.processes import wait_until, workers_alive
from tests.oddities import encoded, make_oddities, picture, with_orientation

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
DEFAULT = CropSettings()


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    data = tmp_path_factory.mktemp("odd")
    make_oddities(data / "val" / "class")
    return open_source(data, "val")


def load(
    images: ImageSource, batches: Sequence[Sequence[int]], nvjpeg: NvJpeg | None, **options: Any
) -> list[Batch]:
    return list(load_batches(images, batches, nvjpeg=nvjpeg, **{"workers": 0, **options}))


def assert_same(got: list[Batch], wanted: list[Batch]) -> None:
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.pixels.numpy(), b.pixels.numpy())
        np.testing.assert_array_equal(a.size, b.size)
        assert sorted(a.bad) == sorted(b.bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_other_decoder(odd: ImageSource, workers: int) -> None:
    batches = [range(i, min(i + 9, len(odd))) for i in range(0, len(odd), 9)]
    batches.insert(1, range(0))
    got = load(odd, batches, NvJpeg(CPU, DEFAULT), workers=workers)
    assert_same(got, load(odd, batches, None))
    assert wait_until(lambda: workers_alive() == 0)


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_crops_are_those_of_the_other_decoder(small: ImageSource, mode: str) -> None:
    crop = CropSettings(mode, background="red", img_size=128)
    both = (load(small, [range(6)], way, crop=crop) for way in (NvJpeg(CPU, crop), None))
    assert_same(*both)


def test_a_batch_comes_in_pieces(small: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_ROOM", 1)
    batches = [range(7), range(7, 13)]
    got = load(small, batches, NvJpeg(CPU, DEFAULT), workers=2)
    assert_same(got, load(small, batches, None))


def test_what_the_gpu_refuses_is_decoded_all_the_same(
    small: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = NvJpeg(CPU, DEFAULT)
    refused = {b"b/3.jpg", b"b/5.jpg"}
    data = {(small.root / name.decode()).read_bytes() for name in refused}
    plain = nvjpeg.decode_jpeg

    def picky(files: list[Tensor], *rest: Any) -> list[Tensor]:
        if any(file.numpy().tobytes() in data for file in files):
            raise RuntimeError("nvjpegDecode failed: 3")
        return plain(files, *rest)

    monkeypatch.setattr(nvjpeg, "decode_jpeg", picky)
    rows = range(len(small))
    assert_same(load(small, [rows], ours), load(small, [rows], None))
    # What libjpeg cannot decode either is bad.
    monkeypatch.setattr(nvjpeg, "decode", lambda data, crop: decode.decode(data[:400], crop))
    (batch,) = load(small, [rows], ours)
    bad = {small.path(row): reason for row, reason in batch.bad}
    assert bad["b/3.jpg"] == bad["b/5.jpg"] == "truncated"
    assert (
        len(batch.index) == len(batch.pixels) == len(rows) - 5
    )  # those of class a are the same files


def test_what_is_for_nvjpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = encoded(picture(30, 40), "JPEG")
    assert size_for_nvjpeg(plain) == (30, 40)
    assert size_for_nvjpeg(plain + b"\0\0") == (30, 40)
    assert size_for_nvjpeg(encoded(Image.new("L", (9, 8)), "JPEG")) == (8, 9)
    for other in (
        plain[:-2],
        plain + b"more",
        b"",
        b"no\xff\xd9",
        with_orientation(6),
        encoded(picture(), "JPEG", progressive=True),
        encoded(Image.new("CMYK", (8, 8)), "JPEG"),
        encoded(picture(10, 41), "JPEG"),
        encoded(picture(), "PNG"),
    ):
        assert size_for_nvjpeg(other) is None
    monkeypatch.setattr(decode, "_MOST_FOR_NVJPEG", 1199)
    assert size_for_nvjpeg(plain) is None


def test_large_files_stay_with_the_workers(
    small: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ours = NvJpeg(CPU, DEFAULT)
    monkeypatch.setattr(ours, "_decode", lambda files: asked.append(len(files)) or [])
    monkeypatch.setattr(loader, "_LARGEST_FILE", 0)
    assert_same(load(small, [range(5)], ours), load(small, [range(5)], None))
    assert asked == []


def test_an_unused_or_closed_iterator_leaves_nothing(small: ImageSource) -> None:
    batches = load_batches(small, [range(5)] * 20, workers=2, nvjpeg=NvJpeg(CPU, DEFAULT))
    next(batches)
    batches.close()
    unused = load_batches(small, [range(5)], workers=1, nvjpeg=NvJpeg(CPU, DEFAULT))
    unused.close()
    del unused
    assert wait_until(lambda: workers_alive() == 0)


def test_corrupt_data_within_a_file_go_unnoticed(tmp_path: Path) -> None:
    (tmp_path / "val" / "a").mkdir(parents=True)
    data = encoded(picture(), "JPEG")
    middle = len(data) // 2
    (tmp_path / "val" / "a" / "0.jpg").write_bytes(data[:middle] + bytes(60) + data[middle + 60 :])
    images = open_source(tmp_path, "val")
    assert load(images, [range(1)], None)[0].damaged == [0]
    assert load(images, [range(1)], NvJpeg(CPU, DEFAULT))[0].damaged == []


def test_a_torchvision_without_nvjpeg_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> list[Tensor]:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(nvjpeg, "decode_jpeg", fail)
    with pytest.raises(SettingsError, match=r"not compiled with nvJPEG.*; use --decoder libjpeg$"):
        NvJpeg(CPU, DEFAULT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_decodes_nearly_the_same(odd: ImageSource, small: ImageSource, workers: int) -> None:
    for images in (small, odd):
        batches = [range(i, min(i + 16, len(images))) for i in range(0, len(images), 16)]
        wanted = load(images, batches, None)
        got = load(images, batches, NvJpeg(GPU, DEFAULT), workers=workers)
        for a, b in zip(got, wanted, strict=True):
            assert a.pixels.is_pinned()
            np.testing.assert_array_equal(a.index, b.index)
            np.testing.assert_array_equal(a.size, b.size)
            apart = (a.pixels.int() - b.pixels.int()).abs().float().mean((1, 2, 3))
            assert apart.max() < 4, [images.path(int(i)) for i in a.index[apart.numpy() >= 4]]


@pytest.mark.gpu
@pytest.mark.photos
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_photographs(photos: Path) -> None:
    images = open_source(photos / "imagenet-photos", "val")
    rows = [range(i, min(i + 64, len(images))) for i in range(0, len(images), 64)]
    wanted = load(images, rows, None, workers=2)
    for _ in range(3):  # memory that is used again must not spoil anything
        for a, b in zip(load(images, rows, NvJpeg(GPU, DEFAULT), workers=2), wanted, strict=True):
            apart = (a.pixels.int() - b.pixels.int()).abs().float().mean((1, 2, 3))
            assert (float(apart.mean()) < 1, float(apart.max()) < 4) == (True, True)
