"""Several processes as one run: ``torchrun`` on one node or on many.

Without ``torchrun`` everything here is the identity, so that jobs are written once.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from anchorpatch.errors import AnchorpatchError
from anchorpatch.runtime.tasks import rank_and_size
from anchorpatch.waits import waiting_for

__all__ = ["World", "any_rank", "average_buffers", "process_group", "sum_ranks"]

#: For one exchange between the processes: writing a checkpoint to a slow disk is well within.
#: What one process does alone for longer, the others wait for in `World.wait`.
_TIMEOUT: Final = timedelta(hours=1)

#: Seconds that an exchange may go on after a stop signal: ``torchrun`` kills after 30.
_GRACE: Final = 20.0

#: How often `World.wait` was called, and where the processes leave notes for each other.
_waits = itertools.count()
_store: Store | None = None


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

    def wait(self, what: str = "the other processes") -> None:
        """Wait until all processes are here, however long that takes.

        By polling, so that a signal gets through, and with it the failure of another process:
        ``torchrun`` ends all of them then.

        Args:
            what: completes "waiting for ...", where it takes long.

        Raises:
            RuntimeError: the process that holds the connections is gone.
        """
        if _store is None:
            return
        key = f"anchorpatch/{next(_waits)}"
        with waiting_for(what):
            _store.add(key, 1)
            while _store.add(key, 0) < self.size:
                time.sleep(0.1)
        with _exchange():
            dist.barrier()  # or the one that holds the store might be gone before all have looked

    def share(self, n: int) -> range:
        """Return which of ``n`` items are this process's: each item is exactly one's.

        Example:
            >>> [list(World(rank, 2).share(5)) for rank in (0, 1)]
            [[0, 2, 4], [1, 3]]
        """
        return range(self.rank, n, self.size)

    def counted(self, done: int, mine: int, total: int) -> int:
        """Return about how many of ``total`` items all processes have done, as fast as this one.

        Args:
            done: of this process's items.
            mine: how many these are.
            total: of all processes.

        Example:
            >>> World(0, 16).counted(done=13, mine=13, total=200)
            200
        """
        return done * total // max(mine, 1)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[World]:
    """Join the processes that ``torchrun`` has started, for as long as the block lasts.

    Args:
        device: a CPU (gloo) or this process's GPU (nccl).

    Raises:
        SettingsError: the environment names ranks that do not fit together.
        AnchorpatchError: the connection to another process is lost.
    """
    global _store
    rank, size = rank_and_size()
    if size == 1:
        yield World()
        return
    gpu = device if device.type == "cuda" else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    try:
        with _exchange():
            _store, _, _ = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
            dist.init_process_group(
                "gloo" if gpu is None else "nccl",
                timeout=_TIMEOUT,
                store=_store,
                rank=rank,
                world_size=size,
                device_id=gpu,
            )
        yield World(rank, size)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise AnchorpatchError(
            "the connection to another process is lost: it has failed or was killed, see its own "
            "message; run the same command again"
        ) from error
    finally:
        _store = None
        if dist.is_initialized():
            with _exchange():
                dist.destroy_process_group()


def _exchange() -> contextlib.AbstractContextManager[None]:
    return waiting_for("the other processes", grace=_GRACE)


def sum_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if not dist.is_initialized():
        return values
    total = values.clone()
    with _exchange():
        dist.all_reduce(total)
    return total


def any_rank(value: int, device: torch.device) -> int:
    """Return the largest of the processes' numbers: 0 where none has anything to say."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, device=device)
    with _exchange():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)


def average_buffers(module: nn.Module) -> None:
    """Give every process the mean of the processes' running statistics, in place."""
    if not dist.is_initialized():
        return
    with _exchange():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()
