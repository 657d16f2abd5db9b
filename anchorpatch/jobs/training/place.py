"""Where a training run stands: what its checkpoint counts, and what its log says of an epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from anchorpatch.errors import WeightsError
from anchorpatch.runtime.distributed import sum_ranks

__all__ = ["Place", "check_identity"]


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

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return state | {"sums": dict(self.sums)}

    @classmethod
    def of(cls, state: Mapping[str, Any], *, is_main: bool) -> Place:
        """Return the place that a checkpoint keeps; version 0.1 did not keep ``waited``."""
        place = cls(**{each.name: state[each.name] for each in fields(cls) if each.name in state})
        if not is_main:  # its share of the sums is lost; those of the first process count
            place.images, place.sums = 0, dict.fromkeys(place.sums, 0.0)
        return place

    def totals(self, device: torch.device) -> tuple[float, dict[str, float], float]:
        """Return the epoch of all processes: its images, mean losses, and share of waiting."""
        names = sorted(self.sums)
        mine = [float(self.images), self.waited, self.seconds, *(self.sums[n] for n in names)]
        all_ranks = sum_ranks(torch.tensor(mine, dtype=torch.float64, device=device)).tolist()
        images, waited, seconds = all_ranks[:3]
        losses = {name: v / images for name, v in zip(names, all_ranks[3:], strict=True)}
        return images, losses, waited / max(seconds, 1e-9)


def check_identity(path: Path, identity: Any, expected: Mapping[str, Any]) -> list[str]:
    """Check that a checkpoint is of the same run, but for what a run may go on with.

    Args:
        path: of the checkpoint.
        identity: what it says of its run, a JSON object as text.
        expected: what this run says, as JSON has it.

    Returns:
        For each thing that differs and may, what comes of it: a line for the user.

    Raises:
        WeightsError: something else differs; it is named.
    """
    try:
        found = dict(json.loads(identity))
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
                f"begun with {there} processes, goes on with {here}: the result will not be the "
                "same bit for bit"
            )
        else:
            different.append(f"{name} {there} there, {here} here")
    if different:
        raise WeightsError(
            f"{path}: a run of another configuration ({'; '.join(different)}); "
            "give the same options (--epochs may be more), or another --runs, or start again "
            "with --overwrite"
        )
    return [f"{path}: {note}" for note in notes]
