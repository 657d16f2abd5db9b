"""Two runs of the program into one folder, the second at a random moment, one of them killed now
and then. Each ends well or says in one line that another is at work; the folder then holds, or gets
by the same command, the right bytes."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

from tests.soak.kills import EXTRACT, JOURNAL, check_shards, done_shards, references
from tests.soak.server import Fault, Program, Trial, run, soak
from tests.soak.training import FOLDERS, NETWORK, check_run, make_inputs

BUSY = ("another process is writing this shard", "another run is", "in use by another")
OTHER = ("holds shards made from other inputs", "another run has started this folder over", *BUSY)


def prepare(material: Path) -> Trial:
    expected = references(material)
    (material / "nets.py").write_text(NETWORK)
    finetune = [*make_inputs(material)["finetune"], "--workers", 0]
    run(*finetune, cwd=material).expect(0)
    trained = material / FOLDERS["finetune"]

    def trial(rng: random.Random, folder: Path) -> Counter[str]:
        (folder / "nets.py").write_text(NETWORK)
        storing = rng.choice(("raw", "jpeg", JOURNAL))
        words = [*EXTRACT, "--codec", *storing.split(), "--workers", rng.choice((0, 1))]
        words += ["--data", material / "folder"]
        kind = rng.choice(("extract", "extract", "extract with others", "finetune"))
        others, allowed = words, BUSY
        if kind == "finetune":
            words = others = finetune
        elif kind == "extract with others":
            others, allowed = [*words, "--max-patches", "2,2,2"], OTHER
            if rng.random() < 0.5:
                words, others = [*words, "--overwrite"], [*others, "--overwrite"]
        first = Program(*words, cwd=folder)
        if rng.random() < 0.8:
            time.sleep(rng.random())
        second = Program(*others, cwd=folder)
        if rng.random() < 0.3:
            victim = rng.choice((first, second))
            if not victim.wait(rng.random()):
                victim.kill()
        ended = first.end(), second.end()
        counts = Counter({kind: 1})
        for one in ended:
            if one.killed:
                counts["killed"] += 1
                continue
            one.expect(0, 1)
            if one.status and not any(text in one.stderr for text in allowed):
                raise Fault(f"{kind}: expected another reason, found {ended}")
            counts["ended well" if not one.status else "said that another is at work"] += 1
        shards = folder / "out" / "val"
        if kind == "extract":
            done_shards(shards, expected(storing))
        elif kind == "extract with others" and "--overwrite" not in words:
            words = [*words, "--overwrite"]
        run(*words, cwd=folder).expect(0)
        if kind == "finetune":
            check_run(folder / FOLDERS["finetune"], trained)
        else:
            check_shards(shards, expected(storing))
        return counts

    return trial


if __name__ == "__main__":
    soak("together", prepare, __doc__)
