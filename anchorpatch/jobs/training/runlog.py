"""The log of a training run: one JSON line an epoch, and TensorBoard on request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anchorpatch.errors import DataError, MissingDependency, StorageError, reason_of
from anchorpatch.jobs.training.loop_config import LoopConfig
from anchorpatch.runtime.checkpoint import versions
from anchorpatch.storage import write_atomically

__all__ = ["RunLog", "write_config"]


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
