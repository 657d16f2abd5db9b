"""The shard format: HDF5 files of patches, read by memory map.

``from anchorpatch.shards import ShardReader, PatchDataset`` is how to read shards; only the
datasets import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchorpatch.shards.dataset import BagBatch, BagDataset, PatchDataset, collate_bags
    from anchorpatch.shards.reader import ImagePatches, ShardReader

__all__ = [
    "BagBatch",
    "BagDataset",
    "ImagePatches",
    "PatchDataset",
    "ShardReader",
    "collate_bags",
]

_HOMES = {
    **dict.fromkeys(("BagBatch", "BagDataset", "PatchDataset", "collate_bags"), "dataset"),
    **dict.fromkeys(("ImagePatches", "ShardReader"), "reader"),
}


if not TYPE_CHECKING:  # or type checkers would take any name for a public one

    def __getattr__(name: str) -> object:
        """Import a public name when it is first asked for."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names too that nobody has asked for yet."""
    return sorted({*globals(), *__all__})
