"""What networks learn from whole images: folders, random crops, evaluation and weights files.

AnchorNet learns from six cross-entropies (section 4.1), a BagNet from one; for Saccader's stages
see `anchorpatch.jobs.train`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anchorpatch.errors import DataError, WeightsError
from anchorpatch.images.crops import (
    PictureCache,
    RandomCrop,
    build_cache,
    cache_side,
    epoch_order,
    load_training_batches,
    open_cache,
)
from anchorpatch.images.loader import load_batches
from anchorpatch.images.source import ImageSource, open_source, without_images
from anchorpatch.metrics import (
    OUTPUTS,
    Accuracy,
    AnchorNetAccuracy,
    six_distances,
    six_losses,
)
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.registry import build
from anchorpatch.networks import Network
from anchorpatch.runtime.checkpoint import WeightsMeta, load_into, load_weights
from anchorpatch.runtime.device import exact_float32
from anchorpatch.runtime.distributed import World
from anchorpatch.runtime.progress import Reporter
from anchorpatch.storage import sha256_of
from anchorpatch.text import counted
from anchorpatch.training.config import ANCHORNET_ONLY, TrainConfig
from anchorpatch.training.loop import Batch, Task


def open_images(
    config: TrainConfig, world: World, report: Reporter
) -> tuple[ImageSource, ImageSource, PictureCache | None]:
    """Find the images, and fill the cache where one is wanted.

    Returns:
        Training images; validation images, of the same classes; decoded training pictures, or
        None where files are decoded each epoch.

    Raises:
        DataError: the folders do not fit together, or hold too few images.
        SettingsError: the batch does not divide evenly.
    """
    train = open_source(
        config.data,
        "train",
        files=config.files,
        only_labelled=config.only_labelled,
        allow_empty=config.allow_empty,
        report=report,
    )
    val = open_source(
        config.data,
        "val",
        config.labels,
        only_labelled=config.only_labelled,
        classes=train.classes,
        classes_of=str(train.root),
        report=report,
    )
    if train.places is not None and train.name(0) == val.name(0):
        raise DataError(
            f"{train.root}: expected a train and a val split, found the same images for both; "
            "give a folder or archive that holds both, or a pattern with {split} in it"
        )
    if len(train) < config.batch_size:
        raise DataError(
            f"{train.root}: {len(train)} images are too few for a batch of {config.batch_size}; "
            "choose a smaller --batch-size, or --recipe small"
        )
    for images in (train, val):
        absent = without_images(images.labels, images.classes)
        for remark in (images.passed_over(), absent and f"{images.root}: {absent}"):
            if remark:
                report.message(remark)
    config.piece(world)
    cache, side = None, cache_side(config.crop)
    if config.image_cache is not None:
        if world.is_main:
            report.message(f"decoding {counted(len(train), 'image')} into {config.image_cache}")
            threads = max(1, config.workers)
            build_cache(train, config.image_cache, threads, config.background, side)
        world.wait(f"rank 0 to decode {counted(len(train), 'image')} into {config.image_cache}")
        cache = open_cache(train, config.image_cache, config.background, side)
    return train, val, cache


class ImageTask(Task):
    """A network that learns from whole images, by default by one cross-entropy as a BagNet.

    Args:
        config: of the run.
        train: training images.
        val: validation images, of the same classes.
        cache: decoded training pictures; None decodes files each epoch.
        device: where the network is.
        world: the processes of the run.

    Attributes:
        bad: training images that could not be decoded, with the reason.
        damaged: training images that were decoded with damage.
    """

    config: TrainConfig
    kind = ""  # that of the architecture
    starts_from = ""  # the same architecture
    unit = "images"

    #: Validation images of a batch on CPU, the fastest size, and on a GPU.
    at_once: ClassVar[tuple[int, int]] = (4, 64)

    #: What counts the right answers of an evaluation.
    accuracy: ClassVar[type[Accuracy] | type[AnchorNetAccuracy]] = Accuracy

    #: Settings that mean nothing to the network.
    meaningless: ClassVar[frozenset[str]] = ANCHORNET_ONLY

    def __init__(
        self,
        config: TrainConfig,
        train: ImageSource,
        val: ImageSource,
        cache: PictureCache | None,
        device: torch.device,
        world: World,
    ) -> None:
        super().__init__(config, device, world)
        self.train, self.val, self.cache = train, val, cache
        self.steps = len(self.train) // config.batch_size
        self.size = self.steps * config.batch_size
        self.bad: dict[int, str] = {}
        self.damaged: set[int] = set()
        self.meta = WeightsMeta(
            config.arch,
            self.train.classes,
            config.se,
            config.weighted_mean,
        ).cropped(config.crop)
        self.kind = self.kind or config.arch
        arch = self.starts_from or config.arch
        self.start = load_weights(config.init, arch) if config.init else None
        settings = {k: v for k, v in config.decisive().items() if k not in self.meaningless}
        for name in ("img_size", "crop_mode", "crop_pct", "background"):
            # By default these say nothing, so that checkpoints from before them are continued.
            if settings[name] == getattr(TrainConfig, name):
                del settings[name]
        self.identity = {
            **settings,
            "image_cache": config.image_cache is not None,
            "processes": self.world.size,
            "classes": list(self.train.classes),
            "train_images": self.train.digest(),
            "val_images": self.val.digest(),
            "init": self.start.sha256 if self.start else None,
        }
        recorded = {k: v for k, v in self.identity.items() if k != "classes"}
        self.origin = {"recipe": config.recipe, "settings": recorded}

    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the device.

        Classifiers of other classes keep their random start.
        """
        net, weights, classes = self.network(), self.start, self.train.classes
        if weights is not None and weights.meta.classes != classes:
            kept = {k: v for k, v in net.state_dict().items() if "classifier" in k}
            weights = replace(weights, tensors={**weights.tensors, **kept})
        if weights is not None:
            load_into(net, weights)
        return net.to(self.device)

    def network(self) -> nn.Module:
        """Return the network with random weights."""
        return build(self.config.arch, len(self.train.classes))

    def outputs(self, module: nn.Module, inputs: Tensor) -> Any:
        """Return what `accuracy` counts, of validation images."""
        return module(inputs)

    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Yield the pieces of random crops from a step of an epoch to the end of the run."""
        config = self.config
        loaded = load_training_batches(
            self.train,
            self._pieces(epoch, step),
            RandomCrop(
                config.crop_size, config.min_area, seed=config.seed, background=config.background
            ),
            workers=config.workers,
            cache=self.cache,
            pin_memory=self.device.type == "cuda",
        )
        share = 1 / self.world.size / config.accumulate
        with closing(loaded):
            for batch in self.waits.each("data", loaded):
                self.damaged.update(batch.damaged)
                self.bad.update(batch.bad)
                bad, total = len(self.bad), len(self.train)
                if batch.bad and (bad > config.max_bad * total or not len(batch.index)):
                    row, reason = batch.bad[0]
                    such_as = f", such as {self.train.path(row)} ({reason})"
                    raise self.train.too_many_bad(bad, total, config.max_bad, such_as)
                labels = self.train.labels[batch.index].astype(np.int64)
                yield self.batch(batch.pixels, labels, share)

    def _pieces(self, epoch: int, step: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield epoch and rows of each piece of this process."""
        config, world = self.config, self.world
        shape = config.accumulate * world.size, config.piece(world)
        for now in range(epoch, config.epochs):
            order = epoch_order(len(self.train), config.seed, now)
            for start in range(step if now == epoch else 0, self.steps):
                batch = order[start * config.batch_size :][: config.batch_size]
                for rows in batch.reshape(shape)[world.rank :: world.size]:
                    yield now, rows

    def evaluate(self, module: nn.Module, check: Callable[[], object]) -> dict[str, Any]:
        """Return the figures of the validation images; calls check() at times."""
        rows = list(self.world.share(len(self.val)))
        size = self.at_once[self.device.type != "cpu"]
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        accuracy, bad = self.accuracy(self.device), 0
        loaded = load_batches(
            self.val,
            batches,
            workers=min(self.config.workers, len(batches)),
            crop=self.config.crop,
            pin_memory=self.device.type == "cuda",
        )
        with (
            closing(loaded),
            torch.inference_mode(),
            exact_float32(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp),
        ):
            for batch in loaded:
                check()
                bad += len(batch.bad)
                if len(batch.index):
                    labels = self.val.labels[batch.index].astype(np.int64)
                    piece = self.batch(batch.pixels, labels, 1.0)
                    accuracy.update(self.outputs(module, piece.inputs), piece.labels)
        if bad > self.config.max_bad * len(rows):
            raise self.val.too_many_bad(bad, len(rows), self.config.max_bad)
        return accuracy.result()


class AnchorNetTask(ImageTask):
    """Learns from six losses, and is measured by branch and by Eq. 7.

    Args:
        args: as of `ImageTask`.
        teacher: whose distribution the six outputs learn too; with the classes of the images.
    """

    at_once = (16, 256)
    meaningless = frozenset()
    accuracy = AnchorNetAccuracy

    def __init__(self, *args: Any, teacher: Network | None = None) -> None:
        super().__init__(*args)
        self.teacher = teacher
        if teacher is None:
            return
        teacher.module.requires_grad_(False).to(self.device)
        # From what AnchorNet reads to what the teacher reads.
        ours, theirs = self.meta, teacher.meta
        ratio = np.divide(ours.std, theirs.std, dtype=np.float32)
        shift = np.divide(np.subtract(ours.mean, theirs.mean), theirs.std, dtype=np.float32)
        self._ratio, self._shift = (
            torch.from_numpy(a).to(self.device).view(3, 1, 1) for a in (ratio, shift)
        )
        config, digest = self.config, "default"
        if config.teacher_weights != "default":
            with open(config.teacher_weights, "rb") as file:
                digest = sha256_of(file)
        taught = {
            "teacher": config.teacher,
            "teacher_weights": digest,
            "distill_weight": config.distill_weight,
            "temperature": config.temperature,
            "class_map": config.matching.class_map and list(config.matching.class_map),
        }
        self.identity |= taught
        self.origin["settings"] |= taught

    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the device."""
        try:
            return super().build()
        except WeightsError as error:
            raise WeightsError(f"{error}; --init needs weights of the same --se") from error

    def network(self) -> nn.Module:
        """Return the network with random weights."""
        config, classes = self.config, len(self.train.classes)
        return AnchorNet(classes, se=config.se, weighted_mean=config.weighted_mean)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the sum of six losses, the teacher's among them, and each cross-entropy."""
        config, logits = self.config, module(batch.inputs)
        losses = six_losses(logits, batch.labels, config.label_smoothing)
        parts = dict(zip(OUTPUTS, losses, strict=True))
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher.module(batch.inputs * self._ratio + self._shift)
            distances = six_distances(logits, taught, config.temperature)
            parts["distillation"] = distances.sum()
            losses = torch.lerp(losses, distances, config.distill_weight)
        # A factor of 0 keeps every parameter in the graph, as several processes need it.
        attention = float(config.attention_loss)
        return losses[:3].sum() + attention * losses[3:].sum(), parts
