"""Pictures from results."""

from anchorpatch.figures.attention import attention_figure
from anchorpatch.figures.coverage import coverage_figure
from anchorpatch.figures.errors import errors_figure
from anchorpatch.figures.patches import patches_figure

__all__ = ["attention_figure", "coverage_figure", "errors_figure", "patches_figure"]
