"""Algorithm 1 line by line in plain Python: the oracle of `anchorpatch.lsp.localize`."""

from __future__ import annotations

import math
from collections.abc import Sequence


def iou(a: tuple[int, int], b: tuple[int, int], theta: int) -> float:
    """Eq. 9, by the pixels of two squares."""
    height = min(a[0], b[0]) + theta - max(a[0], b[0])
    width = min(a[1], b[1]) + theta - max(a[1], b[1])
    intersection = max(0, height) * max(0, width)
    return intersection / (theta * theta + theta * theta - intersection)


def algorithm_1(
    heatmap: Sequence[Sequence[float]],
    theta: int,
    max_patches: int,
    threshold: float,
    coverage: float,
    stride: int = 8,
) -> list[tuple[tuple[int, int], float]]:
    """Return corner (y, x) and activation of each patch of one heatmap (H rows of W)."""
    h, w = len(heatmap), len(heatmap[0])
    coordinates = [(i, j) for i in range(h) for j in range(w)]
    # line 1; Python's sort is stable, so ties stay in row-major order
    coordinates.sort(key=lambda c: -heatmap[c[0]][c[1]])
    chosen = [coordinates[0]]  # line 2
    corners = [(coordinates[0][0] * stride, coordinates[0][1] * stride)]
    for i in range(1, max(1, math.floor(h * w * coverage))):  # line 3
        if len(chosen) == max_patches:  # lines 7, 8
            break
        corner = (coordinates[i][0] * stride, coordinates[i][1] * stride)
        if all(iou(corner, other, theta) < threshold for other in corners):  # line 4
            chosen.append(coordinates[i])  # line 5
            corners.append(corner)
    return [(corner, heatmap[c[0]][c[1]]) for corner, c in zip(corners, chosen, strict=True)]
