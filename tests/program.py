"""The real program, each run in a process of its own, without loading torch each time.

Loading torch and torchvision takes 3 s, and the tests run the program some hundred times. So
each run is forked from a server that has loaded the libraries, and nothing of anchorpatch.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
LOADED = """
    torch torch.distributed torch.utils.flop_counter torchvision.models torchvision.transforms.v2
    PIL.ImageDraw click h5py jinja2 joblib matplotlib.backends.backend_agg matplotlib.figure
    rich.progress rich.table safetensors.torch simplejpeg
"""
PROCESSES.set_forkserver_preload(LOADED.split())


class Started:
    """A process that runs a function, to be used as `subprocess.Popen` is.

    Args:
        target: called in the process.
        args: of the function.
        cwd: the process's folder.
        env: its whole environment.
        stdin: what it reads.
        before: called first, in the process.
        folder: where its streams are files, or None for a folder of its own.
    """

    def __init__(
        self,
        target: Callable[..., object],
        *args: object,
        cwd: Path,
        env: Mapping[str, str],
        stdin: bytes = b"",
        before: Callable[[], object] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.args = args
        self._own = None if folder else tempfile.TemporaryDirectory()
        self._streams = [Path(folder or self._own.name, number) for number in "012"]
        for stream in self._streams:
            stream.write_bytes(stdin if stream.name == "0" else b"")
        self._process = PROCESSES.Process(
            target=_run, args=(target, args, cwd, dict(env), self._streams, before)
        )
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        if self._own:
            self._own.cleanup()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait until it ends, and kill it after so many seconds."""
        with self:
            self._process.join(timeout)
            status = self.poll()
            texts = [stream.read_text("utf-8") for stream in self._streams[1:]]
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout, *texts)
        return subprocess.CompletedProcess(self.args, status, *texts)


def start_program(
    *args: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    before: Callable[[], object] | None = None,
) -> Started:
    """Start ``python -m anchorpatch ARGS`` in a folder, without the caller's settings.

    Args:
        args: of the command line.
        cwd: the folder.
        env: further environment.
        stdin: what the program reads.
        before: called first, in the process of the program.
    """
    words = map(str, args)
    return Started(_main, *words, cwd=cwd, env=_settings(env), stdin=stdin, before=before)


def run_program(
    *args: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
    fresh: bool = False,
    **more: object,
) -> subprocess.CompletedProcess[str]:
    """Run the program as `start_program` does, and wait for it.

    Args:
        args: of the command line.
        cwd: the folder.
        env: further environment.
        timeout: seconds, after which the run is killed.
        fresh: start a new interpreter, for times and for what torch reads while it loads.
        more: of `start_program`.
    """
    if fresh:
        command = [sys.executable, "-m", "anchorpatch", *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env=_settings(env), timeout=timeout, capture_output=True, text=True
        )
    return start_program(*args, cwd=cwd, env=env, **more).wait(timeout)


def run_alone(target: Callable[..., object], *args: object, timeout: float = 120) -> int | None:
    """Return the exit status of a process that calls a function, or minus its signal."""
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    process.join(timeout)
    return process.exitcode


def run_ranks(
    *args: object,
    cwd: Path,
    target: Callable[..., object] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run the program, or a function, as two processes with what ``torchrun`` sets for each.

    As under ``torchrun``, the processes meet at a store that is not theirs, so that no port can
    be taken by others before they do, and share their streams.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    settings = _settings(env) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    if target is None:
        target, args = _main, tuple(map(str, args))
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            Started(
                target,
                *args,
                cwd=cwd,
                env=settings | {"RANK": rank, "LOCAL_RANK": rank},
                folder=Path(folder),
            )
            for rank in "01"
        ]
        done = [rank.wait(timeout) for rank in ranks]
    return max(done, key=lambda one: abs(one.returncode))


def _settings(env: Mapping[str, str] | None) -> dict[str, str]:
    settings = {k: v for k, v in os.environ.items() if not k.startswith("ANCHORPATCH_")}
    return settings | {"ANCHORPATCH_CACHE": os.environ["ANCHORPATCH_CACHE"], **(env or {})}


def run_here(words: list[str], cwd: Path, env: dict[str, str], streams: tuple[Path, Path]) -> None:
    """Run the program as this process, which is a new one; stdout and stderr go to files."""
    _run(_main, words, cwd, env, (Path(os.devnull), *streams))


def _run(
    target: Callable[..., object],
    args: Sequence[object],
    cwd: Path,
    env: dict[str, str],
    streams: Sequence[Path],
    before: Callable[[], object] | None = None,
) -> None:
    # Each run would compile anchorpatch anew where the environment forbids keeping bytecode.
    sys.dont_write_bytecode = False
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, stream in enumerate(streams):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        file = os.open(stream, flags)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if before:
        before()
    try:
        target(*args)
    finally:
        # As an interpreter ends, and not as multiprocessing does: that would wait for joblib's
        # workers before the thread that dismisses them, and clean up nothing.
        threading._shutdown()
        atexit._run_exitfuncs()


def _main(*words: str) -> None:
    sys.argv = ["anchorpatch", *words]
    runpy.run_module("anchorpatch", run_name="__main__", alter_sys=True)
