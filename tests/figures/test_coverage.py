from __future__ import annotations

import numpy as np
import pytest

from anchorpatch.figures import coverage_figure
from anchorpatch.jobs.figures.coverage_curves import LOCALIZERS, CoverageResult, curves_of

AREAS = (0.0, 0.2, 0.5, 1.0)


@pytest.fixture(scope="module")
def result() -> CoverageResult:
    names = [*LOCALIZERS, "random", "random"]
    right = np.random.default_rng(0).random((len(names), 2, 4, 30)) < 0.6
    curves = curves_of(names, right, AREAS)
    return CoverageResult("resnet18", "DATA/val", 30, AREAS, curves, {}, "", (), {"seeds": 3})


def test_each_panel_has_every_curve_at_its_points(result: CoverageResult):
    left, right = coverage_figure(result).axes
    for axes, way in ((left, "covered"), (right, "masked")):
        assert len(axes.lines) == len(LOCALIZERS)
        labels = {line.get_label(): line for line in axes.lines}
        for curve in result.curves:
            series = getattr(curve, way)
            (line,) = [
                line
                for label, line in labels.items()
                if label.endswith(f"{series.auc:.3f}")
                and np.allclose(line.get_ydata(), 100 * np.array(series.top1))
            ]
            assert np.allclose(line.get_xdata(), [0, 20, 50, 100])
        assert len(axes.collections) == 1  # the band of the random seeds
    assert "kept" in left.get_title()
    assert "set to 0" in right.get_title()


def test_no_curve_leaves_its_panel():
    right = np.zeros((1, 2, 4, 10), bool)
    right[0, 0, :, 0] = True
    right[0, 1, :, :9] = True
    curves = curves_of(["centre"], right, AREAS)
    result = CoverageResult("resnet18", "DATA/val", 10, AREAS, curves, {}, "", (), {"seeds": 1})
    for axes in coverage_figure(result).axes:
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top > 90


def test_the_legends_go_from_the_best_to_the_worst(result: CoverageResult):
    left, right = coverage_figure(result).axes
    for axes, sign in ((left, -1), (right, 1)):
        listed = [float(text.get_text().split()[-1]) for text in axes.get_legend().get_texts()]
        assert listed == sorted(listed, key=lambda auc: sign * auc)


def test_no_two_curves_share_colour_or_dash_and_mark(result: CoverageResult):
    lines = coverage_figure(result).axes[0].lines
    assert len({line.get_color() for line in lines}) == len(LOCALIZERS)
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(LOCALIZERS)
