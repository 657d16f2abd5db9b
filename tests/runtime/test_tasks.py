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


@pytest.mark.parametrize("job", [0, 3, 12])
def test_the_jobs_of_a_slurm_array_share_all_items(job: int) -> None:
    # As SLURM sets them for --array=3,7,12: nothing that a partition follows from.
    array = {"ID": job, "MIN": 3, "MAX": 12, "STEP": 1, "COUNT": 3}
    environment = {f"SLURM_ARRAY_TASK_{name}": str(v) for name, v in array.items()}
    assert resolve_task(None, environment) == Task(0, 1, f"SLURM array task {job}", job)
    # The command line has precedence.
    assert resolve_task("0/1", environment) == Task(source="--task 0/1")
    environment |= {"RANK": "1", "WORLD_SIZE": "2"}
    both = f"SLURM array task {job}, torchrun rank 1 of 2"
    assert resolve_task(None, environment) == Task(1, 2, both, job)


@pytest.mark.parametrize("text", ["", "1", "4/4", "-1/4", "a/b", "1/0", "1/2/3", " 0/2"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--task: expected I/N"):
        resolve_task(text, {})
