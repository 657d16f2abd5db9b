"""Each system call of small runs fails once: the n-th of its kind, for every n, with EIO, with
ENOSPC (which lasts), by half of its bytes, or by SIGKILL. The run then ends in the right bytes, or
with one clear line; and run again, without the fault, it ends in the right bytes.

Needs gcc. Kinds and errors are those of faults.c; only calls below the folder of a trial count, and
of calls through libc, which are those of Python, HDF5, torch and safetensors.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anchorpatch import storage
from anchorpatch.demo import bundled_weights
from tests.jobs.finetune_runs import VAL
from tests.soak.kills import EXTRACT, check_shards, done_shards, make_images
from tests.soak.server import Fault, NoMore, Program, Run, Trial, soak, tree
from tests.soak.training import FOLDERS, NETWORK, check_run, make_inputs

_READING = ("open", "read", "stat", "list", "map")
_WRITING = ("create", "write", "sync", "rename", "unlink", "mkdir", "allocate", "lock", "close")
#: In the order of faults.c.
KINDS = (
    *("open", "create", "read", "write", "stat", "sync", "rename", "unlink", "mkdir", "allocate"),
    *("lock", "list", "map", "close"),
)
#: Name -> errno (or KILL and SHORT of faults.c), whether it lasts, and the kinds it is for.
ERRORS: dict[str, tuple[int, bool, tuple[str, ...]]] = {
    "EIO": (errno.EIO, False, KINDS),
    "lasting EIO": (errno.EIO, True, _READING),
    "ENOSPC": (errno.ENOSPC, True, ("create", "write", "sync", "mkdir", "allocate", "rename")),
    "SIGKILL": (-1, False, _WRITING),
    "half": (-2, False, ("read", "write")),
}


class Control(ctypes.Structure):
    """``struct control`` of faults.c."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("armed", "kind", "error", "lasting")),
        *((name, ctypes.c_long) for name in ("from_", "hits")),
        ("count", ctypes.c_long * len(KINDS)),
        ("below", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Case:
    """A command, what it needs in its folder, and what it must leave there."""

    words: list[object]
    begin: Callable[[Path], object]
    check: Callable[[Path], object]
    while_failing: Callable[[Path], object] = lambda folder: None


def make_cases(material: Path) -> dict[str, Case]:
    """Make material for small runs, each of which reads what lies in its folder."""
    make_images(material / "images")
    cases = {}
    for name, source, options in (
        ("extract", "folder", "--codec raw --workers 0 --limit 4"),
        ("extract from tar", "tar", "--codec jpeg --workers 1 --limit 2"),
        ("extract from zip", "zip", "--codec image --workers 0 --limit 2"),
    ):
        words = [*EXTRACT, *options.split(), "--data", "data", "--max-bad", 0.6]
        words += ["--weights", "data/weights.safetensors"]

        def begin(folder: Path, source: str = source) -> None:
            shutil.copytree(material / "images" / source, folder / "data")
            shutil.copy(bundled_weights(), folder / "data" / "weights.safetensors")

        folder = material / name
        begin(folder)
        Program(*words, cwd=folder).end().expect(0)
        expected = tree(folder / "out" / "val", but=(".lock",))
        cases[name] = Case(
            words,
            begin,
            lambda folder, expected=expected: check_shards(folder / "out" / "val", expected),
            lambda folder, expected=expected: done_shards(folder / "out" / "val", expected),
        )
    first = material / "extract"
    expected = tree(first / "out" / "val", but=(".lock",))
    cases["shards verify"] = Case(
        ["shards", "verify", "out", "--jobs", 1],
        lambda folder: shutil.copytree(first / "out", folder / "out"),
        lambda folder: check_shards(folder / "out" / "val", expected),
    )
    cases["shards merge"] = Case(
        ["shards", "merge", "out", "--out", "joined"],
        lambda folder: shutil.copytree(first / "out", folder / "out"),
        lambda folder: check_shards(folder / "joined" / "val", expected),
    )
    words = [*make_inputs(material, VAL)["finetune"][:-1], "shards", "--workers", 0, "--epochs", 1]

    def begin(folder: Path) -> None:
        shutil.copytree(material / "shards", folder / "shards")
        (folder / "nets.py").write_text(NETWORK)

    done = material / "finetune"
    begin(done)
    Program(*words, cwd=done).end().expect(0)
    run = FOLDERS["finetune"]
    cases["finetune"] = Case(words, begin, lambda folder: check_run(folder / run, done / run))
    return cases


def prepare(material: Path) -> Trial:
    storage._PAUSES = (0.0, 0.0, 0.0)
    control = ctypes.POINTER(Control).in_dll(ctypes.CDLL(None), "soak_control").contents
    cases = make_cases(material)

    def fails(case: Case, folder: Path, kind: str = "", error: str = "EIO", n: int = 0) -> Run:
        number, lasting, _ = ERRORS[error]
        control.kind = KINDS.index(kind) if kind else -1
        control.error, control.lasting, control.from_, control.hits = number, lasting, n, 0
        control.count[:] = [0] * len(KINDS)
        control.below = os.fsencode(folder.resolve())
        try:
            return Program(
                *case.words, cwd=folder, first=lambda: setattr(control, "armed", 1)
            ).end()
        finally:
            control.armed = 0

    def every_call() -> Iterator[tuple[str, str, str, int]]:
        for name, case in cases.items():
            folder = material / "counting" / name
            folder.mkdir(parents=True)
            case.begin(folder)
            fails(case, folder).expect(0)
            for kind, count in zip(KINDS, control.count, strict=True):
                for error, (_, _, kinds) in ERRORS.items():
                    yield from (
                        (name, kind, error, n) for n in range(1, 1 + count) if kind in kinds
                    )

    listed = material.parent / "calls.json"  # the same where an interrupted soak goes on
    if not listed.exists():
        listed.write_text(json.dumps(list(every_call())))
    calls = json.loads(listed.read_text())
    random.Random(0).shuffle(calls)
    calls.sort(key=lambda call: tuple(ERRORS).index(call[2]))  # first each call once

    def trial(rng: random.Random, folder: Path) -> Counter[str]:
        if int(folder.name) >= len(calls):
            raise NoMore
        name, kind, error, n = calls[int(folder.name)]
        case = cases[name]
        case.begin(folder)
        ended = fails(case, folder, kind, error, n)
        hit = control.hits > 0
        try:
            if not (ended.killed and error == "SIGKILL"):
                ended.expect(0, 1, 2)
            if not hit and ended.status:
                raise Fault(f"failed without a fault: {ended}")
            if ended.status:
                case.while_failing(folder)
                Program(*case.words, cwd=folder).end().expect(0)
            case.check(folder)
        except Fault as fault:
            raise Fault(f"{name}, {error} at {kind} {n}: {fault}; {ended}") from fault
        if not hit:
            return Counter({"calls that did not come": 1})
        how = "went on" if ended.status == 0 else "said so" if ended.status > 0 else "killed"
        return Counter({"calls": 1, f"{error} {how}": 1, name: 1})

    return trial


def compiled(folder: Path) -> Path:
    """Compile faults.c."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "faults.so"
    source = Path(__file__).with_suffix(".c")
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return library


if __name__ == "__main__":
    if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
        import tempfile

        library = compiled(Path(tempfile.gettempdir(), "anchorpatch-soak"))
        words = [sys.executable, "-m", "tests.soak.faults", *sys.argv[1:]]
        os.execve(sys.executable, words, {**os.environ, "LD_PRELOAD": str(library)})
    soak("faults", prepare, __doc__)
