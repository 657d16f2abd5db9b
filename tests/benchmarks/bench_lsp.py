"""Batched LSP against Algorithm 1 in plain Python, in one run on CPU.

python -m tests.benchmarks.bench_lsp
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from anchorpatch.lsp import localize
from anchorpatch.settings import PRESETS, SCALES, LspSettings
from tests.lsp_oracle import algorithm_1

BATCH = 256
REPEATS = 5
DRAWS = 8


def best_of(f: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        f()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)  # as the extract job runs it: one thread a chunk of images
    rng = np.random.default_rng(0)
    sides = (21, 17, 15)
    heatmaps = [torch.from_numpy(rng.normal(size=(BATCH, s, s)).astype(np.float32)) for s in sides]
    branch = torch.from_numpy(rng.integers(0, 3, size=BATCH))
    lists = [heatmaps[j][i].tolist() for i, j in enumerate(branch.tolist())]
    print(f"{BATCH} heatmaps of mixed scales, best of {REPEATS} runs")

    def plain(s: LspSettings) -> None:
        for heatmap, j in zip(lists, branch.tolist(), strict=True):
            algorithm_1(heatmap, SCALES[j], s.max_patches[j], s.iou_threshold, s.coverage[j])

    def compare(name: str, all_settings: list[LspSettings]) -> None:
        slow = sum(best_of(lambda s=s: plain(s)) for s in all_settings)
        fast = sum(best_of(lambda s=s: localize(heatmaps, branch, s)) for s in all_settings)
        print(
            f"{name:>9}: plain Python {slow * 1e3:7.1f} ms, batched {fast * 1e3:6.2f} ms, "
            f"{slow / fast:5.1f} times faster"
        )

    for name, s in PRESETS.items():
        compare(name, [s])
    # K, T and P drawn as the tests of equality draw them.
    drawn = [
        LspSettings((int(rng.integers(1, 30)),) * 3, rng.random(), (rng.uniform(0.001, 1),) * 3)
        for _ in range(DRAWS)
    ]
    compare("random", drawn)


if __name__ == "__main__":
    main()
