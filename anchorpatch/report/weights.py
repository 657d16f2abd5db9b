"""What the page tells of a file of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorpatch.runtime.checkpoint import WeightsMeta, read_meta
from anchorpatch.storage import sha256_of

__all__ = ["WeightsFacts", "read_weights_facts"]


@dataclass(frozen=True)
class WeightsFacts:
    """A file of weights.

    Attributes:
        path: of the file.
        meta: what it says about itself.
        sha256: of its bytes.
    """

    path: Path
    meta: WeightsMeta
    sha256: str

    def shown(self) -> dict[str, Any]:
        """Return what a page says of it."""
        record = self.meta.training.get("record")
        val = record.get("val") if isinstance(record, dict) else None
        top1 = val.get("top1") if isinstance(val, dict) else None
        return {
            "network": self.meta.architecture,
            "classes": f"{len(self.meta.classes):,}",
            "top-1": f"{top1:.2%}" if isinstance(top1, (int, float)) else "",
            "SHA-256": self.sha256,
        }


def read_weights_facts(path: Path) -> WeightsFacts:
    """Read what a file of weights says about itself.

    Raises:
        WeightsError: it is missing or damaged.
    """
    meta = read_meta(path)
    with path.open("rb") as file:
        return WeightsFacts(path, meta, sha256_of(file))
