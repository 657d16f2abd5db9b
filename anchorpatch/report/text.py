"""Text from files, made fit for a page."""

from __future__ import annotations

import re
from typing import Any, Final

__all__ = ["clean"]

#: What no HTML may hold: control characters, and halves of surrogate pairs, which stand for
#: bytes of file names that are no UTF-8.
_UNFIT: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(value: Any) -> Any:
    r"""Return text without what HTML cannot hold; other values as they are.

    Example:
        >>> clean("caf\udce9")
        'caf�'
    """
    if isinstance(value, str) and _UNFIT.search(value):
        return type(value)(_UNFIT.sub("\N{REPLACEMENT CHARACTER}", value))
    return value
