"""The decision on each image as a file: CSV to read, NPZ for programs."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import SettingsError, StorageError
from anchorpatch.runtime.distributed import World, sum_ranks
from anchorpatch.shards.reader import ShardReader
from anchorpatch.storage import refusals, write_atomically

_TOP: Final = 5


def check_predictions_path(path: Path) -> None:
    """Raise where predictions could not be written, before the work and not after it.

    Raises:
        SettingsError: the suffix is neither .csv nor .npz.
        StorageError: the file's folder cannot be made or written to, or the path is a folder.
    """
    if path.suffix.lower() not in (".csv", ".npz"):
        raise SettingsError(
            f"--predictions {path}: expected a file that ends with .csv or .npz, "
            f"found {path.suffix or 'no suffix'}"
        )
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        what = "it is a folder" if path.is_dir() else f"{path.parent} is not writable"
        raise StorageError(f"{path}: cannot write: {what}: choose another --predictions")


class Predictions:
    """Collects mean distributions, each image from one process, and writes them in path order.

    Args:
        path: of the file, .csv or .npz.
        reader: of the shards.
        device: which the processes exchange tensors on.
    """

    def __init__(self, path: Path, reader: ShardReader, device: torch.device) -> None:
        check_predictions_path(path)
        n, classes = len(reader), len(reader.classes)
        self.path, self._reader, self._device = path, reader, device
        top = min(_TOP, classes)
        self._seen = np.zeros(n, np.uint8)
        self._classes = np.zeros((n, top), np.int32)
        self._best = np.zeros((n, top), np.float64)
        self._compact = path.suffix.lower() == ".csv"
        self._all = np.zeros((0 if self._compact else n, classes), np.float32)

    def keep(self, rows: NDArray[np.int64], probabilities: NDArray[np.float64]) -> None:
        """Note images (n,) and their mean distributions (n, C)."""
        # Stable: of equal probabilities the lower class goes first, as in the decision.
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : self._classes.shape[1]]
        self._seen[rows] = 1
        self._classes[rows] = order
        self._best[rows] = np.take_along_axis(probabilities, order, 1)
        if not self._compact:
            self._all[rows] = probabilities

    def write(self, world: World) -> None:
        """Gather what the processes have and write the file; all of them must call this.

        Raises:
            StorageError: the disk refuses.
        """
        # Every image is one process's, and zero elsewhere: the sum is the whole.
        tensors = (self._seen, self._classes, self._best, self._all)
        seen, classes, best, every = (self._sum(array) for array in tensors)
        if not world.is_main:
            return
        rows = np.flatnonzero(seen)
        paths = [path.decode() for path in self._reader.path[rows].tolist()]
        if self._compact:
            text = self._text(rows, paths, classes[rows], best[rows])
            write_atomically(self.path, lambda file: file.write(text.encode()))
            return
        columns: dict[str, Any] = {
            "path": np.array(paths, np.str_),
            "label": self._reader.label[rows],
            "scale": self._reader.scale[rows],
            "patches": self._reader.counts[rows],
            "top5": classes[rows],
            "top5_probability": best[rows].astype(np.float32),
            "probabilities": every[rows],
            "classes": np.array(self._reader.classes, np.str_),
        }
        write_atomically(self.path, lambda file: _save(file, columns))

    def _sum(self, array: NDArray[Any]) -> NDArray[Any]:
        tensor: Tensor = sum_ranks(torch.from_numpy(array).to(self._device))
        return tensor.cpu().numpy()

    def _text(
        self,
        rows: NDArray[np.int64],
        paths: list[str],
        classes: NDArray[np.int32],
        best: NDArray[np.float64],
    ) -> str:
        reader, names = self._reader, self._reader.classes
        numbers = range(1, classes.shape[1] + 1)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["path", "label", "scale", "patches"]
            + [f"class{k}" for k in numbers]
            + [f"probability{k}" for k in numbers]
        )
        for i, row in enumerate(rows.tolist()):
            writer.writerow(
                [paths[i], names[reader.label[row]], reader.scale[row], reader.counts[row]]
                + [names[c] for c in classes[i]]
                + [f"{p:.6g}" for p in best[i]]
            )
        return text.getvalue()


def _save(file: IO[bytes], columns: dict[str, Any]) -> None:
    np.savez(file, **columns)
