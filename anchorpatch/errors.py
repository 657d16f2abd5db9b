"""Every error that anchorpatch raises on purpose.

::

    AnchorpatchError                 one clear line for the user, exit status 1
    ├── SettingsError                a value that no run could use (also ValueError); status 2
    ├── DataError                    the image folder or the labels file is not as expected
    │   ├── ImageError               one image cannot be decoded; carries the reason
    │   ├── NothingToShow            no image looked at is an example of what was asked for
    │   └── TooManyBadImages         more images were skipped than --max-bad allows
    ├── WeightsError                 a weights file is missing, damaged or of another kind
    ├── ShardError                   a shard or manifest cannot be read or written
    │   ├── CorruptShard             a shard's bytes are not those that were written
    │   ├── ShardBusy                another process is writing the shard
    │   └── ManifestMismatch         the folder holds shards made from other inputs
    ├── StorageError                 the disk refused a write (full, quota, read-only)
    ├── NonFiniteError               NaN or infinity where a number was needed
    ├── OutOfMemory                  the memory of the GPU or of the computer is used up
    ├── MissingDependency            an optional package is not installed
    └── Interrupted                  a signal stopped the run; exit status 128 + signal

A message is one sentence or two: the file, what was expected, what was found, what to do.
"""

from __future__ import annotations

import errno
import os
from typing import Final

__all__ = [
    "AnchorpatchError",
    "CorruptShard",
    "DataError",
    "ImageError",
    "Interrupted",
    "ManifestMismatch",
    "MissingDependency",
    "NonFiniteError",
    "NothingToShow",
    "OutOfMemory",
    "SettingsError",
    "ShardBusy",
    "ShardError",
    "StorageError",
    "TooManyBadImages",
    "WeightsError",
    "reason_of",
]

#: ENOTSUPP of Linux, which NFS leaks to programs though no C library has words for it.
ENOTSUPP: Final = 524


def reason_of(error: BaseException) -> str:
    """Return why something failed as words for the middle of a message: one line, no bare number.

    Example:
        >>> reason_of(OSError(errno.ENOLCK, None)), reason_of(KeyError("no such part"))
        ('No locks available', 'no such part')
    """
    number = error.errno if isinstance(error, OSError) else None
    if number == ENOTSUPP:
        text = os.strerror(errno.EOPNOTSUPP)
    elif isinstance(error, OSError) and (error.strerror or number):
        text = error.strerror or os.strerror(number or 0)
    else:
        # A KeyError shows its message as a literal, in quotes.
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join(text.split()) or type(error).__name__


class AnchorpatchError(Exception):
    """Base of the tree; ``exit_status`` is what the command line ends with."""

    exit_status = 1


class SettingsError(AnchorpatchError, ValueError):
    """A setting has a value that no run could use: wrong usage."""

    exit_status = 2


class DataError(AnchorpatchError):
    """The image folder or the labels file is not as expected."""


class ImageError(DataError):
    """One image cannot be decoded.

    Attributes:
        reason: why, in a few words that can be counted ("truncated", "empty file").
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NothingToShow(DataError):
    """No image that was looked at is an example of what was asked for; nothing is wrong."""


class TooManyBadImages(DataError):
    """More images were skipped than ``--max-bad`` allows."""


class WeightsError(AnchorpatchError):
    """A weights or checkpoint file is missing, damaged or of another kind."""


class ShardError(AnchorpatchError):
    """A shard or manifest cannot be read or written."""


class CorruptShard(ShardError):
    """The bytes of a shard are not those that were written."""


class ShardBusy(ShardError):
    """Another process is writing the shard."""


class ManifestMismatch(ShardError):
    """The output folder holds shards made from other settings, weights or files."""


class StorageError(AnchorpatchError):
    """The disk refused a write."""


class NonFiniteError(AnchorpatchError):
    """NaN or infinity where a number was needed."""


class OutOfMemory(AnchorpatchError):
    """The memory of the GPU or of the computer is used up."""


class MissingDependency(AnchorpatchError):
    """An optional package is not installed."""


class Interrupted(AnchorpatchError):
    """A signal stopped the run.

    Attributes:
        exit_status: 128 + signal: 130 after Ctrl-C (SIGINT), 143 after SIGTERM.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number
