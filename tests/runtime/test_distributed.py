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
from anchorpatch.runtime.distributed import World, any_rank, process_group, sum_ranks
from tests.program import PROCESSES

CPU = torch.device("cpu")


@given(n=st.integers(0, 200), size=st.integers(1, 9))
def test_every_item_is_exactly_one_process_s(n: int, size: int):
    shares = [list(World(rank, size).share(n)) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(n=st.integers(0, 300), size=st.integers(1, 20), batch=st.integers(1, 40))
def test_progress_ends_with_all_items(n: int, size: int, batch: int):
    world = World(0, size)
    mine = len(world.share(n))
    shown = [world.counted(min(done, mine), mine, n) for done in range(0, mine + batch, batch)]
    assert shown[-1] == n
    assert shown == sorted(shown)


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
            connection.send(any_rank(5 + rank, CPU))
    except AnchorpatchError as error:
        connection.send(str(error))


@pytest.mark.parametrize(
    ("dies", "told"),
    [(False, ["1 is there", 6, 6]), (True, ["the connection to another process is lost: "])],
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
