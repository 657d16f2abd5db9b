"""How networks are trained: the settings of any run, of `train` and of `finetune`, and recipes.

Nothing here imports torch, so that the command line can tell the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from anchorpatch.classes import AS_NAMED, Matching
from anchorpatch.errors import SettingsError
from anchorpatch.settings import ARCHITECTURES, CROP, SCALES, CropSettings

if TYPE_CHECKING:
    from anchorpatch.runtime.distributed import World

#: Settings that only AnchorNet has.
ANCHORNET_ONLY: Final = frozenset({"se", "weighted_mean", "attention_loss"})


#: Settings of any run that are one of a few words.
CHOICES: Final = {"optimizer": ("sgd", "adamw"), "schedule": ("step", "cosine")}


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How any network is trained; the defaults are those of section 4.1.

    Attributes:
        folder: of the run, by convention RUNS/NETWORK.
        epochs: passes over the training images.
        batch_size: images of one step, over all processes and pieces.
        accumulate: pieces in which a process works on its part of a step.
        optimizer: "sgd" or "adamw"; only the former has ``momentum`` and ``nesterov``.
        lr: rate for a batch of 256. It scales linearly with the batch size for SGD, with its
            square root for AdamW.
        weight_decay: of all parameters.
        schedule: "step" divides the rate by 10 every ``step_epochs``, "cosine" lets it fall to 0.
        step_epochs: see ``schedule``.
        warmup_epochs: the rate rises linearly from 0 over these, may be a fraction.
        label_smoothing: share of the target that all classes get.
        ema_decay: of the moving average of weights, which is then what is evaluated and saved;
            0 for none.
        amp: compute in bfloat16 where that is safe.
        channels_last: memory format; faster on CPU and GPU.
        compile: pass the network through ``torch.compile``.
        sync_batchnorm: normalize over the pieces of all processes.
        checkpoint_minutes: time between checkpoints within an epoch; each epoch ends with one.
        seed: of initial weights, order and augmentation.
        workers: processes or threads that load; 0 loads in the main one.
        device: auto, cpu or cuda.
        overwrite: replace a run of other settings or data in ``folder``, and weights without a
            checkpoint; the same run is resumed all the same.
    """

    #: Settings that change nothing about the result, so that a resumed run may differ in them.
    FREE: ClassVar[frozenset[str]] = frozenset(
        {"folder", "checkpoint_minutes", "workers", "device", "tensorboard", "overwrite"}
    )

    folder: Path
    epochs: int = 100
    batch_size: int = 256
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: str = "step"
    step_epochs: int = 30
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    amp: bool = False
    channels_last: bool = True
    compile: bool = False
    sync_batchnorm: bool = False
    checkpoint_minutes: float = 10.0
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    tensorboard: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "accumulate", "step_epochs")
        _check(self, "at least 1", lambda value: value >= 1, *counts)
        _check(self, "a number above 0", lambda value: 0 < value < math.inf, "lr")
        shares = ("momentum", "label_smoothing", "ema_decay")
        _check(self, "a number from 0 to below 1", lambda value: 0 <= value < 1, *shares)
        others = ("weight_decay", "warmup_epochs", "checkpoint_minutes", "seed", "workers")
        _check(self, "at least 0", lambda value: value >= 0, *others)
        for name, known in CHOICES.items():
            _check(self, " or ".join(known), known.__contains__, name)
        if self.nesterov and not self.momentum:
            raise SettingsError("nesterov: needs a momentum above 0")

    @property
    def rate(self) -> float:
        """The rate at this batch size, before the schedule."""
        share = self.batch_size / 256
        return self.lr * (share if self.optimizer == "sgd" else math.sqrt(share))

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the result: all but the `FREE` ones."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.FREE}

    def piece(self, world: World) -> int:
        """Return the images of one piece.

        Raises:
            SettingsError: the batch does not divide evenly.
        """
        parts = world.size * self.accumulate
        if self.batch_size % parts:
            raise SettingsError(
                f"batch size {self.batch_size} does not divide into {world.size} processes x "
                f"{self.accumulate} pieces; choose a multiple of {parts}"
            )
        return self.batch_size // parts


def _check(config: LoopConfig, expected: str, valid: Callable[[Any], bool], *names: str) -> None:
    """Raise SettingsError where a setting has a value that is not valid."""
    for name in names:
        if not valid(value := getattr(config, name)):
            raise SettingsError(f"{name}: expected {expected}, got {value!r}")


def rate_factor(config: LoopConfig, step: int, steps: int) -> float:
    """Return the rate of a step as a multiple of the base rate.

    Args:
        config: schedule and warm-up.
        step: number of the step, from the start of the run.
        steps: of one epoch.

    Example:
        >>> config = LoopConfig(folder=Path())
        >>> [round(rate_factor(config, 10 * epoch, 10), 6) for epoch in (0, 29, 30, 60, 90)]
        [1.0, 1.0, 0.1, 0.01, 0.001]
        >>> cosine = LoopConfig(folder=Path(), schedule="cosine", epochs=10, warmup_epochs=2)
        >>> [round(rate_factor(cosine, step, 1), 2) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    warmup = round(config.warmup_epochs * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "step":
        return float(0.1 ** (step // steps // config.step_epochs))
    share = (step - warmup) / max(1, config.epochs * steps - warmup)
    return (1 + math.cos(math.pi * min(share, 1.0))) / 2


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How a network is trained on whole images; see `LoopConfig` for the rest.

    Attributes:
        data: folder with ``train/`` and ``val/``.
        arch: the network, of `anchorpatch.settings.ARCHITECTURES`.
        labels: CSV with the labels of a flat ``val/``.
        files: list of the training images; see `anchorpatch.images.labels.read_list`.
        only_labelled: leave out images without a label.
        recipe: name under which the settings are recorded.
        img_size: side of the validation crops in pixels.
        crop_size: side of the training crops in pixels.
        min_area: smallest share of the picture that a training crop shows.
        crop_mode: how validation images become crops, see `anchorpatch.settings.CropSettings`;
            like ``img_size`` and the next two, recorded in the weights for what is done with them
            later.
        crop_pct: share of the resized side that a validation crop keeps; None for that of the mode.
        background: color behind transparent pixels.
        allow_empty: accept training classes without images.
        se: AnchorNet: build the squeeze-and-excitation blocks.
        weighted_mean: AnchorNet: multiply S by H * W.
        attention_loss: AnchorNet: add the three losses of the attention branches.
        init: weights to start from; classifiers of other classes start from random weights.
        teacher: AnchorNet: a network, see `anchorpatch.models.registry.build`, whose softened
            distribution on the same crop the six outputs learn too.
        teacher_weights: "default" (the pretrained ones) or a file.
        distill_weight: of the teacher's part of the loss; the labels have the rest.
        temperature: by which the logits of both are divided.
        matching: of the outputs of the teacher with the classes.
        image_cache: folder for decoded training pictures; None decodes files each epoch.
        max_bad: share of unreadable images above which the run fails.
    """

    #: A checkpoint notes ``arch`` as its kind, and what the paths hold.
    FREE: ClassVar[frozenset[str]] = LoopConfig.FREE | {
        *("data", "labels", "files", "only_labelled", "init", "max_bad", "allow_empty"),
        *("image_cache", "recipe", "arch"),
        # What a run without a teacher does not record.
        *("teacher", "teacher_weights", "distill_weight", "temperature", "matching"),
    }

    data: Path
    arch: str = "anchornet"
    labels: Path | None = None
    files: Path | None = None
    only_labelled: bool = False
    recipe: str = "paper"
    img_size: int = CROP
    crop_size: int = CROP
    min_area: float = 0.08
    crop_mode: str = "center"
    crop_pct: float | None = None
    background: str = "#ffffff"
    allow_empty: bool = False
    se: bool = True
    weighted_mean: bool = True
    attention_loss: bool = True
    init: Path | None = None
    teacher: str | None = None
    teacher_weights: str = "default"
    distill_weight: float = 0.5
    temperature: float = 1.0
    matching: Matching = AS_NAMED
    image_cache: Path | None = None
    max_bad: float = 0.01

    @property
    def crop(self) -> CropSettings:
        """How validation images become crops."""
        return CropSettings(
            self.crop_mode, self.background, img_size=self.img_size, crop_pct=self.crop_pct
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, " or ".join(RECIPES), RECIPES.__contains__, "recipe")
        known = f"one of {', '.join(ARCHITECTURES)}"
        _check(self, known, ARCHITECTURES.__contains__, "arch")
        _check(self, "a share above 0", lambda share: 0 < share <= 1, "min_area", "distill_weight")
        _check(self, "a number above 0", lambda value: 0 < value < math.inf, "temperature")
        if self.teacher is not None and self.arch != "anchornet":
            raise SettingsError(f"teacher: only for anchornet, not for {self.arch}; leave it out")
        if self.teacher_weights == "none":
            raise SettingsError("teacher_weights: expected default or a file, got 'none'")
        for name in ("teacher_weights", "distill_weight", "temperature"):
            if self.teacher is None and getattr(self, name) != getattr(type(self), name):
                raise SettingsError(f"{name}: only with a teacher; give one, or leave it out")
        if self.teacher is None and self.matching != AS_NAMED:
            raise SettingsError("class_map: only with a teacher; give one, or leave it out")
        largest = ARCHITECTURES[self.arch]
        if self.crop_size < largest:
            raise SettingsError(
                f"crop_size: the largest patch of {self.arch} needs {largest} px, "
                f"got {self.crop_size}"
            )
        for name in sorted(ANCHORNET_ONLY):
            if self.arch != "anchornet" and not getattr(self, name):
                raise SettingsError(
                    f"{name}: only for anchornet, not for {self.arch}; leave it out"
                )
        object.__setattr__(self, "background", self.crop.background)
        object.__setattr__(self, "crop_pct", self.crop.crop_pct)


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


def recipe_settings(recipe: str, arch: str = "anchornet", img_size: int = CROP) -> dict[str, Any]:
    """Return what a recipe sets, with training crops that suit the size of the validation crops.

    Example:
        >>> [recipe_settings("small", img_size=side)["crop_size"] for side in (224, 256, 111)]
        [176, 201, 111]
        >>> recipe_settings("paper", img_size=320)
        {'crop_size': 320}
    """
    settings = RECIPES[recipe]
    side = round(settings.get("crop_size", CROP) * img_size / CROP)
    return {**settings, "crop_size": max(side, ARCHITECTURES[arch])}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """How a network is fine-tuned; see `LoopConfig` for the rest.

    The paper says no more than "fine-tuned on training patches". The defaults are what is usual
    for pretrained networks: a tenth of the rate that they were trained with, falling to 0 by a
    cosine over a few epochs, after a short warm-up for heads with random weights. An epoch over all
    patches shows each image many times, so 5 epochs are not few.

    Attributes:
        network: its name, see `anchorpatch.models.registry.build`.
        shards: folder with ``train/`` and ``val/``.
        weights: to start from: "default" (torchvision's), "none" (random) or a file.
        matching: of the outputs of ``weights`` with the classes, whose rows the network keeps.
        scale: train and measure on the patches of one scale alone; None takes all three.
        patches_per_image: of each image in an epoch, drawn again each time; None takes all.
        holdout: share of the training images that are not trained on, chosen by their paths, for
            `anchorpatch evaluate --budget` to calibrate thresholds on.
        baseline: train on whole images instead, at the same cost (see `like`).
        data: folder with the images, for a baseline where the shards hold no crops.
        like: folder of the run whose multiply-accumulates a baseline may spend, by convention
            that of the same network on patches. Where it holds no run, a run on patches with
            these settings is taken. None: a baseline makes ``epochs`` passes.
        flip: random horizontal flip (p = 0.5).
        jitter: of brightness, contrast and saturation.
        min_area: smallest share of a whole image that a baseline's training crop shows.
        freeze_bn: keep the running means and variances of BatchNorm, and normalize by them.
    """

    #: What the paths and the weights hold is compared instead.
    FREE: ClassVar[frozenset[str]] = LoopConfig.FREE | set(
        ("shards", "data", "like", "weights", "matching")
    )

    network: str
    shards: Path
    epochs: int = 5
    lr: float = 0.01
    nesterov: bool = True
    schedule: str = "cosine"
    warmup_epochs: float = 0.5
    weights: str = "default"
    matching: Matching = AS_NAMED
    scale: int | None = None
    patches_per_image: int | None = None
    holdout: float = 0.0
    baseline: bool = False
    data: Path = Path("data")
    like: Path | None = None
    flip: bool = True
    jitter: float = 0.2
    min_area: float = 0.35
    freeze_bn: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        from anchorpatch.models.registry import check_name  # which imports torch

        check_name(self.network)
        if self.network == "anchornet":
            raise SettingsError(
                "anchornet finds the patches; train it with `anchorpatch train`, and fine-tune "
                "an ordinary network such as resnet50"
            )
        _check(self, f"one of {SCALES}", (None, *SCALES).__contains__, "scale")
        _check(self, "at least 1", lambda n: n is None or n >= 1, "patches_per_image")
        shares = ("jitter", "holdout")
        _check(self, "a number from 0 to below 1", lambda value: 0 <= value < 1, *shares)
        _check(self, "a share above 0", lambda share: 0 < share <= 1, "min_area")
        if self.baseline and (self.scale or self.patches_per_image):
            raise SettingsError(
                "baseline: trains on whole images, so it takes no --scale or --patches-per-image; "
                "its budget is that of the run on patches"
            )

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the result; the newest unless they are 0."""
        newest = ("holdout", "freeze_bn")
        return {k: v for k, v in super().decisive().items() if v or k not in newest}

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales of the patches that take part."""
        return SCALES if self.scale is None else (self.scale,)


#: What replaces the defaults where a network starts from random weights: the rate that such
#: networks are usually trained with, and more epochs.
SCRATCH: Final[dict[str, Any]] = {"epochs": 30, "lr": 0.1}
