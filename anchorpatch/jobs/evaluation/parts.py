"""The parts of an evaluation of an ordinary network: what is opened, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from anchorpatch.errors import DataError, WeightsError
from anchorpatch.images.folder import spread_rows, without_images
from anchorpatch.jobs.crops import Crops, ImageSource
from anchorpatch.jobs.evaluation.config import EvaluateNetworkConfig
from anchorpatch.jobs.evaluation.network_speed import Speed, measure_speed
from anchorpatch.jobs.evaluation.patch_scores import (
    Distributions,
    Keep,
    open_shards,
    score_images,
    score_patches,
)
from anchorpatch.jobs.evaluation.tables import WHOLE, Costs
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.jobs.metrics import Figures, PatchFigures
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.complexity import macs
from anchorpatch.models.registry import build_on_meta, check_name
from anchorpatch.networks import (
    Network,
    best_weights,
    check_sides,
    load_for_whole_images,
    load_network,
    load_tuned,
    run_folder,
)
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.runtime.device import resolve_device
from anchorpatch.runtime.distributed import World, process_group
from anchorpatch.runtime.memory import keep_freed_memory
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import SCALES, LspSettings
from anchorpatch.shards.reader import ShardReader

__all__ = ["Evaluation"]

#: Images on which speed is measured: some seconds for a ResNet-50.
_SPEED_IMAGES: Final = {"cpu": 32, "cuda": 2048}


@dataclass(frozen=True)
class Evaluation:
    """Shards, opened and checked, and what can be measured of networks on them.

    Attributes:
        config: what is evaluated.
        reader: of the shards.
        device: where it computes.
        world: the processes.
        report: is told what is done.
    """

    config: EvaluateNetworkConfig
    reader: ShardReader
    device: torch.device
    world: World
    report: Reporter

    @classmethod
    @contextmanager
    def prepare(
        cls, config: EvaluateNetworkConfig, progress: Reporter | None
    ) -> Iterator[Evaluation]:
        """Open and check everything; see `anchorpatch.jobs.evaluate_network.run` for errors."""
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
        path = best_weights(run_folder(config.runs, name))
        paths = {s: best_weights(run_folder(config.runs, name, scale=s)) for s in config.scales}
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
        """Load the network that is asked about whole images; see `EvaluateNetworkConfig`.

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
        sides = (*self.config.scales, WHOLE)
        anchornet = AnchorNet(len(self.reader.network_classes))
        return Costs(
            {side: macs(module, side) / 1e9 for side in sides},
            macs(anchornet, WHOLE, anchornet.localize) / 1e9,
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
        best = best_weights(run_folder(self.config.runs, "anchornet"))
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
        on_gpu, settings = self.device.type == "cuda", self.reader.settings
        rows = self.rows(SCALES)
        n = min(len(rows), _SPEED_IMAGES[self.device.type])
        some = rows[spread_rows(len(rows), n)]
        pixels = torch.cat([batch.pixels for batch in whole.batches(some, self.batch_size)])
        amp = self.config.amp
        lsp = LspSettings(settings.max_patches, settings.iou_threshold, settings.coverage)
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
