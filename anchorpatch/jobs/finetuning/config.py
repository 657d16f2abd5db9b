"""How a network is fine-tuned on patches (section 4.3): the settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from anchorpatch.errors import SettingsError
from anchorpatch.jobs.training.loop_config import LoopConfig
from anchorpatch.models.registry import check_name
from anchorpatch.settings import SCALES

__all__ = ["FREE", "SCRATCH", "FinetuneConfig"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """How a network is fine-tuned; see `LoopConfig` for the rest.

    The paper says no more than "fine-tuned on training patches". The defaults are what is usual
    for pretrained networks: a tenth of the rate that they were trained with, falling to 0 by a
    cosine over a few epochs, after a short warm-up for heads that start anew. An epoch over all
    patches shows each image many times, so 5 epochs are not few.

    Attributes:
        network: its name, see `anchorpatch.models.registry.build`.
        shards: folder with ``train/`` and ``val/``.
        folder: of the run, by convention `networks.run_folder`.
        weights: to start from: "default" (torchvision's), "none" (random) or a file.
        scale: train and measure on the patches of one scale alone; None takes all three.
        patches_per_image: of each image in an epoch, drawn anew each time; None takes all.
        baseline: train on whole images instead, at the same cost (see `like`).
        data: folder with the images, for a baseline where the shards hold no crops.
        like: folder of the run whose multiply-accumulates a baseline may spend, by convention
            that of the same network on patches. Where it holds no run, a run on patches with
            these settings is taken. None: a baseline makes ``epochs`` passes.
        flip: random horizontal flip (p = 0.5).
        jitter: of brightness, contrast and saturation.
        min_area: smallest share of a whole image that a baseline's training crop shows.
        workers: threads that read patches, or processes that decode a baseline's files.
        device: auto, cpu or cuda.
        tensorboard: write event files.
        overwrite: throw a run of other settings or shards in ``folder`` away, and weights without
            a checkpoint; the same run is resumed all the same.
    """

    network: str
    shards: Path
    folder: Path
    epochs: int = 5
    lr: float = 0.01
    nesterov: bool = True
    schedule: str = "cosine"
    warmup_epochs: float = 0.5
    weights: str = "default"
    scale: int | None = None
    patches_per_image: int | None = None
    baseline: bool = False
    data: Path = Path("data")
    like: Path | None = None
    flip: bool = True
    jitter: float = 0.2
    min_area: float = 0.35
    workers: int = 2
    device: str = "auto"
    tensorboard: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.network)
        if self.network == "anchornet":
            raise SettingsError(
                "anchornet finds the patches; train it with `anchorpatch train`, and fine-tune "
                "an ordinary network such as resnet50"
            )
        if self.scale is not None and self.scale not in SCALES:
            known = ", ".join(map(str, SCALES))
            raise SettingsError(f"scale: expected one of {known}, got {self.scale}")
        if self.baseline and (self.scale or self.patches_per_image):
            raise SettingsError(
                "baseline: trains on whole images, so it takes no --scale or --patches-per-image; "
                "its budget is that of the run on patches"
            )
        if self.patches_per_image is not None and self.patches_per_image < 1:
            raise SettingsError(
                f"patches_per_image: expected at least 1, got {self.patches_per_image}"
            )
        if not 0 <= self.jitter < 1:
            raise SettingsError(f"jitter: expected a number from 0 to below 1, got {self.jitter}")
        if not 0 < self.min_area <= 1:
            raise SettingsError(f"min_area: expected a share above 0, got {self.min_area}")
        if self.workers < 0:
            raise SettingsError(f"workers: expected at least 0, got {self.workers}")

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales of the patches that take part."""
        return SCALES if self.scale is None else (self.scale,)


#: What replaces the defaults where a network starts from random weights: the rate that such
#: networks are usually trained with, and more epochs.
SCRATCH: Final[dict[str, Any]] = {"epochs": 30, "lr": 0.1}

#: Settings that change nothing about the result, so that a resumed run may differ in them.
#: What the paths and the weights hold is compared instead.
FREE: Final = frozenset(
    {"shards", "folder", "data", "like", "weights", "workers", "device", "tensorboard"}
    | {"overwrite", "checkpoint_minutes"}
)
