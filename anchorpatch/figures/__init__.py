"""Pictures from results."""

from anchorpatch.figures.coverage import coverage_figure
from anchorpatch.figures.patches import patches_figure

__all__ = ["coverage_figure", "patches_figure"]
