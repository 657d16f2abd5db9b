"""How AnchorNet and its peers are trained: the settings and the recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from anchorpatch.errors import SettingsError
from anchorpatch.jobs.training.loop_config import LoopConfig
from anchorpatch.settings import ARCHITECTURES, CropSettings

__all__ = ["ANCHORNET_ONLY", "FREE", "RECIPES", "TrainConfig"]

#: Settings that the other networks have not.
ANCHORNET_ONLY: Final = frozenset({"se", "weighted_mean", "attention_loss"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How a network is trained on whole images; see `LoopConfig` for the rest.

    Attributes:
        data: folder with ``train/`` and ``val/``.
        folder: of the run, by convention RUNS/ARCH.
        arch: the network, of `anchorpatch.settings.ARCHITECTURES`.
        labels: CSV with the labels of a flat ``val/``.
        recipe: name under which the settings are recorded.
        crop_size: side of the training crops in pixels; validation always takes 224.
        min_area: smallest share of the picture that a training crop shows.
        crop_mode: how validation images become crops, see `anchorpatch.settings.CropSettings`;
            recorded in the weights, for what is done with them later.
        background: colour behind transparent pixels; recorded likewise.
        allow_empty: accept training classes without images.
        se: AnchorNet: build the squeeze-and-excitation blocks.
        weighted_mean: AnchorNet: multiply S by H * W.
        attention_loss: AnchorNet: add the three losses of the attention branches.
        init: weights to start from; classifiers of other classes start anew.
        image_cache: folder for decoded training pictures; None decodes files each epoch.
        max_bad: share of unreadable training images that fails the run.
        workers: loading processes.
        device: auto, cpu or cuda.
        tensorboard: write event files.
        overwrite: throw a run of other settings or images in ``folder`` away, and weights without
            a checkpoint; the same run is resumed all the same.
    """

    data: Path
    folder: Path
    arch: str = "anchornet"
    labels: Path | None = None
    recipe: str = "paper"
    crop_size: int = 224
    min_area: float = 0.08
    crop_mode: str = "center"
    background: str = "#ffffff"
    allow_empty: bool = False
    se: bool = True
    weighted_mean: bool = True
    attention_loss: bool = True
    init: Path | None = None
    image_cache: Path | None = None
    max_bad: float = 0.01
    workers: int = 0
    device: str = "auto"
    tensorboard: bool = False
    overwrite: bool = False

    @property
    def crop(self) -> CropSettings:
        """How validation images become crops."""
        return CropSettings(self.crop_mode, self.background)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe not in RECIPES:
            raise SettingsError(f"recipe: expected {' or '.join(RECIPES)}, got {self.recipe!r}")
        if self.arch not in ARCHITECTURES:
            raise SettingsError(
                f"arch: expected one of {', '.join(ARCHITECTURES)}, got {self.arch!r}"
            )
        largest = ARCHITECTURES[self.arch]
        if self.crop_size < largest:
            raise SettingsError(
                f"crop_size: the largest patch of {self.arch} needs {largest} px, "
                f"got {self.crop_size}"
            )
        for name in sorted(ANCHORNET_ONLY):
            if self.arch != "anchornet" and not getattr(self, name):
                raise SettingsError(
                    f"{name}: only anchornet has it, {self.arch} has nothing like it"
                )
        object.__setattr__(self, "background", self.crop.background)
        if not 0 < self.min_area <= 1:
            raise SettingsError(f"min_area: expected a share above 0, got {self.min_area}")


#: What each recipe sets. ``paper`` is section 4.1, the defaults. ``small`` is for a few thousand
#: images: small batches give many steps, crops of 176 px are half the work and show objects at
#: about the size that validation does (magnified crops of 224 px do not).
RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "paper": {},
    "small": {
        "epochs": 30,
        "batch_size": 32,
        "lr": 0.3,
        "nesterov": True,
        "weight_decay": 2e-4,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "ema_decay": 0.99,
        "crop_size": 176,
        "min_area": 0.35,
    },
}

#: Settings that change nothing about the result, so that a resumed run may differ in them, or
#: that its checkpoint notes in another way: ``arch`` is its kind.
FREE: Final = frozenset(
    {"data", "folder", "labels", "init", "max_bad", "allow_empty", "workers", "device"}
    | {"tensorboard", "overwrite", "checkpoint_minutes", "image_cache", "recipe", "arch"}
)
