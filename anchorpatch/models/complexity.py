"""What a network costs and sees: parameters, MACs, receptive fields, all computed from it.

And the cost of Table 3 (section 4.3), computed from the networks, beside what the paper prints. A
network costs its MACs at the patch's side times the mean patches per image; the overall figure
weights the scales by their images. AnchorNet's own cost is no part of the column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from anchorpatch.errors import SettingsError, reason_of
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.registry import build_on_meta
from anchorpatch.settings import SCALES

#: Side of a whole image in pixels.
WHOLE: Final = 224

#: Mean patches per image, by scale (section 4.3).
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

#: What networks raise when an image has a side that they cannot take.
_REFUSALS = (AssertionError, RuntimeError, ValueError)


def parameters(module: nn.Module) -> int:
    """Return the number of parameters.

    Example:
        >>> parameters(AnchorNet(classes=1000))
        1550313
    """
    return sum(p.numel() for p in module.parameters())


def macs(
    module: nn.Module, size: int = 224, forward: Callable[[torch.Tensor], Any] | None = None
) -> int:
    """Return the multiply-accumulates of convolutions and matrix products for one image.

    A network on the device "meta" (`anchorpatch.models.registry.build_on_meta`) gives the same
    count without computing anything.

    Args:
        module: takes (1, 3, size, size).
        size: side of the image in pixels.
        forward: what to count instead of ``module``'s own forward, say ``net.localize``.

    Example:
        >>> net = AnchorNet(classes=1000)
        >>> [round(macs(net, forward=f) / 1e9, 4) for f in (net.full, net.localize)]
        [0.4853, 0.3939]
    """
    parameter = next(module.parameters())
    image = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), _Shortened(), FlopCounterMode(display=False) as counter:
            (forward or module)(image)
    finally:
        module.train(training)
    return int(counter.get_total_flops()) // 2


def macs_at(
    module: nn.Module,
    sizes: Iterable[int],
    forward: Callable[[torch.Tensor], Any] | None = None,
) -> dict[int, int | None]:
    """Return `macs` by size, None where the network cannot take it."""
    counts: dict[int, int | None] = {}
    for size in sizes:
        try:
            counts[size] = macs(module, size, forward)
        except _REFUSALS:
            counts[size] = None
    return counts


def refusal(module: nn.Module, size: int) -> str | None:
    """Return why a network cannot take images of a size in pixels, or None where it can.

    One image goes through, in evaluation mode; where the network's operators can, without
    memory and without computing anything.

    Example:
        >>> refusal(nn.Conv2d(3, 8, 3), 63) is None
        True
        >>> "cannot be multiplied" in refusal(nn.Linear(64, 10), 63)
        True
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shadow = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            try:
                functional_call(module, shadow, torch.empty(1, 3, size, size, device="meta"))
            except (NotImplementedError, *_REFUSALS):
                parameter = next(module.parameters())
                module(torch.zeros(1, 3, size, size, device=parameter.device))
    except _REFUSALS as error:
        return reason_of(error)[:120]
    finally:
        module.train(training)
    return None


def check_sides(name: str, module: nn.Module, sides: Iterable[int] = SCALES) -> None:
    """Do nothing where a network takes images of all these sides.

    Args:
        name: of the network.
        module: the network; see `refusal`.
        sides: in pixels.

    Raises:
        SettingsError: it cannot take a side.
    """
    reasons = {side: reason for side in sides if (reason := refusal(module, side)) is not None}
    if reasons:
        listed = ", ".join(map(str, reasons))
        raise SettingsError(
            f"{name} cannot take images of {listed} px ({next(iter(reasons.values()))}): choose a "
            "network without a fixed or larger size of input, such as resnet50"
        )


class _Shortened(TorchFunctionMode):
    """Passes over what neither counts nor changes a shape: it takes nearly half of the time."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and func in (F.batch_norm, F.relu):
            return args[0]
        return func(*args, **(kwargs or {}))


def receptive_field(modules: Iterable[nn.Module]) -> int:
    """Return the side in pixels of what one output location of chained modules sees.

    Each convolution widens the field by (kernel - 1) times the strides before it. Modules are
    taken to run one after the other; parallel 1 x 1 paths (shortcuts, squeeze-and-excitation)
    change nothing.
    """
    field, jump = 1, 1
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                field += (layer.kernel_size[0] - 1) * layer.dilation[0] * jump
                jump *= layer.stride[0]
    return field


def anchornet_receptive_fields(net: AnchorNet) -> tuple[int, ...]:
    """Return the receptive field of each branch in pixels.

    Example:
        >>> anchornet_receptive_fields(AnchorNet(classes=10))
        (63, 95, 111)
    """
    return tuple(
        receptive_field([net.stem, net.head, branch.get_submodule("localization")])
        for branch in net.branches
    )


@dataclass(frozen=True)
class Cell:
    """One figure of the column.

    Attributes:
        network: its name.
        scale: "224", "63", "95", "111", or "all" for the overall figure.
        gmacs: per image, computed.
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
        """Return the cell for JSON, with its deviation."""
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
