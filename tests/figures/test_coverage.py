from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from anchorpatch.errors import SettingsError, WeightsError
from anchorpatch.figures.coverage import (
    LOCALIZERS,
    CoverageConfig,
    CoverageResult,
    Curve,
    coverage_figure,
    coverage_table,
    curves_of,
    measure_coverage,
)
from anchorpatch.jobs.crops import CropSource
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights
from anchorpatch.runtime.progress import Reporter
from tests.report.samples import DASH, texts

NETWORK = "mobilenet_v3_small"
WITHOUT_PEERS = tuple(name for name in LOCALIZERS if name[:3] not in ("bag", "sac"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUNS with an untrained network for the classes of `image_folder`, of mixed opinions."""
    runs = tmp_path_factory.mktemp("runs")
    torch.manual_seed(3)
    net = build(NETWORK, 2)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net(torch.randn(8, 3, 96, 96))
    torch.nn.init.normal_(net.classifier[-1].weight, std=0.5)
    path = runs / f"{NETWORK}-baseline" / "best.safetensors"
    save_weights(path, net.state_dict(), WeightsMeta(NETWORK, ("cat", "dog")))
    return runs


@pytest.fixture
def config(runs: Path, weights: Path) -> CoverageConfig:
    return CoverageConfig(
        NETWORK,
        weights,
        runs,
        localizers=WITHOUT_PEERS,
        areas=(0.2, 0.6),
        seeds=2,
        images=6,
        batch_size=4,
        device="cpu",
    )


@pytest.fixture
def source(image_folder: Path) -> CropSource:
    return CropSource.of_folder(image_folder, "val")


def by_name(result: CoverageResult) -> dict[str, Curve]:
    return {curve.localizer: curve for curve in result.curves}


def test_every_way_is_decided_as_by_hand(config: CoverageConfig, source: CropSource, runs: Path):
    result = measure_coverage(source, config)
    assert (result.images, result.areas) == (6, (0.0, 0.2, 0.6, 1.0))
    assert [curve.localizer for curve in result.curves] == list(WITHOUT_PEERS)
    rows = sorted(np.random.default_rng(0).permutation(40)[:6].tolist())
    net = build(NETWORK, 2).eval()
    from anchorpatch.runtime.checkpoint import load_weights

    loaded = load_weights(runs / f"{NETWORK}-baseline" / "best.safetensors", NETWORK)
    net.load_state_dict(loaded.tensors)
    mean, std = (torch.tensor(x)[:, None, None] for x in (loaded.meta.mean, loaded.meta.std))

    def top1(change) -> float:
        right = 0
        for row in rows:
            (crop,) = source.batches([row], 1)
            pixels = change(crop.pixels[0].clone()).permute(2, 0, 1) / 255
            with torch.no_grad():
                logits = net(((pixels - mean) / std)[None])[0]
            right += int(logits.argmax()) == int(crop.labels[0])
        return right / len(rows)

    @cache
    def squares(area: float) -> torch.Tensor:
        """Pixels by their distance from the middle, then row by row."""
        places = [(y, x) for y in range(224) for x in range(224)]
        places.sort(key=lambda p: max(abs(p[0] - 111.5), abs(p[1] - 111.5)))
        mask = torch.zeros(224, 224, 1, dtype=torch.bool)
        for y, x in places[: round(area * 224 * 224)]:
            mask[y, x] = True
        return mask

    curve = by_name(result)["center"]
    covered = [top1(lambda p, a=a: p * squares(a)) for a in (0.0, 0.2, 0.6, 1.0)]
    masked = [top1(lambda p, a=a: p * ~squares(a)) for a in (0.0, 0.2, 0.6, 1.0)]
    assert curve.covered.top1 == pytest.approx(covered)
    assert curve.masked.top1 == pytest.approx(masked)
    for other in result.curves:
        assert other.covered.top1[0] == other.masked.top1[-1] == covered[0]
        assert other.covered.top1[-1] == other.masked.top1[0] == covered[-1]
    assert len({covered[0], covered[-1], *covered[1:3], *masked[1:3]}) > 1


def test_every_decision_is_progress(config: CoverageConfig, source: CropSource):
    class Counter(Reporter):
        def start(self, description: str, total: int, done: int = 0, unit: str = "images") -> None:
            self.total, self.unit, self.steps = total, unit, []

        def advance(self, n: int, **counts: int) -> None:
            self.steps.append(n)

    counter = Counter()
    measure_coverage(source, replace(config, localizers=("sobel", "random"), batch_size=6), counter)
    assert (counter.total, counter.unit) == (6 * (2 + 2 * 3 * 2), "decisions")
    assert counter.steps == [6] * 14


def test_neither_the_batch_nor_the_other_localizers_change_a_curve(
    config: CoverageConfig, source: CropSource
):
    whole = measure_coverage(source, config)
    few = measure_coverage(source, replace(config, batch_size=5, localizers=("random", "gradcam")))
    for name in ("random", "gradcam"):
        assert by_name(few)[name].covered.top1 == by_name(whole)[name].covered.top1
        assert by_name(few)[name].covered.gain is None


def test_the_curves_are_summed_as_in_plain_python():
    rng = np.random.default_rng(0)
    right = rng.random((3, 2, 4, 5)) < 0.5
    areas = (0.0, 0.2, 0.7, 1.0)
    curves = {c.localizer: c for c in curves_of(["anchornet", "random", "random"], right, areas)}

    def under(values) -> float:
        steps = zip(areas, areas[1:], values, values[1:], strict=False)
        return sum((b - a) * (float(u) + float(v)) / 2 for a, b, u, v in steps)

    for way, name, sign in ((0, "covered", 1), (1, "masked", -1)):
        images = [
            [under([right[k, way, a, i] for a in range(4)]) for i in range(5)] for k in range(3)
        ]
        ours, random = (getattr(curves[n], name) for n in ("anchornet", "random"))
        assert ours.top1 == pytest.approx([right[0, way, a].mean() for a in range(4)])
        assert ours.auc == pytest.approx(statistics.mean(images[0]))
        assert ours.auc_error == pytest.approx(statistics.stdev(images[0]) / math.sqrt(5))
        assert (ours.spread, ours.auc_spread, ours.gain) == (None, None, 0.0)
        seeds = [statistics.mean(images[k]) for k in (1, 2)]
        assert random.auc == pytest.approx(statistics.mean(seeds))
        assert random.auc_spread == pytest.approx(statistics.stdev(seeds))
        means = [[right[k, way, a].mean() for k in (1, 2)] for a in range(4)]
        assert random.spread == pytest.approx([statistics.stdev(m) for m in means])
        better = [sign * ((images[1][i] + images[2][i]) / 2 - images[0][i]) for i in range(5)]
        assert random.gain == pytest.approx(statistics.mean(better))
        assert random.gain_error == pytest.approx(statistics.stdev(better) / math.sqrt(5))


def test_a_winner_is_said_only_beyond_two_standard_errors():
    n = 400
    right = np.zeros((3, 2, 3, n), bool)
    right[0, :, 1, : n // 2] = True
    right[1, :, 1, : n // 2 + 60] = True  # better covered, worse masked
    right[2, :, 1, 1 : n // 2 + 1] = True  # as good, other images
    curves = {
        c.localizer: c for c in curves_of(["anchornet", "sobel", "center"], right, (0, 0.5, 1))
    }
    assert curves["sobel"].covered.beats_anchornet
    assert not curves["sobel"].masked.beats_anchornet
    assert not curves["center"].covered.beats_anchornet


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"areas": (0.5, 0.2)}, "areas: expected increasing shares"),
        ({"areas": (0.0, 0.2)}, "areas: expected increasing shares"),
        ({"areas": ()}, "areas: expected increasing shares"),
        ({"localizers": ("sobell",)}, "localizers: expected some of .*, got sobell"),
        ({"seeds": 0}, "seeds: expected at least 1"),
    ],
)
def test_settings_out_of_range(config: CoverageConfig, change: dict, why: str):
    with pytest.raises(SettingsError, match=why):
        replace(config, **change)


def test_weights_and_peers_that_are_missing_or_wrong(
    config: CoverageConfig, source: CropSource, tmp_path: Path, weights: Path
):
    with pytest.raises(WeightsError, match=f"anchorpatch finetune {NETWORK} --baseline"):
        measure_coverage(source, replace(config, runs=tmp_path))
    with pytest.raises(WeightsError, match=r"expected weights of bagnet33, .*, found anchornet"):
        measure_coverage(source, replace(config, peers=(weights,)))
    best = tmp_path / NETWORK / "best.safetensors"
    best.parent.mkdir()
    best.hardlink_to(config.runs / f"{NETWORK}-baseline" / "best.safetensors")
    tuned = measure_coverage(
        source, replace(config, runs=tmp_path, localizers=("center",), images=2)
    )
    assert tuned.settings["asked"] == f"{best} (fine-tuned on patches)"
    result = measure_coverage(source, replace(config, localizers=("center", "bagnet33"), images=2))
    assert result.settings["asked"] == str(config.runs / f"{NETWORK}-baseline/best.safetensors")
    assert [curve.localizer for curve in result.curves] == ["center"]
    assert "anchorpatch train --arch bagnet33" in result.left_out[0]
    with pytest.raises(SettingsError, match=r"no localizer is left: BagNet-33: no .*bagnet33"):
        measure_coverage(source, replace(config, localizers=("bagnet33",)))


def test_images_of_other_classes_are_refused(
    config: CoverageConfig, tmp_path: Path, image_folder: Path
):
    for name in ("bird", "cat"):
        (tmp_path / "val" / name).mkdir(parents=True)
        photo = (image_folder / "val" / "cat" / "00.JPEG").read_bytes()
        (tmp_path / "val" / name / "a.JPEG").write_bytes(photo)
    with pytest.raises(WeightsError, match="expected outputs for the 2 classes bird, cat"):
        measure_coverage(CropSource.of_folder(tmp_path, "val"), config)


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
    curves = curves_of(["center"], right, AREAS)
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


def test_no_two_curves_share_color_or_dash_and_mark(result: CoverageResult):
    lines = coverage_figure(result).axes[0].lines
    assert len({line.get_color() for line in lines}) == len(LOCALIZERS)
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(LOCALIZERS)


def test_figure_6_in_numbers_reads_as_on_the_terminal() -> None:
    right = np.random.default_rng(0).random((4, 2, 3, 30)) < 0.6
    curves = curves_of(["anchornet", "branch63", "random", "random"], right, (0.0, 0.4, 1.0))
    result = CoverageResult("net", "val", 30, (0.0, 0.4, 1.0), curves, {}, "", (), {"seeds": 2})
    table = coverage_table("Figure 6 in numbers", json.loads(json.dumps(result.summary())))
    assert [column.name for column in table.columns] == [
        *("localizer", "covered", "±", "gain", "masked", "±", "gain"),
    ]
    assert [cell.text for cell in table.rows[2]] == [
        "random",
        *(
            text
            for way in (curves[2].covered, curves[2].masked)
            for text in (
                f"{way.auc:.4f}",
                f"± {way.auc_error:.4f} ({way.auc_spread:.4f})",
                f"{way.gain:+.4f} ± {way.gain_error:.4f}",
            )
        ),
    ]
    assert [row[0].text for row in table.rows] == ["AnchorNet", "branch 63 px alone", "random"]
    assert [row[1].key for row in table.rows] == [curve.covered.auc for curve in curves]
    tiny = {"localizer": "of later", "covered_auc": 0.5, "covered_gain": -1e-6, "masked_auc": "x"}
    (row,) = texts(coverage_table("", [tiny]))
    assert row == ["of later", "0.5000", DASH, "+0.0000 ± 0.0000", DASH, DASH, DASH]
