"""Shards made by the actors of a Ray cluster; see `anchorpatch.jobs.ray_actor`.

The driver scans the images once and puts the plan into Ray's object store, which each node has in
shared memory. It hands shards out, a few at a time, and commits what comes back; no actor writes
the manifest. An actor keeps one localizer, and takes shards from its queue while it makes earlier
ones. When an actor or its node dies, another one is started where there is room, and its shards
are given to whoever is free. So nodes may join and leave.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Final

import numpy as np
import torch
from numpy.typing import NDArray

from anchorpatch import __version__, storage
from anchorpatch.errors import (
    AnchorpatchError,
    CorruptShard,
    ImageError,
    Interrupted,
    MissingDependency,
    SettingsError,
    ShardError,
    reason_of,
)
from anchorpatch.images.source import spread_rows
from anchorpatch.jobs.extract import check_bad, skipped_elsewhere, start_counting
from anchorpatch.jobs.extract_plan import Plan
from anchorpatch.jobs.ray_actor import Actor, Made, Orders
from anchorpatch.runtime.device import cpu_count
from anchorpatch.runtime.progress import Reporter, Waits
from anchorpatch.shards.layout import shard_name
from anchorpatch.shards.manifest import LOCK_NAME, Manifest, ShardEntry
from anchorpatch.signals import StopSignals, waiting_for
from anchorpatch.text import counted

#: Actors that may die over one shard, for whatever reason.
_TRIES: Final = 5

#: Seconds between looks at the nodes, and before a shard that another process makes is tried again.
_PAUSE: Final = 1.0

#: Seconds to wait for a shard that another process makes, for a file to be seen on a shared
#: folder, and before a long wait for an actor is reported.
_PATIENCE: Final = 60.0

#: Seconds for actors to throw away what they are making.
_GRACE: Final = 5.0

#: Bytes of crops that the workers of an actor may be ahead; see `anchorpatch.images.loader`.
_ROOM: Final = 1 << 30


@dataclass(frozen=True)
class RaySettings:
    """Which cluster to use, and how.

    Attributes:
        address: HOST:PORT of the head node, or auto for the cluster that this machine is part of;
            None: as $RAY_ADDRESS says, else a cluster of this machine alone, for this run.
        cpus: CPU cores of an actor; None: those of the smallest node, or of each of its GPUs.
        collect: actors send shards through the object store, as the output folder is not shared.
        workers: decoding processes of an actor; None: as many as cores.
        threads: computing on a CPU in an actor; None: as many as cores.
    """

    address: str | None = None
    cpus: int | None = None
    collect: bool = False
    workers: int | None = None
    threads: int | None = None


@contextmanager
def connected(settings: RaySettings, device: str = "auto") -> Iterator[RayCluster]:
    """Join a cluster, or start one on this machine, for the block.

    Raises:
        MissingDependency: Ray is not installed.
        SettingsError: the address is no address, or no node has what an actor is to have.
        AnchorpatchError: the cluster does not answer.
    """
    # Read when Ray is loaded, and by the processes that it starts: no reports to its makers, no
    # idle worker for each core, and actors of the same priority as other processes.
    for name in ("USAGE_STATS_ENABLED", "prestart_worker_first_driver", "worker_niceness"):
        os.environ.setdefault(f"RAY_{name}", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingDependency(
            f"--ray: Ray cannot be loaded ({reason_of(error)}): pip install 'anchorpatch[ray]'"
        ) from error
    # Ray prints what happens to its processes, to stdout.
    with open(os.devnull, "w") as null, redirect_stdout(null):
        try:
            with _held():
                _join(ray, settings.address or os.environ.get("RAY_ADDRESS") or "local")
                cluster = RayCluster(ray, settings, device)
            yield cluster
        finally:
            with waiting_for("Ray to end"):
                ray.shutdown()


@contextmanager
def _held() -> Iterator[StopSignals]:
    """Hold stop signals back until the end of the block.

    What a handler raises within a call of Ray arrives as a SystemError, or not at all.
    """
    with StopSignals() as stop:
        yield stop
    if stop.received:
        signal.raise_signal(stop.received)


def _join(ray: Any, address: str) -> None:
    options: dict[str, Any] = {
        "address": address,
        "log_to_driver": False,
        "logging_level": "CRITICAL",
    }
    if address == "local":
        options |= {"num_cpus": cpu_count(), "include_dashboard": False}
    else:
        # For what is set when the program starts; a cluster's own processes know nothing of it.
        names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "ANCHORPATCH_SPOOL")
        passed = {name: os.environ[name] for name in names if name in os.environ}
        options["runtime_env"] = {"env_vars": passed}
    if address not in ("auto", "local"):
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal() and int(port) < 1 << 16) or "/" in host:
            raise SettingsError(
                f"--ray: expected HOST:PORT of the cluster's head node, or auto, got {address!r}"
            )
        try:  # Ray would try for two minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise AnchorpatchError(
                f"--ray {address}: no Ray cluster answers there ({reason_of(error)}): start one "
                "with ray start --head, or leave the address out to use this machine alone"
            ) from error
    try:
        with waiting_for(f"Ray ({address})"):
            ray.init(**options)
    except SystemExit as error:  # what Ray makes of SIGTERM
        number = signal.SIGTERM
        raise Interrupted("terminated by SIGTERM; run the same command again", number) from error
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise AnchorpatchError(f"--ray {address}: cannot use Ray: {reason_of(error)}") from error


class RayCluster:
    """A cluster as `anchorpatch.jobs.extract.run` uses it.

    Args:
        ray: the module, which is connected.
        settings: for the actors.
        device: auto, cpu or cuda.

    Attributes:
        device: of the actors.
    """

    def __init__(self, ray: Any, settings: RaySettings, device: str) -> None:
        self._ray, nodes = ray, [n["Resources"] for n in ray.nodes() if n["Alive"]]
        gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
        if device == "cuda" and not gpus:
            raise SettingsError(
                "--device cuda: no node of the Ray cluster has a GPU; use --device cpu, or auto"
            )
        cuda = bool(gpus) and device != "cpu"
        self.device: torch.device | None = torch.device("cuda" if cuda else "cpu")
        shares = [
            int(n.get("CPU", 0) / (n["GPU"] if cuda else 1)) for n in (gpus if cuda else nodes)
        ]
        cpus = settings.cpus or min([share for share in shares if share] or [1])
        self.needs = {"num_cpus": cpus, "num_gpus": int(cuda)}
        self.settings = replace(
            settings, cpus=cpus, workers=cpus if settings.workers is None else settings.workers
        )
        if not sum(self.room()):
            largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
            raise SettingsError(
                f"--ray-cpus: an actor needs {counted(cpus, 'CPU core')}{' and a GPU' * cuda}, but "
                f"the largest node of the Ray cluster has {counted(largest, 'core')}"
            )

    def room(self) -> list[int]:
        """Return how many actors each node that is there has room for."""
        wanted = {"CPU": self.needs["num_cpus"], "GPU": self.needs["num_gpus"]}
        return [
            min(int(node["Resources"].get(kind, 0) // n) for kind, n in wanted.items() if n)
            for node in self._ray.nodes()
            if node["Alive"]
        ]

    @contextmanager
    def making(
        self, plan: Plan, reporter: Reporter, waits: Waits
    ) -> Iterator[Callable[[Manifest, Sequence[int]], int]]:
        """See `anchorpatch.jobs.extract.Engine`."""
        with _held():
            crew = _Crew(self._ray, self, plan, reporter, waits)
        try:
            yield crew.make
        finally:
            crew.dismiss()


@dataclass(eq=False)
class _Hand:
    """An actor, as the driver sees it: its calls under way, by reference, with their shards."""

    actor: Any
    calls: dict[Any, int | None] = field(default_factory=dict)
    host: str = ""
    dead: bool = False


class _Crew:
    """The actors of a run, and who makes what."""

    def __init__(
        self, ray: Any, cluster: RayCluster, plan: Plan, reporter: Reporter, waits: Waits
    ) -> None:
        self._ray, self._cluster, self._plan = ray, cluster, plan
        self._reporter, self._waits = reporter, waits
        self._hands: list[_Hand] = []
        self._tries, self._failed_starts, self._room = Counter[int](), 0, 0
        self._looked, self._waiting_since = -math.inf, time.monotonic()
        settings, side = cluster.settings, plan.header.settings.img_size
        workers, cpus = settings.workers or 0, settings.cpus or 1
        # What the workers ask for at once must be there, or the pipeline would run dry.
        ahead = min(2 * workers * plan.batch_size, _ROOM // (3 * side * side))
        self._most = 2 + ahead // plan.config.shard_size
        folder = None if settings.collect else plan.out.absolute()
        orders = Orders(
            version=__version__,
            folder=folder,
            token=(plan.out / LOCK_NAME).stat().st_mtime_ns,
            probe=tuple(_probe(plan)),
            cpus=cpus,
            threads=settings.threads or cpus,
        )
        theirs = replace(
            plan,
            config=replace(plan.config, workers=workers),
            files=replace(plan.files, paths=None),
        )
        make = ray.remote(Actor).options(max_concurrency=self._most + 2, **cluster.needs)
        self._plan_ref = ray.put(theirs)
        self._hire: Callable[[], Any] = lambda: make.remote(self._plan_ref, orders)

    def make(self, manifest: Manifest, shards: Sequence[int]) -> int:
        """Make shards, and return their number of images."""
        with _held() as stop:
            return self._make(manifest, shards, stop)

    def _make(self, manifest: Manifest, shards: Sequence[int], stop: StopSignals) -> int:
        todo, made, since = deque(shards), 0, time.monotonic()
        refused: set[int] = set()  # and, with the time to try again:
        later: dict[int, float] = {}
        self._images = sum(len(manifest.shard_range(i)) for i in self._plan.owned)
        self._skipped = skipped_elsewhere(self._plan, manifest, shards)
        patience = _PATIENCE if self._plan.config.task.job is None else 0.0
        start_counting(self._plan, manifest, shards, self._reporter)
        try:
            while (left := len(todo) + len(later) + self._under_way()) and not stop.received:
                now = time.monotonic()
                if left > len(refused):
                    since = now
                elif now - since > patience:
                    break
                if due := [shard for shard, when in later.items() if when < now]:
                    manifest = manifest.refreshed()
                    for shard in due:
                        del later[shard]
                        (refused.discard if manifest.has(shard) else todo.append)(shard)
                self._staff(left)
                self._hand_out(todo)
                if (result := self._next_result(todo)) is None:
                    continue
                shard, found = result
                if found.entry is None:
                    refused.add(shard)
                    later[shard] = now + _PAUSE
                    continue
                refused.discard(shard)
                manifest = self._commit(manifest, shard, found.entry, found.data)
                made += len(manifest.shard_range(shard))
                for stage, seconds in found.waited.items():
                    self._waits.seconds[stage] += seconds / max(1, len(self._hands))
                self._failed_starts = 0
        finally:
            self._reporter.stop()
        return made

    def dismiss(self) -> None:
        """End the actors; what they are making is thrown away."""
        with suppress(Exception), waiting_for("the Ray actors to end"):  # the cluster may be gone
            stops = [hand.actor.stop.remote() for hand in self._hands if hand.host]
            if stops:
                self._ray.wait(stops, num_returns=len(stops), timeout=_GRACE)
        for hand in self._hands:
            self._kill(hand)

    def _kill(self, hand: _Hand) -> None:
        with suppress(Exception):
            self._ray.kill(hand.actor)

    def _under_way(self) -> int:
        return sum(shard is not None for hand in self._hands for shard in hand.calls.values())

    def _staff(self, shards: int) -> None:
        """Have as many actors as there is room for on the nodes that are there now."""
        now = time.monotonic()
        if now - self._looked > _PAUSE:
            before, room = self._room, self._cluster.room()
            self._looked, self._room = now, sum(room)
            if self._room != before:
                nodes, cpus = counted(sum(map(bool, room)), "node"), self._cluster.needs["num_cpus"]
                self._reporter.message(
                    f"extract {self._plan.config.split}: {counted(self._room, 'Ray actor')} on "
                    f"{nodes}, each with {counted(cpus, 'CPU core')}"
                    f"{' and a GPU' * self._cluster.needs['num_gpus']}"
                )
        alive = [hand for hand in self._hands if not hand.dead]
        wanted = min(self._room, shards)
        for _ in range(wanted - len(alive)):
            hand = _Hand(self._hire())
            hand.calls[hand.actor.prepare.remote()] = None
            self._hands.append(hand)
        for hand in [hand for hand in alive if not hand.host][: max(0, len(alive) - wanted)]:
            self._kill(hand)
            self._hands.remove(hand)
        if any(hand.host for hand in self._hands):
            self._waiting_since = now
        elif now - self._waiting_since > _PATIENCE:
            self._reporter.message(f"still waiting for Ray to start an actor ({_PATIENCE:.0f} s)")
            self._waiting_since = now

    def _hand_out(self, todo: deque[int]) -> None:
        ready = [hand for hand in self._hands if hand.host and not hand.dead]
        # As the end comes, no actor gets more than its share.
        share = -(-(len(todo) + self._under_way()) // max(1, len(self._hands)))
        while todo and ready:
            hand = min(ready, key=lambda hand: len(hand.calls))
            if len(hand.calls) >= min(self._most, share):
                break
            shard = todo.popleft()
            hand.calls[hand.actor.make.remote(shard)] = shard

    def _next_result(self, todo: deque[int]) -> tuple[int, Made] | None:
        """Wait a little for a call to end; put the shard of one that was lost back in front."""
        calls = {call: hand for hand in self._hands for call in hand.calls}
        if not calls:
            time.sleep(_PAUSE)
            return None
        done, _ = self._ray.wait([*calls], timeout=_PAUSE)
        if not done:
            return None
        hand = calls[done[0]]
        shard = hand.calls.pop(done[0])
        errors = self._ray.exceptions
        try:
            found = self._ray.get(done[0])
            if shard is not None:
                return shard, found
            hand.host = found
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            # Of that type itself are errors of processes, such as a loading worker that was killed.
            if shard is None or type(cause) is not AnchorpatchError:
                raise (cause if isinstance(cause, Exception) else error) from None
            self._lost(hand, shard, todo, cause)
        except errors.RayError as error:
            self._lost(hand, shard, todo, error)
        return None

    def _lost(self, hand: _Hand, shard: int | None, todo: deque[int], error: Exception) -> None:
        """Note that a call has failed because its actor, or what it had made, is gone."""
        missing = re.search(r"(?:ModuleNotFound|Import)Error: (.*)", str(error))
        self._failed_starts += shard is None
        if shard is None and (missing or self._failed_starts > _TRIES + 2 * self._room):
            raise AnchorpatchError(
                f"Ray cannot start an actor: {missing[1] if missing else _why(error)} "
                f"({_node(error)}): install the same anchorpatch, and what it needs, on all nodes"
            ) from error
        if not hand.dead:
            where = f"on {hand.host}" if hand.host else "while it started"
            self._reporter.message(f"a Ray actor failed {where}: {_why(error)}")
        hand.dead = True
        if not hand.calls:
            self._kill(hand)
            self._hands.remove(hand)
        if shard is not None:
            todo.appendleft(shard)
            self._tries[shard] += 1
            if self._tries[shard] >= _TRIES:
                raise AnchorpatchError(
                    f"{self._plan.out / shard_name(self._plan.config.split, shard)}: "
                    f"{_TRIES} Ray actors failed before it was done: {_why(error)}; run again with "
                    "fewer --workers or a smaller --batch-size if memory is short"
                ) from error

    def _commit(
        self, manifest: Manifest, shard: int, entry: ShardEntry, data: NDArray[np.uint8] | None
    ) -> Manifest:
        path = manifest.shard_path(shard)
        if entry.skipped:
            self._skipped.update(reason for _, reason in entry.skipped)
            check_bad(self._plan, self._images, self._skipped, entry.skipped[-1][0])
        if data is not None:

            def write(file: BinaryIO) -> None:
                storage.allocate(file, entry.bytes)
                if storage.write_hashed(file, [data]) != entry.sha256:
                    raise CorruptShard(f"{path}: damaged on its way from a Ray actor: run again")

            storage.write_atomically(path, write, needed=entry.bytes)
        # A network filesystem may show new files late.
        until = time.monotonic() + _PATIENCE
        with waiting_for(f"{path} to be seen on this machine"):
            while not (path.exists() and path.stat().st_size == entry.bytes):
                if time.monotonic() > until:
                    raise ShardError(
                        f"{path}: a Ray actor has written it, but this machine does not see it: "
                        "choose an --out that all nodes share, or use --collect"
                    )
                time.sleep(0.2)
        manifest = manifest.commit(entry)
        skipped = len(entry.skipped)
        images, patches = entry.images + skipped, sum(entry.patches.values())
        self._reporter.advance(images, patches=patches, skipped=skipped)
        return manifest


def _probe(plan: Plan) -> Iterator[tuple[int, int]]:
    """Yield some images that can be read here, and their bytes."""
    for row in spread_rows(len(plan.images), 4).tolist():
        with suppress(ImageError):
            yield row, len(plan.images.read(row))


def _why(error: Exception) -> str:
    """Return in a few words why an actor is gone."""
    kinds = r"Worker exit detail: ([^.]*)|(its node has died|temporarily unavailable: [^.(]*)"
    found = re.search(kinds, str(error))
    return (found[1] or found[2]).strip() if found else reason_of(error)[-200:]


def _node(error: Exception) -> str:
    found = re.search(r"ip[=:] ?([\w.:]+)", str(error))
    return f"node {found[1]}" if found else "on one of the nodes"
