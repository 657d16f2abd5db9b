"""Files without a name, in which a shard's large datasets grow until their sizes are known."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["Spools"]


class Spools:
    """Byte streams by dataset name.

    Args:
        folder: where the files lie, which are gone even after SIGKILL.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}

    def append(self, name: str, data: Any) -> None:
        """Add bytes, or an array's, to a stream."""
        if name not in self._files:
            # Lives until `close`.
            self._files[name] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        self._files[name].write(data)

    def flush(self) -> None:
        """Hand everything to the system, which may refuse it."""
        for file in self._files.values():
            file.flush()

    def copy(self, name: str, target: BinaryIO, offset: int, size: int) -> None:
        """Copy a whole stream into ``target``, within the kernel where that can."""
        source = self._files[name]
        source.seek(0)
        target.seek(offset)
        done = 0
        if hasattr(os, "copy_file_range"):
            # Refused between some filesystems and by old kernels; then the plain way goes on.
            with suppress(OSError):
                while done < size:
                    args = (source.fileno(), target.fileno(), size - done, done, offset + done)
                    n = os.copy_file_range(*args)
                    if n == 0:
                        break
                    done += n
        if done < size:
            source.seek(done)
            target.seek(offset + done)
            shutil.copyfileobj(source, target, 1 << 20)

    def close(self) -> None:
        """Throw the streams away."""
        for file in self._files.values():
            # What a spool could not flush is not wanted any more.
            with suppress(OSError):
                file.close()
        self._files.clear()
