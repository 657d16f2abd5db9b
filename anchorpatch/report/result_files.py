"""Results that ``anchorpatch evaluate --result FILE`` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from anchorpatch.jobs.results import AnchorNetFigures, Speed, Table3, Table3Row, Table4, Table4Row

__all__ = ["Result", "read_result"]

#: A larger JSON file is no result of ours.
_MOST_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class Result:
    """What ``anchorpatch evaluate`` found.

    Attributes:
        source: the file.
        table: Table 3, Table 4, or the figures of AnchorNet.
    """

    source: str
    table: Table3 | Table4 | AnchorNetFigures


def read_result(path: Path) -> Result | None:
    """Read a result; None for JSON of another kind, which may lie anywhere."""
    if path.stat().st_size > _MOST_BYTES:
        return None
    data = path.read_bytes()
    if b'"protocol"' not in data and not path.name.startswith("table"):
        return None
    document = json.loads(data)
    if not isinstance(document, dict) or document.get("protocol") not in _READERS:
        return None
    fields = {name: value for name, value in document.items() if name != "protocol"}
    return Result(str(path), _READERS[document["protocol"]](fields))


def _table_3(fields: dict[str, Any]) -> Table3:
    rows = tuple(Table3Row(**row) for row in fields["rows"])
    speed = None if fields["speed"] is None else Speed(**fields["speed"])
    left_out = tuple(map(str, fields["left_out"]))
    return Table3(**{**fields, "rows": rows, "speed": speed, "left_out": left_out})


def _table_4(fields: dict[str, Any]) -> Table4:
    return Table4(**{**fields, "rows": tuple(Table4Row(**row) for row in fields["rows"])})


_READERS: Final[Mapping[str, Callable[[dict[str, Any]], Table3 | Table4 | AnchorNetFigures]]] = {
    "patches": _table_3,
    "rescale": _table_4,
    "anchornet": lambda fields: AnchorNetFigures(**fields),
}
