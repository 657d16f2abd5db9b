"""Train AnchorNet (section 4.1), or one of its peers.

Folder -> random crops -> loss of the network -> SGD -> runs/ARCH/{best,last}.safetensors.
AnchorNet and the BagNets are one run of the trainer; Saccader is up to three, one after the
other, in folders below its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from anchorpatch.runtime.device import resolve_device
from anchorpatch.runtime.distributed import process_group
from anchorpatch.runtime.progress import Reporter
from anchorpatch.storage import write_atomically
from anchorpatch.training.config import TrainConfig
from anchorpatch.training.image_tasks import AnchorNetTask, BagNetTask, open_images
from anchorpatch.training.loop import Trainer
from anchorpatch.training.run_folder import (
    BEST,
    RunSummary,
    alone_in,
    best_record,
    refuse_foreign,
)
from anchorpatch.training.saccader import Stage, stages


@dataclass(frozen=True, kw_only=True)
class TrainSummary(RunSummary):
    """Result of a training run; of several stages, the epochs and records are those of the last.

    Attributes:
        bad: training images that could not be decoded, by reason, in this start.
        damaged: training images that were decoded with damage, in this start.
        ignored: files of train and val that were passed over, by extension.
        earlier: of the stages before the last, by name: the best record.
    """

    bad: dict[str, int]
    damaged: int
    ignored: dict[str, int]
    earlier: dict[str, dict[str, Any]]


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
        planned = _plan(config, images.train.classes)
        last = planned[-1].config.folder
        if not config.overwrite:
            refuse_foreign(config.folder, last)
        world.wait("the other processes to open the run")
        bad: dict[int, str] = {}
        damaged: set[int] = set()
        earlier: dict[str, dict[str, Any]] = {}
        for number, stage in enumerate(planned, start=1):
            if len(planned) > 1:
                report.message(f"stage {number} of {len(planned)}, {stage.name}")
            task = stage.task(stage.config, images)
            records = Trainer(task, report).run()
            bad.update(task.bad)
            damaged.update(task.damaged)
            if number < len(planned):
                earlier[stage.name] = best_record(records)
        weights = config.folder / BEST
        if last != config.folder and world.is_main:
            content = (last / BEST).read_bytes()
            write_atomically(weights, lambda file: file.write(content))
        world.wait()
        return TrainSummary(
            weights=weights,
            epochs=len(records),
            classes=len(images.train.classes),
            images=(len(images.train), len(images.val)),
            best=best_record(records),
            last=records[-1],
            bad=dict(Counter(bad.values())),
            damaged=len(damaged),
            ignored=dict(Counter(images.train.ignored) + Counter(images.val.ignored)),
            earlier=earlier,
        )


def _plan(config: TrainConfig, classes: tuple[str, ...]) -> list[Stage]:
    """Return the runs of the trainer, in order."""
    if config.arch == "saccader":
        return stages(config, classes)
    return [Stage(config.arch, AnchorNetTask if config.arch == "anchornet" else BagNetTask, config)]
