"""Extraction on a real Ray cluster of two nodes on this machine, and how it fails."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anchorpatch import __version__, storage
from anchorpatch.errors import (
    AnchorpatchError,
    CorruptShard,
    DataError,
    MissingDependency,
    SettingsError,
    ShardBusy,
    ShardError,
    TooManyBadImages,
)
from anchorpatch.jobs import extract, extract_ray
from anchorpatch.jobs.extract_plan import ExtractConfig, Plan, make_plan
from anchorpatch.jobs.extract_ray import RayCluster, RaySettings, connected
from anchorpatch.jobs.ray_actor import Actor, Made, Orders
from anchorpatch.shards.manifest import LOCK_NAME, read_manifest
from anchorpatch.shards.splits import open_manifest
from tests.program import PROCESSES, run_here, run_program

#: Of one image each.
SHARDS = 40


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def config_of(data: Path, weights: Path, out: Path, **changes: Any) -> ExtractConfig:
    given: dict[str, Any] = {"shard_size": 1, "workers": 0, "device": "cpu", **changes}
    return ExtractConfig(data, "val", weights, out, **given)


@pytest.fixture(scope="module")
def reference(
    image_folder: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("plain")
    extract.run(config_of(image_folder, weights, out))
    return contents(out / "val")


# --- a real cluster -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="needs Ray")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("USAGE_STATS_ENABLED", "prestart_worker_first_driver", "worker_niceness"):
            patch.setenv(f"RAY_{name}", "0")
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


def actors_of(node: Any) -> list[int]:
    """Return the processes of a node's actors."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            parent = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[1]
            name = Path("/proc", process, "cmdline").read_text()
            if int(parent) == raylet and name.startswith("ray::Actor"):
                found.append(int(process))
    return found


def test_actors_and_nodes_that_die_change_no_byte(
    cluster: Any, image_folder: Path, weights: Path, tmp_path: Path, reference: dict[str, bytes]
) -> None:
    out, streams = tmp_path / "out/val", (tmp_path / "stdout", tmp_path / "stderr")
    settings = {k: v for k, v in os.environ.items() if not k.startswith("ANCHORPATCH_")}
    arguments = ["extract", "--data", image_folder, "--weights", weights, "--out", out.parent]
    arguments += ["--shard-size", 1, "--device", "cpu", "--ray", cluster.address, "--ray-cpus", 1]
    words = list(map(str, arguments))
    (node,) = cluster.worker_nodes
    plan = make_plan(config_of(image_folder, weights, out.parent))
    open_manifest(out, plan.header, plan.files)
    program = PROCESSES.Process(target=run_here, args=(words, tmp_path, settings, streams))

    def wait_until(ready: Callable[[int], object]) -> None:
        end = time.monotonic() + 300
        while not ready(len(read_manifest(out).entries)):
            assert program.is_alive(), streams[1].read_text()
            assert time.monotonic() < end
            time.sleep(0.02)

    with ExitStack() as locks:
        # Nobody gets further than these shards, of which the first 20 come free at some time.
        part = locks.enter_context(ExitStack())
        for i in range(10, SHARDS):
            lock = storage.lock_file(out / f"val-{i:05d}.h5.lock", ShardBusy())
            (part if i < 30 else locks).enter_context(lock)
        program.start()
        try:
            wait_until(lambda n: n == 10 and all(map(actors_of, (cluster.head_node, node))))
            part.close()
            wait_until(lambda n: n > 10)
            for process in actors_of(cluster.head_node):
                os.kill(process, signal.SIGKILL)
            cluster.remove_node(node, allow_graceful=False)
            wait_until(lambda n: n == 30)
            os.kill(program.pid, signal.SIGTERM)
            program.join(60)
        finally:
            program.kill()
        lines = streams[1].read_text().splitlines()
        assert program.exitcode == 143, lines
        assert lines[-1] == "anchorpatch: terminated by SIGTERM; run the same command again"
        assert any("2 Ray actors on 2 nodes, each with 1 CPU core" in line for line in lines)
        assert sum("a Ray actor failed on" in line for line in lines) >= 1, lines
        assert not any("Traceback" in line for line in lines)
        assert not actors_of(cluster.head_node)
        left = {path.name for path in out.iterdir()} - reference.keys()
        assert left == {LOCK_NAME, *(f"val-{i:05d}.h5.lock" for i in range(30, SHARDS))}
    result = run_program(*words, "--collect", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert '"images_per_second"' in result.stdout
    assert contents(out) == reference
    assert {path.name for path in out.iterdir()} == {LOCK_NAME, *reference}


# --- what an actor looks at ---------------------------------------------------------------------


@pytest.fixture
def plan(image_folder: Path, weights: Path, tmp_path: Path) -> Plan:
    plan = make_plan(config_of(image_folder, weights, tmp_path / "out", limit=3))
    open_manifest(plan.out, plan.header, plan.files)
    return plan


def orders_for(plan: Plan, **changes: Any) -> Orders:
    token = (plan.out / LOCK_NAME).stat().st_mtime_ns
    probe = tuple(extract_ray._probe(plan))
    assert len(probe) == 3
    given = {"folder": plan.out, "token": token, "probe": probe, "cpus": 1, "threads": 1}
    return Orders(**{"version": __version__, **given, **changes})


def test_a_node_that_lacks_something_is_named(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / LOCK_NAME).touch()
    size = orders_for(plan).probe[0][1]
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"version": "0.0.1"}, AnchorpatchError, "install the same version on all nodes"),
        ({"probe": ((0, size + 1),)}, DataError, f"00.JPEG: expected {size + 1:,} bytes, found"),
        ({"folder": tmp_path / "none"}, ShardError, "none: this is not the output folder"),
        ({"folder": tmp_path / "other", "token": 1}, ShardError, "or use --collect"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            Actor(plan, orders_for(plan, **changes)).prepare()
        assert str(caught.value).startswith("node ")
    data = shutil.copytree(plan.config.data, tmp_path / "data")
    plan = make_plan(replace(plan.config, data=data))
    orders = orders_for(plan)
    shutil.rmtree(data / "val/dog")
    with pytest.raises(DataError, match=r"dog/06.JPEG: expected .* bytes, found missing"):
        Actor(plan, orders).prepare()


def test_an_actor_that_stops_leaves_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: dict[str, bytes]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    killed = tmp_path / "scratch/anchorpatch-ray-killed"
    killed.mkdir(parents=True)
    (killed / "lock").touch()
    actor = Actor(plan, orders_for(plan, folder=None))
    actor.prepare()
    assert not killed.exists()
    made = actor.make(1)
    assert made.entry is not None
    assert made.data is not None
    assert made.entry.bytes == len(made.data)
    assert {path.name for path in plan.out.iterdir()} == {LOCK_NAME, "manifest.json"}
    actor.stop()
    assert not list((tmp_path / "scratch").iterdir())


# --- the driver, with a pretended Ray -----------------------------------------------------------


class _RayError(Exception):
    cause: Exception


class PretendedRay:
    """A cluster of one core, whose actors answer as two functions say; an error is raised."""

    exceptions = SimpleNamespace(RayError=_RayError, RayTaskError=type("Task", (_RayError,), {}))

    def __init__(self, make: Callable[[int], object], prepare: Callable[[], object]) -> None:
        def call(answer: Callable[..., object]) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *given: partial(answer, *given))

        self.actor = SimpleNamespace(
            make=call(make), prepare=call(prepare), stop=call(lambda: None)
        )

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]

    def put(self, value: object) -> object:
        return value

    def remote(self, kind: type) -> Any:
        return SimpleNamespace(
            options=lambda **given: SimpleNamespace(remote=lambda *args: self.actor)
        )

    def wait(self, calls: list[Any], **options: object) -> tuple[list[Any], list[Any]]:
        return calls[:1], calls[1:]

    def get(self, call: Callable[[], object]) -> object:
        if isinstance(answer := call(), Exception):
            raise answer
        return answer

    def kill(self, actor: object) -> None: ...


def died(text: str) -> Exception:
    return _RayError(f"The actor died.\n ip: 10.0.0.3\n {text}")


def failed(error: Exception) -> Exception:
    task = PretendedRay.exceptions.RayTaskError("raised by a task")
    task.cause = error
    return task


KILLED = died("Worker exit detail: Worker unexpectedly exits with a connection error. Some")
NOT_INSTALLED = died(
    "in its creation task, (ip=10.0.0.3)\nModuleNotFoundError: No module named 'x'"
)


@pytest.mark.parametrize(
    ("make", "prepare", "kind", "message"),
    [
        (KILLED, "host", AnchorpatchError, "val-00000.h5: 5 Ray actors failed before it was done: "
         "Worker unexpectedly exits with a connection error; run again with fewer --workers"),
        (failed(AnchorpatchError("a loading worker was killed")), "host", AnchorpatchError,
         "5 Ray actors failed before it was done: a loading worker was killed; run"),
        (failed(DataError("node a: no disk")), "host", DataError, "^node a: no disk$"),
        (Made(None, None, {}), "host", ShardBusy, "another process is writing this shard"),
        (None, NOT_INSTALLED, AnchorpatchError, r"start an actor: No module named 'x' \(node "
         r"10.0.0.3\): install the same anchorpatch, and what it needs, on all nodes"),
        (None, KILLED, AnchorpatchError, "cannot start an actor: Worker unexpectedly exits"),
        (None, failed(ShardError("node a: not the folder")), ShardError, "^node a: not the folder"),
    ],
)  # fmt: skip
def test_what_cannot_go_on_ends_in_one_line(
    plan: Plan, monkeypatch: pytest.MonkeyPatch,
    make: object, prepare: object, kind: type[Exception], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(extract_ray, "_PATIENCE", 0.05)
    monkeypatch.setattr(extract_ray, "_PAUSE", 0.01)
    ray = PretendedRay(lambda shard: make, lambda: prepare)
    with pytest.raises(kind, match=message):
        extract.run(plan.config, engine=RayCluster(ray, RaySettings(), "cpu"))
    assert not read_manifest(plan.out).entries


def test_what_comes_back_is_looked_at(plan: Plan, reference: dict[str, bytes]) -> None:
    actor = Actor(plan, orders_for(plan, folder=None))

    def damaged(shard: int) -> Made:
        made = actor.make(shard)
        assert made.data is not None
        made.data[-1] ^= 1
        return made

    def skipped(shard: int) -> Made:
        made = actor.make(shard)
        return made._replace(entry=replace(made.entry, skipped=(("cat/0", "truncated"),)))

    for make, kind in ((damaged, CorruptShard), (skipped, TooManyBadImages)):
        ray = PretendedRay(make, lambda: "host")
        with pytest.raises(kind):
            extract.run(plan.config, engine=RayCluster(ray, RaySettings(collect=True), "cpu"))
        assert not list(plan.out.glob("*.h5"))
    ray = PretendedRay(actor.make, lambda: "host")
    summary = extract.run(plan.config, engine=RayCluster(ray, RaySettings(collect=True), "cpu"))
    assert (summary.complete, summary.images_run) == (True, 3)
    actor.stop()


# --- addresses ----------------------------------------------------------------------------------


def test_addresses_and_cores_that_there_are_not() -> None:
    pytest.importorskip("ray", reason="needs Ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
        cases: list[tuple[str, type[Exception], str]] = [
            ("ray://head:10001", SettingsError, "--ray: expected HOST:PORT of the cluster's head"),
            ("head", SettingsError, "got 'head'"),
            ("head:123456", SettingsError, "got 'head:123456'"),
            (nobody, AnchorpatchError, f"--ray {nobody}: no Ray cluster answers there"),
        ]
        for address, kind, message in cases:
            with pytest.raises(kind, match=message), connected(RaySettings(address)):
                pass
    ray = PretendedRay(print, print)
    with pytest.raises(SettingsError, match=r"needs 2 CPU cores, but the largest .* has 1 core"):
        RayCluster(ray, RaySettings(cpus=2), "auto")
    with pytest.raises(SettingsError, match="no node of the Ray cluster has a GPU"):
        RayCluster(ray, RaySettings(), "cuda")


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    message = re.escape("pip install 'anchorpatch[ray]'")
    with pytest.raises(MissingDependency, match=message), connected(RaySettings()):
        pass
