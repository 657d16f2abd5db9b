from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import anchorpatch
from anchorpatch.cli import main as program_of
from tests.conftest import Program


def test_version_and_help(program: Program) -> None:
    assert program("--version").stdout == f"anchorpatch, version {anchorpatch.__version__}\n"
    shown = program("--help")
    assert shown.returncode == 0
    for command in ("train", "extract", "predict", "shards", "models", "demo", "scenes"):
        assert f"\n  {command} " in shown.stdout


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys; sys.argv = ['anchorpatch', '--help']\n"
        "from anchorpatch.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("False False\n")


def test_help_is_quick(program: Program) -> None:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        program("--help", fresh=True)
        times.append(time.perf_counter() - began)
    # 0.3 s is what the program promises on an idle machine; a loaded one gets more.
    assert min(times) < 1.0


def test_wrong_usage_is_status_2_on_stderr(program: Program) -> None:
    for args, message in (
        (["extrac"], "Did you mean 'extract'?"),
        (["extract", "--bach-size", 3], "'--batch-size'"),
        (["extract", "--coverage", "a,b"], "expected 3 numbers"),
        (["extract", "--max-bad", "120%"], "expected a share such as 0.01 or 1%"),
        (["extract", "--task", "4/4"], "expected I/N with I from 0 to N - 1"),
        (["extract", "--iou-threshold", "7"], "iou_threshold: expected a number from 0 to 1"),
        (["--config", "none.toml", "models"], "settings file none.toml does not exist"),
    ):
        result = program(*args)
        assert (result.returncode, result.stdout) == (2, ""), args
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_settings_file_and_environment(program: Program, tmp_path: Path) -> None:
    (tmp_path / "anchorpatch.toml").write_text("[models]\nclasses = 20\nsize = 120\n")

    def classes(*args: object, env: dict[str, str] | None = None) -> tuple[int, int]:
        result = program("models", "anchornet", "--json", *args, env=env)
        assert result.returncode == 0, result.stderr
        data = json.loads(result.stdout)
        return data["classes"], data["size"]

    assert classes() == (20, 120)
    assert classes(env={"ANCHORPATCH_MODELS_CLASSES": "30"}) == (30, 120)
    assert classes("--classes", 40, env={"ANCHORPATCH_MODELS_CLASSES": "30"}) == (40, 120)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[models]\nclases = 3\n",
            "[models]: no such option: 'clases'. Did you mean 'classes'?",
        ),
        ("[modles]\n", "found 'modles'. Did you mean 'models'?"),
        ("[models\n", "anchorpatch.toml: "),
        ("[models]\nclasses = 'x'\n", "'x' is not a valid integer"),
    ],
)
def test_bad_settings_files_are_refused(
    program: Program, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "anchorpatch.toml").write_text(text)
    result = program("models")
    assert result.returncode == 2
    assert message in result.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m anchorpatch --help | head -c 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stderr == ""


def test_completion_works(program: Program) -> None:
    env = {
        "_ANCHORPATCH_COMPLETE": "bash_complete",
        "COMP_WORDS": "anchorpatch ext",
        "COMP_CWORD": "1",
    }
    # Completion is bound to the name of the program.
    script = Path(sys.executable).with_name("anchorpatch")
    result = subprocess.run([script], env={**os.environ, **env}, capture_output=True, text=True)
    assert "extract" in result.stdout


GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    ("command", "job", "error", "line"),
    [
        (
            "train",
            "jobs.train.run",
            torch.OutOfMemoryError(GPU),
            "out of GPU memory (2.00 GiB more were needed): "
            "use a lower --batch-size or a higher --accumulate",
        ),
        (
            "finetune resnet18",
            "jobs.finetune.run",
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
            "out of GPU memory: use a lower --batch-size or a higher --accumulate",
        ),
        (
            "evaluate anchornet --weights demo",
            "jobs.evaluate_anchornet.run",
            torch.OutOfMemoryError(GPU),
            "out of GPU memory (2.00 GiB more were needed): "
            "use a lower --batch-size or --device cpu",
        ),
        (
            "extract --weights demo",
            "jobs.extract.run",
            MemoryError("Unable to allocate 147. KiB for an array with shape (224, 224, 3)"),
            "out of memory (147. KiB more were needed): "
            "use a lower --batch-size or fewer --workers",
        ),
        (
            "scenes data",
            "demo.scene_folder.make_scenes",
            RuntimeError(CPU),
            "out of memory: close other programs",
        ),
        (
            "scenes data",
            "demo.scene_folder.make_scenes",
            OSError(errno.EIO, "Input/output error", "data/train"),
            "data/train: Input/output error: check the disk and run the same command again",
        ),
    ],
)
def test_used_up_memory_and_a_failing_disk_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    job: str,
    error: Exception,
    line: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(f"anchorpatch.{job}", fail)
    assert program_of._run(command.split()) == 1
    assert capsys.readouterr() == ("", f"anchorpatch: {line}\n")


def test_other_errors_stay_what_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("anchorpatch.jobs.train.run", fail)
    assert program_of._run(["train"]) == 1
    assert "unexpected RuntimeError: CUDA error: an illegal" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "5"}])
def test_idle_threads_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]
) -> None:
    code = (
        "import os, sys; sys.argv = ['anchorpatch', '--version']\n"
        "from anchorpatch.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **chosen}
    )
    assert shown.stdout.splitlines()[-1] == ("None" if chosen else "PASSIVE")


def test_a_signal_that_nobody_waits_for_is_named(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; sys.argv = ['anchorpatch', 'models']\n"
        "from anchorpatch.cli import main\n"
        "main.load_config = lambda *_: os.kill(os.getpid(), signal.SIGUSR2)\n"
        "main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGUSR2
    assert done.stderr == "anchorpatch: terminated by SIGUSR2; run the same command again\n"


def test_a_signal_behind_the_run_is_one_line() -> None:
    code = (
        "import os, signal; from anchorpatch.cli import main\n"
        "main._run = lambda args: os.kill(os.getpid(), signal.SIGTERM) or 1\n"
        "main.main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    line = "anchorpatch: terminated by SIGTERM; run the same command again\n"
    assert (shown.returncode, shown.stderr) == (128 + signal.SIGTERM, line)
