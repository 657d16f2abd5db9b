"""Train AnchorNet (section 4.1), or one of its peers.

Folder -> random crops -> loss of the network -> SGD -> runs/ARCH/{best,last}.safetensors.
AnchorNet and the BagNets are one run of the trainer; Saccader is up to three, one after the
other, in folders below its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from anchorpatch.jobs.training.anchornet import AnchorNetTask
from anchorpatch.jobs.training.bagnet import BagNetTask
from anchorpatch.jobs.training.config import RECIPES, TrainConfig
from anchorpatch.jobs.training.image_task import ImageTask, TrainingImages, open_images
from anchorpatch.jobs.training.runlog import RunLog, alone_in, best_record, write_config
from anchorpatch.jobs.training.saccader import Stage, stages
from anchorpatch.jobs.training.trainer import Trainer, refuse_foreign
from anchorpatch.runtime.device import resolve_device
from anchorpatch.runtime.distributed import process_group
from anchorpatch.runtime.progress import Reporter
from anchorpatch.storage import write_atomically

__all__ = ["RECIPES", "TrainConfig", "TrainSummary", "run"]

_BEST: Final = "best.safetensors"


@dataclass(frozen=True)
class TrainSummary:
    """What a run came to.

    Attributes:
        weights: the best weights file.
        epochs: trained, all starts together; of the last stage.
        classes: number of classes.
        images: training and validation images.
        bad: training images that could not be decoded, by reason, in this start.
        best: record of the epoch with the best top-1, as in log.jsonl; of the last stage.
        last: record of the last epoch.
        earlier: of the stages before the last, by name: the best record.
        damaged: training images that were decoded with damage, in this start.
        ignored: files of train and val that were passed over, by extension.
    """

    weights: Path
    epochs: int
    classes: int
    images: tuple[int, int]
    bad: dict[str, int]
    best: dict[str, Any]
    last: dict[str, Any]
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    damaged: int = 0
    ignored: dict[str, int] = field(default_factory=dict)


def run(config: TrainConfig, progress: Reporter | None = None) -> TrainSummary:
    """Train a network, or go on with a run that was stopped.

    Raises:
        DataError: the folders do not fit together, or hold too few images.
        WeightsError: ``init`` or last.pt cannot be used.
        Interrupted: a signal came; the checkpoint is written.
        NonFiniteError: training diverged.
        StorageError: the disk refused, or another run is at work in the folder.
    """
    device = resolve_device(config.device)
    with process_group(device) as world, alone_in(config.folder, world, device):
        report = progress if progress is not None and world.is_main else Reporter()
        images = open_images(config, device, world, report)
        planned = _plan(config, images)
        if not config.overwrite:
            refuse_foreign(config.folder, planned[-1].config.folder)
        world.wait("the other processes to open the run")
        bad: dict[int, str] = {}
        damaged: set[int] = set()
        earlier: dict[str, dict[str, Any]] = {}
        for number, stage in enumerate(planned, start=1):
            if len(planned) > 1:
                report.message(f"stage {number} of {len(planned)}, {stage.name}")
            records = _train(stage, images, report, bad, damaged)
            best = dict(best_record(records))
            if number < len(planned):
                earlier[stage.name] = best
        weights = config.folder / _BEST
        if stage.config.folder != config.folder and world.is_main:
            content = (stage.config.folder / _BEST).read_bytes()
            write_atomically(weights, lambda file: file.write(content))
        world.wait()
        return TrainSummary(
            weights=weights,
            epochs=len(records),
            classes=len(images.train.classes),
            images=(len(images.train), len(images.val)),
            bad=dict(Counter(bad.values())),
            damaged=len(damaged),
            ignored=dict(Counter(images.train.ignored) + Counter(images.val.ignored)),
            best=best,
            last=records[-1],
            earlier=earlier,
        )


def _plan(config: TrainConfig, images: TrainingImages) -> list[Stage]:
    """Return the runs of the trainer, in order."""
    if config.arch == "saccader":
        return stages(config, images.train.classes)
    task: type[ImageTask] = AnchorNetTask if config.arch == "anchornet" else BagNetTask
    return [Stage(config.arch, task, config)]


def _train(
    stage: Stage,
    images: TrainingImages,
    report: Reporter,
    bad: dict[int, str],
    damaged: set[int],
) -> list[dict[str, Any]]:
    """Train one stage, or go on with it.

    Args:
        stage: what is trained.
        images: on what.
        report: where progress is shown.
        bad: takes the training images that could not be decoded.
        damaged: takes those that were decoded with damage.

    Returns:
        The records of all epochs.
    """
    config = stage.config
    task = stage.task(config, images)
    log = RunLog(config.folder, main=images.world.is_main, tensorboard=config.tensorboard)
    trainer = Trainer(task, config, config.folder, images.device, images.world, report, log)
    trainer.resume(overwrite=config.overwrite)
    if images.world.is_main:
        write_config(config.folder, config)
    records = trainer.run()
    bad.update(task.bad)
    damaged.update(task.damaged)
    return records
