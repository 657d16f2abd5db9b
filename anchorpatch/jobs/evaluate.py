"""Evaluate an ordinary network on shards of patches: Tables 3 and 4.

Shards -> network -> softmax -> sum over an image's patches -> accuracy, beside the same network
on whole images, with the cost of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from anchorpatch.classes import AS_NAMED, IMAGENET_NAMES, ClassNames, Matching
from anchorpatch.errors import DataError, SettingsError, WeightsError
from anchorpatch.images.source import spread_rows, without_images
from anchorpatch.jobs.crops import Crops, CropSource, open_shards
from anchorpatch.jobs.patch_scores import (
    Distributions,
    Keep,
    Predictions,
    score_images,
    score_patches,
)
from anchorpatch.jobs.results import Speed, Table3, Table4, table_3_rows, table_4_rows
from anchorpatch.jobs.speed import SPEED_IMAGES, Stopwatch
from anchorpatch.lsp import crop, grid_size
from anchorpatch.metrics import Figures, PatchFigures
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.complexity import check_sides, macs
from anchorpatch.models.registry import build_on_meta
from anchorpatch.networks import (
    Network,
    best_weights,
    load_for_whole_images,
    load_network,
    load_tuned,
)
from anchorpatch.runtime.checkpoint import Weights, load_weights
from anchorpatch.runtime.device import computing_on, joined
from anchorpatch.runtime.distributed import World
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import SCALES, STRIDE, Computing
from anchorpatch.shards.reader import ShardReader

#: Places of a patch that need no localizer.
PLACES: Final = ("center", "random")


@dataclass(frozen=True)
class EvaluateConfig(Computing):
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
            Table 4; None: as `anchorpatch.networks.load_for_whole_images` chooses.
        data: folder of the images, for shards that hold no whole images.
        anchornet_weights: of AnchorNet, to measure speed; None for
            RUNS/anchornet/best.safetensors where it exists.
        speed: measure images per second.
        scales: the images that chose one of these are counted.
        predictions: file for the decision on each image, .csv or .npz.
        batch_size: patches or images in a batch; None for 32 on CPU and 256 on a GPU.
        workers: processes that decode the images of ``data``.
        limit: take only so many images, evenly spread over the split.
        matching: of the outputs of ``weights``, ``whole_weights`` and the pretrained set with the
            classes of the shards.
        class_names: what the file of predictions calls classes.
        localizers: other places for the patch of Table 4: "center", "random".
        seed: of the random places.
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
    limit: int | None = None
    matching: Matching = AS_NAMED
    class_names: ClassNames = IMAGENET_NAMES
    localizers: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.localizers if name not in PLACES]:
            raise SettingsError(
                f"localizers: expected some of {', '.join(PLACES)}, got {', '.join(unknown)}"
            )


def run(config: EvaluateConfig, progress: Reporter | None = None) -> Table3:
    """Evaluate a network on patches and on whole images (Table 3).

    Raises:
        ShardError: there are no shards, or no images in them.
        CorruptShard: a shard cannot be read.
        DataError: the shards have other classes than the weights.
        WeightsError: weights are missing, or another network's.
        SettingsError: no such network, or it cannot take a patch.
        StorageError: the predictions cannot be written.
    """
    with Evaluation.prepare(config, progress) as job:
        whole, why_not = job.find_whole()
        anchornet, no_speed = job.find_anchornet(whole, why_not)
        networks = job.for_patches()
        distinct = list({id(network): network for network in networks.values()}.values())
        predictions = None
        if config.predictions is not None:
            known = job.reader, distinct[0].meta.classes, job.names
            predictions = Predictions(config.predictions, *known, job.device)
        one = distinct[0] if len(distinct) == 1 else None
        asked = None
        if whole is not None:
            asked, why_not = job.beside_patches(one)
        job.report.message(computing_on(job.device))
        module, localizer = distinct[0].module, AnchorNet(len(job.reader.network_classes))
        size = job.reader.settings.img_size
        gmacs = {side: macs(module, side) / 1e9 for side in (*config.scales, size)}
        gmacs_anchornet = macs(localizer, size, localizer.localize) / 1e9
        figures = job.score_whole(asked, whole, config.scales) if asked and whole else None
        patches = job.score_patches(networks, keep=predictions.keep if predictions else None)
        if predictions is not None:
            predictions.write(job.world)
        speed = job.measure(networks, whole, anchornet) if anchornet and whole else None
        missing = {f"row {size}": why_not if config.whole else None, "speed": no_speed}
        by_scale = ", ".join(f"{net.source} ({scale} px)" for scale, net in networks.items())
        weights: dict[str, str | None] = {str(s): net.source for s, net in networks.items()}
        weights |= {"whole": asked.source if asked else None, "all": one.source if one else None}
        return Table3(
            network=config.network,
            shards=str(job.reader.folder),
            weights=one.source if one else by_scale,
            whole_weights=weights["whole"],
            whole_source=whole.description if whole and asked else None,
            gmacs_whole=gmacs[size],
            gmacs_anchornet=gmacs_anchornet,
            rows=table_3_rows(patches, figures, gmacs, gmacs_anchornet, weights, size),
            speed=speed,
            left_out=tuple(f"{what}: {why}" for what, why in missing.items() if why),
            whole_trained_on=asked.trained_on if asked else "",
            notes=notes_of(*distinct, asked, resized="extract resized patches and whole images"),
            img_size=size,
        )


def run_rescale(config: EvaluateConfig, progress: Reporter | None = None) -> Table4:
    """Compare the strongest patch of each image with the image rescaled to its size (Table 4).

    Both are shown to the network for whole images: the paper does not train it further.

    Raises:
        DataError: there are no whole images, or the shards have other classes than the weights.
        AnchorpatchError: as `run`.
    """
    with Evaluation.prepare(config, progress) as job:
        whole, why_not = job.find_whole()
        if whole is None:
            raise DataError(f"--protocol rescale needs the whole images, but {why_not}")
        network = job.for_whole_images()
        job.report.message(computing_on(job.device))
        rescaled = {
            scale: job.score_whole(
                network,
                whole,
                (scale,),
                partial(Crops.rescaled, side=scale, interpolation=network.meta.interpolation),
            )
            for scale in config.scales
        }
        localized = job.score_patches(dict.fromkeys(config.scales, network), most=1)
        others = {
            name: {
                scale: job.score_whole(
                    network, whole, (scale,), partial(_cut, name, scale, config.seed)
                )
                for scale in config.scales
            }
            for name in config.localizers
        }
        return Table4(
            network=config.network,
            shards=str(job.reader.folder),
            weights=network.source,
            whole_source=whole.description,
            rows=table_4_rows(rescaled, localized, others),
            trained_on=network.trained_on,
            notes=notes_of(network, resized="extract resized the images and their patches"),
        )


def _cut(place: str, scale: int, seed: int, whole: Crops) -> Crops:
    """Return the patch of each image at its center, or at a random location of AnchorNet's."""
    n, side = len(whole.rows), whole.pixels.shape[1]
    corners = np.full((n, 2), (side - scale) // 2)
    if place == "random":
        grid = grid_size(side, side, scale)
        for corner, row in zip(corners, whole.rows.tolist(), strict=True):
            # By image, so that batches and processes do not matter.
            corner[:] = np.random.default_rng((seed, row)).integers(grid) * STRIDE
    cut = crop(whole.pixels, torch.arange(n), torch.from_numpy(corners), scale)
    return whole._replace(pixels=cut)


@dataclass(frozen=True)
class Evaluation:
    """Shards, opened and checked, and what can be measured of networks on them."""

    config: EvaluateConfig
    reader: ShardReader
    device: torch.device
    world: World
    report: Reporter
    names: ClassNames

    @classmethod
    @contextmanager
    def prepare(cls, config: EvaluateConfig, progress: Reporter | None) -> Iterator[Evaluation]:
        """Open and check everything; see `anchorpatch.jobs.evaluate.run` for errors."""
        with joined(config.device, progress, config.precision) as (device, world, report):
            # Without weights yet: what cannot be is said at once.
            check_sides(config.network, build_on_meta(config.network), config.scales)
            reader = open_shards(config.shards, config.split)
            job = cls(config, reader, device, world, report, config.class_names.of(reader.classes))
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

    def find_whole(self) -> tuple[CropSource | None, str | None]:
        """Return the whole images, or why there are none."""
        config = self.config
        try:
            found = CropSource.of_shards(
                self.reader,
                config.data,
                split=config.split,
                workers=config.workers,
                report=self.report,
            )
        except DataError as error:
            return None, str(error)
        return found, None

    def find_anchornet(
        self, whole: CropSource | None, why_not: str | None
    ) -> tuple[Weights | None, str | None]:
        """Return AnchorNet's weights if speed can be measured, or why it cannot."""
        config = self.config
        path = config.anchornet_weights or best_weights(config.runs, "anchornet")
        if not config.speed:
            return None, None
        if config.scales != SCALES:
            return None, "needs the images of all scales"
        if whole is None:
            return None, why_not
        if config.anchornet_weights is None and not path.is_file():
            return None, f"needs --anchornet-weights, as {path} does not exist"
        weights = load_weights(path)
        if weights.sha256 != self.reader.header.weights_sha256:
            self.report.message(
                f"{weights.path}: not the weights that the shards were made with; AnchorNet may "
                "choose other scales than theirs, and speed depends on these"
            )
        return weights, None

    def for_patches(self) -> dict[int, Network]:
        """Load the network that decides on patches, or one per scale, by scale.

        Raises:
            WeightsError: there is none, or it cannot be used.
        """
        config, name = self.config, self.config.network
        classes, message = self.reader.classes, self.report.message
        if config.weights is not None:
            given = load_network(name, classes, config.weights, message, matching=config.matching)
            return dict.fromkeys(config.scales, given)
        path = best_weights(config.runs, name)
        paths = {scale: best_weights(config.runs, name, scale=scale) for scale in config.scales}
        missing = [scale for scale, file in paths.items() if not file.is_file()]
        if path.is_file() and not config.per_scale:
            return dict.fromkeys(config.scales, load_tuned(name, classes, path, message))
        if not missing:
            return {s: load_tuned(name, classes, file, message) for s, file in paths.items()}
        one_of_several = config.per_scale or len(missing) < len(paths)
        option = f" --scale {missing[0]}" if one_of_several else ""
        raise WeightsError(
            f"{paths[missing[0]] if one_of_several else path} does not exist: run `anchorpatch "
            f"finetune {name}{option}`, or name weights with --weights FILE (--weights default: "
            "the pretrained ones)"
        )

    def for_whole_images(self, at_hand: Network | None = None) -> Network:
        """Load the network that is asked about whole images; see `EvaluateConfig`.

        Args:
            at_hand: the network that decides on all patches, where there is one.
        """
        config = self.config
        name, classes, message = config.network, self.reader.classes, self.report.message
        given = config.whole_weights or (config.weights if at_hand is None else None)
        options: dict[str, Any] = {"at_hand": at_hand, "matching": config.matching}
        return load_for_whole_images(name, classes, config.runs, message, given, **options)

    def beside_patches(self, one: Network | None) -> tuple[Network | None, str]:
        """Load what is asked about whole images beside patches, if anything, and why not.

        Args:
            one: the network that decides on all patches; None for networks of one scale, which
                have no say in whole images.
        """
        if not self.config.whole:
            return None, ""
        try:
            return self.for_whole_images(one), ""
        except WeightsError as error:
            if one is not None or self.config.whole_weights is not None:
                raise
            return None, str(error)

    def score_patches(
        self, networks: Mapping[int, Network], *, most: int | None = None, keep: Keep | None = None
    ) -> PatchFigures:
        """Decide on the images by their patches, or by the strongest of them.

        Args:
            networks: by the scale of the patches that they decide on.
            most: take only the strongest patches of each image, so many.
            keep: gets the decisions.
        """
        with self.counting("patches", self.config.scales) as (rows, advance):
            return score_patches(
                self.runs(networks),
                self.reader,
                rows,
                batch_size=self.batch_size,
                keep=keep,
                most=most,
                advance=advance,
            )

    def score_whole(
        self,
        network: Network,
        whole: CropSource,
        scales: tuple[int, ...],
        change: Callable[[Crops], Crops] = lambda batch: batch,
    ) -> Figures:
        """Decide on the whole images that chose one of the scales, changed first."""
        on_gpu = self.device.type == "cuda"
        with self.counting("whole images", scales) as (rows, advance):
            batches = whole.batches(rows, self.batch_size, pin_memory=on_gpu)
            return score_images(self.on_device(network), map(change, batches), advance=advance)

    def runs(self, networks: Mapping[int, Network]) -> dict[int, Distributions]:
        """Return the networks by scale, on the device."""
        return {scale: self.on_device(network) for scale, network in networks.items()}

    def on_device(self, network: Network) -> Distributions:
        """Return a network that gives distributions, on the device."""
        # Channels last takes the pixels as they lie in the shards.
        module = network.module.eval().to(self.device).to(memory_format=torch.channels_last)
        amp = self.config.precision == "bfloat16"
        return Distributions(module, self.device, network.meta, amp)

    @contextmanager
    def counting(
        self, what: str, scales: tuple[int, ...]
    ) -> Iterator[tuple[NDArray[np.int64], Callable[[int], None]]]:
        """Give this process's images of the scales, and what counts those that are done."""
        rows = self.rows(scales)
        mine = rows[list(self.world.share(len(rows)))]
        with self.report.counting(f"evaluating {what}", len(rows)):
            yield mine, self.world.counter(self.report.advance, len(mine), len(rows))

    def measure(
        self, networks: Mapping[int, Network], whole: CropSource, weights: Weights
    ) -> Speed | None:
        """Time both ways. That is for the main process: None in the others."""
        if not self.world.is_main:
            return None
        with self.stopwatch(networks, whole, weights) as watch:
            return watch.speed()

    def stopwatch(
        self, networks: Mapping[int, Network], whole: CropSource, weights: Weights
    ) -> Stopwatch:
        """Read the images on which speed is measured, and return what measures it."""
        self.report.message("measuring speed")
        rows, size = self.rows(SCALES), self.batch_size
        some = rows[spread_rows(len(rows), SPEED_IMAGES[self.device.type])]
        pixels = torch.cat([batch.pixels for batch in whole.batches(some, size)])
        how = self.reader.settings, self.device, self.config
        return Stopwatch(self.runs(networks), weights, *how, pixels, size)


def notes_of(*networks: Network | None, resized: str) -> tuple[str, ...]:
    """Return what is special about networks, each once.

    That is how their outputs were matched with the classes, and an interpolation that is not that
    of the pixels.
    """
    notes = []
    for network in networks:
        if network is not None:
            how = network.meta.interpolation
            notes += [network.note] if network.note else []
            if how != "bilinear" and network.trained_on != "patches":
                notes.append(f"{network.source}: trained with {how} resizing; {resized} bilinearly")
    return tuple(dict.fromkeys(notes))
