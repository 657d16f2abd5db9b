"""Which device computes, how exactly, with how many threads and how much memory.

And how data get there without a wait.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import SettingsError
from anchorpatch.runtime.distributed import World, environment_number, process_group
from anchorpatch.runtime.progress import Reporter
from anchorpatch.text import counted

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    ``auto`` is a GPU where there is one. Under ``torchrun`` each process takes the GPU of its
    local rank. That GPU becomes the current one, which is what streams, events and allocations
    that name no device mean.

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
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute in float32 where it says so, and alike each time, during the block.

    cuDNN's convolutions round float32 to TF32 by default, which moves a few percent of the
    images to other patches, and it may choose other algorithms, which sum in another order.
    Training keeps the defaults. Also a decorator.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    settings: list[tuple[Any, str, Any]] = [
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
    ]
    # torch 2.9 replaced `allow_tf32`, and warns of it.
    if hasattr(cudnn, "conv"):
        settings += [(cudnn.conv, "fp32_precision", "ieee"), (matmul, "fp32_precision", "ieee")]
    else:
        settings += [(cudnn, "allow_tf32", False), (matmul, "allow_tf32", False)]
    with ExitStack() as stack:
        for where, name, value in settings:
            stack.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, value)
        yield


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16; ONEDNN_MAX_CPU_ISA may hide them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if platform.machine() in ("x86_64", "AMD64"):
        # There, AVX-512 without these instructions counts too.
        hidden = os.environ.get("ONEDNN_MAX_CPU_ISA") in ("AVX512_CORE", "AVX512_CORE_VNNI")
        able = able and not hidden and torch.cpu._is_avx512_bf16_supported()
    return able


def check_precision(precision: str, device: torch.device) -> None:
    """Raise SettingsError for bfloat16 on a device that would emulate it, slowly."""
    if precision == "bfloat16" and not has_bfloat16(device):
        raise SettingsError(
            "--precision bfloat16: expected a device with bfloat16 instructions, which this "
            f"{'CPU' if device.type == 'cpu' else 'GPU'} lacks; use --precision float32"
        )


def to_device(array: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for what the GPU is doing.

    Such a copy starts from page-locked memory; from any other the driver may wait.
    """
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def cpu_count() -> int:
    """Return how many CPU cores are this process's, at least 1.

    Affinity and the quota of a container count. Processes of ``torchrun`` on one machine share
    its cores.
    """
    return max(1, int(joblib.cpu_count()) // max(1, environment_number("LOCAL_WORLD_SIZE", 1)))


def use_threads(threads: int | None) -> None:
    """Choose the threads that compute on the CPU.

    Args:
        threads: how many; None: as OMP_NUM_THREADS says, else one per core of this process.
    """
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = cpu_count()
    if threads is not None:
        torch.set_num_threads(threads)


def use_files(most: int = 1 << 16) -> None:
    """Let this process open ``most`` files, or as many as the system allows.

    Random reads from more shards than can be kept open are ten times as slow.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS names a limit that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def computing_on(device: torch.device, engine: str = "torch") -> str:
    """Return a line that says where a job computes, and with how many threads on a CPU."""
    if device.type != "cpu":
        return f"computing on {torch.cuda.get_device_name(device)}"
    by = "" if engine == "torch" else f" by {engine}"
    return f"computing on {counted(torch.get_num_threads(), 'CPU thread')} (--threads){by}"


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step instead of giving it back.

    A training step frees and takes the same hundreds of megabytes again and again. glibc maps
    and unmaps every large block, and clearing fresh pages costs more than some layers: AnchorNet
    on two cores trains 16 images per step at 29 instead of 21 images/s. Other C libraries are
    left alone.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


@contextmanager
def joined(
    name: str, progress: Reporter | None, precision: str = "float32"
) -> Iterator[tuple[torch.device, World, Reporter]]:
    """Join the processes of a job that computes, and keep freed memory on a CPU.

    Args:
        name: of the device, as `resolve_device` takes it.
        progress: where the main process shows progress.
        precision: that the device must have.

    Yields:
        Device, processes, and where this one shows progress.

    Raises:
        SettingsError: the device or the precision cannot be used.
    """
    device = resolve_device(name)
    check_precision(precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    with process_group(device) as world:
        yield device, world, progress if progress is not None and world.is_main else Reporter()


def peak_memory(device: torch.device) -> int:
    """Return the most memory in bytes that this process had: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
