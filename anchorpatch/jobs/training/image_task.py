"""What the networks that learn from whole images share: folders, crops, measure and files.

A network brings its loss and its figures; see `train_anchornet`, `train_bagnet`, `train_saccader`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from anchorpatch.errors import DataError, TooManyBadImages
from anchorpatch.images.crops import (
    PictureCache,
    RandomCrop,
    build_cache,
    epoch_order,
    load_training_batches,
    open_cache,
)
from anchorpatch.images.folder import ImageFolder, scan_folder, without_images
from anchorpatch.images.loader import load_batches
from anchorpatch.jobs.localizer import normalize
from anchorpatch.jobs.training.config import FREE, TrainConfig
from anchorpatch.jobs.training.task import Batch, Piece, Waiting
from anchorpatch.runtime.checkpoint import (
    Weights,
    WeightsMeta,
    load_into,
    load_weights,
    save_weights,
)
from anchorpatch.runtime.device import exact_float32, to_device
from anchorpatch.runtime.distributed import World
from anchorpatch.runtime.progress import Reporter
from anchorpatch.text import counted

__all__ = ["Figures", "ImageTask", "TrainingImages", "open_images", "start_from"]


@dataclass(frozen=True)
class TrainingImages:
    """What a run learns from, where it computes, and with whom.

    Attributes:
        train: the training images.
        val: the validation images, of the same classes.
        cache: decoded training pictures; None decodes files each epoch.
        device: CPU or GPU.
        world: the processes of the run.
    """

    train: ImageFolder
    val: ImageFolder
    cache: PictureCache | None
    device: torch.device
    world: World


def open_images(
    config: TrainConfig, device: torch.device, world: World, report: Reporter
) -> TrainingImages:
    """Look the folders over, and fill the cache where one is wanted.

    Raises:
        DataError: the folders do not fit together, or hold too few images.
        SettingsError: the batch does not divide evenly.
    """
    train, val = _folders(config)
    for folder in (train, val):
        absent = without_images(folder.labels, folder.classes)
        for remark in (folder.passed_over(), absent and f"{folder.root}: {absent}"):
            if remark:
                report.message(remark)
    config.piece(world)
    cache = None
    if config.image_cache is not None:
        if world.is_main:
            report.message(f"decoding {counted(len(train), 'image')} into {config.image_cache}")
            threads = max(1, config.workers)
            build_cache(train, config.image_cache, threads, config.background)
        world.wait(f"rank 0 to decode {counted(len(train), 'image')} into {config.image_cache}")
        cache = open_cache(train, config.image_cache, config.background)
    return TrainingImages(train, val, cache, device, world)


def _folders(config: TrainConfig) -> tuple[ImageFolder, ImageFolder]:
    train = scan_folder(config.data, "train", allow_empty=config.allow_empty)
    val = scan_folder(
        config.data, "val", config.labels, classes=train.classes, classes_of=str(train.root)
    )
    if len(train) < config.batch_size:
        raise DataError(
            f"{train.root}: {len(train)} images are too few for a batch of {config.batch_size}; "
            "choose a smaller --batch-size, or --recipe small"
        )
    return train, val


class Figures(Protocol):
    """Sums over validation images; several processes add up exactly."""

    def update(self, outputs: Any, labels: Tensor) -> object:
        """Count a batch: what `ImageTask.outputs` gave, and class indices (n,), int64."""

    def result(self) -> dict[str, Any]:
        """Return images, loss, top1 and top5 of all processes' images, and more."""


class ImageTask(ABC):
    """What the training loop needs to know, but for the network; see `task.Task`.

    Args:
        config: of the run.
        images: of `open_images`.
    """

    unit = "images"

    #: Validation images of a batch on CPU, the fastest size, and on a GPU.
    at_once: ClassVar[tuple[int, int]] = (16, 256)

    #: Settings that mean nothing to the network.
    meaningless: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: TrainConfig, images: TrainingImages) -> None:
        self.config, self.images = config, images
        self.train, self.val = images.train, images.val
        self.device, self.world = images.device, images.world
        self.piece = config.piece(self.world)
        self.steps = len(self.train) // config.batch_size
        self.size = self.steps * config.batch_size
        self.waiting = Waiting()
        self.bad: dict[int, str] = {}
        self.damaged: set[int] = set()
        self.meta = replace(
            self.describe(), crop_mode=config.crop_mode, background=config.background
        )
        self.kind = self.meta.architecture
        self._mean = torch.tensor(self.meta.mean, device=self.device)
        self._std = torch.tensor(self.meta.std, device=self.device)
        self.start = self.open_start()
        skipped = FREE | self.meaningless
        settings = {
            f.name: getattr(config, f.name)
            for f in fields(config)
            if f.name not in skipped
            # By default these say nothing, so that checkpoints from before them are continued.
            and not (f.name in ("crop_mode", "background") and getattr(config, f.name) == f.default)
        }
        self.identity: dict[str, Any] = {
            **settings,
            "image_cache": config.image_cache is not None,
            "processes": self.world.size,
            "classes": list(self.train.classes),
            "train_images": self.train.digest(),
            "val_images": self.val.digest(),
            "init": self.start.sha256 if self.start else None,
        }

    # --- what a network brings ----------------------------------------------------------------

    @abstractmethod
    def describe(self) -> WeightsMeta:
        """Return what the weights files say about themselves."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the device."""

    @abstractmethod
    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss, a mean over the piece, and parts to log, means too."""

    @abstractmethod
    def figures(self) -> Figures:
        """Return new sums for an evaluation."""

    def outputs(self, module: nn.Module, inputs: Tensor) -> Any:
        """Return what `figures` count, of validation images."""
        return module(inputs)

    def open_start(self) -> Weights | None:
        """Return the weights to start from, if there are such."""
        if self.config.init is None:
            return None
        return load_weights(self.config.init, self.meta.architecture)

    # --- what all share -----------------------------------------------------------------------

    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Yield the pieces of random crops from a step of an epoch to the end of the run."""
        config = self.config
        loaded = load_training_batches(
            self.train,
            _Plan(len(self.train), config, self.world, self.piece, self.steps, epoch, step),
            RandomCrop(
                config.crop_size, config.min_area, seed=config.seed, background=config.background
            ),
            workers=config.workers,
            cache=self.images.cache,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for batch in self.waiting.watch(loaded):
                self.damaged.update(batch.damaged)
                if batch.bad:
                    self._note_bad(dict(batch.bad), len(batch.index))
                yield self._on_device(batch.index, batch.pixels, self.train)
        finally:
            loaded.close()

    def evaluate(self, module: nn.Module, check: Callable[[], object]) -> dict[str, Any]:
        """Return the figures of the validation images; calls check() at times."""
        rows = list(self.world.share(len(self.val)))
        size = self.at_once[self.device.type != "cpu"]
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        figures = self.figures()
        loaded = load_batches(
            self.val,
            batches,
            workers=min(self.config.workers, len(batches)),
            crop=self.config.crop,
            pin_memory=self.device.type == "cuda",
        )
        bad = 0
        try:
            with (
                torch.inference_mode(),
                exact_float32(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp),
            ):
                for batch in loaded:
                    check()
                    bad += len(batch.bad)
                    if len(batch.index):
                        piece = self._on_device(batch.index, batch.pixels, self.val)
                        figures.update(self.outputs(module, piece.inputs), piece.labels)
        finally:
            loaded.close()
        if bad > self.config.max_bad * len(rows):
            raise TooManyBadImages(
                f"{self.val.root}: {bad} of {len(rows)} images cannot be decoded, more than "
                f"--max-bad {self.config.max_bad:.1%}; remove them or raise --max-bad"
            )
        return figures.result()

    def save(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a weights file."""
        training = {
            "recipe": self.config.recipe,
            "settings": {k: v for k, v in self.identity.items() if k != "classes"},
            "record": dict(record),
        }
        save_weights(path, tensors, replace(self.meta, training=training))

    def _on_device(self, rows: npt.NDArray[np.int64], pixels: Tensor, of: ImageFolder) -> Piece:
        labels = to_device(of.labels[rows].astype(np.int64), self.device)
        inputs = normalize(pixels.to(self.device, non_blocking=True), self._mean, self._std)
        if not self.config.channels_last:
            inputs = inputs.contiguous()
        share = 1 / self.world.size / self.config.accumulate
        return Piece(inputs, labels, share)

    def _note_bad(self, bad: Mapping[int, str], good: int) -> None:
        self.bad.update(bad)
        limit = self.config.max_bad * len(self.train)
        if len(self.bad) > limit or not good:
            row, reason = next(iter(bad.items()))
            raise TooManyBadImages(
                f"{self.train.root}: {len(self.bad)} images so far cannot be decoded, more than "
                f"--max-bad {self.config.max_bad:.1%} of {len(self.train)}, such as "
                f"{self.train.path(row)} ({reason}); remove them or raise --max-bad"
            )


@dataclass(frozen=True)
class _Plan:
    """Epoch and rows of each piece of this process, from a step of an epoch to the end."""

    n: int
    config: TrainConfig
    world: World
    piece: int
    steps: int
    epoch: int
    step: int

    def __iter__(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        first, parts = self.step, self.config.accumulate * self.world.size
        for epoch in range(self.epoch, self.config.epochs):
            order = epoch_order(self.n, self.config.seed, epoch)
            for step in range(first, self.steps):
                batch = order[step * self.config.batch_size :][: self.config.batch_size]
                pieces = batch.reshape(parts, self.piece)
                for rows in pieces[self.world.rank :: self.world.size]:
                    yield epoch, rows
            first = 0


def start_from(net: nn.Module, weights: Weights, classes: tuple[str, ...]) -> None:
    """Fill a network with weights; classifiers of other classes keep their random start.

    Raises:
        WeightsError: the tensors are not those of the network.
    """
    if weights.meta.classes != classes:
        own = net.state_dict()
        kept = {k: v for k, v in own.items() if "classifier" in k}
        weights = replace(weights, tensors={**weights.tensors, **kept})
    load_into(net, weights)
