"""The folder of a training run: who may write into it, what stands there, and where the run is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import torch

from anchorpatch.errors import DataError, MissingDependency, StorageError, WeightsError, reason_of
from anchorpatch.runtime.checkpoint import versions
from anchorpatch.runtime.distributed import World, any_rank, sum_ranks
from anchorpatch.storage import lock_file, refusals, write_atomically
from anchorpatch.tables import number
from anchorpatch.text import few
from anchorpatch.training.config import LoopConfig

#: Files of a run: the weights of its best and last epoch, and its training state.
BEST: Final = "best.safetensors"
LAST: Final = "last.safetensors"
CHECKPOINT: Final = "last.pt"


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Result of a run.

    Attributes:
        weights: the best weights file.
        epochs: trained, all starts together.
        classes: number of classes.
        images: training and validation images.
        best: record of the epoch with the best top-1, as in log.jsonl.
        last: record of the last epoch.
    """

    weights: Path
    epochs: int
    classes: int
    images: tuple[int, int]
    best: dict[str, Any]
    last: dict[str, Any]


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
        """Keep the records of the first ``epochs`` epochs; later ones will be trained again.

        Raises:
            DataError: the log is damaged.
            StorageError: the disk refused.
        """
        lines = []
        try:
            if self.path.is_file() and epochs:
                lines = self.path.read_text(encoding="utf-8").splitlines()[:epochs]
            self.records = [json.loads(line) for line in lines]
            found = sum(map(_is_record, self.records))
            if found < epochs:
                raise ValueError(f"{found} of {epochs} epochs")
        except (
            *(OSError, LookupError, AttributeError, TypeError, ValueError, RecursionError),
        ) as error:
            raise DataError(
                f"{self.path}: expected the record of an epoch in each line, found others "
                f"({reason_of(error)}); restore it from a copy, or remove the run's last.pt to "
                "start again"
            ) from error
        if self.main:
            text = "".join(line + "\n" for line in lines)
            write_atomically(self.path, lambda file: file.write(text.encode()))

    def append(self, record: dict[str, Any]) -> None:
        """Add the record of an epoch.

        Raises:
            StorageError: the disk refused.
        """
        self.records.append(record)
        if not self.main:
            return
        with refusals(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._writer is not None:
            for name, value in _flat(record):
                self._writer.add_scalar(name, value, record["epoch"])
            self._writer.flush()

    @staticmethod
    def line(record: Mapping[str, Any], epochs: int, unit: str = "images") -> str:
        """Return a record as one line for people."""
        val, waiting = record["val"], record.get("waiting", 0.0)
        # Below that, faster loading would make no difference.
        note = f" ({waiting:.0%} of the time waiting for data)" if waiting >= 0.1 else ""
        return (
            f"epoch {record['epoch']}/{epochs}: loss {record['train']['loss']:.3f}, "
            f"val loss {val['loss']:.3f}, top-1 {val['top1']:.1%}, top-5 {val['top5']:.1%}, "
            f"rate {record['lr']:.2g}, {record[f'{unit}_per_second']:,.1f} {unit}/s{note}"
        )


def _is_record(record: Any) -> bool:
    """Tell whether a record has the numbers that a summary shows."""
    val = record["val"]
    numbers = [record["epoch"], record["train"]["loss"], val["top1"], val["top5"], val["loss"]]
    for found in val.get("by_scale", {}).values():
        names = ("patches", "top1", "top5") if found["images"] else ()
        numbers += [found[name] for name in ("images", *names)]
    return all(isinstance(n, (int, float)) for n in numbers)


def best_record(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the record of the epoch with the best top-1; {} where none has one.

    Of equal ones it is the first, whose weights ``best.safetensors`` holds.
    """
    known = [record for record in records if number(record, "val", "top1") is not None]
    return dict(max(known, key=lambda record: record["val"]["top1"], default={}))


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
    busy = StorageError(
        f"{folder}: another run is training here; wait for it to finish, or give another --runs"
    )
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
            raise error or busy
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


@dataclass
class Place:
    """Where a run stands.

    Attributes:
        epoch: epochs that are done.
        step: steps of this one that are done.
        images: or patches, of the epoch so far, in this process.
        seconds: of the epoch so far.
        waited: seconds of these that passed without data.
        best: top-1 of the best epoch.
        sums: of the epoch so far, in this process: each part of the loss times its images.
    """

    epoch: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    best: float = -1.0
    sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Any], *, steps: int, is_main: bool) -> Place:
        """Return the place that a checkpoint keeps; version 0.1 did not keep ``waited``.

        Raises:
            ValueError: there is no such place in a run of so many steps per epoch.
        """
        known = {each.name: state[each.name] for each in fields(cls) if each.name in state}
        place, begun = cls(**known), "loss" in known["sums"]
        whole = place.epoch, place.step, place.images
        # Sums of parts that the loss leaves out may be infinite.
        others = place.seconds, place.waited, place.best, *place.sums.values()
        right = all(type(n) is int for n in whole) and all(
            isinstance(n, (int, float)) for n in others
        )
        if not right or min(whole) < 0 or not begun <= place.step <= begun * steps:
            raise ValueError(f"expected a place in {steps} steps, found {known}")
        return place if is_main else place.without_sums()

    def without_sums(self) -> Place:
        """Return the place of a process whose share the first one keeps."""
        return replace(self, images=0, sums=dict.fromkeys(self.sums, 0.0))

    def gathered(self, device: torch.device, *, is_main: bool) -> Place:
        """Let the first process have the images and sums of all, as it writes the checkpoint."""
        names = sorted(self.sums)
        mine = torch.tensor([self.images, *(self.sums[n] for n in names)], dtype=torch.float64)
        images, *sums = sum_ranks(mine.to(device)).tolist()
        whole = replace(self, images=int(images), sums=dict(zip(names, sums, strict=True)))
        return whole if is_main else self.without_sums()

    def totals(self, device: torch.device) -> tuple[float, dict[str, float], float]:
        """Return the epoch of all processes: its images, mean losses, and share of waiting."""
        names = sorted(self.sums)
        mine = [float(self.images), self.waited, self.seconds, *(self.sums[n] for n in names)]
        all_ranks = sum_ranks(torch.tensor(mine, dtype=torch.float64, device=device)).tolist()
        images, waited, seconds = all_ranks[:3]
        losses = {name: v / max(images, 1) for name, v in zip(names, all_ranks[3:], strict=True)}
        return images, losses, waited / max(seconds, 1e-9)


def check_identity(path: Path, identity: Any, expected: Mapping[str, Any]) -> list[str]:
    """Check that a checkpoint is of the same run, but for what a run may go on with.

    Args:
        path: of the checkpoint.
        identity: what it says of its run, a JSON object as text.
        expected: what this run says, as JSON values.

    Returns:
        For each thing that differs and may, what comes of it: a line for the user.

    Raises:
        WeightsError: something else differs; it is named.
    """
    try:
        found, expected = dict(json.loads(identity)), json.loads(json.dumps(expected))
    except (TypeError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: expected training state of a run, found state that does not say of which; "
            "start again with --overwrite, or restore it from a copy"
        ) from error
    different, notes = [], []
    for name in sorted(expected.keys() | found.keys()):
        there, here = found.get(name), expected.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            there = {key: there.get(key) for key in here}  # older versions told more
        if there == here:
            continue
        if name == "epochs" and isinstance(there, int) and there < expected[name]:
            note = f"{here} epochs instead of {there}"
            if found.get("schedule") == "cosine":
                note += (
                    f": the rate follows the schedule of {here} epochs from here on, which is not "
                    f"what {here} epochs from the start would give"
                )
            notes.append(note)
        elif name == "processes":
            notes.append(
                f"started with {there} processes, resumed with {here}: the result will not be the "
                "same bit for bit"
            )
        else:
            there, here = (
                few(list(map(str, v))) if isinstance(v, list) else v for v in (there, here)
            )
            different.append(f"{name} {there} there, {here} here")
    if different:
        raise WeightsError(
            f"{path}: this run has a different configuration ({'; '.join(different)}); "
            "give the same options (--epochs may be more), or another --runs, or start again "
            "with --overwrite"
        )
    return [f"{path}: {note}" for note in notes]


def refuse_foreign(folder: Path, run: Path) -> None:
    """Raise WeightsError where a folder holds results that no run here has left.

    Args:
        folder: that is about to get results.
        run: folder of the run that gives them, whose checkpoint identifies them.
    """
    paths = (folder / name for name in (LAST, BEST, "log.jsonl"))
    found = [path.name for path in paths if path.is_file() and path.stat().st_size]
    if found and not (run / CHECKPOINT).is_file():
        raise WeightsError(
            f"{folder} holds {' and '.join(found)}, but no {CHECKPOINT} to resume from: move them "
            "away, give another --runs, or replace them with --overwrite"
        )
