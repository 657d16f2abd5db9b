"""Which part of a job this process does, without any process talking to another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from anchorpatch.errors import SettingsError

__all__ = ["Task", "environment_number", "is_main", "rank_and_size", "resolve_task"]


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
