"""The log of a training run: one JSON line an epoch, and TensorBoard on request."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from anchorpatch.errors import DataError, MissingDependency, StorageError, reason_of
from anchorpatch.jobs.training.loop_config import LoopConfig
from anchorpatch.runtime.checkpoint import versions
from anchorpatch.runtime.distributed import World, any_rank
from anchorpatch.storage import lock_file, refusals, write_atomically

__all__ = ["RunLog", "alone_in", "best_record", "write_config"]


class RunLog:
    """Records of epochs in ``log.jsonl``.

    Args:
        folder: of the run.
        main: False for processes that write nothing.
        tensorboard: write event files into ``folder/tensorboard`` too.

    Attributes:
        records: of all epochs so far.

    Raises:
        MissingDependency: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, *, main: bool = True, tensorboard: bool = False) -> None:
        self.main = main
        self.path = folder / "log.jsonl"
        self.records: list[dict[str, Any]] = []
        self._writer: Any = None
        if tensorboard and main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingDependency(
                    "--tensorboard needs TensorBoard: pip install 'anchorpatch[tensorboard]'"
                ) from error
            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def cut(self, epochs: int) -> None:
        """Keep the records of the first ``epochs`` epochs; those behind are trained anew.

        Raises:
            DataError: the log is damaged.
            StorageError: the disk refused.
        """
        lines = []
        try:
            if self.path.is_file() and epochs:
                for line in self.path.read_text(encoding="utf-8").splitlines()[:epochs]:
                    lines.append(line + "\n")
            self.records = [json.loads(line) for line in lines]
            found = sum(float(record["val"]["top1"]) >= 0 for record in self.records)
            if found < epochs:
                raise ValueError(f"{found} of {epochs} epochs")
        except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{self.path}: expected the record of an epoch in each line, found others "
                f"({reason_of(error)}); restore it from a copy, or remove the run's last.pt to "
                "start again"
            ) from error
        if self.main:
            write_atomically(self.path, lambda file: file.write("".join(lines).encode()))

    def append(self, record: dict[str, Any]) -> None:
        """Add the record of an epoch.

        Raises:
            StorageError: the disk refused.
        """
        self.records.append(record)
        if not self.main:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"{self.path} could not be written: {reason_of(error)}; free space, "
                "then run the command again"
            ) from error
        if self._writer is not None:
            for name, value in _flat(record):
                self._writer.add_scalar(name, value, record["epoch"])
            self._writer.flush()

    @staticmethod
    def line(record: Mapping[str, Any], epochs: int, unit: str = "images") -> str:
        """Return a record as one line for people."""
        val, waiting = record["val"], record.get("waiting", 0.0)
        # Below that, faster loading would make no odds.
        note = f" ({waiting:.0%} of the time waiting for data)" if waiting >= 0.1 else ""
        return (
            f"epoch {record['epoch']}/{epochs}: loss {record['train']['loss']:.3f}, "
            f"val loss {val['loss']:.3f}, top-1 {val['top1']:.1%}, top-5 {val['top5']:.1%}, "
            f"rate {record['lr']:.2g}, {record[f'{unit}_per_second']:,.1f} {unit}/s{note}"
        )


def best_record(records: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the record of the epoch with the best top-1; {} where none has one.

    Of equal ones it is the first, whose weights ``best.safetensors`` holds.
    """

    def top1(record: Mapping[str, Any]) -> float | None:
        val = record.get("val")
        value = val.get("top1") if isinstance(val, Mapping) else None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        return value if math.isfinite(value) else None

    known = (record for record in records if top1(record) is not None)
    return max(known, key=lambda record: top1(record) or 0.0, default={})


@contextmanager
def alone_in(folder: Path, world: World, device: torch.device) -> Iterator[None]:
    """Keep other runs out of a run's folder during the block.

    Args:
        folder: of the run; it is made, and removed again where nothing comes of the run.
        world: the processes of this run, of which the main one holds the lock.
        device: of this process.

    Raises:
        StorageError: another run is at work in the folder, or the disk refuses.
    """
    busy = f"{folder}: another run is training here; wait for its end, or give another --runs"
    made = [path for path in (folder, *folder.parents) if world.is_main and not path.exists()]
    with ExitStack() as stack:
        for path in reversed(made):
            stack.callback(_remove_if_empty, path)
        error: StorageError | None = None
        if world.is_main:
            try:
                with refusals(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_file(folder / ".run.lock", busy))
            except StorageError as refused:
                error = refused
        if any_rank(int(error is not None), device):
            raise error or StorageError(busy)
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            pairs.append((prefix + name, float(value)))
    return pairs


def write_config(folder: Path, config: LoopConfig, **more: Any) -> None:
    """Write ``config.json``: the settings of a run, more JSON values, the software's versions.

    Raises:
        StorageError: the disk refused.
    """
    document = {**asdict(config), **more, "versions": versions()}
    text = json.dumps(document, default=str, indent=2) + "\n"
    write_atomically(folder / "config.json", lambda file: file.write(text.encode()))
