"""Several processes as one run: ``torchrun`` on one node or on many.

Without ``torchrun`` everything here is the identity, so that jobs are written once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anchorpatch.runtime.tasks import rank_and_size

__all__ = ["World", "any_rank", "average_buffers", "process_group", "sum_ranks"]


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for the other processes."""
        if dist.is_initialized():
            dist.barrier()

    def share(self, n: int) -> range:
        """Return which of ``n`` items are this process's: each item is exactly one's.

        Example:
            >>> [list(World(rank, 2).share(5)) for rank in (0, 1)]
            [[0, 2, 4], [1, 3]]
        """
        return range(self.rank, n, self.size)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """Join the processes that ``torchrun`` has started, for as long as the block lasts.

    Args:
        device: a CPU (gloo) or this process's GPU (nccl).

    Raises:
        SettingsError: the environment names ranks that do not fit together.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size)
    finally:
        dist.destroy_process_group()


def sum_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if not dist.is_initialized():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def any_rank(value: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers: 0 where none has anything to say."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def average_buffers(module: nn.Module) -> None:
    """Give every process the mean of the processes' running statistics, in place."""
    if not dist.is_initialized():
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
