"""Localize multi-scale semantic patches with AnchorNet and train classifiers on them.

An implementation of "Localizing Multi-scale Semantic Patches for Image Classification"
(Yang et al.) as a command-line toolkit for dataset preprocessing. Importing this package
imports nothing heavy: torch is loaded by the module that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anchorpatch.api import LocalizedPatches, localize
    from anchorpatch.shards.dataset import BagBatch, BagDataset, PatchDataset, collate_bags
    from anchorpatch.shards.reader import ImagePatches, ShardReader

__version__ = "0.1.0"

__all__ = [
    "BagBatch",
    "BagDataset",
    "ImagePatches",
    "LocalizedPatches",
    "PatchDataset",
    "ShardReader",
    "__version__",
    "collate_bags",
    "localize",
]

_HOMES = {
    **dict.fromkeys(("LocalizedPatches", "localize"), "api"),
    **dict.fromkeys(("BagBatch", "BagDataset", "PatchDataset", "collate_bags"), "shards.dataset"),
    **dict.fromkeys(("ImagePatches", "ShardReader"), "shards.reader"),
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
