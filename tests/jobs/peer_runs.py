"""Tiny training runs of AnchorNet's peers: networks a sixteenth as wide, crops of 101 px."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anchorpatch.jobs.train import run
from anchorpatch.models.bagnet import BagNet
from anchorpatch.models.registry import NETWORKS
from anchorpatch.models.saccader import Saccader
from anchorpatch.runtime.progress import Reporter
from anchorpatch.training.config import TrainConfig
from tests.training.runs import tiny

WIDTH = 4
STAGES = ("1-bagnet", "2-location", "3-reinforce")

#: For `anchorpatch.models.registry.NETWORKS`.
NARROW = {
    "bagnet33": lambda classes: BagNet(33, classes, width=WIDTH),
    "bagnet77": lambda classes: BagNet(77, classes, width=WIDTH),
    "saccader": lambda classes: Saccader(classes, width=WIDTH),
}


def peer(arch: str, data: Path, folder: Path, **changes: Any) -> TrainConfig:
    """A run of one epoch of four steps, maps of 4 x 4 places for 77 px."""
    return tiny(data, folder, **{"arch": arch, "epochs": 1, "crop_size": 101, "lr": 0.5, **changes})


def run_narrow(config: TrainConfig, report: Reporter) -> None:
    """For a process of its own, which does not know the narrow networks."""
    NETWORKS.update(NARROW)
    run(config, report)
