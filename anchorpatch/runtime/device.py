"""Which device computes."""

from __future__ import annotations

import os

import torch

from anchorpatch.errors import SettingsError
from anchorpatch.runtime.tasks import environment_number

__all__ = ["cpu_count", "resolve_device"]


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    ``auto`` is a GPU where there is one. Under ``torchrun`` each process takes the GPU of its
    local rank.

    Raises:
        SettingsError: ``cuda`` was asked for and cannot be used.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if not torch.version.cuda else "no GPU was found"
        raise SettingsError(f"--device cuda: {why}; use --device cpu, or auto")
    rank, gpus = environment_number("LOCAL_RANK", 0), torch.cuda.device_count()
    if rank >= gpus:
        raise SettingsError(
            f"local rank {rank} has no GPU: {gpus} found; lower torchrun's --nproc-per-node"
        )
    return torch.device("cuda", rank)


def cpu_count() -> int:
    """Return how many CPU cores this process may use (affinity and batch systems count)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
