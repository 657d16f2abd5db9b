"""The cost of Table 3 (section 4.3), computed from the networks, beside what the paper prints.

A network costs its MACs at the patch's side times the mean patches of an image; the overall
figure weights the scales by their images. AnchorNet's own cost is no part of the column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from anchorpatch.models.complexity import macs_at
from anchorpatch.models.registry import build_on_meta
from anchorpatch.settings import SCALES

__all__ = ["IMAGES", "MEAN_PATCHES", "PRINTED", "WHOLE", "Cell", "cells", "table_3_costs"]

#: Side of a whole image in pixels.
WHOLE: Final = 224

#: Mean patches of an image, by scale (section 4.3).
MEAN_PATCHES: Final = {63: 5.6, 95: 2.9, 111: 2.1}

#: Images of ImageNet's validation set that each branch localises (section 4.3).
IMAGES: Final = {63: 15050, 95: 18047, 111: 16903}

#: Printed GMACs ("FLOPs (G)") by network: at 224 px, by scale, and overall.
PRINTED: Final[Mapping[str, Mapping[str, float]]] = {
    "resnet50": {"224": 4.1, "63": 1.9, "95": 2.2, "111": 2.2, "all": 2.1},
    "resnext50": {"224": 4.3, "63": 2.0, "95": 2.3, "111": 2.4, "all": 2.2},
    "densenet169": {"224": 3.4, "63": 1.6, "95": 1.8, "111": 1.8, "all": 1.7},
    "hcgnet_c": {"224": 7.1, "63": 3.3, "95": 3.8, "111": 3.9, "all": 3.7},
}


@dataclass(frozen=True)
class Cell:
    """One figure of the column.

    Attributes:
        network: its name.
        scale: "224", "63", "95", "111", or "all" for the overall figure.
        gmacs: of an image, computed.
        printed: by the paper.
    """

    network: str
    scale: str
    gmacs: float
    printed: float

    @property
    def deviation(self) -> float:
        """Share by which the computed figure lies above the printed one."""
        return self.gmacs / self.printed - 1

    def to_json(self) -> dict[str, Any]:
        """Return the cell as JSON knows it."""
        return {**asdict(self), "deviation": self.deviation}


def cells(network: str, gmacs: Mapping[int, float]) -> tuple[Cell, ...]:
    """Return a network's part of the column.

    Args:
        network: a name in `PRINTED`.
        gmacs: of one input, by its side: 63, 95, 111 and 224 px.

    Example:
        >>> [round(c.gmacs, 2) for c in cells("resnet50", {224: 4, 63: 0.3, 95: 0.7, 111: 1})]
        [4, 1.68, 2.03, 2.1, 1.95]
    """
    values = {str(WHOLE): gmacs[WHOLE]}
    values.update({str(scale): gmacs[scale] * MEAN_PATCHES[scale] for scale in SCALES})
    weighted = sum(values[str(scale)] * IMAGES[scale] for scale in SCALES)
    values["all"] = weighted / sum(IMAGES.values())
    printed = PRINTED[network]
    return tuple(Cell(network, scale, value, printed[scale]) for scale, value in values.items())


def table_3_costs() -> tuple[Cell, ...]:
    """Return the whole column, computed from the networks."""
    column: list[Cell] = []
    for network in PRINTED:
        counts = macs_at(build_on_meta(network), (WHOLE, *SCALES))
        gmacs = {side: count / 1e9 for side, count in counts.items() if count is not None}
        column += cells(network, gmacs)
    return tuple(column)
