"""Two ranks, one of which is killed at a random moment. The other ends when torchrun sends it
SIGTERM; run again, both end in the bytes, or the weights, of ranks that nobody disturbed.

Every 25th trial has the real ``torchrun``; in the others this program does what torchrun does for
processes that it starts: their environment, and SIGTERM for the rest where one fails.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.soak.kills import EXTRACT, JOURNAL, check_shards, done_shards, references
from tests.soak.server import PATIENCE, Fault, Program, Run, Trial, soak
from tests.soak.training import FOLDERS, NETWORK, check_run, make_inputs

RANKS = 2


def start(words: list[object], folder: Path) -> list[Program]:
    """Start the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Program(
            *words,
            cwd=folder,
            env={
                **{f"{name}RANK": str(rank) for name in ("", "LOCAL_")},
                **{f"{name}WORLD_SIZE": str(RANKS) for name in ("", "LOCAL_")},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
        )
        for rank in range(RANKS)
    ]


def end(programs: list[Program]) -> list[Run]:
    """Wait for all; as soon as one fails, ask the others to stop, as torchrun does."""
    left = list(programs)
    while left:
        for program in [p for p in left if p.wait(0.05)]:
            left.remove(program)
            if program.failed():
                for other in left:
                    os.kill(other.pid, signal.SIGTERM)
    return [program.end() for program in programs]


def torchrun(words: list[object], folder: Path, moment: float | None) -> int:
    """Run real ranks, and kill one of them so many seconds after they have started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    command += ["--standalone", "-m", "anchorpatch", *map(str, words)]
    settings = {**os.environ, "ANCHORPATCH_CACHE": str(folder / "cache")}
    with subprocess.Popen(
        command, cwd=folder, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as agent:
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
        while moment is not None and agent.poll() is None:
            if len(ranks := children.read_text().split()) >= RANKS:
                time.sleep(moment)
                with suppress(ProcessLookupError):  # it has ended
                    os.kill(int(random.choice(ranks)), signal.SIGKILL)
                break
            time.sleep(0.1)
        said, _ = agent.communicate(timeout=PATIENCE)
    if moment is None and agent.returncode:
        raise Fault(f"torchrun {words} ended with {agent.returncode}: {said.decode()[-3000:]}")
    return agent.returncode


def prepare(material: Path) -> Trial:
    expected = references(material)
    (material / "nets.py").write_text(NETWORK)
    commands = {name: [*words, "--workers", 0] for name, words in make_inputs(material).items()}
    torchrun(commands["finetune"], material, None)
    for one in end(start(commands["train"], material)):
        one.expect(0)
    took = {"extract": 1.0, "train": 2.0, "finetune": 1.0}

    def trial(rng: random.Random, folder: Path) -> Counter[str]:
        (folder / "nets.py").write_text(NETWORK)
        kind = rng.choice(("extract", "finetune", "finetune", "train"))
        storing = rng.choice(("raw", "jpeg", JOURNAL))
        words = commands.get(kind) or [
            *(*EXTRACT, "--codec", *storing.split(), "--workers", rng.choice((0, 1))),
            *("--data", material / "folder"),
        ]
        counts: Counter[str] = Counter()
        if int(folder.name) % 25 == 24:
            killed = torchrun(words, folder, 2 + 6 * rng.random())
            counts["kills by torchrun" if killed else "torchrun was faster"] += 1
            torchrun(words, folder, None)
        else:
            for _ in range(rng.randint(1, 2)):
                ranks = start(words, folder)
                victim = rng.choice(ranks)
                if not victim.wait(rng.random() * took[kind]):
                    victim.kill()
                ended = end(ranks)
                if any(one.killed for one in ended):
                    counts[f"kills of {kind}"] += 1
                    for one in ended:
                        one.expect(-signal.SIGKILL, 0, 1, 128 + signal.SIGTERM, -signal.SIGTERM)
                if kind == "extract":
                    done_shards(folder / "out" / "val", expected(storing))
            ended = end(start(words, folder))
            if any(one.status for one in ended):
                raise Fault(f"expected all to end well, found {ended}")
            took[kind] = max(took[kind], ended[0].seconds)
        if kind == "extract":
            check_shards(folder / "out" / "val", expected(storing))
        else:
            check_run(folder / FOLDERS[kind], material / FOLDERS[kind])
        return counts

    return trial


if __name__ == "__main__":
    soak("ranks", prepare, __doc__)
