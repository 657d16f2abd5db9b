"""Train AnchorNet (section 4.1).

Folder -> random crops -> six cross-entropies -> SGD -> runs/anchornet/{best,last}.safetensors.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from anchorpatch.errors import DataError, TooManyBadImages, WeightsError
from anchorpatch.images.cache import build_cache
from anchorpatch.images.folder import ImageFolder, scan_folder
from anchorpatch.images.loader import load_batches
from anchorpatch.images.training import RandomCrop, epoch_order, load_training_batches
from anchorpatch.jobs.class_names import differing
from anchorpatch.jobs.localizer import normalize
from anchorpatch.jobs.runlog import RunLog, write_config
from anchorpatch.jobs.scores import OUTPUTS, Scores, six_losses
from anchorpatch.jobs.task import Batch, Piece, Waiting
from anchorpatch.jobs.train_config import FREE, RECIPES, TrainConfig
from anchorpatch.jobs.trainer import Trainer
from anchorpatch.models.anchornet import AnchorNet, Logits
from anchorpatch.runtime.checkpoint import (
    WeightsMeta,
    load_into,
    load_weights,
    save_weights,
)
from anchorpatch.runtime.device import resolve_device
from anchorpatch.runtime.distributed import World, process_group
from anchorpatch.runtime.progress import Reporter

__all__ = ["RECIPES", "TrainConfig", "TrainSummary", "run"]


@dataclass(frozen=True)
class TrainSummary:
    """What a run came to.

    Attributes:
        weights: the best weights file.
        epochs: trained, all starts together.
        classes: number of classes.
        images: training and validation images.
        bad: training images that could not be decoded, by reason, in this start.
        best: record of the epoch with the best top-1, as in log.jsonl.
        last: record of the last epoch.
    """

    weights: Path
    epochs: int
    classes: int
    images: tuple[int, int]
    bad: dict[str, int]
    best: dict[str, Any]
    last: dict[str, Any]


def run(config: TrainConfig, progress: Reporter | None = None) -> TrainSummary:
    """Train AnchorNet, or go on with a run that was stopped.

    Raises:
        DataError: the folders do not fit together, or hold too few images.
        WeightsError: ``init`` or last.pt cannot be used.
        Interrupted: a signal came; the checkpoint is written.
        NonFiniteError: training diverged.
        StorageError: the disk refused.
    """
    device = resolve_device(config.device)
    with process_group(device) as world:
        report = progress if progress is not None and world.is_main else Reporter()
        train, val = _folders(config)
        task = _AnchorNetTask(config, train, val, device, world, report)
        log = RunLog(config.folder, main=world.is_main, tensorboard=config.tensorboard)
        trainer = Trainer(task, config, config.folder, device, world, report, log)
        trainer.resume(overwrite=config.overwrite)
        if world.is_main:
            write_config(config.folder, config)
        records = trainer.run()
        best = max(records, key=lambda record: float(record["val"]["top1"]))
        return TrainSummary(
            weights=config.folder / "best.safetensors",
            epochs=len(records),
            classes=len(train.classes),
            images=(len(train), len(val)),
            bad=task.bad_by_reason(),
            best=best,
            last=records[-1],
        )


def _folders(config: TrainConfig) -> tuple[ImageFolder, ImageFolder]:
    train = scan_folder(config.data, "train")
    val = scan_folder(config.data, "val", config.labels)
    if train.classes != val.classes:
        raise DataError(
            f"{config.data}: train and val must hold the same classes, found "
            f"{differing(train.classes, val.classes)}; add or remove the folders"
        )
    if len(train) < config.batch_size:
        raise DataError(
            f"{train.root}: {len(train)} images are too few for a batch of {config.batch_size}; "
            "choose a smaller --batch-size, or --recipe small"
        )
    return train, val


class _AnchorNetTask:
    """What the training loop needs to know about AnchorNet; see `task.Task`."""

    kind = "anchornet"
    unit = "images"

    def __init__(
        self,
        config: TrainConfig,
        train: ImageFolder,
        val: ImageFolder,
        device: torch.device,
        world: World,
        report: Reporter,
    ) -> None:
        self.config, self.train, self.val = config, train, val
        self.device, self.world = device, world
        self.piece = config.piece(world)
        self.steps = len(train) // config.batch_size
        self.size = self.steps * config.batch_size
        self.waiting = Waiting()
        self.bad: dict[int, str] = {}
        self.meta = WeightsMeta("anchornet", train.classes, config.se, config.weighted_mean)
        self._mean = torch.tensor(self.meta.mean, device=device)
        self._std = torch.tensor(self.meta.std, device=device)
        self.cache = None
        if config.image_cache is not None:
            if world.is_main:
                report.message(f"decoding {len(train):,} images into {config.image_cache}")
                build_cache(train, config.image_cache, max(1, config.workers))
            world.wait()
            self.cache = build_cache(train, config.image_cache, 1)
        settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE}
        self.identity = {
            **settings,
            "image_cache": config.image_cache is not None,
            "processes": world.size,
            "classes": list(train.classes),
            "train_images": train.digest(),
            "val_images": val.digest(),
            "init": load_weights(config.init).sha256 if config.init else None,
        }

    def build(self) -> nn.Module:
        config, classes = self.config, self.train.classes
        net = AnchorNet(len(classes), se=config.se, weighted_mean=config.weighted_mean)
        if config.init is not None:
            _start_from(net, config.init, classes)
        return net.to(self.device)

    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        config = self.config
        loaded = load_training_batches(
            self.train,
            _Plan(len(self.train), config, self.world, self.piece, self.steps, epoch, step),
            RandomCrop(config.crop_size, config.min_area, seed=config.seed),
            workers=config.workers,
            cache=self.cache,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for batch in self.waiting.watch(loaded):
                rows, pixels, _, bad = batch
                if bad:
                    self._note_bad(dict(bad), len(rows))
                yield self._on_device(rows, pixels, self.train)
        finally:
            loaded.close()

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        losses = six_losses(module(batch.inputs), batch.labels, self.config.label_smoothing)
        # A factor of 0 keeps every parameter in the graph, as several processes need it.
        attention = float(self.config.attention_loss)
        total = losses[:3].sum() + attention * losses[3:].sum()
        return total, dict(zip(OUTPUTS, losses, strict=True))

    def evaluate(self, module: nn.Module, check: Any) -> dict[str, Any]:
        rows = list(self.world.share(len(self.val)))
        # CPU: the fastest size; larger ones spend their time on fresh memory.
        size = 16 if self.device.type == "cpu" else 256
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        scores = Scores(self.device)
        loaded = load_batches(
            self.val,
            batches,
            workers=min(self.config.workers, len(batches)),
            pin_memory=self.device.type == "cuda",
        )
        bad = 0
        try:
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp),
            ):
                for found, pixels, _, missing in loaded:
                    check()
                    bad += len(missing)
                    if len(found):
                        piece = self._on_device(found, pixels, self.val)
                        logits: Logits = module(piece.inputs)
                        scores.update(logits, piece.labels)
        finally:
            loaded.close()
        if bad > self.config.max_bad * len(rows):
            raise TooManyBadImages(
                f"{self.val.root}: {bad} of {len(rows)} images cannot be decoded, more than "
                f"--max-bad {self.config.max_bad:.1%}; remove them or raise --max-bad"
            )
        return scores.result()

    def save(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        training = {
            "recipe": self.config.recipe,
            "settings": {k: v for k, v in self.identity.items() if k != "classes"},
            "record": dict(record),
        }
        save_weights(path, tensors, replace(self.meta, training=training))

    def bad_by_reason(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for reason in self.bad.values():
            counts[reason] = counts.get(reason, 0) + 1
        return counts

    def _on_device(self, rows: npt.NDArray[np.int64], pixels: Tensor, of: ImageFolder) -> Piece:
        labels = torch.from_numpy(of.labels[rows].astype(np.int64))
        inputs = normalize(pixels.to(self.device, non_blocking=True), self._mean, self._std)
        if not self.config.channels_last:
            inputs = inputs.contiguous()
        share = 1 / self.world.size / self.config.accumulate
        return Piece(inputs, labels.to(self.device, non_blocking=True), share)

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


def _start_from(net: AnchorNet, path: Path, classes: tuple[str, ...]) -> None:
    """Fill a network with weights; classifiers of other classes keep their random start."""
    weights = load_weights(path)
    if weights.meta.classes != classes:
        own = net.state_dict()
        kept = {k: v for k, v in own.items() if "classifier" in k}
        weights = replace(weights, tensors={**weights.tensors, **kept})
    try:
        load_into(net, weights)
    except WeightsError as error:
        raise WeightsError(f"{error}; --init needs weights of the same --se") from error
