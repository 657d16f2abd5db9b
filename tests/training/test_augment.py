from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from anchorpatch.training.augment import Augmentation, adjust_colors, crop_boxes


def pictures(n: int = 4, side: int = 24) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8))


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng((7, *key))


def test_without_anything_it_is_the_pixels():
    found = Augmentation(jitter=0.0, flip=False)(pictures(), rng())
    assert torch.equal(found, pictures().permute(0, 3, 1, 2).float() / 255)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_colors_are_those_of_torchvision():
    inputs = pictures().permute(0, 3, 1, 2).float() / 255
    factors = torch.tensor([[0.8, 1.2, 0.9], [1.2, 0.8, 1.1], [1.0, 1.0, 1.0], [1.1, 1.1, 0.0]])
    for picture, found, row in zip(inputs, adjust_colors(inputs, factors), factors, strict=True):
        expected = F.adjust_brightness(picture, float(row[0]))
        expected = F.adjust_contrast(expected, float(row[1]))
        expected = F.adjust_saturation(expected, float(row[2]))
        assert torch.allclose(found, expected, atol=1e-5)


def test_flips_are_mirror_images_of_about_every_second():
    pixels = pictures(64)
    plain = Augmentation(jitter=0.0, flip=False)(pixels, rng())
    found = Augmentation(jitter=0.0)(pixels, rng())
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(found, plain, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(found, plain, strict=True)]
    assert [a or b for a, b in zip(flipped, kept, strict=True)] == [True] * 64
    assert 20 < sum(flipped) < 44


def test_boxes_are_resized_bilinearly():
    inputs = pictures(3).permute(0, 3, 1, 2).float() / 255
    boxes = [(3, 4, 20, 22), (0, 0, 24, 24), (8, 2, 16, 18)]
    for picture, found, (left, top, right, bottom) in zip(
        inputs, crop_boxes(inputs, boxes), boxes, strict=True
    ):
        size = [bottom - top, right - left]
        expected = F.resized_crop(picture, top, left, *size, [24, 24], antialias=False)
        # At its border, a crop sees the pixels beyond, and a cut-out piece does not.
        assert torch.allclose(found[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], atol=1e-4)


@pytest.mark.parametrize("min_area", [1.0, 0.5])
def test_the_key_decides(min_area: float):
    augment = Augmentation(min_area=min_area)
    assert torch.equal(augment(pictures(), rng(1)), augment(pictures(), rng(1)))
    assert not torch.equal(augment(pictures(), rng(1)), augment(pictures(), rng(2)))
    found = augment(pictures(), rng(1))
    assert found.shape == (4, 3, 24, 24)
    assert 0 <= found.min() <= found.max() <= 1
    assert not torch.equal(found[0], Augmentation(0.0, False, min_area)(pictures(), rng(1))[0])
