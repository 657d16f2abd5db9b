"""Figures 3 to 6 of the paper: what they show, found by ``find_...``, and their pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from anchorpatch.figures.attention import AttentionConfig, attention_figure, find_attention
from anchorpatch.figures.coverage import CoverageConfig, coverage_figure, measure_coverage
from anchorpatch.figures.errors import ErrorsConfig, errors_figure, find_errors
from anchorpatch.figures.patches import PatchesConfig, find_patches, patches_figure
from anchorpatch.jobs.crops import CropSource

#: Figures 3 to 5: number -> settings, how it is found, and how it is drawn.
EXAMPLES: Final[dict[int, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]]] = {
    3: (PatchesConfig, find_patches, patches_figure),
    4: (ErrorsConfig, find_errors, errors_figure),
    5: (AttentionConfig, find_attention, attention_figure),
}

__all__ = [
    "EXAMPLES",
    "AttentionConfig",
    "CoverageConfig",
    "CropSource",
    "ErrorsConfig",
    "PatchesConfig",
    "attention_figure",
    "coverage_figure",
    "errors_figure",
    "find_attention",
    "find_errors",
    "find_patches",
    "measure_coverage",
    "patches_figure",
]
