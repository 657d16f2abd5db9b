"""Several processes as one run: ``torchrun`` on one node or on many, and the parts of a job.

Without ``torchrun`` everything here is the identity, so that jobs are written once. A `Task` says
which items are a process's to do, without any process talking to another.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from anchorpatch.errors import AnchorpatchError, SettingsError
from anchorpatch.signals import waiting_for

#: For one exchange between the processes: writing a checkpoint to a slow disk is well within.
#: What one process does alone for longer, the others wait for in `World.wait`.
_TIMEOUT: Final = timedelta(hours=1)

#: Seconds that an exchange may go on after a stop signal: ``torchrun`` kills after 30.
_GRACE: Final = 20.0

#: How often `World.wait` was called, and where the processes leave notes for each other.
_waits = itertools.count()
_store: Store | None = None


def environment_number(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return a whole number that ``torchrun`` or a batch system has put into the environment.

    Raises:
        SettingsError: it is not a whole number.

    Example:
        >>> environment_number("WORLD_SIZE", 1, {}), environment_number("RANK", 0, {"RANK": "3"})
        (1, 3)
    """
    text = environment.get(name)
    try:
        return default if text is None else int(text)
    except ValueError:
        raise SettingsError(
            f"${name}: expected a whole number, as torchrun or SLURM sets it, got {text!r}"
        ) from None


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return which of how many processes of ``torchrun`` this is; (0, 1) without it.

    Raises:
        SettingsError: the environment names ranks that do not fit together.
    """
    size = environment_number("WORLD_SIZE", 1, environment)
    rank = environment_number("RANK", -1 if size > 1 else 0, environment)
    if not 0 <= rank < size:
        raise SettingsError(
            f"WORLD_SIZE is {environment.get('WORLD_SIZE', 'not set')} but RANK is "
            f"{environment.get('RANK', 'not set')}: start several processes with torchrun"
        )
    return rank, size


def is_main() -> bool:
    """Tell whether this process is the one of ``torchrun``'s that writes and talks to the user."""
    return rank_and_size()[0] == 0


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

    def counter(
        self, advance: Callable[[int], object], mine: int, total: int
    ) -> Callable[[int], None]:
        """Return what counts this process's items as if the others were as fast.

        Args:
            advance: told about how many more of the ``total`` items are done.
            mine: how many items are this process's.
            total: of all processes.

        Example:
            >>> World(0, 16).counter(print, mine=13, total=200)(13)
            200
        """
        done = 0

        def count(n: int) -> None:
            nonlocal done
            before, done = done, done + n
            advance(done * total // mine - before * total // mine)

        return count


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
            "the connection to another process was lost: it has failed or was killed; see its "
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


def rows_of_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Return the processes' tensors of one shape (n,) as rows (ranks, n), in the ranks' order."""
    if not dist.is_initialized():
        return values[None]
    rows = torch.zeros((dist.get_world_size(), *values.shape), dtype=values.dtype, device=device)
    rows[dist.get_rank()] = values
    with _exchange():
        dist.all_reduce(rows)
    return rows.to(values.device)


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


@dataclass(frozen=True)
class Task:
    """Part ``index`` of ``total``: every item whose number modulo ``total`` is ``index``.

    Attributes:
        index: from 0 to ``total - 1``.
        total: parts.
        source: what the part follows from.
        job: the number of this job among jobs that share the part: each does those of its items
            that no other one is doing or has done. None where there are no others.
    """

    index: int = 0
    total: int = 1
    source: str = "this process"
    job: int | None = None

    def owns(self, item: int) -> bool:
        """Tell whether an item is this task's to do."""
        return item % self.total == self.index


def resolve_task(option: str | None, environment: Mapping[str, str] = os.environ) -> Task:
    """Combine ``--task I/N`` (or a SLURM array) with the ranks of ``torchrun``.

    An array's indices say nothing about how many jobs there are (``--array=3,7,12``), nor do
    SLURM's other variables for a list with gaps. So the jobs of an array share all items.

    Args:
        option: "I/N" with I from 0 to N - 1, or None: SLURM_ARRAY_TASK_ID decides, if set.
        environment: where RANK, WORLD_SIZE and SLURM_ARRAY_TASK_ID are looked up.

    Raises:
        SettingsError: not of the form I/N, or I outside 0 .. N - 1.

    Example:
        >>> resolve_task("1/4", {})
        Task(index=1, total=4, source='--task 1/4', job=None)
        >>> resolve_task(None, {"RANK": "1", "WORLD_SIZE": "2"})
        Task(index=1, total=2, source='torchrun rank 1 of 2', job=None)
        >>> resolve_task(None, {"SLURM_ARRAY_TASK_ID": "8"})
        Task(index=0, total=1, source='SLURM array task 8', job=8)
    """
    source = []
    index, total, job = 0, 1, None
    if option is not None:
        index, total = _parse(option)
        source.append(f"--task {option}")
    elif "SLURM_ARRAY_TASK_ID" in environment:
        job = environment_number("SLURM_ARRAY_TASK_ID", 0, environment)
        source.append(f"SLURM array task {job}")
    rank, ranks = rank_and_size(environment)
    if ranks > 1:
        source.append(f"torchrun rank {rank} of {ranks}")
    return Task(index * ranks + rank, total * ranks, ", ".join(source) or "this process", job)


def _parse(option: str) -> tuple[int, int]:
    first, slash, second = option.partition("/")
    if slash and first.isdecimal() and second.isdecimal() and int(first) < int(second):
        return int(first), int(second)
    raise SettingsError(f"--task: expected I/N with I from 0 to N - 1, such as 0/4, got {option!r}")
