"""Figures 3 to 6 of the paper: what they show, found by ``find_...``, and their pictures."""

from anchorpatch.figures.attention import AttentionConfig, attention_figure, find_attention
from anchorpatch.figures.coverage import CoverageConfig, coverage_figure, measure_coverage
from anchorpatch.figures.errors import ErrorsConfig, errors_figure, find_errors
from anchorpatch.figures.examples import Choice
from anchorpatch.figures.patches import PatchesConfig, find_patches, patches_figure
from anchorpatch.jobs.crops import ImageSource

__all__ = [
    "AttentionConfig",
    "Choice",
    "CoverageConfig",
    "ErrorsConfig",
    "ImageSource",
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
