"""Evaluate an ordinary network on shards of patches: Tables 3 and 4.

Shards -> network -> softmax -> sum over an image's patches -> accuracy, beside the same network
on whole images, with the cost of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from anchorpatch.errors import DataError, WeightsError
from anchorpatch.images.folder import spread_rows, without_images
from anchorpatch.jobs.crops import Crops, ImageSource
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.jobs.patch_scores import (
    Distributions,
    Keep,
    open_shards,
    score_images,
    score_patches,
)
from anchorpatch.jobs.predictions import Predictions, check_predictions_path
from anchorpatch.jobs.results import Speed, Table3, Table3Row, Table4, Table4Row
from anchorpatch.jobs.speed import measure_speed
from anchorpatch.metrics import Figures, PatchFigures
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.complexity import check_sides, macs
from anchorpatch.models.registry import build_on_meta, check_name
from anchorpatch.networks import (
    Network,
    best_weights,
    load_for_whole_images,
    load_network,
    load_tuned,
)
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.runtime.device import computing_on, keep_freed_memory, resolve_device
from anchorpatch.runtime.distributed import World, process_group
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import CROP, SCALES
from anchorpatch.shards.reader import ShardReader

#: Images on which speed is measured: some seconds for a ResNet-50.
_SPEED_IMAGES: Final = {"cpu": 32, "cuda": 2048}


@dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated, and on what.

    Attributes:
        network: name of the network.
        shards: folder that holds the split's shards.
        split: name of the split's folder.
        runs: folder of training runs.
        weights: for patches: a file, "default" or "none"; None for
            RUNS/NETWORK/best.safetensors, or where there is none for one network per scale,
            RUNS/NETWORK-SCALE/best.safetensors.
        per_scale: take one network per scale also where there is one for all.
        whole: also evaluate whole images, where there are some.
        whole_weights: the same as ``weights`` for whole images, and for both columns of
            Table 4; None for the first of RUNS/NETWORK-baseline/best.safetensors, ``weights``
            unless they were fine-tuned on patches, the pretrained set, and ``weights``.
        data: folder of the images, for shards that hold no whole images.
        anchornet_weights: of AnchorNet, to measure speed; None for
            RUNS/anchornet/best.safetensors where it exists.
        speed: measure images per second.
        scales: the images that chose one of these are counted.
        predictions: file for the decision on each image, .csv or .npz.
        batch_size: patches or images in a batch; None for 32 on CPU and 256 on a GPU.
        workers: processes that decode the images of ``data``.
        device: auto, cpu or cuda.
        amp: compute in bfloat16.
        limit: take only so many images, evenly spread over the split.
    """

    network: str
    shards: Path = Path("shards")
    split: str = "val"
    runs: Path = Path("runs")
    weights: str | Path | None = None
    per_scale: bool = False
    whole: bool = True
    whole_weights: str | Path | None = None
    data: Path = Path("data")
    anchornet_weights: Path | None = None
    speed: bool = True
    scales: tuple[int, ...] = SCALES
    predictions: Path | None = None
    batch_size: int | None = None
    workers: int = 0
    device: str = "auto"
    amp: bool = False
    limit: int | None = None


def run(config: EvaluateConfig, progress: Reporter | None = None) -> Table3:
    """Evaluate a network on patches and on whole images (Table 3).

    Raises:
        ShardError: there are no shards, no images in them, or an image has no patch.
        CorruptShard: a shard cannot be read.
        DataError: the shards have other classes than the weights.
        WeightsError: weights are missing, or another network's.
        SettingsError: no such network, or it cannot take a patch.
        StorageError: the predictions cannot be written.
    """
    if config.predictions is not None:
        check_predictions_path(config.predictions)
    with _Evaluation.prepare(config, progress) as job:
        whole, why_not = job.find_whole()
        anchornet, no_speed = job.find_anchornet(whole, why_not)
        networks = job.for_patches()
        distinct = list({id(network): network for network in networks.values()}.values())
        asked = None
        if whole is not None and config.whole:
            try:
                asked = job.for_whole_images(distinct[0] if len(distinct) == 1 else None)
            except WeightsError as error:
                if len(distinct) == 1 or config.whole_weights is not None:
                    raise
                why_not = str(error)  # networks of one scale have no say in whole images
        job.report.message(computing_on(job.device))
        costs = job.costs(distinct[0].module)
        figures = job.score_whole(asked, whole) if asked and whole else None
        predictions = None
        if config.predictions is not None:
            predictions = Predictions(config.predictions, job.reader, job.device)
        patches = job.score_patches(networks, keep=predictions.keep if predictions else None)
        if predictions is not None:
            predictions.write(job.world)
        speed = job.measure(networks, whole, anchornet) if anchornet and whole else None
        missing = {"row 224": why_not if config.whole else None, "speed": no_speed}
        one = distinct[0].source if len(distinct) == 1 else None
        by_scale = ", ".join(f"{net.source} ({scale} px)" for scale, net in networks.items())
        whole_weights = asked.source if asked else None
        weights = {str(scale): network.source for scale, network in networks.items()}
        weights_of_rows = {**weights, str(CROP): whole_weights, "all": one}
        return Table3(
            network=config.network,
            shards=str(job.reader.folder),
            weights=one or by_scale,
            whole_weights=whole_weights,
            whole_source=whole.description if whole and asked else None,
            gmacs_whole=costs.network[CROP],
            gmacs_anchornet=costs.anchornet,
            rows=tuple(
                replace(row, weights=weights_of_rows[row.scale])
                for row in table_3_rows(patches, figures, costs)
            ),
            speed=speed,
            left_out=tuple(f"{what}: {why}" for what, why in missing.items() if why),
            whole_trained_on=asked.trained_on if asked else "",
        )


def run_rescale(config: EvaluateConfig, progress: Reporter | None = None) -> Table4:
    """Compare the strongest patch of each image with the image rescaled to its size (Table 4).

    Both are shown to the network for whole images: the paper does not train it further.

    Raises:
        DataError: there are no whole images, or the shards have other classes than the weights.
        AnchorpatchError: as `run`.
    """
    with _Evaluation.prepare(config, progress) as job:
        whole, why_not = job.find_whole()
        if whole is None:
            raise DataError(f"rescaling needs the whole images, but {why_not}")
        network = job.for_whole_images()
        job.report.message(computing_on(job.device))
        rescaled = {
            scale: job.score_whole(network, whole, (scale,), partial(_rescaled, side=scale))
            for scale in config.scales
        }
        localized = job.score_patches(dict.fromkeys(config.scales, network), most=1)
        return Table4(
            network=config.network,
            shards=str(job.reader.folder),
            weights=network.source,
            whole_source=whole.description,
            rows=table_4_rows(rescaled, localized),
            trained_on=network.trained_on,
        )


def _rescaled(batch: Crops, side: int) -> Crops:
    """Make whole images as small as a patch: antialiased bilinear."""
    pixels: Tensor = v2.functional.resize(
        batch.pixels.permute(0, 3, 1, 2), [side, side], antialias=True
    )
    return batch._replace(pixels=pixels.permute(0, 2, 3, 1))


@dataclass(frozen=True)
class _Evaluation:
    """Shards, opened and checked, and what can be measured of networks on them.

    Attributes:
        config: what is evaluated.
        reader: of the shards.
        device: where it computes.
        world: the processes.
        report: called with what is done.
    """

    config: EvaluateConfig
    reader: ShardReader
    device: torch.device
    world: World
    report: Reporter

    @classmethod
    @contextmanager
    def prepare(cls, config: EvaluateConfig, progress: Reporter | None) -> Iterator[_Evaluation]:
        """Open and check everything; see `anchorpatch.jobs.evaluate.run` for errors."""
        device = resolve_device(config.device)
        with process_group(device) as world:
            report = progress if progress is not None and world.is_main else Reporter()
            if device.type == "cpu":
                keep_freed_memory()
            # Without weights yet: what cannot be is said at once.
            check_name(config.network)
            check_sides(config.network, build_on_meta(config.network), config.scales)
            reader = open_shards(config.shards, config.split)
            job = cls(config, reader, device, world, report)
            if absent := without_images(reader.label[job.rows(SCALES)], reader.classes):
                report.message(absent)
            yield job

    @property
    def batch_size(self) -> int:
        """Patches or images in a batch."""
        return self.config.batch_size or (32 if self.device.type == "cpu" else 256)

    def rows(self, scales: tuple[int, ...]) -> NDArray[np.int64]:
        """Return the images that are evaluated and chose one of the scales."""
        taken = spread_rows(len(self.reader), self.config.limit)
        return taken[np.isin(self.reader.scale[taken], scales)]

    def find_whole(self) -> tuple[ImageSource | None, str | None]:
        """Return the whole images, or why there are none."""
        data, split = self.config.data, self.config.split
        try:
            found = ImageSource.of_shards(
                self.reader, data, split=split, workers=self.config.workers
            )
        except DataError as error:
            return None, str(error)
        return found, None

    def for_patches(self) -> dict[int, Network]:
        """Load the network that decides on patches, or one per scale, by scale.

        Raises:
            WeightsError: there is none, or it cannot be used.
        """
        config, name = self.config, self.config.network
        if config.weights is not None:
            return dict.fromkeys(config.scales, self._load(config.weights))
        path = best_weights(config.runs, name)
        paths = {s: best_weights(config.runs, name, scale=s) for s in config.scales}
        missing = [scale for scale, file in paths.items() if not file.is_file()]
        if path.is_file() and not config.per_scale:
            return dict.fromkeys(config.scales, self._load_tuned(path))
        if not missing:
            return {scale: self._load_tuned(file) for scale, file in paths.items()}
        if config.per_scale or len(missing) < len(paths):
            path = paths[missing[0]]
            advice = f"run `anchorpatch finetune {name} --scale {missing[0]}`"
        else:
            advice = f"run `anchorpatch finetune {name}`"
        raise WeightsError(
            f"{path} does not exist: {advice}, or name weights with --weights FILE (--weights "
            "default: the published ones)"
        )

    def for_whole_images(self, at_hand: Network | None = None) -> Network:
        """Load the network that is asked about whole images; see `EvaluateConfig`.

        Args:
            at_hand: the network that decides on all patches, where there is one.
        """
        config, message = self.config, self.report.message
        given = config.whole_weights or (config.weights if at_hand is None else None)
        if given is not None:
            return self._load(given)
        return load_for_whole_images(
            config.network, self.reader.classes, config.runs, message, at_hand=at_hand
        )

    def _load(self, source: str | Path) -> Network:
        name, message = self.config.network, self.report.message
        return load_network(name, self.reader.classes, source, message)

    def _load_tuned(self, path: Path) -> Network:
        name, message = self.config.network, self.report.message
        return load_tuned(name, self.reader.classes, path, message)

    def costs(self, module: torch.nn.Module) -> Costs:
        """Count what a network and AnchorNet cost."""
        sides = (*self.config.scales, CROP)
        anchornet = AnchorNet(len(self.reader.network_classes))
        return Costs(
            {side: macs(module, side) / 1e9 for side in sides},
            macs(anchornet, CROP, anchornet.localize) / 1e9,
        )

    def score_patches(
        self, networks: Mapping[int, Network], *, most: int | None = None, keep: Keep | None = None
    ) -> PatchFigures:
        """Decide on the images by their patches, or by the strongest of them.

        Args:
            networks: by the scale of the patches that they decide on.
            most: take only the strongest patches of each image, so many.
            keep: gets the decisions.
        """
        taken = spread_rows(len(self.reader), self.config.limit)
        mine = taken[list(self.world.share(len(taken)))]
        mine = mine[np.isin(self.reader.scale[mine], self.config.scales)]
        with self._counting("patches", self.config.scales, len(mine)) as advance:
            return score_patches(
                self._distributions(networks),
                self.reader,
                world=self.world,
                batch_size=self.batch_size,
                scales=self.config.scales,
                keep=keep,
                most=most,
                limit=self.config.limit,
                advance=advance,
            )

    def _distributions(self, networks: Mapping[int, Network]) -> dict[int, Distributions]:
        return {
            scale: Distributions(
                _on(network, self.device), self.device, network.meta, self.config.amp
            )
            for scale, network in networks.items()
        }

    def score_whole(
        self,
        network: Network,
        whole: ImageSource,
        scales: tuple[int, ...] | None = None,
        change: Callable[[Crops], Crops] = lambda batch: batch,
    ) -> Figures:
        """Decide on the whole images that chose one of the scales, changed first."""
        scales = scales or self.config.scales
        rows = self.rows(scales)[self.world.rank :: self.world.size]
        on_gpu = self.device.type == "cuda"
        batches = whole.batches(rows, self.batch_size, pin_memory=on_gpu)
        with self._counting("whole images", scales, len(rows)) as advance:
            return score_images(
                _on(network, self.device),
                map(change, batches),
                device=self.device,
                meta=network.meta,
                amp=self.config.amp,
                advance=advance,
            )

    @contextmanager
    def _counting(
        self, what: str, scales: tuple[int, ...], mine: int
    ) -> Iterator[Callable[[int], None]]:
        total, done = len(self.rows(scales)), 0

        def advance(images: int) -> None:
            nonlocal done
            before, done = done, done + images
            count = self.world.counted
            self.report.advance(count(done, mine, total) - count(before, mine, total))

        self.report.start(f"evaluating {what}", total)
        try:
            yield advance
        finally:
            self.report.stop()

    def find_anchornet(
        self, whole: ImageSource | None, why_not: str | None
    ) -> tuple[Weights | None, str | None]:
        """Return AnchorNet's weights if speed can be measured, or why it cannot."""
        path = self.config.anchornet_weights
        best = best_weights(self.config.runs, "anchornet")
        if not self.config.speed:
            return None, None
        if self.config.scales != SCALES:
            return None, "needs the images of all scales"
        if whole is None:
            return None, why_not
        if path is None and not best.is_file():
            return None, (
                f"needs AnchorNet's weights, and {best} does not exist: name them with "
                "--anchornet-weights"
            )
        weights = load_weights(path or best)
        if weights.sha256 != self.reader.header.weights_sha256:
            self.report.message(
                f"{weights.path}: not the weights that the shards were made with; AnchorNet may "
                "choose other scales than theirs, and speed depends on these"
            )
        return weights, None

    def measure(
        self, networks: Mapping[int, Network], whole: ImageSource, weights: Weights
    ) -> Speed | None:
        """Measure both ways in the main process; None in the others."""
        if not self.world.is_main:
            return None
        self.report.message("measuring speed")
        on_gpu, lsp = self.device.type == "cuda", self.reader.settings.lsp
        rows = self.rows(SCALES)
        n = min(len(rows), _SPEED_IMAGES[self.device.type])
        some = rows[spread_rows(len(rows), n)]
        pixels = torch.cat([batch.pixels for batch in whole.batches(some, self.batch_size)])
        amp = self.config.amp
        with Localizer(weights, lsp, self.device, batch_size=self.batch_size, amp=amp) as localizer:
            return measure_speed(
                self._distributions(networks),
                localizer,
                pixels.pin_memory() if on_gpu else pixels,
                batch_size=self.batch_size,
            )


def _on(network: Network, device: torch.device) -> torch.nn.Module:
    # Channels last takes the pixels as they lie in the shards.
    module = network.module.eval().to(device)
    return module.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one input, 1e9.

    Attributes:
        network: of the network, by the side of its input in pixels; 224 is there.
        anchornet: of localizing one image.
    """

    network: Mapping[int, float]
    anchornet: float


def table_3_rows(
    figures: PatchFigures, whole: Figures | None, costs: Costs
) -> tuple[Table3Row, ...]:
    """Return the lines of Table 3: whole images, where there are any, each scale, and all.

    Args:
        figures: of the network on patches.
        whole: of the network on whole images.
        costs: of the network for each scale and for 224 px, and of AnchorNet.
    """
    rows = [] if whole is None else [_whole_row(whole, costs)]
    spent = 0.0
    for scale, found in figures.by_scale.items():
        total = found.patches * costs.network[scale]
        rows.append(_patch_row(str(scale), found, total, costs))
        spent += total
    return (*rows, _patch_row("all", figures, spent, costs))


def _whole_row(whole: Figures, costs: Costs) -> Table3Row:
    gmacs = costs.network[CROP]
    return Table3Row(
        str(CROP), whole.images, None, gmacs, None, None, None, whole.top1, whole.top5, whole.loss
    )


def _patch_row(scale: str, found: Figures, total: float, costs: Costs) -> Table3Row:
    """Return a line on ``found.images`` whose patches cost ``total`` in all."""
    whole = costs.network[CROP]
    gmacs = total / found.images if found.images else None
    both = None if gmacs is None else gmacs + costs.anchornet
    return Table3Row(
        scale=scale,
        images=found.images,
        mean_patches=found.mean_patches,
        gmacs=gmacs,
        saved=_saved(gmacs, whole),
        gmacs_with_anchornet=both,
        saved_with_anchornet=_saved(both, whole),
        top1=found.top1,
        top5=found.top5,
        loss=found.loss,
    )


def _saved(gmacs: float | None, whole: float) -> float | None:
    return None if gmacs is None or not whole else 1 - gmacs / whole


def table_4_rows(rescaled: Mapping[int, Figures], localized: PatchFigures) -> tuple[Table4Row, ...]:
    """Return the lines of Table 4: each scale, and all.

    Args:
        rescaled: figures of the rescaled images by the scale that they chose.
        localized: figures of the strongest patch of the same images.
    """
    rows = [
        Table4Row(str(scale), r.images, r.top1, found.top1, r.top5, found.top5)
        for scale, r in rescaled.items()
        for found in (localized.by_scale[scale],)
    ]
    n = localized.images
    top1 = sum(r.images * (r.top1 or 0.0) for r in rescaled.values()) / n
    top5 = sum(r.images * (r.top5 or 0.0) for r in rescaled.values()) / n
    return (*rows, Table4Row("all", n, top1, localized.top1, top5, localized.top5))
