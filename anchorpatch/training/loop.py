"""The training loop: what every network here shares, whatever it learns and from what.

A `Task` brings data, loss and evaluation; `Trainer` brings optimizer, schedule, averaging,
processes, checkpoints, the log and orderly stops.

One step takes ``batch_size`` images, or up to so many patches of one scale, whatever the number of
processes and of parts a process works in: rank r of R with ``accumulate`` A takes R-th parts in A
pieces. Gradients are those of the whole batch: each piece weighs by its share of the images, as
pieces may differ in size. Batch normalization sees one piece (``batch_size / R / A`` images), or
with ``sync_batchnorm`` the pieces of all processes. The rate follows the batch linearly: ``lr``
stands for 256 images (see `LoopConfig`).

A run that was stopped, also by SIGKILL and within an epoch, goes on from its last checkpoint
as if nothing had happened: with one process on CPU the weights are equal bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from anchorpatch.errors import Interrupted, NonFiniteError, SettingsError, WeightsError, reason_of
from anchorpatch.metrics import hits
from anchorpatch.networks import Normalization
from anchorpatch.runtime.checkpoint import WeightsMeta, load_state, save_state, save_weights
from anchorpatch.runtime.device import computing_on, peak_memory, to_device
from anchorpatch.runtime.distributed import World, any_rank, average_buffers, rows_of_ranks
from anchorpatch.runtime.progress import Reporter, Waits
from anchorpatch.signals import StopRequested, StopSignals
from anchorpatch.training.config import LoopConfig, rate_factor
from anchorpatch.training.run_folder import (
    BEST,
    CHECKPOINT,
    LAST,
    Place,
    RunLog,
    check_identity,
    refuse_foreign,
    write_config,
)

#: On a GPU, reading a loss waits for it: steps between two looks, and between two questions to
#: the other processes whether to stop.
_LOOK_EVERY = 20

#: A val loss is far above the train loss from so many times it on; running statistics are young
#: before so many steps: of where they began, 0.9 ** 100 is left, but the weights move too.
_FAR, _FEW_STEPS = 1.5, 100


class Batch(NamedTuple):
    """A piece of a step, on the device.

    Attributes:
        inputs: what the network reads (n, 3, H, W).
        labels: class index (n,), int64.
        share: weight of its mean loss in the step's; those of all pieces of a step sum to 1. A
            piece of share 0 stands in for a missing one: it is computed and not counted.
    """

    inputs: Tensor
    labels: Tensor
    share: float


class Task(ABC):
    """What is trained, on what, towards what. By default, a classifier by its cross-entropy.

    Args:
        config: of the run.
        device: where the network is.
        world: the processes of the run.
    """

    #: Name in the training state.
    kind: str
    #: Optimizer steps per epoch.
    steps: int
    #: What is counted, in the plural: "images", "patches".
    unit: str
    #: How many of them an epoch has, over all processes.
    size: int
    #: What must be equal for a run to be resumed, as JSON values.
    identity: dict[str, Any]
    #: What the weights files say about themselves, once the network is built.
    meta: WeightsMeta
    #: What they say of how they came about, as JSON values.
    origin: dict[str, Any]

    def __init__(self, config: LoopConfig, device: torch.device, world: World) -> None:
        self.config, self.device, self.world = config, device, world
        #: How long `batches` has waited for "data", since the trainer last looked.
        self.waits = Waits()

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the device."""

    @abstractmethod
    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Yield the pieces from a step of an epoch to the end of the run."""

    @abstractmethod
    def evaluate(self, module: nn.Module, check: Callable[[], object]) -> dict[str, Any]:
        """Return figures of the validation images, "top1" among them; calls check() at times."""

    def ready(self, module: nn.Module) -> None:
        """Change a network that has been put into training mode; here nothing."""
        return None

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss, a mean over the piece, and parts to log, means too."""
        logits = module(batch.inputs).float()
        loss = functional.cross_entropy(
            logits, batch.labels, label_smoothing=self.config.label_smoothing
        )
        return loss, {"top1": hits(logits.detach(), batch.labels).mean()}

    def save(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a weights file."""
        training = {**self.origin, "record": dict(record)}
        save_weights(path, tensors, replace(self.meta, training=training))

    @cached_property
    def _normalize(self) -> Normalization:
        return Normalization(self.meta, self.device)

    def batch(self, pixels: Tensor, labels: Tensor | NDArray[np.int64], share: float) -> Batch:
        """Move a piece to the device and normalize its pixels (see `Normalization`)."""
        inputs = self._normalize(pixels)
        if not self.config.channels_last:
            inputs = inputs.contiguous()
        return Batch(inputs, to_device(labels, self.device), share)


def build_optimizer(module: nn.Module, config: LoopConfig) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters, at the rate for this batch size."""
    shared: dict[str, Any] = {"lr": config.rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), **shared)
    return torch.optim.SGD(
        module.parameters(), momentum=config.momentum, nesterov=config.nesterov, **shared
    )


class MovingAverage(AveragedModel):
    """An exponential average of a network's weights and buffers.

    Args:
        module: the network.
        decay: weight of the past in each step, once the average is old enough.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take a step towards the network's weights.

        As `AveragedModel` does, whose own method makes the host wait for a GPU four times.
        """
        n = int(self.n_averaged)  # lies on the host
        # A young average leaves its random beginning behind faster.
        weight = 1 - min(self.decay, (1 + n) / (10 + n))
        averages, currents = [], []
        pairs = zip(
            chain(self.module.parameters(), self.module.buffers()),
            chain(model.parameters(), model.buffers()),
            strict=True,
        )
        for average, current in pairs:
            if n and average.is_floating_point():
                averages.append(average)
                currents.append(current)
            else:  # the beginning, and counters
                average.copy_(current)
        if averages:
            torch._foreach_lerp_(averages, currents, weight)
        self.n_averaged += 1


class Trainer:
    """Runs a `Task` to its end, or until a signal.

    Args:
        task: what is trained, how and where.
        report: where progress is shown.

    Raises:
        MissingDependency: TensorBoard is wanted and not installed.
        SettingsError: ``sync_batchnorm`` without a GPU.
    """

    def __init__(self, task: Task, report: Reporter) -> None:
        config, device = task.config, task.device
        self.task, self.config, self.report = task, config, report
        self.device, self.world = device, task.world
        self.folder, self._checkpoint = config.folder, config.folder / CHECKPOINT
        self.log = RunLog(self.folder, main=self.world.is_main, tensorboard=config.tensorboard)
        torch.manual_seed(config.seed)
        self.module = task.build()
        if config.channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
        if config.sync_batchnorm and device.type != "cuda":
            raise SettingsError("sync_batchnorm: torch synchronizes on GPUs only; leave it out")
        if config.sync_batchnorm and self.world.size > 1:
            convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
            self.module = convert(self.module)
        self.wrapped = self._wrap(self.module)
        self.average = MovingAverage(self.module, config.ema_decay) if config.ema_decay else None
        self.optimizer = build_optimizer(self.module, config)
        self.schedule = LambdaLR(self.optimizer, lambda s: rate_factor(config, s, task.steps))
        self.place = Place()
        self.stop = StopSignals()
        self._saved = time.monotonic()
        self._warned = False

    # --- the run ------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Take up the run that the folder holds, if it holds one.

        It may go on with more epochs and with another number of processes, which is said.
        """
        state, notes = None, list[str]()
        try:
            if self._checkpoint.is_file():
                state = load_state(self._checkpoint, self.task.kind)
                notes = check_identity(self._checkpoint, state.get("identity"), self.task.identity)
            else:
                refuse_foreign(self.folder, self.folder)
        except WeightsError:
            if not self.config.overwrite:
                raise
            state = None
        self.world.wait("the other processes to open the run")
        if state is not None:
            for note in notes:
                self.report.message(note)
            self._restore(state)
            return
        if self.world.is_main:
            for name in (CHECKPOINT, LAST, BEST):
                (self.folder / name).unlink(missing_ok=True)
        self.log.cut(0)

    def run(self, **more: Any) -> list[dict[str, Any]]:
        """Train to the end, from where the run in the folder stands if there is one.

        Args:
            more: JSON values for config.json, beside the settings.

        Returns:
            The records of all epochs.

        Raises:
            WeightsError: last.pt cannot be read, or belongs to another configuration; or there
                are results without it.
            Interrupted: a signal came; the checkpoint is written.
            NonFiniteError: the loss is NaN or infinite; the last good checkpoint is kept.
            StorageError: the disk refused.
        """
        self._resume()
        if self.world.is_main:
            write_config(self.folder, self.config, **more)
        epochs = self.config.epochs
        if self.place.epoch >= epochs:
            return self.log.records
        batches = self.task.batches(self.place.epoch, self.place.step)
        with self.stop, contextlib.closing(batches):
            self.report.message(computing_on(self.device))
            self.report.start("training", epochs * self.task.size, self._counted(), self.task.unit)
            try:
                while self.place.epoch < epochs:
                    self._train_epoch(batches)
                    self._finish_epoch()
            except RuntimeError:
                if self.world.size > 1 and self.stop.received:  # others were stopped first
                    self._interrupt(self.stop.received)
                raise
            finally:
                self.report.stop()
        return self.log.records

    def _train_epoch(self, batches: Generator[Batch, None, None]) -> None:
        self.task.ready(self.wrapped.train())
        sums: dict[str, Tensor] = {}
        began = time.monotonic()
        while self.place.step < self.task.steps:
            for piece in range(self.config.accumulate):
                try:
                    batch = self._next(batches, piece)
                except StopRequested:
                    self._collect(sums, began)
                    self._save(check=self.place.step > 0)
                    self._interrupt(self.stop.received)
                last = piece + 1 == self.config.accumulate
                with self._exchange(last):
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
                        loss, parts = self.task.loss(self.wrapped, batch)
                    # Over the processes, gradients are averaged; shares ask for their sum.
                    torch.autograd.backward(loss * (batch.share * self.world.size))
                n = len(batch.labels) if batch.share else 0
                self.place.images += n
                for name, value in {"loss": loss, **parts}.items():
                    sums[name] = sums.get(name, 0.0) + value.detach().double() * n
            self._check_finite(sums["loss"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.module)
            before = self._counted()
            self.place.step += 1
            self.report.advance(self._counted() - before)
            began = self._pause(sums, began)
        self._collect(sums, began)

    def _next(self, batches: Generator[Batch, None, None], piece: int) -> Batch:
        """Return the next piece; a signal ends the wait for it where nothing is half done."""
        if piece or self.world.size > 1:
            return next(batches)
        with self.stop.interrupting():
            return next(batches)

    def _counted(self) -> int:
        """Return how many images or patches the run has seen, all processes together."""
        place, size = self.place, self.task.size
        return place.epoch * size + place.step * size // self.task.steps

    def _pause(self, sums: dict[str, Tensor], began: float) -> float:
        """After a step: stop when asked to, and write a checkpoint when it is time."""
        # One process can stop at any step. Several have to agree, which costs a message.
        alone = self.world.size == 1
        due = time.monotonic() - self._saved > self.config.checkpoint_minutes * 60
        often = alone or self.device.type == "cpu"
        if not often and self.place.step % _LOOK_EVERY and self.place.step < self.task.steps:
            return began
        # The main process's clock decides for all.
        state = self.stop.received * 2 + (due and self.world.is_main)
        state = any_rank(state, self.device)
        if not state:
            return began
        self._collect(sums, began)
        self._save(check=True)
        if state >= 2:
            self._interrupt(state // 2)
        return time.monotonic()

    def _finish_epoch(self) -> None:
        """Evaluate, log and write the weights of a trained epoch."""
        place, task = self.place, self.task
        module: nn.Module = self.module
        average_buffers(module)
        if self.average is not None:
            average_buffers(self.average)
            module = self.average.module
        # A process that is stopped in the evaluation cannot ask the others; and results without a
        # checkpoint would be somebody else's, see `refuse_foreign`.
        if self.world.size > 1 or not self._checkpoint.is_file():
            self._save()
        try:
            with self.stop.interrupting():
                validation = task.evaluate(module.eval(), self._check_stop)
        except StopRequested:
            # The trained epoch is saved whole; only the evaluation is done again.
            if self.world.size == 1:
                self._save()
            self._interrupt(self.stop.received)
        record = self._record(validation)
        better = validation["top1"] > place.best
        place.best = max(place.best, validation["top1"])
        self.log.append(record)
        if self.world.is_main:
            for name in (LAST, BEST) if better else (LAST,):
                task.save(self.folder / name, module.state_dict(), record)
        self.place = Place(place.epoch + 1, best=place.best)
        self._save()
        self.report.message(self.log.line(record, self.config.epochs, self.task.unit))
        self._warn_of_statistics(module, record)
        if number := any_rank(self.stop.received, self.device):
            self._interrupt(number)

    def _warn_of_statistics(self, module: nn.Module, record: Mapping[str, Any]) -> None:
        """Say once why validation is poor where batch normalization has hardly begun to count."""
        seen = [b for name, b in module.named_buffers() if name.endswith("num_batches_tracked")]
        # By output where there are several: training may leave some of them out of its sum.
        losses = record["val"].get("losses", {"loss": record["val"]["loss"]})
        names = losses.keys() & record["train"].keys()
        train, val = (sum(found[name] for name in names) for found in (record["train"], losses))
        if self._warned or not seen or not 0 < _FAR * train < val:
            return
        if (steps := int(seen[-1])) < _FEW_STEPS:
            self._warned = True
            self.report.message(
                f"val loss {val:.3f} is far above train loss {train:.3f}: batch normalization's "
                f"running statistics, which validation uses, have seen {steps} steps and lag "
                "behind the weights; more steps help (more --epochs, or a smaller --batch-size)"
            )

    def _record(self, validation: Mapping[str, Any]) -> dict[str, Any]:
        images, losses, waiting = self.place.totals(self.device)
        last_step = (self.place.epoch + 1) * self.task.steps - 1
        return {
            "epoch": self.place.epoch + 1,
            "lr": self.config.rate * rate_factor(self.config, last_step, self.task.steps),
            "train": losses,
            "val": validation,
            f"{self.task.unit}_per_second": images / max(self.place.seconds, 1e-9),
            "seconds": self.place.seconds,
            "waiting": waiting,
            "peak_memory": peak_memory(self.device),
        }

    # --- parts of a step ----------------------------------------------------------------------

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients with the last piece of a step."""
        if not last and isinstance(self.wrapped, DistributedDataParallel):
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def _check_finite(self, total: Tensor) -> None:
        """Look at the sum of the losses, in which NaN and infinity stay."""
        looks = self.device.type == "cpu" or not self.place.step % _LOOK_EVERY
        if looks and not bool(torch.isfinite(total)):
            rate = self.optimizer.param_groups[0]["lr"]
            raise NonFiniteError(
                f"the loss is not finite at step {self.place.step + 1} of epoch "
                f"{self.place.epoch + 1} (rate {rate:.3g}); try a lower --lr, more "
                "--warmup-epochs, or no --amp. The last checkpoint is kept"
            )

    def _collect(self, sums: dict[str, Tensor], began: float) -> None:
        """Move the sums from the device into the place."""
        for name, value in sums.items():
            self.place.sums[name] = self.place.sums.get(name, 0.0) + float(value)
        sums.clear()
        self.place.seconds += time.monotonic() - began
        self.place.waited += self.task.waits.seconds.pop("data", 0.0)

    def _check_stop(self) -> None:
        """Stop an evaluation that signals do not reach, as it is another thread's."""
        if self.stop.received:
            raise StopRequested

    def _interrupt(self, number: int) -> NoReturn:
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} in epoch {self.place.epoch + 1}; "
            "run the same command again to resume",
            number,
        )

    # --- building and files -------------------------------------------------------------------

    def _wrap(self, module: nn.Module) -> nn.Module:
        if self.world.size > 1:
            gpu = [self.device.index] if self.device.type == "cuda" else None
            # Gradients of 1 x 1 kernels have strides of no consequence, of which DDP warns.
            warnings.filterwarnings("ignore", "Grad strides do not match")
            module = DistributedDataParallel(module, device_ids=gpu)
        if self.config.compile:
            module.compile()
        return module

    def _save(self, *, check: bool = False) -> None:
        if check:
            for kept in filter(None, (self.module, self.average)):
                average_buffers(kept)
            total = torch.tensor(self.place.sums["loss"], dtype=torch.float64)
            self._check_finite(total)
        # What only one process has would be lost with it.
        self.place = self.place.gathered(self.device, is_main=self.world.is_main)
        random = rows_of_ranks(torch.get_rng_state(), self.device)
        self._saved = time.monotonic()
        if not self.world.is_main:
            return
        save_state(
            self._checkpoint,
            self.task.kind,
            {
                "identity": json.dumps(self.task.identity, sort_keys=True),
                "module": self.module.state_dict(),
                "average": self.average.state_dict() if self.average else {},
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "random": random,
                **asdict(self.place),
            },
        )

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            self.module.load_state_dict(state["module"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            # Where there are more epochs now, the next step has another rate than was planned.
            factor = rate_factor(self.config, self.schedule.last_epoch, self.task.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.rate * factor
            rows = state["random"].view(-1, torch.get_rng_state().numel())
            # torch crashes where the state is a part of another tensor.
            torch.set_rng_state(rows[min(self.world.rank, len(rows) - 1)].clone())
            is_main, steps = self.world.is_main, self.task.steps
            place = self.place = Place.of(state, steps=steps, is_main=is_main)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise WeightsError(
                f"{self._checkpoint}: expected the training state of this run, found another "
                f"({reason_of(error)[:200]}); remove it to start again, or restore it from a copy"
            ) from error
        # A line may have been written for an epoch whose checkpoint was not.
        self.log.cut(place.epoch)
        if place.epoch < self.config.epochs:
            self.report.message(
                f"resuming from {self._checkpoint}: epoch {place.epoch + 1}, step {place.step}"
            )
