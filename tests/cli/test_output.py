from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import draw_photo

NO_ROOM = "anchorpatch: cannot write to stdout: No space left on device\n"
CLOSED = "anchorpatch: cannot write to stdout: Bad file descriptor\n"


def shell(command: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the shell in which ANCHORPATCH stands for the program."""
    command = command.replace("ANCHORPATCH", f"{sys.executable} -m anchorpatch")
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**os.environ, **env}, capture_output=True
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """A folder with shards, made by an extraction whose stderr was closed."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data" / "val" / "cat").mkdir(parents=True)
    draw_photo(0, (230, 240)).save(folder / "data" / "val" / "cat" / "0.png")
    extract = f"ANCHORPATCH extract --data data --weights {weights} --workers 0 --out ü世"
    result = shell(f"{extract} 2>&-", folder)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"1 image" in result.stdout
    return folder


def test_a_closed_stdout_is_no_reason_to_do_nothing(tmp_path: Path) -> None:
    result = shell("ANCHORPATCH scenes drawn --train 0 --val 1 >&-", tmp_path)
    assert (result.returncode, result.stderr.decode()) == (1, CLOSED)
    assert len(list(tmp_path.glob("drawn/val/*/*.JPEG"))) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("args", ["--help", "shards inspect ü世", "shards inspect ü世 --json"])
def test_a_stdout_that_takes_nothing_is_one_line_and_status_1(made: Path, args: str) -> None:
    result = shell(f"ANCHORPATCH {args} >/dev/full", made)
    assert (result.returncode, result.stderr.decode()) == (1, NO_ROOM)
    result = shell(f"ANCHORPATCH {args} >&-", made)
    assert (result.returncode, result.stderr.decode()) == (1, CLOSED)
    result = shell(f"ANCHORPATCH {args} >&- 2>&- <&-", made)
    assert (result.returncode, result.stderr.decode()) == (1, "")


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_a_stderr_that_takes_nothing_loses_messages_only(made: Path, stderr: str) -> None:
    env = {"ANCHORPATCH_NO_SUCH": "1"}  # gives a message
    result = shell(f"ANCHORPATCH shards inspect ü世 --json {stderr}", made, **env)
    assert (result.returncode, result.stdout[:1]) == (0, b"{")
    assert shell(f"ANCHORPATCH extrakt {stderr}", made).returncode == 2


@pytest.mark.parametrize(
    ("encoding", "name"), [("latin-1", "ü\\u4e16"), ("ascii", "\\xfc\\u4e16"), ("utf-8", "ü世")]
)
def test_what_a_terminal_cannot_show_is_escaped(made: Path, encoding: str, name: str) -> None:
    result = shell("ANCHORPATCH shards inspect ü世", made, PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert result.stdout.decode(encoding).startswith(f"{name}/val\n")
    result = shell("ANCHORPATCH shards inspect ü世x", made, PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode(encoding).startswith(f"anchorpatch: {name}x: expected shards")


def test_other_systems_are_told_so() -> None:
    code = "import sys; sys.modules['fcntl'] = None; from anchorpatch.cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "anchorpatch: runs on Linux and macOS only; on Windows, use WSL\n"
