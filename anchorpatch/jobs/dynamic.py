"""Accuracy against cost, by dynamic inference: ``evaluate NETWORK --protocol dynamic``.

Every patch of the split goes through the network once; what each threshold of confidence costs, and
how often it is right, is read from `anchorpatch.jobs.looks.Looks`. Beside it stand a fixed number
of patches, and the whole image at several sizes. Thresholds for a budget come from images that are
neither measured nor trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import DataError, SettingsError, WeightsError
from anchorpatch.images.source import spread_rows
from anchorpatch.jobs.crops import Crops, CropSource, open_shards, rescaled
from anchorpatch.jobs.evaluate import EvaluateConfig, Evaluation, notes_of
from anchorpatch.jobs.localizer import Localized, Localizer
from anchorpatch.jobs.looks import (
    LookCosts,
    Looks,
    joined,
    not_trained_on,
    score_localized,
    score_looks,
)
from anchorpatch.jobs.speed import Way
from anchorpatch.jobs.tradeoff import (
    Calibration,
    Dynamic,
    DynamicRow,
    curve_of,
    fixed_numbers,
    row_of,
    savings,
)
from anchorpatch.metrics import Accuracy, Figures, probability_losses
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.complexity import macs, refusal
from anchorpatch.networks import Network, best_weights
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.runtime.device import computing_on, to_device
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import CROP, SCALES, THRESHOLDS
from anchorpatch.shards.reader import ShardReader
from anchorpatch.text import counted, few

#: Sizes of the whole image, at crops of 224 px.
_SIDES: Final = (224, 192, 160, 128, 96)


@dataclass(frozen=True, kw_only=True)
class DynamicConfig(EvaluateConfig):
    """What is evaluated; see `EvaluateConfig` for the rest.

    Attributes:
        confidence: one of `anchorpatch.settings.CONFIDENCES`.
        thresholds: of confidence; without any, and without budgets, `THRESHOLDS`.
        budgets: GMACs per image in all, for which thresholds are calibrated.
        glance: side in pixels to which the whole image is rescaled for the first look; None for
            none.
        calibrate_on: split of the shards with the images that thresholds are calibrated on.
        calibrate_images: how many of them, evenly spread.
    """

    confidence: str = "max"
    thresholds: tuple[float, ...] = ()
    budgets: tuple[float, ...] = ()
    glance: int | None = None
    calibrate_on: str = "train"
    calibrate_images: int = 2000

    def __post_init__(self) -> None:
        if self.budgets and self.calibrate_on == self.split:
            raise SettingsError(
                f"--calibrate-on {self.split}: the images of this split are measured; choose "
                "another one, such as train"
            )
        if not all(0 <= t <= 1 for t in self.thresholds):
            raise SettingsError(f"--threshold: expected 0 to 1, got {self.thresholds}")


def run(config: DynamicConfig, progress: Reporter | None = None) -> Dynamic:
    """Measure the curve of accuracy against cost.

    Raises:
        DataError: there are no whole images, and a glance is asked for; or there are no images to
            calibrate on.
        SettingsError: a budget is too small for the first look.
        AnchorpatchError: as `anchorpatch.jobs.evaluate.run`.
    """
    with Evaluation.prepare(config, progress) as job:
        whole, why_not = job.find_whole()
        if config.glance is not None and whole is None:
            raise DataError(f"--glance needs the whole images, but {why_not}")
        anchornet, no_speed = job.find_anchornet(whole, why_not)
        networks = job.for_patches()
        distinct = list({id(network): network for network in networks.values()}.values())
        one = distinct[0] if len(distinct) == 1 else None
        asked = None
        if whole is not None:
            asked, why_not = job.beside_patches(one)
        job.report.message(computing_on(job.device))
        module, size = distinct[0].module, job.reader.settings.img_size
        localizer = AnchorNet(len(job.reader.network_classes))
        costs = LookCosts(
            {side: macs(module, side) / 1e9 for side in config.scales},
            macs(localizer, size, localizer.localize) / 1e9,
            macs(_able(module, config), config.glance) / 1e9 if config.glance else 0.0,
        )
        glance = _glance(job, networks)
        thresholds = dict.fromkeys(config.thresholds)
        calibrated: list[tuple[float, float, float]] = []
        calibration = None
        if config.budgets:
            calibration, looks = _calibrate(job, networks, glance)
            calibrated = [_within(looks, costs, budget) for budget in sorted(config.budgets)]
        elif not thresholds:
            thresholds = dict.fromkeys(THRESHOLDS)
        looks, alone = _score(job, networks, whole, glance)
        rows = [] if asked is None or whole is None else _whole_rows(job, asked, whole)
        most = dict(zip(SCALES, job.reader.settings.max_patches, strict=True))
        fixed = fixed_numbers({scale: most[scale] for scale in config.scales}, alone)
        of_looks = [row_of("fixed", name, alone, taken, costs) for name, taken in fixed.items()]
        at = partial(_at_threshold, looks, costs)
        of_looks += [at(threshold) for threshold in thresholds]
        for budget, threshold, met in calibrated:
            of_looks.append(replace(at(threshold), budget=budget, calibrated=met))
        rows += of_looks
        if anchornet is not None and whole is not None and job.world.is_main:
            rows = _timed(job, networks, whole, anchornet, rows, asked, glance)
        missing = {"whole images": why_not if config.whole else None, "speed": no_speed}
        by_scale = ", ".join(f"{net.source} ({scale} px)" for scale, net in networks.items())
        return Dynamic(
            network=config.network,
            shards=str(job.reader.folder),
            weights=one.source if one else by_scale,
            whole_weights=asked.source if asked else None,
            whole_trained_on=asked.trained_on if asked else "",
            whole_source=whole.description if whole and asked else None,
            confidence=config.confidence,
            glance=config.glance,
            gmacs_anchornet=costs.anchornet,
            rows=tuple(rows),
            savings=savings(looks, alone, costs, fixed),
            curve=curve_of(looks, costs),
            calibration=calibration,
            left_out=tuple(f"{what}: {why}" for what, why in missing.items() if why),
            notes=notes_of(*distinct, asked, resized="extract resized patches and whole images"),
            img_size=size,
        )


def _able(module: torch.nn.Module, config: DynamicConfig) -> torch.nn.Module:
    """Return a network that takes the glance.

    Raises:
        SettingsError: it does not.
    """
    assert config.glance is not None
    if why := refusal(module, config.glance):
        raise SettingsError(
            f"--glance {config.glance}: {config.network} cannot take images of this size ({why})"
        )
    return module


# --- looking ------------------------------------------------------------------------------


def _glance(job: Evaluation, networks: Mapping[int, Network]) -> Way | None:
    """Return what gives the distributions of whole images at the size of a glance."""
    side = job.config.glance  # type: ignore[attr-defined]
    if side is None:
        return None
    nearest = networks[min(networks, key=lambda scale: abs(scale - side))]
    run, how = job.on_device(nearest), nearest.meta.interpolation

    return lambda pixels: run(rescaled(pixels.to(job.device), side, how))


def _score(
    job: Evaluation,
    networks: Mapping[int, Network],
    whole: CropSource | None,
    glance: Way | None,
) -> tuple[Looks, Looks]:
    """Return what each look at the split's images decides: with the glance, and without."""
    config = job.config
    assert isinstance(config, DynamicConfig)
    rows = job.rows(config.scales)
    order = np.concatenate([rows[job.reader.scale[rows] == scale] for scale in config.scales])
    with job.counting("patches", config.scales) as (mine, advance):
        # In the order in which patches are read.
        own = order[np.isin(order, mine)]
        return score_looks(
            job.runs(networks),
            job.reader,
            order,
            own,
            batch_size=job.batch_size,
            measure=config.confidence,
            glances=_glances(glance, whole, own, job.batch_size),
            advance=advance,
        )


def _glances(
    glance: Way | None, images: CropSource | None, rows: NDArray[np.int64], size: int
) -> Iterator[Tensor] | None:
    """Return the distributions of glances at images, in batches; None without glances."""
    if glance is None or images is None:
        return None
    return (glance(batch.pixels) for batch in images.batches(rows, size))


def _whole_rows(job: Evaluation, network: Network, whole: CropSource) -> list[DynamicRow]:
    """Measure whole images at several sizes."""
    size = whole.crop.img_size
    sides = sorted({round(side * size / CROP) for side in _SIDES}, reverse=True)
    sides = [side for side in sides if refusal(network.module, side) is None]
    run, how = job.on_device(network), network.meta.interpolation
    accuracy = Accuracy(job.device, len(sides))
    with (
        job.counting("whole images", job.config.scales) as (rows, advance),
        closing(whole.batches(rows, job.batch_size)) as batches,
        torch.inference_mode(),
    ):
        for batch in batches:
            labels = to_device(batch.labels, job.device)
            crops = batch._replace(pixels=batch.pixels.to(job.device))
            for j, side in enumerate(sides):
                small = crops if side == size else crops.rescaled(side, how)
                p = run(small.pixels)
                accuracy.update(p, labels, probability_losses(p, labels), group=j)
            advance(len(batch.rows))
    _, figures = accuracy.figures()

    def row(side: int, found: Figures) -> DynamicRow:
        cost = macs(network.module, side) / 1e9
        return DynamicRow("whole", str(side), found.images, 0.0, cost, cost, found.top1, found.top5)

    return [row(side, found) for side, found in zip(sides, figures, strict=True)]


def _at_threshold(looks: Looks, costs: LookCosts, threshold: float) -> DynamicRow:
    row = row_of("dynamic", f"{threshold:.5g}", looks, looks.stops(threshold), costs)
    return replace(row, threshold=threshold)


# --- thresholds for budgets ---------------------------------------------------------------


def _within(looks: Looks, costs: LookCosts, budget: float) -> tuple[float, float, float]:
    """Return a budget, its threshold, and what it costs the images of the calibration.

    Raises:
        SettingsError: the budget is below what the first look costs.
    """
    threshold, met = looks.threshold_for(costs, budget)
    if met > budget + 1e-9:
        raise SettingsError(
            f"--budget {budget:g}: expected at least {met:.3f} GMACs, which the first look at an "
            f"image costs, AnchorNet's {costs.anchornet:.3f} included; raise it, or give a --glance"
        )
    return budget, threshold, met


def _calibrate(
    job: Evaluation, networks: Mapping[int, Network], glance: Way | None
) -> tuple[Calibration, Looks]:
    """Look at images that are neither measured nor trained on.

    Raises:
        DataError: there are none.
        WeightsError: their patches must be localized, and there are no weights to do it.
    """
    config = job.config
    assert isinstance(config, DynamicConfig)
    reader = open_shards(config.shards, config.calibrate_on)
    if reader.classes != job.reader.classes:
        raise DataError(
            f"{reader.folder}: expected shards of the classes of {job.reader.folder}, to calibrate "
            f"on, found {counted(len(reader.classes), 'class')} ({few(reader.classes)})"
        )
    others = "choose a split of other images with --calibrate-on, or give --threshold"
    where = str(reader.folder)
    rows, share = not_trained_on(networks.values(), reader.path, where, others)
    rows = rows[spread_rows(len(rows), config.calibrate_images)]
    if share is None:
        source = f"{counted(len(rows), 'image')} of {reader.folder}"
    else:
        source = f"{counted(len(rows), 'image')} of {reader.folder}, held out by finetune"
    job.report.message(f"calibrating on {source}")
    ours, theirs = job.reader.settings, reader.settings
    same = (ours.lsp, str(ours.crop), job.reader.header.weights_sha256) == (
        theirs.lsp,
        str(theirs.crop),
        reader.header.weights_sha256,
    )
    if same:
        rows = np.concatenate([rows[reader.scale[rows] == scale] for scale in config.scales])
        mine = np.sort(list(job.world.share(len(rows))))
        images = _crops(job, reader) if glance is not None else None
        looks, _ = score_looks(
            job.runs(networks),
            reader,
            rows,
            rows[mine],
            batch_size=job.batch_size,
            measure=config.confidence,
            glances=_glances(glance, images, rows[mine], job.batch_size),
        )
        return Calibration(len(rows), source, share), looks
    looks = _localized(job, networks, reader, rows, glance)
    return Calibration(len(looks.counts), source, share), looks


def _crops(job: Evaluation, reader: ShardReader) -> CropSource:
    """Return the whole images of the shards that thresholds are calibrated on."""
    config = job.config
    assert isinstance(config, DynamicConfig)
    options: dict[str, Any] = {"split": config.calibrate_on, "workers": config.workers}
    return CropSource.of_shards(reader, config.data, **options, report=job.report)


def _localized(
    job: Evaluation,
    networks: Mapping[int, Network],
    reader: ShardReader,
    rows: NDArray[np.int64],
    glance: Way | None,
) -> Looks:
    """Localize patches in images as those of the split were, and look at them.

    Raises:
        WeightsError: there are no weights of the AnchorNet that made the split's shards.
    """
    config, ours = job.config, job.reader.settings
    assert isinstance(config, DynamicConfig)
    path = config.anchornet_weights or best_weights(config.runs, "anchornet")
    needed = (
        f"{reader.folder}: its patches were selected otherwise than those of {job.reader.folder}, "
        f"so they are localized anew ({ours.lsp})"
    )
    if not path.is_file():
        raise WeightsError(f"{needed}, for which {path} is missing: give --anchornet-weights FILE")
    weights = load_weights(path)
    if weights.sha256 != job.reader.header.weights_sha256:
        raise WeightsError(
            f"{needed}, but {path} are not the weights that made {job.reader.folder}: give those "
            "with --anchornet-weights FILE"
        )
    job.report.message(needed)
    images = _crops(job, reader)
    if str(images.crop) != str(ours.crop):
        raise DataError(
            f"{reader.folder}: expected crops as in {job.reader.folder} ({ours.crop}), to "
            f"calibrate on, found {images.crop}; extract it in the same way"
        )
    how = job.device, config.engine, config.precision
    size = job.batch_size
    with Localizer(weights, ours.lsp, *how, side=ours.img_size, batch_size=size) as localizer:

        def batches() -> Iterator[tuple[Crops, Localized]]:
            # All of them by each process: this part is small, and so are the differences of ranks.
            with closing(images.batches(rows, size)) as loaded:
                for crops in loaded:
                    yield crops, localizer.submit(crops.pixels).result(lambda i: images.path(i))

        scored = partial(score_localized, batch_size=size, measure=config.confidence)
        tables = scored(job.runs(networks), batches(), glance=glance)
    looks = joined(tables)
    return looks.of_scales(config.scales)


# --- speed --------------------------------------------------------------------------------


def _timed(
    job: Evaluation,
    networks: Mapping[int, Network],
    whole: CropSource,
    anchornet: Weights,
    rows: Sequence[DynamicRow],
    asked: Network | None,
    glance: Way | None,
) -> list[DynamicRow]:
    """Add the speed of the whole image at its own size, of all patches, and of each threshold."""
    measure = job.config.confidence  # type: ignore[attr-defined]
    fixed = [i for i, row in enumerate(rows) if row.way == "fixed"]
    with job.stopwatch(networks, whole, anchornet) as watch:
        ways: dict[int, Way] = {}
        for i, row in enumerate(rows):
            if row.way == "whole" and row.setting == str(whole.crop.img_size) and asked:
                ways[i] = watch.whole(job.on_device(asked))
            elif row.threshold is not None:
                ways[i] = watch.dynamic(row.threshold, measure, glance)
        if fixed:
            ways[fixed[-1]] = watch.by_patches
        by_name = {str(i): way for i, way in ways.items()}
        rates, latencies = watch.rates(by_name), watch.latencies(by_name)
    timed = list(rows)
    for i in ways:
        latency = latencies[str(i)]
        timed[i] = replace(
            rows[i],
            images_per_second=rates[str(i)],
            images_per_second_single=latency.images_per_second,
            latency_median=latency.median,
            latency_p95=latency.p95,
        )
    return timed
