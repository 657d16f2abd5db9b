"""Which processes of the loader there are."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable


def own_workers() -> list[multiprocessing.process.BaseProcess]:
    # joblib keeps processes of its own for later, which other tests may have started.
    children = multiprocessing.active_children()
    return [child for child in children if not type(child).__name__.startswith("Loky")]


def workers_alive() -> int:
    return len(own_workers())


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False
