"""Which rows a process works on, piece by piece, through a run on shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anchorpatch.jobs.training.loop_config import LoopConfig
from anchorpatch.runtime.distributed import World
from anchorpatch.shards.dataset import batches_of, pieces_of

__all__ = ["Plan", "Request"]


class Request(NamedTuple):
    """The rows of a piece of a step.

    Attributes:
        key: seed, pass, step of the pass and number of the piece: what augmentation follows from.
        scale: side of the pixels.
        rows: of patches of this scale, or of images (n,).
        share: of the step's rows; 0 for a piece that stands in for a missing one.
    """

    key: tuple[int, int, int, int]
    scale: int
    rows: NDArray[np.int64]
    share: float

    @property
    def visit(self) -> int:
        """Number of the pass."""
        return self.key[1]


@dataclass(frozen=True)
class Plan:
    """The steps of a run. All pieces of a step have one scale, on all processes.

    A pass visits every row once. An epoch, after which the network is measured, is a pass over
    patches. A baseline's epochs are equal parts of its steps, and may be shorter or longer.

    Attributes:
        draw: returns the rows of a pass by scale, in random order.
        counts: how many these are.
        config: batch size, pieces, epochs and seed.
        world: the processes.
        steps: optimiser steps of an epoch; None for those of a pass.
    """

    draw: Callable[[np.random.Generator], Mapping[int, NDArray[np.int64]]]
    counts: Mapping[int, int]
    config: LoopConfig
    world: World
    steps: int | None = None

    @property
    def steps_a_pass(self) -> int:
        """How many batches the rows of a pass make."""
        return sum(-(-n // self.config.batch_size) for n in self.counts.values())

    @property
    def steps_an_epoch(self) -> int:
        """How many steps lie between two measurements."""
        return self.steps or self.steps_a_pass

    @property
    def rows_an_epoch(self) -> int:
        """About how many rows an epoch visits; exact where it is a pass."""
        return sum(self.counts.values()) * self.steps_an_epoch // self.steps_a_pass

    def pieces(self, epoch: int, step: int) -> Iterator[Request]:
        """Yield this process's pieces from a step of an epoch to the end of the run."""
        config, world = self.config, self.world
        steps, total = self.steps_an_epoch, self.config.epochs * self.steps_an_epoch
        drawn, batches = -1, []
        for done in range(epoch * steps + step, total):
            visit, index = divmod(done, self.steps_a_pass)
            if visit != drawn:
                rng = np.random.default_rng((config.seed, visit))
                drawn, batches = visit, batches_of(self.draw(rng), config.batch_size, rng)
            scale, rows = batches[index]
            pieces = pieces_of(rows, world.size * config.accumulate)
            for number in range(world.rank, len(pieces), world.size):
                found, counted = pieces[number]
                key = (config.seed, visit, index, number)
                yield Request(key, scale, found, counted / len(rows))
