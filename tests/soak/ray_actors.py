"""Actors of `extract --ray` killed at random moments, a node removed in the middle and another one
added, now and then the driver killed too: the shards are the same bytes in the end.

A cluster of two nodes on this machine serves all trials.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.soak.kills import EXTRACT, check_shards, make_images, reference
from tests.soak.server import Program, Trial, soak

_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
node = cluster.add_node(num_cpus=1)
for line in sys.stdin:
    if line == "replace\\n":
        cluster.remove_node(node, allow_graceful=False)
        node = cluster.add_node(num_cpus=1)
    raylets = [n.all_processes["raylet"][0].process.pid for n in cluster.list_all_nodes()]
    print(cluster.address, *raylets, flush=True)
cluster.shutdown()
"""


class Nodes:
    """The cluster, in a process of its own: this one must have one thread."""

    def __init__(self) -> None:
        # Set before the programs are forked too.
        for name in ("USAGE_STATS_ENABLED", "prestart_worker_first_driver", "worker_niceness"):
            os.environ[f"RAY_{name}"] = "0"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.ask("look")

    def ask(self, what: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        self.address, *raylets = self._process.stdout.readline().split()
        self._raylets = set(map(int, raylets))

    def actors(self) -> list[int]:
        """Return the processes of actors, without their loading workers."""
        found = []
        for process in filter(str.isdecimal, os.listdir("/proc")):
            with suppress(OSError):
                parent = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[1]
                name = Path("/proc", process, "cmdline").read_text()
                if int(parent) in self._raylets and name.startswith("ray::Actor"):
                    found.append(int(process))
        return found


def prepare(material: Path) -> Trial:
    make_images(material)
    shards = "--shard-size 1 --batch-size 1"
    expected = reference(material, f"raw {shards}")
    nodes = Nodes()

    def trial(rng: random.Random, folder: Path) -> Counter[str]:
        words = [*EXTRACT, *shards.split(), "--data", material / "folder"]
        words += ["--ray", nodes.address, "--ray-cpus", 1]
        words += ["--collect"] if rng.random() < 0.3 else []
        counts: Counter[str] = Counter()
        driver = Program(*words, cwd=folder)
        # Each kill costs a shard at most one of its five tries, whoever has it.
        kills, removed, killed = rng.randint(1, 4), rng.random() < 0.3, rng.random() < 0.2
        while not driver.wait(rng.random() * 2):
            if kills and (actors := nodes.actors()):
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(actors), signal.SIGKILL)
                    kills -= 1
                    counts["actors killed"] += 1
            elif removed and not kills:
                nodes.ask("replace")
                removed = False
                counts["nodes removed"] += 1
            elif killed and not kills:
                driver.kill()
                counts["drivers killed"] += 1
                break
        ended = driver.end()
        if ended.killed:
            driver = Program(*words, cwd=folder)
            driver.wait(600)  # where others compute too, actors take minutes to start
            ended = driver.end()
        ended.expect(0)
        check_shards(folder / "out" / "val", expected)
        end = time.monotonic() + 30
        while nodes.actors() and time.monotonic() < end:  # of a driver that is gone
            time.sleep(0.1)
        return counts

    return trial


if __name__ == "__main__":
    soak("ray_actors", prepare, __doc__)
