"""The real program, each run in a process of its own, without loading torch each time.

Loading torch and torchvision takes 3 s, and the tests run the program some hundred times. So
each run is forked from a server that has the two loaded, and nothing of anchorpatch.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torchvision"])


def run_program(
    *args: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m anchorpatch ARGS`` in a folder, without the caller's settings.

    Args:
        args: of the command line.
        cwd: the folder.
        env: further environment.
        timeout: seconds, after which the run is killed.
        fresh: start a new interpreter, for times and for what torch reads while it loads.
    """
    words = list(map(str, args))
    settings = {k: v for k, v in os.environ.items() if not k.startswith("ANCHORPATCH_")}
    settings["ANCHORPATCH_CACHE"] = os.environ["ANCHORPATCH_CACHE"]
    settings |= env or {}
    if fresh:
        command = [sys.executable, "-m", "anchorpatch", *words]
        return subprocess.run(
            command, cwd=cwd, env=settings, timeout=timeout, capture_output=True, text=True
        )
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        process = PROCESSES.Process(target=run_here, args=(words, cwd, settings, streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, *(s.read_text() for s in streams))
        stdout, stderr = (stream.read_text() for stream in streams)
        return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def run_here(words: list[str], cwd: Path, env: dict[str, str], streams: tuple[Path, Path]) -> None:
    """Run the program as this process, which is a new one; stdout and stderr go to files."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, stream in enumerate(streams, 1):
        file = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["anchorpatch", *words]
    try:
        runpy.run_module("anchorpatch", run_name="__main__", alter_sys=True)
    finally:
        # As an interpreter ends, and not as multiprocessing does: that would wait for joblib's
        # workers before the thread that dismisses them, and clean up nothing.
        threading._shutdown()
        atexit._run_exitfuncs()
