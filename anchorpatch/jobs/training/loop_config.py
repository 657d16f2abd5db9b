"""How any network is trained: optimiser, rate and what goes with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from anchorpatch.errors import SettingsError
from anchorpatch.runtime.distributed import World

__all__ = ["LoopConfig", "build_optimizer", "rate_factor"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How any network is trained; the defaults are those of section 4.1.

    Attributes:
        epochs: passes over the training images.
        batch_size: images of one step, over all processes and pieces.
        accumulate: pieces in which a process works on its part of a step.
        optimizer: "sgd" or "adamw".
        lr: rate for a batch of 256. It scales linearly with the batch size for SGD, with its
            square root for AdamW.
        momentum: of SGD.
        nesterov: take Nesterov's momentum.
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
        sync_batchnorm: normalise over the pieces of all processes.
        checkpoint_minutes: time between checkpoints within an epoch; each epoch ends with one.
        seed: of initial weights, order and augmentation.
    """

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

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "step_epochs"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise SettingsError(f"lr: expected a number above 0, got {self.lr}")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(
                    f"{name}: expected a number from 0 to below 1, got {getattr(self, name)}"
                )
        for name in ("weight_decay", "warmup_epochs", "checkpoint_minutes", "seed"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.nesterov and not self.momentum:
            raise SettingsError("nesterov: needs a momentum above 0")
        if self.optimizer not in ("sgd", "adamw"):
            raise SettingsError(f"optimizer: expected sgd or adamw, got {self.optimizer!r}")
        if self.schedule not in ("step", "cosine"):
            raise SettingsError(f"schedule: expected step or cosine, got {self.schedule!r}")

    @property
    def rate(self) -> float:
        """The rate at this batch size, before the schedule."""
        share = self.batch_size / 256
        return self.lr * (share if self.optimizer == "sgd" else math.sqrt(share))

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


def rate_factor(config: LoopConfig, step: int, steps: int) -> float:
    """Return the rate of a step as a multiple of the base rate.

    Args:
        config: schedule and warm-up.
        step: number of the step, from the start of the run.
        steps: of one epoch.

    Example:
        >>> [round(rate_factor(LoopConfig(), 10 * epoch, 10), 6) for epoch in (0, 29, 30, 60, 90)]
        [1.0, 1.0, 0.1, 0.01, 0.001]
        >>> cosine = LoopConfig(schedule="cosine", epochs=10, warmup_epochs=2)
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


def build_optimizer(module: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """Return the optimiser of all parameters, at the rate for this batch size."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            module.parameters(), lr=config.rate, weight_decay=config.weight_decay
        )
    return torch.optim.SGD(
        module.parameters(),
        lr=config.rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
