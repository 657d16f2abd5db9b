from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorpatch.errors import SettingsError
from anchorpatch.runtime.tasks import Task, resolve_task


@given(total=st.integers(1, 9), ranks=st.integers(1, 5), items=st.integers(0, 60))
def test_every_item_belongs_to_one_task(total: int, ranks: int, items: int) -> None:
    tasks = [
        resolve_task(f"{index}/{total}", {"RANK": str(rank), "WORLD_SIZE": str(ranks)})
        for index in range(total)
        for rank in range(ranks)
    ]
    for item in range(items):
        assert sum(task.owns(item) for task in tasks) == 1


def test_slurm_arrays_may_start_and_step_anywhere() -> None:
    found = []
    for task in (3, 5, 7, 9):
        array = {"ID": task, "MIN": 3, "STEP": 2, "COUNT": 4}
        environment = {f"SLURM_ARRAY_TASK_{name}": str(v) for name, v in array.items()}
        found.append(resolve_task(None, environment))
    assert [(t.index, t.total) for t in found] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    # What is said on the command line goes before it.
    assert resolve_task("0/1", environment) == Task(source="--task 0/1")


@pytest.mark.parametrize("text", ["", "1", "4/4", "-1/4", "a/b", "1/0", "1/2/3", " 0/2"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--task: expected I/N"):
        resolve_task(text, {})


def test_slurm_without_a_count_is_refused() -> None:
    with pytest.raises(SettingsError, match="SLURM_ARRAY_TASK_COUNT"):
        resolve_task(None, {"SLURM_ARRAY_TASK_ID": "3"})
    outside = {"ID": "9", "MIN": "0", "COUNT": "4"}
    with pytest.raises(SettingsError, match="outside an array of 4"):
        resolve_task(None, {f"SLURM_ARRAY_TASK_{k}": v for k, v in outside.items()})
