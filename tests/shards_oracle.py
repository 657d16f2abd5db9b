"""Checks shards with plain h5py, without the project's reader: python -m tests.shards_oracle DIR.

Every stored patch must equal the crop of the stored image at its corner, pixel for pixel, so
the shards have to be made with --store-images (or --codec image, which stores no patches).
"""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np


def check_shard(path: Path) -> tuple[int, int]:
    """Return how many images and patches were compared."""
    patches = 0
    with h5py.File(path) as file:
        images = file["images"]
        pixels = images["pixels"]
        n = len(images["path"])
        for dataset in (images["path"], pixels, file["patches/63/score"]):
            assert dataset.chunks is None
            assert dataset.compression is None
        paths = [bytes(p) for p in images["path"][:]]
        assert paths == sorted(set(paths))
        expected_first = {63: 0, 95: 0, 111: 0}
        for i in range(n):
            theta, count = int(images["scale"][i]), int(images["count"][i])
            first = int(images["first"][i])
            assert first == expected_first[theta]
            expected_first[theta] += count
            assert count >= 1
            group = file[f"patches/{theta}"]
            crop = pixels[i]
            scores = group["score"][first : first + count]
            assert (np.diff(scores) <= 0).all()
            for row in range(first, first + count):
                y, x = (int(v) for v in group["corner"][row])
                assert y % 8 == x % 8 == 0
                assert int(group["image"][row]) == i
                expected = crop[y : y + theta, x : x + theta]
                assert expected.shape == (theta, theta, 3)
                if "pixels" in group:
                    assert np.array_equal(group["pixels"][row], expected)
                patches += 1
        for theta, total in expected_first.items():
            assert len(file[f"patches/{theta}/score"]) == total
    return n, patches


def check_folder(folder: Path) -> tuple[int, int]:
    """Check all shards of a split folder."""
    counts = [check_shard(path) for path in sorted(folder.glob("*.h5"))]
    assert counts, f"no shards in {folder}"
    return sum(n for n, _ in counts), sum(m for _, m in counts)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: %d images, %d patches, all equal to their crops" % check_folder(Path(name)))
