"""Lists of classes in messages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from anchorpatch.text import counted

__all__ = ["differing", "few", "without_images"]


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


def without_images(labels: npt.NDArray[np.integer], classes: Sequence[str]) -> str | None:
    """Name the classes that none of some images has; None where each class has one.

    Args:
        labels: index of each image's class (n,).
        classes: names of the classes.

    Example:
        >>> without_images(np.array([0, 2]), ("ant", "bee", "cat", "dog"))
        '2 of 4 classes have no image among the 2 images taken: bee, dog'
    """
    absent = np.setdiff1d(np.arange(len(classes)), labels)
    if not len(absent):
        return None
    have = "has" if len(absent) == 1 else "have"
    return (
        f"{len(absent):,} of {counted(len(classes), 'class', 'classes')} {have} no image among the "
        f"{counted(len(labels), 'image')} taken: {few([classes[i] for i in absent])}"
    )
