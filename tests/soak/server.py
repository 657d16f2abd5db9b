"""What the soak tests share: forked programs, a record of trials, and the line at the end.

Loading torch takes 2 s. So everything is loaded once, into a process that has no second thread,
and each trial is forked from it and calls the command line's ``main`` there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.program import run_here

#: Seconds after which a program counts as hung.
PATIENCE = 120.0

#: What torch may write at the end, where the working folder cannot be listed: it imports a module.
TORCH_AT_EXIT = "Exception ignored in atexit callback: <function dump_compile_times "


class Fault(Exception):
    """What a trial has found."""


class NoMore(Exception):
    """Where a trial is one of a list: the list has ended."""


class Run(NamedTuple):
    """How a program ended: its exit status, or minus the signal, and what it wrote."""

    words: list[str]
    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    def expect(self, *statuses: int) -> Run:
        """Return the run, which must have one of these statuses and, if it failed, say why."""
        if self.status not in statuses:
            raise Fault(f"expected exit status {statuses}, found {self}")
        ours = self.stderr.count("Traceback") - self.stderr.count(TORCH_AT_EXIT)
        if ours or "anchorpatch: unexpected " in self.stderr:
            raise Fault(f"expected one clear line, found {self}")
        said = self.stdout or re.search("^(anchorpatch|Error): ", self.stderr, re.M)
        if self.status > 0 and not said:
            raise Fault(f"expected a reason, found {self}")
        return self


class Program:
    """``anchorpatch WORDS`` in a process and a process group of its own.

    Args:
        words: of the command line.
        cwd: the folder to run in.
        env: further environment.
        first: called in the new process before the program.
    """

    def __init__(
        self,
        *words: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        first: Callable[[], object] | None = None,
    ) -> None:
        self.words = list(map(str, words))
        self.streams = (Path(cwd, f".stdout-{id(self)}"), Path(cwd, f".stderr-{id(self)}"))
        settings = {k: v for k, v in os.environ.items() if not k.startswith("ANCHORPATCH_")}
        settings |= {"ANCHORPATCH_CACHE": str(cwd / "cache"), **(env or {})}
        self.began = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            status = 70
            try:
                os.setpgid(0, 0)
                if first is not None:
                    first()
                run_here(self.words, cwd, settings, self.streams)
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else bool(error.code)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        self.pidfd = os.pidfd_open(self.pid)

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Return whether it has ended by then. Time in which this process is stopped is none."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        while not (ended := bool(poll.poll(int(1000 * min(seconds, 0.25))))) and seconds > 0.25:
            seconds -= 0.25
        return ended

    def failed(self) -> bool:
        """Return whether it has ended otherwise than well; it is still to be waited for."""
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found is not None and (found.si_code != os.CLD_EXITED or found.si_status != 0)

    def kill(self, *, group: bool = False) -> None:
        """Send SIGKILL to the process alone, or to its workers too."""
        try:
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # too early for a group
            os.kill(self.pid, signal.SIGKILL)

    def end(self) -> Run:
        """Wait until the program and its workers are gone."""
        hung = not self.wait()
        if hung:
            self.kill(group=True)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        seconds = time.monotonic() - self.began
        os.close(self.pidfd)
        stdout, stderr = (s.read_text(errors="replace") if s.exists() else "" for s in self.streams)
        for stream in self.streams:
            stream.unlink(missing_ok=True)
        run = Run(self.words, status, stdout, stderr, seconds)
        orphans = _still_there(self.pid)
        if hung or orphans:
            raise Fault(f"{'the program hung' if hung else 'workers outlive it'}: {run}")
        return run


def _still_there(group: int) -> bool:
    """Reap what is left of a process group (see `load`); end it after 10 s, and say so."""
    for _ in range(200):
        try:
            while os.waitpid(-group, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    return True


def run(*words: object, cwd: Path, kill_after: float | None = None, group: bool = False) -> Run:
    """Run the program, and kill it after so many seconds unless it has ended."""
    program = Program(*words, cwd=cwd)
    if kill_after is not None and not program.wait(kill_after):
        program.kill(group=group)
    return program.end()


def in_child(function: Callable[[Connection], object]) -> tuple[int, list[Any]]:
    """Call a function in a forked process; return how that ended and what it has sent.

    The status is 0, or 1 where the function raised something, the last that was sent, or minus
    the signal. After `PATIENCE` seconds of CPU time the system ends the process (SIGPROF).
    """
    ours, theirs = Pipe(duplex=False)
    if not (pid := os.fork()):
        status = 1
        try:
            signal.setitimer(signal.ITIMER_PROF, PATIENCE)
            function(theirs)
            status = 0
        except BaseException:
            theirs.send(traceback.format_exc())
        finally:
            os._exit(status)
    theirs.close()
    sent = []
    with ours, suppress(EOFError):
        while True:
            sent.append(ours.recv())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sent


def load() -> None:
    """Load everything that commands load, in one thread, and become the parent of orphans."""
    import anchorpatch

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(anchorpatch.__path__, "anchorpatch."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    gc.collect()
    gc.freeze()
    _check_threads()


def _check_threads() -> None:
    if (threads := len(os.listdir("/proc/self/task"))) != 1:
        raise RuntimeError(f"expected one thread, as the rest is forked from here; found {threads}")


def tree(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Return the files below a folder, without those that end in one of ``but``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if not p.name.endswith(but)}


Trial = Callable[[random.Random, Path], Counter[str]]


def soak(name: str, prepare: Callable[[Path], Trial], description: str | None) -> None:
    """Run the trials that the command line asks for and are not done, and print a line.

    Args:
        name: of the program.
        prepare: is given a new folder for material and returns what makes one trial, from a
            generator of random numbers, in a folder of its own whose name is the trial's number,
            and counts what it has done. It raises `Fault`, or `NoMore`.
        description: for ``--help``.
    """
    parser = argparse.ArgumentParser(f"python -m tests.soak.{name}", description=description)
    parser.add_argument("trials", type=int, metavar="N", help="trials to have in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "anchorpatch-soak")
    )
    args = parser.parse_args()
    folder: Path = args.folder / f"{name}-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "trials.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = {line["trial"]: line for line in map(json.loads, lines)}
    if todo := [i for i in range(args.trials) if i not in done]:
        load()
        shutil.rmtree(folder / "material", ignore_errors=True)
        (folder / "material").mkdir()
        trial = prepare(folder / "material")
        for i in todo:
            try:
                line = _try(trial, random.Random(f"{name} {args.seed} {i}"), folder / f"{i:06d}", i)
            except NoMore:
                break
            done[i] = line
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
    mine = [line for i, line in sorted(done.items()) if i < args.trials]
    counts: Counter[str] = sum((Counter(line["counts"]) for line in mine), Counter())
    faults = [line for line in mine if line["fault"]]
    seconds = sum(line["seconds"] for line in mine)
    shown = ", ".join(f"{n:,} {what}" for what, n in sorted(counts.items()))
    print(
        f"{name}, seed {args.seed}: {len(mine):,} trials in {seconds:,.0f} s: {shown}; "
        f"{len(faults):,} faults" + "".join(f"\n  trial {f['trial']}: {f['fault']}" for f in faults)
    )
    sys.stdout.flush()
    os._exit(bool(faults))  # what libraries say of an interpreter that ends would follow the line


def _try(trial: Trial, rng: random.Random, folder: Path, number: int) -> dict[str, object]:
    _check_threads()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began, fault = time.monotonic(), None
    counts: Counter[str] = Counter()
    try:
        counts = trial(rng, folder)
    except Fault as error:
        fault = str(error)
        print(f"trial {number}: {fault} (left as it is: {folder})", file=sys.stderr, flush=True)
    else:
        shutil.rmtree(folder)
    seconds = round(time.monotonic() - began, 3)
    return {"trial": number, "seconds": seconds, "counts": counts, "fault": fault}
