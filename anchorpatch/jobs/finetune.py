"""Fine-tune an ordinary network on semantic patches (section 4.3).

Shards -> patches of one scale a batch -> flip and jitter -> cross-entropy with the label of the
patch's image -> runs/NETWORK/{best,last}.safetensors, measured by the sum of the softmax
distributions of an image's patches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from anchorpatch.errors import WeightsError, reason_of
from anchorpatch.jobs.finetuning.config import FREE, SCRATCH, FinetuneConfig
from anchorpatch.jobs.finetuning.setup import Setup, prepare
from anchorpatch.jobs.training.augment import Augmentation
from anchorpatch.jobs.training.runlog import RunLog, alone_in, best_record, write_config
from anchorpatch.jobs.training.task import Batch, Piece, Waiting
from anchorpatch.jobs.training.trainer import Trainer
from anchorpatch.network_weights import OR_NONE, find_pretrained
from anchorpatch.networks import load_network
from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights
from anchorpatch.runtime.device import resolve_device, to_device
from anchorpatch.runtime.distributed import World, process_group
from anchorpatch.runtime.progress import Reporter
from anchorpatch.shards.reader import ShardReader
from anchorpatch.storage import sha256_of
from anchorpatch.text import counted

__all__ = ["SCRATCH", "FinetuneConfig", "FinetuneSummary", "forecast", "run"]


@dataclass(frozen=True)
class FinetuneSummary:
    """What a run came to.

    Attributes:
        network: its name.
        weights: the best weights file.
        source: where the pixels came from.
        epochs: trained, all starts together.
        classes: number of classes.
        images: training and validation images.
        cost: steps, patches and multiply-accumulates, see `finetune_setup.Cost`.
        best: record of the epoch with the best top-1, as in log.jsonl.
        last: record of the last epoch.
    """

    network: str
    weights: Path
    source: str
    epochs: int
    classes: int
    images: tuple[int, int]
    cost: dict[str, Any]
    best: dict[str, Any]
    last: dict[str, Any]


def run(config: FinetuneConfig, progress: Reporter | None = None) -> FinetuneSummary:
    """Fine-tune a network, or go on with a run that was stopped.

    Raises:
        ShardError: shards are missing or damaged.
        DataError: train and val do not fit together, or hold too few patches.
        SettingsError: network, batch and shards do not fit together.
        WeightsError: ``weights`` or last.pt cannot be used.
        Interrupted: a signal came; the checkpoint is written.
        NonFiniteError: training diverged.
        StorageError: the disk refused, or another run is at work in the folder.
    """
    device = resolve_device(config.device)
    with process_group(device) as world, alone_in(config.folder, world, device):
        report = progress if progress is not None and world.is_main else Reporter()
        setup = prepare(config, world)
        config = setup.config
        if setup.train.header.weights_sha256 != setup.val.header.weights_sha256:
            report.message(
                f"{config.shards}: the AnchorNet that made the shards of val is not the one that "
                "made those of train; the figures will be those of a mixture"
            )
        task = _FinetuneTask(setup, device, world, report.message)
        log = RunLog(config.folder, main=world.is_main, tensorboard=config.tensorboard)
        trainer = Trainer(task, config, config.folder, device, world, report, log)
        trainer.resume(overwrite=config.overwrite)
        if world.is_main:
            write_config(config.folder, config, cost=setup.cost.to_json())
            if setup.cost.budget:
                report.message(_budget_text(setup))
        records = trainer.run()
        best = dict(best_record(records))
        return FinetuneSummary(
            network=config.network,
            weights=config.folder / "best.safetensors",
            source=setup.data.source,
            epochs=len(records),
            classes=len(setup.train.classes),
            images=(len(setup.train), len(setup.val)),
            cost=setup.cost.to_json(),
            best=best,
            last=records[-1],
        )


def forecast(config: FinetuneConfig) -> dict[str, Any]:
    """Return what a run would do, as JSON values; see `run` for errors.

    Weights of a file are read and tried; a pretrained set must exist, and is not downloaded.
    """
    setup = prepare(config, World())
    if config.weights == "default":
        find_pretrained(config.network, OR_NONE)
    elif config.weights != "none":
        load_network(config.network, setup.train.classes, config.weights, replace_head=True)
    return {
        "network": config.network,
        "weights": config.weights,
        "folder": str(config.folder),
        "source": setup.data.source,
        "unit": setup.data.unit,
        "classes": len(setup.train.classes),
        "images": [len(setup.train), len(setup.val)],
        "batch_size": config.batch_size,
        "cost": setup.cost.to_json(),
    }


def _budget_text(setup: Setup) -> str:
    cost = setup.cost
    assert cost.budget is not None
    macs, of = cost.budget
    return (
        f"the budget of {of}: {macs / 1e9:,.1f} GMACs; {counted(cost.epochs, 'epoch')} of "
        f"{cost.steps:,} steps over whole images take {cost.macs / 1e9:,.1f} GMACs"
    )


class _FinetuneTask:
    """What the training loop needs to know about fine-tuning; see `task.Task`."""

    kind = "finetune"

    def __init__(
        self, setup: Setup, device: torch.device, world: World, message: Callable[[str], None]
    ) -> None:
        self.setup, self.config, self.plan = setup, setup.config, setup.plan
        self.device, self.world, self.message = device, world, message
        self.unit = setup.data.unit
        self.steps, self.size = self.plan.steps_an_epoch, self.plan.rows_an_epoch
        self.waiting = Waiting()
        self.augment = Augmentation(self.config.jitter, self.config.flip, setup.data.min_area)
        settings = {
            f.name: getattr(self.config, f.name) for f in fields(self.config) if f.name not in FREE
        }
        self.identity = {
            **settings,
            "weights": _digest_of_weights(self.config.weights),
            "processes": world.size,
            "steps": self.steps,
            "files": setup.data.min_area == 1.0 and self.config.baseline,
            "train_shards": _digest_of_shards(setup.train),
            "val_shards": _digest_of_shards(setup.val),
        }

    def build(self) -> nn.Module:
        found = load_network(
            self.config.network,
            self.setup.train.classes,
            self.config.weights,
            message=self.message,
            replace_head=True,
        )
        of_shards = self.setup.train.settings
        self.meta: WeightsMeta = replace(
            found.meta, crop_mode=of_shards.crop_mode, background=of_shards.background
        )
        self._mean = torch.tensor(self.meta.mean, device=self.device)[:, None, None]
        self._std = torch.tensor(self.meta.std, device=self.device)[:, None, None]
        return found.module.to(self.device)

    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        pieces = self.plan.pieces(epoch, step)
        loaded = self.setup.data.load(pieces, self.device.type == "cuda")
        with closing(loaded):
            for request, (pixels, labels) in self.waiting.watch(loaded):
                rng = np.random.default_rng(request.key)
                inputs = self.augment(pixels.to(self.device, non_blocking=True), rng)
                inputs = (inputs - self._mean) / self._std
                if not self.config.channels_last:
                    inputs = inputs.contiguous()
                yield Piece(inputs, to_device(labels, self.device), request.share)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits = module(batch.inputs).float()
        loss = functional.cross_entropy(
            logits, batch.labels, label_smoothing=self.config.label_smoothing
        )
        return loss, {"top1": (logits.detach().argmax(1) == batch.labels).float().mean()}

    def evaluate(self, module: nn.Module, check: Callable[[], object]) -> dict[str, Any]:
        return self.setup.data.evaluate(module, self.meta, self.world, self.device, check)

    def save(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        training = {
            "settings": self.identity,
            "cost": self.setup.cost.to_json(),
            "record": dict(record),
        }
        save_weights(path, tensors, replace(self.meta, training=training))


def _digest_of_weights(weights: str) -> str:
    """Return what the initial weights are known by: a name, or the SHA-256 of a file."""
    if weights in ("default", "none"):
        return weights
    try:
        with open(weights, "rb") as file:
            return sha256_of(file)
    except OSError as error:
        raise WeightsError(
            f"{weights}: expected a weights file, 'default' or 'none', found: {reason_of(error)}"
        ) from error


def _digest_of_shards(reader: ShardReader) -> dict[str, Any]:
    """Return which AnchorNet made the shards, and a digest of their bytes."""
    digest = hashlib.sha256()
    for sha256 in reader.sha256:
        digest.update(sha256.encode())
    return {
        "anchornet": reader.header.weights_sha256,
        "sha256": digest.hexdigest(),
    }
