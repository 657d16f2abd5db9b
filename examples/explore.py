#!/usr/bin/env python3
"""The figures as functions, for a notebook (cells begin with `# %%`) or as a script.

    python examples/explore.py DATA [RUNS] [NETWORK]

DATA holds `val/CLASS/*.JPEG`, RUNS the weights of AnchorNet and, for Figure 6, of NETWORK.
"""

# %% What to look at
from __future__ import annotations

import sys
from pathlib import Path

from anchorpatch.figures import (
    AttentionConfig,
    CoverageConfig,
    ErrorsConfig,
    ImageSource,
    PatchesConfig,
    attention_figure,
    coverage_figure,
    errors_figure,
    find_attention,
    find_errors,
    find_patches,
    measure_coverage,
    patches_figure,
)
from anchorpatch.runtime.checkpoint import load_weights

data = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
runs = Path(sys.argv[2] if len(sys.argv) > 2 else "runs")
source = ImageSource.of_folder(data, "val")
weights = load_weights(runs / "anchornet" / "best.safetensors")

# %% Figure 3: a PIL image
patches = find_patches(source, weights, PatchesConfig(per_scale=4))
patches_figure(patches).save("patches.png")
print(patches.caption)

# %% Figure 4: a PIL image
errors = find_errors(source, weights, ErrorsConfig())
errors_figure(errors).save("errors.png")
print(errors.caption)

# %% Figure 5: a matplotlib figure
attention = find_attention(source, weights, AttentionConfig(count=3))
attention_figure(attention).savefig("attention.png")
for example in attention.examples:
    print(example.image.path, [s.max().item() for s in example.attention])

# %% Figure 6: a matplotlib figure; takes minutes
if len(sys.argv) > 3:
    config = CoverageConfig(sys.argv[3], weights.path, runs, images=100, areas=(0.1, 0.3, 0.6))
    curves = measure_coverage(source, config)
    coverage_figure(curves).savefig("coverage.png", dpi=150)
    for row in curves.summary():
        print(row["localizer"], f"{row['covered_auc']:.3f} {row['masked_auc']:.3f}")
