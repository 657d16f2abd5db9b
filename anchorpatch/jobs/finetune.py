"""Fine-tune an ordinary network on semantic patches (section 4.3).

Shards -> patches of one scale a batch -> flip and jitter -> cross-entropy with the label of the
patch's image -> runs/NETWORK/{best,last}.safetensors, measured by the sum of the softmax
distributions of an image's patches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from anchorpatch.errors import DataError, SettingsError, WeightsError, reason_of
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.jobs.finetune_data import (
    Data,
    FinetuneConfig,
    PatchData,
    Plan,
    WholeData,
)
from anchorpatch.jobs.patch_scores import open_shards
from anchorpatch.models.complexity import check_sides, macs
from anchorpatch.models.registry import build_on_meta
from anchorpatch.networks import OR_NONE, find_pretrained, load_network
from anchorpatch.runtime.device import resolve_device
from anchorpatch.runtime.distributed import World, process_group
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import SCALES
from anchorpatch.shards.dataset import visited
from anchorpatch.shards.reader import ShardReader
from anchorpatch.storage import sha256_of
from anchorpatch.text import counted, differing
from anchorpatch.training.augment import Augmentation
from anchorpatch.training.loop import Batch, Task, Trainer
from anchorpatch.training.run_folder import BEST, RunSummary, alone_in, best_record


@dataclass(frozen=True, kw_only=True)
class FinetuneSummary(RunSummary):
    """Result of a fine-tuning run.

    Attributes:
        network: its name.
        source: where the pixels came from.
        cost: steps, patches and multiply-accumulates, see `Cost`.
    """

    network: str
    source: str
    cost: dict[str, Any]


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
        if setup.cost.budget:
            report.message(_budget_text(setup.cost, *setup.cost.budget))
        task = _FinetuneTask(setup, device, world, report.message)
        records = Trainer(task, report).run(cost=setup.cost.to_json())
        return FinetuneSummary(
            network=config.network,
            weights=config.folder / BEST,
            source=setup.data.source,
            epochs=len(records),
            classes=len(setup.train.classes),
            images=(len(setup.train), len(setup.val)),
            cost=setup.cost.to_json(),
            best=best_record(records),
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


def _budget_text(cost: Cost, macs: int, of: str) -> str:
    return (
        f"the budget of {of}: {macs / 1e9:,.1f} GMACs; {counted(cost.epochs, 'epoch')} of "
        f"{cost.steps:,} steps over whole images take {cost.macs / 1e9:,.1f} GMACs"
    )


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Multiply-accumulates are those of the forward passes in training. The backward passes take
    about twice as many, for patches and whole images alike.

    Attributes:
        epochs: of the run.
        steps: optimiser steps of an epoch.
        rows: patches of an epoch by scale; for a baseline, images by 224.
        macs_by_side: of the network on one of them.
        macs: of the whole run.
        budget: what a baseline may spend, and by which run; None for other runs.
    """

    epochs: int
    steps: int
    rows: dict[int, int]
    macs_by_side: dict[int, int]
    macs: int
    budget: tuple[int, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        document: dict[str, Any] = {
            "epochs": self.epochs,
            "steps_an_epoch": self.steps,
            "rows_an_epoch": {str(side): n for side, n in self.rows.items()},
            "macs_by_side": {str(side): n for side, n in self.macs_by_side.items()},
            "macs": self.macs,
        }
        if self.budget:
            document["budget"] = {"macs": self.budget[0], "of": self.budget[1]}
        return document


@dataclass(frozen=True)
class Setup:
    """A run that can begin.

    Attributes:
        config: with the epochs that a baseline's budget gives.
        train: reader of the training shards.
        val: reader of the validation shards.
        data: what the network is trained and measured on.
        plan: the steps.
        cost: of the run.
    """

    config: FinetuneConfig
    train: ShardReader
    val: ShardReader
    data: Data
    plan: Plan
    cost: Cost


def prepare(config: FinetuneConfig, world: World) -> Setup:
    """Look shards, network and settings over, and plan the run.

    Raises:
        ShardError: the shards of a split are missing, damaged or without patches.
        DataError: train and val hold other classes, too few patches, or whole images that a
            baseline needs are missing.
        SettingsError: the network cannot take the patches, or the batch is too small.
    """
    train, val = (open_shards(config.shards, split) for split in ("train", "val"))
    _same_classes(config.shards, train, val)
    data = _data(config, train, val)
    counts = data.counts()
    _enough(config, train, counts, world)
    module = build_on_meta(config.network, len(train.classes)).eval()
    sides = tuple(counts)
    check_sides(config.network, module, sides)
    per_row = {side: macs(module, side) for side in sides}
    plan = Plan(data.draw, counts, config, world)
    budget = None
    if config.baseline and config.like is not None:
        budget = _budget(config, train, module)
        steps, epochs = _affordable(budget[0], plan.steps_per_pass, _total(counts, per_row))
        config = replace(config, epochs=epochs)
        plan = replace(plan, config=config, steps=steps)
    part = plan.steps_per_epoch / plan.steps_per_pass
    cost = Cost(
        epochs=config.epochs,
        steps=plan.steps_per_epoch,
        rows={side: round(n * part) for side, n in counts.items()},
        macs_by_side=per_row,
        macs=round(config.epochs * part * _total(counts, per_row)),
        budget=budget,
    )
    return Setup(config, train, val, data, plan, cost)


def _same_classes(shards: Path, train: ShardReader, val: ShardReader) -> None:
    if train.classes == val.classes:
        return
    raise DataError(
        f"{shards}: expected train and val shards of the same classes, found "
        f"{differing(train.classes, val.classes)}; extract the split val again, from a folder in "
        "which train lies beside it and has all of its classes"
    )


def _data(config: FinetuneConfig, train: ShardReader, val: ShardReader) -> Data:
    if not config.baseline:
        return PatchData(config, train, val)
    whole = [
        ImageSource.of_shards(reader, config.data, split=split, workers=config.workers)
        for reader, split in ((train, "train"), (val, "val"))
    ]
    return WholeData(config, *whole)


def _enough(
    config: FinetuneConfig, train: ShardReader, counts: Mapping[int, int], world: World
) -> None:
    parts, total = world.size * config.accumulate, sum(counts.values())
    if config.batch_size < 2 * parts:
        raise SettingsError(
            f"batch size {config.batch_size} is too small for {world.size} processes x "
            f"{config.accumulate} pieces of at least 2; choose --batch-size {2 * parts} or more"
        )
    if not total:
        raise DataError(
            f"{train.folder}: expected patches of {config.scale} px, found none; "
            "choose another --scale"
        )
    if total < config.batch_size:
        unit = "images" if config.baseline else "patches"
        raise DataError(
            f"{train.folder}: {total} {unit} an epoch are too few for a batch of "
            f"{config.batch_size}; choose a smaller --batch-size"
        )


def _total(counts: Mapping[int, int], macs_by_side: Mapping[int, int]) -> int:
    return sum(n * macs_by_side[side] for side, n in counts.items())


def _budget(config: FinetuneConfig, train: ShardReader, module: nn.Module) -> tuple[int, str]:
    """Return what a baseline may spend in MACs, and the run on patches that spends as much."""
    assert config.like is not None
    path = config.like / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        cost = document["cost"]
        return int(cost["macs"]), f"{config.like}, {counted(cost['epochs'], 'epoch')}"
    except FileNotFoundError:
        counts = visited(train, SCALES)
        per_row = {scale: macs(module, scale) for scale in counts}
        of = f"{counted(config.epochs, 'epoch')} of all patches"
        return config.epochs * _total(counts, per_row), of
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected the settings of a run on patches, whose cost a baseline takes, "
            f"found something else ({type(error).__name__}); give --epochs, or remove that run"
        ) from error


def _affordable(budget: int, steps_per_pass: int, macs_per_pass: int) -> tuple[int, int]:
    """Return steps of an epoch and epochs that cost the budget, but at least one pass.

    Example:
        >>> _affordable(budget=250, steps_per_pass=10, macs_per_pass=100)
        (12, 2)
        >>> _affordable(budget=30, steps_per_pass=10, macs_per_pass=100)
        (10, 1)
    """
    total = max(steps_per_pass, round(budget / macs_per_pass * steps_per_pass))
    epochs = max(1, round(total / steps_per_pass))
    return round(total / epochs), epochs


class _FinetuneTask(Task):
    """A network that learns from the rows of a `Setup`."""

    config: FinetuneConfig
    kind = "finetune"

    def __init__(
        self, setup: Setup, device: torch.device, world: World, message: Callable[[str], None]
    ) -> None:
        super().__init__(setup.config, device, world)
        self.setup, self.message = setup, message
        self.unit = setup.data.unit
        self.steps, self.size = setup.plan.steps_per_epoch, setup.plan.rows_per_epoch
        self.augment = Augmentation(self.config.jitter, self.config.flip, setup.data.min_area)
        self.identity = {
            **self.config.decisive(),
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
        self.meta = replace(
            found.meta, crop_mode=of_shards.crop_mode, background=of_shards.background
        )
        return found.module.to(self.device)

    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        pieces = self.setup.plan.pieces(epoch, step)
        loaded = self.setup.data.load(pieces, self.device.type == "cuda")
        with closing(loaded):
            for request, (pixels, labels) in self.waiting.watch(loaded):
                rng = np.random.default_rng(request.key)
                inputs = self.augment(pixels.to(self.device, non_blocking=True), rng)
                yield self.batch(inputs.permute(0, 2, 3, 1), labels, request.share)

    def evaluate(self, module: nn.Module, check: Callable[[], object]) -> dict[str, Any]:
        return self.setup.data.evaluate(module, self.meta, self.world, self.device, check)

    def training(self) -> dict[str, Any]:
        return {"settings": self.identity, "cost": self.setup.cost.to_json()}


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
