from __future__ import annotations

import os
import signal
import socket
import time
from multiprocessing.connection import Connection

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anchorpatch.errors import AnchorpatchError, SettingsError
from anchorpatch.runtime.distributed import (
    Task,
    World,
    any_rank,
    process_group,
    resolve_task,
    rows_of_ranks,
    sum_ranks,
)
from anchorpatch.training.run_folder import Place
from tests.program import PROCESSES

CPU = torch.device("cpu")


@given(n=st.integers(0, 200), size=st.integers(1, 9))
def test_every_item_is_exactly_one_process_s(n: int, size: int):
    shares = [list(World(rank, size).share(n)) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(n=st.integers(0, 300), size=st.integers(1, 20), batch=st.integers(1, 40))
def test_progress_ends_with_all_items(n: int, size: int, batch: int):
    world, shown = World(0, size), [0]
    mine = len(world.share(n))
    count = world.counter(shown.append, mine, n)
    for done in range(0, mine, batch):
        count(min(batch, mine - done))
    assert sum(shown) == n
    assert min(shown) == 0


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(CPU) as world:
        assert world == World(0, 1)
        assert world.is_main
        world.wait()
        assert sum_ranks(torch.tensor([2.0])).tolist() == [2.0]
        assert any_rank(15, CPU) == 15


@pytest.mark.parametrize("rank", [None, "-1", "2"])
def test_ranks_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, rank: str | None):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with (
        pytest.raises(SettingsError, match="start several processes with torchrun"),
        process_group(CPU),
    ):
        pass


def take_part(rank: int, port: int, dies: bool, connection: Connection) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ["RANK"] = str(rank)
    try:
        with process_group(CPU) as world:
            world.wait()
            if rank == 1 and dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 1:
                time.sleep(0.3)
                connection.send("1 is there")
            if not dies:
                world.wait()
            told = any_rank(5 + rank, CPU)
            assert rows_of_ranks(torch.tensor([rank, 7]), CPU).tolist() == [[0, 7], [1, 7]]
            place = Place(images=3 + rank, sums={"b": 1.0, "a": 2.0 + rank})
            place = place.gathered(CPU, is_main=world.is_main)
            assert place.images == (7, 0)[rank]
            assert place.sums == ({"a": 5.0, "b": 2.0}, {"a": 0.0, "b": 0.0})[rank]
            connection.send(told)
    except AnchorpatchError as error:
        connection.send(str(error))


@pytest.mark.parametrize(
    ("dies", "told"),
    [(False, ["1 is there", 6, 6]), (True, ["the connection to another process was lost: "])],
)
def test_processes_wait_for_each_other_and_notice_a_death(dies: bool, told: list[object]):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    here, there = PROCESSES.Pipe()
    ranks = [PROCESSES.Process(target=take_part, args=(r, port, dies, there)) for r in (0, 1)]
    for process in ranks:
        process.start()
    there.close()
    for expected in told:
        assert here.poll(60)
        found = here.recv()
        assert found == expected or str(found).startswith(str(expected))
    for process in ranks:
        process.join(60)
        assert process.exitcode is not None


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
