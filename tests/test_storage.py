"""Disks that refuse: simulated at each write, a small tmpfs, and a limit on the file size."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from anchorpatch.errors import StorageError, reason_of
from anchorpatch.settings import CODECS
from anchorpatch.shards.layout import shard_name
from anchorpatch.shards.manifest import FilesDigest
from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.verify import verify_folder
from anchorpatch.shards.writer import ShardWriter
from tests.shards.samples import make_batch, make_header

ADVICE = "free space and run the same command again"
RAISE_THE_LIMIT = "raise the limit of file sizes (ulimit -f) and run the same command again"


class Disk:
    """Counts every call that writes, and refuses one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.refuse = -1
        self.error = errno.ENOSPC
        self.log: list[str] = []
        for name in ("fsync", "replace", "posix_fallocate"):
            monkeypatch.setattr(os, name, self.checked(name, getattr(os, name)))
        monkeypatch.setattr(Path, "open", self.opening(Path.open, reading=("r", "rb")))
        monkeypatch.setattr(tempfile, "TemporaryFile", self.opening(tempfile.TemporaryFile))

    def check(self, name: str) -> None:
        self.log.append(name)
        self.calls += 1
        if self.calls == self.refuse:
            raise OSError(self.error, os.strerror(self.error))

    def checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.check(name)
            return function(*args, **kwargs)

        return call

    def opening(
        self, function: Callable[..., Any], reading: tuple[str, ...] = ()
    ) -> Callable[..., Any]:
        """Let the files that ``function`` opens for writing ask first."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if reading and (*args[1:], kwargs.get("mode"), "r")[0] in (*reading, None):
                return function(*args, **kwargs)
            self.check("open")
            return AskingFile(function(*args, **kwargs), self)

        return call


class AskingFile:
    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> Any:
        self._disk.check("write")
        return self._file.write(data)

    def flush(self) -> None:
        self._disk.check("flush")
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> AskingFile:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()


def write_split(folder: Path, codec: str = "raw", images: tuple[int, int] = (3, 2)) -> None:
    """Write a shard of two batches and its entry, as a job does."""
    total = sum(images)
    header = make_header(codec=codec, store_images=True, shard_size=total)
    manifest = open_manifest(folder, header, FilesDigest(total, "f0" * 32, ("e0" * 32,)))
    for index in manifest.refreshed().missing():
        path = folder / shard_name("val", index)
        with ShardWriter(path, header, files_sha256="e0" * 32) as shard:
            shard.append(make_batch(images[0], seed=1))
            shard.append(make_batch(images[1], seed=2, start=images[0]))
        manifest = manifest.commit(shard.entry)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize(
    ("codec", "error"),
    [
        *((codec, errno.ENOSPC) for codec in CODECS),
        ("raw", errno.EDQUOT),
        ("raw", errno.EFBIG),
    ],
)
def test_each_write_that_fails_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, error: int
) -> None:
    disk = Disk(monkeypatch)
    write_split(tmp_path / "whole" / "val", codec, (1, 1))
    total, log = disk.calls, disk.log
    assert {"open", "write", "flush", "fsync", "replace", "posix_fallocate"} <= set(log)
    whole = (tmp_path / "whole" / "val" / "val-00000.h5").read_bytes()
    disk.error = error
    survived = []
    for n in range(1, total + 1):
        folder = tmp_path / str(n) / "val"
        disk.calls, disk.refuse = 0, n
        try:
            write_split(folder, codec, (1, 1))
        except StorageError as caught:
            message = str(caught)
            assert (RAISE_THE_LIMIT if error == errno.EFBIG else ADVICE) in message, (n, log[n - 1])
            assert os.strerror(error) in message
            assert str(folder) in message
            assert "\n" not in message
        else:
            survived.append(log[n - 1])
        left = names(folder) - {"manifest.json", ".manifest.lock", "val-00000.h5"}
        assert left == set(), (n, log[n - 1])
        if "val-00000.h5" in names(folder):
            assert (folder / "val-00000.h5").read_bytes() == whole
        disk.refuse = -1
        write_split(folder, codec, (1, 1))
        assert verify_folder(folder, jobs=1) == []
        assert (folder / "val-00000.h5").read_bytes() == whole
    # Syncing a folder is best effort.
    assert set(survived) <= {"fsync"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if result.returncode:
        pytest.skip(f"cannot mount a tmpfs: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 200_000, 900_000])
def test_a_full_disk(small_disk: Path, room: int) -> None:
    ballast = small_disk / "ballast"
    space = os.statvfs(small_disk)
    ballast.write_bytes(bytes(space.f_bavail * space.f_bsize - room))
    folder = small_disk / "val"
    with pytest.raises(StorageError, match=ADVICE):
        write_split(folder)
    assert names(folder) <= {"manifest.json", ".manifest.lock"}
    ballast.unlink()
    # The shard itself fits; the shard and its spools do not.
    with pytest.raises(StorageError, match=r"val-00000.h5: .*No space.*bytes are needed"):
        write_split(folder)
    subprocess.run(["mount", "-o", "remount,size=8M", str(small_disk)], check=True)
    write_split(folder)
    assert verify_folder(folder, jobs=1) == []


LIMITED = """
import resource, sys
from pathlib import Path
from anchorpatch.errors import StorageError, reason_of
from tests.test_storage import write_split
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write_split(Path(sys.argv[1]))
except StorageError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("limit", [0, 20_000, 500_000])
def test_a_limit_on_the_file_size(tmp_path: Path, limit: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "val"), str(limit)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert (result.returncode, result.stderr) == (3, ""), result.stderr
    assert result.stdout.count("\n") == 1
    assert "File too large" in result.stdout
    assert RAISE_THE_LIMIT in result.stdout
    assert names(tmp_path / "val") <= {"manifest.json", ".manifest.lock"}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "val").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="make the folder writable, or choose another one"):
        write_split(tmp_path / "val")


@pytest.fixture(scope="session")
def refusing_flock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload whose flock fails with the errno in $FLOCK_ERRNO, in HDF5 too."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler, to replace flock")
    library = tmp_path_factory.mktemp("flock") / "flock.so"
    source = library.with_suffix(".c")
    source.write_text(
        "#include <errno.h>\n#include <stdlib.h>\n"
        'int flock(int fd, int how) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }\n'
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


WITHOUT_LOCKS = """
import sys
from pathlib import Path
from anchorpatch.shards import ShardReader
from anchorpatch.shards.verify import verify_folder
from tests.test_storage import write_split
write_split(Path(sys.argv[1]))
assert verify_folder(sys.argv[1], jobs=1) == []
reader = ShardReader(sys.argv[1])
print(len(reader.image_patches(0).pixels) > 0, len(reader.label))
"""


@pytest.mark.parametrize(
    # 524 is the kernel's ENOTSUPP, which NFS leaks.
    "error",
    [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, 524],
)
def test_a_filesystem_without_locks_goes_on(
    tmp_path: Path, refusing_flock: Path, error: int
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path / "val")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "LD_PRELOAD": str(refusing_flock), "FLOCK_ERRNO": str(error)},
    )
    assert result.stdout.startswith("True "), result.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOLCK, "No locks available"), "No locks available"),
        (OSError(errno.EIO, None), "Input/output error"),
        (OSError(524, "Unknown error 524"), "Operation not supported"),
        (OSError("one\n line"), "one line"),
        (KeyError("no such part"), "no such part"),
        (OSError(), "OSError"),
    ],
)
def test_reasons_are_words(error: Exception, words: str) -> None:
    assert reason_of(error) == words


def test_two_writers_of_a_shard_are_safe_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    write_split(tmp_path / "whole" / "val")
    whole = (tmp_path / "whole" / "val" / "val-00000.h5").read_bytes()
    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "val-00000.h5"
    header = make_header(store_images=True, shard_size=5)
    writers = [ShardWriter(path, header, files_sha256="e0" * 32) for _ in range(2)]
    for one in writers:
        one.append(make_batch(3, seed=1))
    for one in writers:
        one.append(make_batch(2, seed=2, start=3))
    for one in writers:
        one.close()
        assert path.read_bytes() == whole
    assert names(tmp_path) == {"whole", "val-00000.h5"}


KILLED = """
import os, sys
from pathlib import Path
from tests.test_storage import write_split
name, _, n = sys.argv[2].partition(":")
real, left = getattr(os, name), int(n)
def dying(*args, **kwargs):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    return real(*args, **kwargs)
setattr(os, name, dying)
write_split(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("moment", ["posix_fallocate:0", "replace:1", "fsync:3", "replace:2"])
def test_a_killed_run_is_made_good_by_the_next(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "val"
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), moment],
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    write_split(tmp_path / "whole" / "val")
    write_split(folder)
    assert verify_folder(folder, jobs=1) == []
    for name in ("val-00000.h5", "manifest.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "val" / name).read_bytes()
