"""What the training loop asks of a job: its network, its data, its loss, its measure."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

__all__ = ["Batch", "Piece", "Task", "Waiting"]

_T = TypeVar("_T")


class Batch(Protocol):
    """A piece of a step, on the device."""

    @property
    def inputs(self) -> Tensor:
        """What the network reads (n, 3, H, W)."""

    @property
    def labels(self) -> Tensor:
        """Class index (n,), int64."""

    @property
    def share(self) -> float:
        """Weight of its mean loss in the step's; those of all pieces of a step sum to 1.

        A piece of share 0 stands in for a missing one: it is computed and not counted.
        """


class Piece(NamedTuple):
    """The plain `Batch`."""

    inputs: Tensor
    labels: Tensor
    share: float


class Waiting:
    """Measures how long a run waits for its data.

    Example:
        >>> waiting = Waiting()
        >>> list(waiting.watch(iter("ab")))
        ['a', 'b']
        >>> waiting.take() > 0, waiting.take()
        (True, 0.0)
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def watch(self, items: Iterator[_T]) -> Iterator[_T]:
        """Yield the items, and note the time until each is there."""
        while True:
            began = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._seconds += time.perf_counter() - began
            yield item
            del item  # or it would live on while the next one is waited for

    def take(self) -> float:
        """Return the seconds since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Task(Protocol):
    """What is trained, on what, towards what."""

    #: Name in the training state.
    kind: str
    #: Optimiser steps of one epoch.
    steps: int
    #: What is counted, in the plural: "images", "patches".
    unit: str
    #: How many of them an epoch has, over all processes.
    size: int
    #: What must be equal for a run to be resumed, as JSON values.
    identity: dict[str, Any]
    #: Time that `batches` has spent waiting for data.
    waiting: Waiting

    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the device."""

    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Yield the pieces from a step of an epoch to the end of the run."""

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss, a mean over the piece, and parts to log, means too."""

    def evaluate(self, module: nn.Module, check: Any) -> dict[str, Any]:
        """Return figures of the validation images, "top1" among them; calls check() at times."""

    def save(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a weights file."""
