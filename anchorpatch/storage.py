"""Files: writing to a disk that may refuse, and reading what others may have written.

A write ends in one clear error or in a whole file. A read is tried again where the disk falters,
and what is read is looked at before it is used.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from anchorpatch.errors import ENOTSUPP, AnchorpatchError, DataError, StorageError, reason_of
from anchorpatch.signals import waiting_for

#: What to do about a write that the system refused; otherwise the folder is not for writing.
_ADVICE: Final = {
    errno.ENOSPC: "free space and run the same command again",
    errno.EDQUOT: "free space and run the same command again",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) and run the same command again",
    errno.EIO: "check the disk and run the same command again",
}

#: What a filesystem answers that has no locks.
_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, ENOTSUPP}

#: Errors that say nothing about the file that is read, and that may be over in a moment: a disk
#: or a network that falters. Linux alone has EREMOTEIO.
_PASSING: Final = {
    getattr(errno, name, errno.EIO)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "EREMOTEIO", "ENOLINK"),
        *("EPROTO", "ENOBUFS", "ENOTCONN", "ESHUTDOWN", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED"),
    )
}

#: Seconds before each further try to read what could not be read.
_PAUSES: tuple[float, ...] = (0.5, 2.0, 8.0)

_T = TypeVar("_T")


def patiently(path: str | bytes | Path, read: Callable[[], _T]) -> _T:
    """Return ``read()``, tried again after a growing pause while the disk or network falters.

    Args:
        path: what is read, for the message.
        read: reads it.

    Raises:
        DataError: it cannot be read by the last try either. This is no fault of the file, so it
            is not one to be skipped.
        OSError: an error of another kind, at once.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            if pause is None:
                name = os.fsencode(path).decode(errors="backslashreplace")
                raise DataError(
                    f"{name}: cannot be read: {reason_of(error)} (tried "
                    f"{len(_PAUSES) + 1} times): check the disk or the network, then run the same "
                    "command again"
                ) from error
            with waiting_for("a disk or a network that falters"):
                time.sleep(pause)
    raise AssertionError  # the last pause is None


_WORDS: Final = {str: "text", bool: "true or false", int: "an integer", float: "a finite number"}


def to_json(value: Any) -> Any:
    """Return a result for JSON: a dataclass by its fields, but for ``pixels``.

    Keys and paths become text, arrays and tuples lists.

    Example:
        >>> to_json({63: (Path("val"), None)})
        {'63': ['val', None]}
    """
    if is_dataclass(value):
        names = [f.name for f in fields(value) if f.name != "pixels"]
        return {name: to_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    # Not asked for by type: numpy is slow to import.
    return value.tolist() if hasattr(value, "tolist") else value


def from_json(cls: type[_T], document: object) -> _T:
    """Build a dataclass from a JSON object whose values have the annotated types.

    Lists become tuples, integers floats and keys numbers where the annotation says so; ``true`` is
    no number.

    Raises:
        ValueError: a name is missing or unknown, or a value is of another type; it is named.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Box:
        ...     corner: tuple[float, float]
        >>> from_json(Box, {"corner": [0, 1.5]})
        Box(corner=(0.0, 1.5))
        >>> from_json(Box, {"corner": [0, True]})
        Traceback (most recent call last):
        ValueError: corner: expected 2 values, each a finite number, found [0, True]
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"expected a JSON object, found {type(document).__name__}")
    hints = _hints(cls)  # type: ignore[arg-type]
    unknown = document.keys() - hints.keys()
    if unknown:
        raise ValueError(f"expected no field {min(unknown)!r}")
    values = {name: _typed(value, hints[name], name) for name, value in document.items()}
    try:
        return cls(**values)
    except TypeError as error:  # a field is missing
        raise ValueError(reason_of(error)) from error


@cache  # as a manifest may have 100,000 entries
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


@cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(hint), get_args(hint)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Return a JSON value as the annotation has it, or raise ValueError."""
    if type(value) is hint and hint is not float:
        return value
    origin, args = _parts(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for one in args:
            with suppress(ValueError):
                return _typed(value, one, name)
    elif origin is tuple and isinstance(value, (list, tuple)):
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        if len(kinds) == len(value):
            with suppress(ValueError):
                return tuple(_typed(v, kind, name) for v, kind in zip(value, kinds, strict=True))
    elif origin is not None and origin is not tuple and isinstance(value, Mapping):
        # Keys of JSON are text.
        return {args[0](k): _typed(v, args[1], f"{name}[{k!r}]") for k, v in value.items()}
    elif hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    raise ValueError(f"{name}: expected {_expected(hint)}, found {shown}")


def _expected(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, args))
    if origin is tuple:
        number = "a list" if args[-1] is ... else f"{len(args)} values"
        return f"{number}, each {_expected(args[0])}"
    return _WORDS.get(hint, "nothing" if hint is type(None) else "a JSON object")


@contextmanager
def refusals(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError of the block into one StorageError.

    Args:
        path: the file that was to be written.
        needed: its size in bytes, if known.

    Raises:
        StorageError: naming the file, the system's reason, the bytes, and what to do.
    """
    try:
        yield
    except OSError as error:
        size = f" ({needed:,} bytes are needed)" if needed else ""
        advice = _ADVICE.get(error.errno or 0, "make the folder writable, or choose another one")
        raise StorageError(f"{path}: cannot write: {reason_of(error)}{size}: {advice}") from error


def try_lock(file: BinaryIO | int, *, wait: bool) -> bool:
    """Take an exclusive lock on an open file; it ends when the file is closed.

    On a filesystem without locks this is as if the lock were taken.

    Returns:
        False where another process holds it and ``wait`` is false.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path`` (created if need be) during the block.

    Threads, processes, and on network filesystems hosts, exclude each other: on NFS since
    Linux 2.6.12, on Lustre when mounted with ``-o flock``. Where a filesystem has no locks
    the block runs without one.
    """
    with refusals(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with refusals(path), waiting_for(f"the lock {path}, which another process holds"):
            try_lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(path: Path, busy: AnchorpatchError) -> Iterator[None]:
    """Hold an exclusive lock on a file that is there only as long as the block lasts.

    Where a filesystem has no locks the block runs without one; see `locked`.

    Args:
        path: the file. What a killed process leaves behind is no lock.
        busy: raised where another process holds the lock.

    Raises:
        StorageError: the disk refuses.
    """
    with ExitStack() as stack:
        while True:
            with refusals(path):
                file = stack.enter_context(path.open("ab"))
                if not try_lock(file, wait=False):
                    raise busy
                # Its last holder may have removed the file that was opened.
                with suppress(FileNotFoundError):
                    if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                        break
        try:
            yield
        finally:  # before the lock ends
            with suppress(OSError):
                path.unlink()


def allocate(file: BinaryIO, size: int) -> None:
    """Claim the room of ``size`` bytes at once, so that a full disk says so before the writing.

    Without effect where the system or the filesystem cannot.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, ENOTSUPP):
                raise


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of a whole open file, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    file.seek(0)
    while n := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:n])
    return digest.hexdigest()


@cache
def _sync_file_range() -> Any:
    """Return what has Linux begin to write a part of a file to the disk, without a wait."""
    import ctypes  # which few commands need

    found = None
    with suppress(OSError, AttributeError):
        found = ctypes.CDLL(None).sync_file_range
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


#: Bytes of a file after which the disk begins with them, so that `os.fsync` finds little to do.
_SYNC_BYTES: Final = 1 << 24


def write_hashed(file: BinaryIO, chunks: Iterable[Any]) -> str:
    """Write bytes, or arrays, and return their SHA-256 in hexadecimal."""
    digest, begun, begin_sync = hashlib.sha256(), file.tell(), _sync_file_range()
    for chunk in chunks:
        digest.update(chunk)
        file.write(chunk)
        if begin_sync is not None and (end := file.tell()) - begun >= _SYNC_BYTES:
            begin_sync(file.fileno(), begun, end - begun, 2)  # SYNC_FILE_RANGE_WRITE
            begun = end
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[BinaryIO], _T], needed: int | None = None) -> _T:
    """Let ``write`` fill a file that others see whole or not at all, whenever the system crashes.

    Args:
        path: its name. Its folder is made.
        write: is given the file, open for reading and writing.
        needed: its size in bytes, if known, for the error.

    Returns:
        What ``write`` returns.

    Raises:
        StorageError: the disk refuses; what stood under ``path`` before is as it was.
    """
    with refusals(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: without locks two processes may be here at once.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with temporary.open("x+b") as file:
                result = write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Not every filesystem syncs folders; those that do not, say EINVAL.
            with suppress(OSError):
                os.fsync(folder)
        finally:
            os.close(folder)
    return result
