"""Lists of classes in messages."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["differing", "few"]


def few(names: Sequence[str]) -> str:
    """Return the first classes, for people.

    Example:
        >>> few(("cat", "dog")), few(("ant", "bee", "cat", "dog"))
        ('cat, dog', 'ant, bee, cat, ...')
    """
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def differing(train: Sequence[str], val: Sequence[str]) -> str:
    """Say how the classes of two splits differ, which they do.

    Example:
        >>> differing(("cat", "dog"), ("ant", "cat")), differing(("a", "b"), ("b", "a"))
        ('dog only in train, ant only in val', 'another order')
    """
    ours, theirs = set(train), set(val)
    lacking = [f"{name} only in train" for name in sorted(ours - theirs)]
    lacking += [f"{name} only in val" for name in sorted(theirs - ours)]
    more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
    return ", ".join(lacking[:5]) + more if lacking else "another order"
