"""SIGKILL at random moments of an extraction; run again, it ends in the bytes of one that nobody
disturbed, and what was done before the kill is neither lost nor made again."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from anchorpatch.shards import manifest
from tests.conftest import draw_photo
from tests.images.packing import tar_bytes, tree_of, zip_bytes
from tests.oddities import bad_files, encoded
from tests.program import run_program
from tests.soak.server import Fault, Trial, run, soak, tree

#: Twelve shards, the last of which go to the manifest by way of its journal.
JOURNAL = "raw --shard-size 1"

#: With what follows and a bad one, 4 shards of 2 batches each.
IMAGES = 11
SHARDS = "--split val --weights demo --out out --img-size 111 --shard-size 3 --batch-size 2"
EXTRACT = f"extract {SHARDS} --engine torch --threads 1 --max-bad 0.3 --json".split()
STORING = ("raw", "jpeg", "image", "raw --store-images", "jpeg --store-images", JOURNAL)
SOURCES = ("folder", "tar", "zip")

#: What a killed program may leave: a lock is none without its process, and half-written files
#: are removed by a later run.
LEFTOVERS = re.compile(r".*\.lock|.*\.tmp")


def make_images(data: Path) -> None:
    """Write the same images as DATA/{folder,tar,zip}/val: two classes, one image is truncated."""
    folder = data / "folder" / "val"
    for i in range(IMAGES):
        path = folder / ("cat", "dog")[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(draw_photo(i, (130 + i, 120)), "JPEG", quality=90))
    (folder / "cat" / "bad.jpg").write_bytes(bad_files()["truncated.jpg"][0])
    for name, pack in (("tar", tar_bytes), ("zip", zip_bytes)):
        (data / name).mkdir()
        (data / name / f"val.{name}").write_bytes(pack(tree_of(folder)))


def done_shards(folder: Path, expected: dict[str, bytes]) -> dict[str, tuple[int, int]]:
    """Return inode and time of the shards that the manifest names, whose bytes must be right."""
    if not (folder / "manifest.json").exists():
        return {}
    found = {}
    for entry in manifest.read_manifest(folder).entries:
        path = folder / entry.name
        if path.read_bytes() != expected[entry.name]:
            raise Fault(f"the manifest names {path}, whose bytes are others")
        found[entry.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def check_shards(folder: Path, expected: dict[str, bytes]) -> None:
    """Raise Fault unless the folder holds what it should and nothing else."""
    found = {n: b for n, b in tree(folder).items() if not LEFTOVERS.fullmatch(n)}
    if found.keys() != expected.keys():
        raise Fault(f"expected {sorted(expected)} in {folder}, found {sorted(found)}")
    if wrong := [name for name in expected if found[name] != expected[name]]:
        raise Fault(f"the bytes of {', '.join(wrong)} in {folder} are others")


def reference(material: Path, storing: str) -> dict[str, bytes]:
    """Return the files of an undisturbed run."""
    folder = material / "reference" / storing
    folder.mkdir(parents=True)
    words = [*EXTRACT, "--codec", *storing.split(), "--workers", 0]
    words += ["--data", material / "folder"]
    run(*words, cwd=folder).expect(0)
    return tree(folder / "out" / "val", but=(".lock",))


def references(material: Path) -> Callable[[str], dict[str, bytes]]:
    """Make images; return what gives the shards of each way of storing them, by name and bytes."""
    manifest._WITH_JOURNAL = 1
    make_images(material)
    made = cache(partial(reference, material))
    # A forked program does as one that a fresh interpreter runs.
    words = [*EXTRACT, "--workers", 0, "--data", material / "folder"]
    fresh = run_program(*words, cwd=material, fresh=True)
    assert fresh.returncode == 0, fresh.stderr
    check_shards(material / "out" / "val", made("raw"))
    return made


def prepare(material: Path) -> Trial:
    expected = references(material)
    took: dict[tuple[str, int, str], float] = {}

    def trial(rng: random.Random, folder: Path) -> Counter[str]:
        way = rng.choice((*STORING, JOURNAL)), rng.choice((0, 1, 2)), rng.choice(SOURCES)
        storing, workers, source = way
        words = [*EXTRACT, "--codec", *storing.split(), "--workers", workers]
        words += ["--data", material / source]
        shards, want = folder / "out" / "val", expected(storing)
        counts: Counter[str] = Counter()
        for _ in range(rng.randint(1, 3)):
            before = done_shards(shards, want)
            moment = rng.random() * took.get(way, 0.5)
            killed = run(*words, cwd=folder, kill_after=moment, group=rng.random() < 0.3)
            if not killed.killed:
                killed.expect(0)
                break
            counts["kills"] += 1
            after = done_shards(shards, want)
            if not before.items() <= after.items():
                raise Fault(f"shards that were done were made again: {before}, then {after}")
            counts["shards done at a kill"] += len(after)
            counts["journals at a kill"] += (shards / manifest.JOURNAL_NAME).exists()
        ended = run(*words, cwd=folder).expect(0)
        if not after_all(done_shards(shards, want), want):
            raise Fault(f"shards are missing after {ended}")
        took[way] = max(ended.seconds, took.get(way, 0.0))
        check_shards(shards, want)
        return counts

    return trial


def after_all(done: dict[str, tuple[int, int]], expected: dict[str, bytes]) -> bool:
    """Tell whether the manifest names all shards."""
    return done.keys() == expected.keys() - {"manifest.json"}


if __name__ == "__main__":
    soak("kills", prepare, __doc__)
