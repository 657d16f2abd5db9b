"""Text for people: names, numbers and counts, the same on a terminal and on a page."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

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


def decimal(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """Write a number with decimals; what rounds to zero has no minus.

    Args:
        value: the number.
        digits: decimals.
        sign: write the plus too.

    Example:
        >>> decimal(1234.5), decimal(-0.00004, 4), decimal(0.25, 3, sign=True)
        ('1,234.50', '0.0000', '+0.250')
    """
    # The sum turns -0.0, which round() returns for small negative numbers, into 0.0.
    return f"{round(value, digits) + 0.0:{'+' if sign else ''},.{digits}f}"


def percent(share: float, digits: int = 2, *, sign: bool = False) -> str:
    """Write a share, where 1 is 100 %, as `decimal` writes numbers.

    Example:
        >>> percent(0.758), percent(-0.001, 0), percent(-0.04, 0)
        ('75.80%', '0%', '-4%')
    """
    return f"{decimal(100 * share, digits, sign=sign)}%"


def counted(count: int, noun: str) -> str:
    """Write a count with its noun, in the plural where it is not one.

    Example:
        >>> counted(1, "image"), counted(1200, "patch"), counted(0, "class"), counted(2, "epoch")
        ('1 image', '1,200 patches', '0 classes', '2 epochs')
    """
    ending = "" if count == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{count:,} {noun}{ending}"


def tally(counts: Mapping[str, int]) -> str:
    """Write how many things there are in all, and how many of each kind.

    Example:
        >>> tally({"truncated": 1200, "empty file": 3}), tally({})
        ('1,203 (1,200 truncated, 3 empty file)', '0')
    """
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return f"{sum(counts.values()):,}" + (f" ({kinds})" if kinds else "")


def few(names: Sequence[str], most: int = 3) -> str:
    """Name the first of some things, and say how many more there are.

    Example:
        >>> few(("cat", "dog")), few(("ant", "bee", "cat", "dog"))
        ('cat, dog', 'ant, bee, cat and 1 more')
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def differing(train: Sequence[str], val: Sequence[str]) -> str:
    """Say how the classes of two splits differ, which they do.

    Example:
        >>> differing(("cat", "dog"), ("ant", "cat")), differing(("a", "b"), ("b", "a"))
        ('dog only in train, ant only in val', 'another order')
    """
    ours, theirs = set(train), set(val)
    lacking = [f"{name} only in train" for name in sorted(ours - theirs)]
    lacking += [f"{name} only in val" for name in sorted(theirs - ours)]
    return few(lacking, 5) or "another order"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that ends as a mistyped one, or is most like it; None without one.

    Example:
        >>> nearest("0001.JPEG", ["cat/0000.JPEG", "cat/0001.JPEG"]), nearest("xyz", ["cat"])
        ('cat/0001.JPEG', None)
    """
    words = list(known)
    ending = [other for other in words if other.endswith(word)]
    return next(iter(ending or difflib.get_close_matches(word, words, 1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean ...?`` for a mistyped word, or nothing.

    Example:
        >>> did_you_mean("bach-size", ["batch-size", "workers"])
        " Did you mean 'batch-size'?"
    """
    near = nearest(word, known)
    return f" Did you mean {near!r}?" if near else ""
