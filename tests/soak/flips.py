"""One flipped bit anywhere in the shards and the manifest of a split: `shards verify` names the
file, who opens the folder all the same gets an error or the patches, each once, and (in a fifth of
the trials) `extract --repair` makes the bytes what they were."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from anchorpatch.errors import AnchorpatchError
from anchorpatch.shards.manifest import JOURNAL_NAME, read_manifest
from anchorpatch.shards.reader import ShardReader
from tests.soak.kills import EXTRACT, JOURNAL, STORING, check_shards, references
from tests.soak.mutate import flipped
from tests.soak.server import Fault, Trial, in_child, run, soak, tree


def prepare(material: Path) -> Trial:
    expected = references(material)
    unfinished = "unfinished"
    made = {storing: expected(storing) for storing in STORING}
    made[unfinished] = unfinish(material, JOURNAL, unfinished)

    def trial(rng: random.Random, folder: Path) -> Counter[str]:
        storing = rng.choice(tuple(made))
        shards = folder / "out" / "val"
        shutil.copytree(material / "reference" / storing / "out", folder / "out")
        name = rng.choice(sorted(made[storing]))
        data = made[storing][name]
        # Half of them in the header, which is a small part of a shard.
        bit = rng.randrange(8 * (min(len(data), 8192) if rng.random() < 0.5 else len(data)))
        (shards / name).write_bytes(flipped(data, bit))
        found = run("shards", "verify", "out", "--jobs", 1, cwd=folder)
        where = f"bit {bit} of {name}, codec {storing}"
        seen = "val-00009.h5: has no entry" if name == JOURNAL_NAME else f"out/val/{name}: "
        if found.status != 1 or seen not in found.stdout or found.stderr:
            raise Fault(f"{where}: expected `verify` to name it, found {found}")
        if storing == unfinished and "val-00008.h5: has no entry" in found.stdout:
            raise Fault(f"{where}: more is lost than the entry: {found}")
        status, sent = in_child(lambda answers: read_all(shards, answers))
        if status > 0:
            raise Fault(f"{where}: {sent[-1]}")
        counts = Counter({"flips seen": 1, f"opened: {sent[-1] if sent else status}": 1})
        if rng.random() < 0.8:
            return counts
        counts["repaired"] = 1
        if storing == unfinished:
            storing = JOURNAL
        how = ["--overwrite"] if name == "manifest.json" else []
        words = [*EXTRACT, "--codec", *storing.split(), "--workers", 0, "--repair", *how]
        run(*words, "--data", material / "folder", cwd=folder).expect(0)
        check_shards(shards, made[storing])
        return counts

    return trial


def unfinish(material: Path, storing: str, name: str) -> dict[str, bytes]:
    """Copy shards and remove the last two; the third last is known to the journal alone."""
    folder = material / "reference" / name / "out" / "val"
    shutil.copytree(material / "reference" / storing / "out" / "val", folder)
    manifest = read_manifest(folder)
    last = manifest.entries[-3:]
    manifest.forget(last).commit(last[0])
    for entry in last[1:]:
        (folder / entry.name).unlink()
    return tree(folder, but=(".lock",))


def read_all(folder: Path, answers: Connection) -> None:
    """Read every patch of a split, and say how that ended."""
    try:
        reader = ShardReader(folder, partial=True)
        patches = sum(len(reader.image_patches(i).pixels) for i in range(len(reader)))
        assert patches == reader.counts.sum(), (patches, reader.counts)
        answers.send("read")
    except AnchorpatchError:
        answers.send("refused")


if __name__ == "__main__":
    soak("flips", prepare, __doc__)
