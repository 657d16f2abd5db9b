"""What a fine-tuning run will do, before it does it: shards, steps and their cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from anchorpatch.errors import DataError, SettingsError
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.jobs.finetuning.config import FinetuneConfig
from anchorpatch.jobs.finetuning.data import Data, PatchData, WholeData
from anchorpatch.jobs.finetuning.plan import Plan
from anchorpatch.jobs.patch_scores import open_shards
from anchorpatch.models.complexity import macs
from anchorpatch.models.registry import build_on_meta
from anchorpatch.networks import check_sides
from anchorpatch.runtime.distributed import World
from anchorpatch.settings import SCALES
from anchorpatch.shards.dataset import visited
from anchorpatch.shards.reader import ShardReader
from anchorpatch.text import counted, differing

__all__ = ["Cost", "Setup", "prepare"]


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
        """Return the cost as JSON knows it."""
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
        steps, epochs = _affordable(budget[0], plan.steps_a_pass, _total(counts, per_row))
        config = replace(config, epochs=epochs)
        plan = replace(plan, config=config, steps=steps)
    part = plan.steps_an_epoch / plan.steps_a_pass
    cost = Cost(
        epochs=config.epochs,
        steps=plan.steps_an_epoch,
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


def _affordable(budget: int, steps_a_pass: int, macs_a_pass: int) -> tuple[int, int]:
    """Return steps of an epoch and epochs that cost the budget, but at least one pass.

    Example:
        >>> _affordable(budget=250, steps_a_pass=10, macs_a_pass=100)
        (12, 2)
        >>> _affordable(budget=30, steps_a_pass=10, macs_a_pass=100)
        (10, 1)
    """
    total = max(steps_a_pass, round(budget / macs_a_pass * steps_a_pass))
    epochs = max(1, round(total / steps_a_pass))
    return round(total / epochs), epochs
