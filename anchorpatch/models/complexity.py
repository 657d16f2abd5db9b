"""What a network costs and sees: parameters, MACs, receptive fields, all computed from it.

And the cost of Table 3 (section 4.3), computed from the networks, beside what the paper prints. A
network costs its MACs at the patch's side times the mean patches per image; the overall figure
weights the scales by their images. AnchorNet's own cost is no part of the column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from anchorpatch.errors import SettingsError, reason_of
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.bagnet import BagNet
from anchorpatch.models.registry import build, build_on_meta, is_own
from anchorpatch.models.saccader import Saccader
from anchorpatch.settings import CROP, SCALES

#: Mean patches per image, by scale (section 4.3).
MEAN_PATCHES: Final = {63: 5.6, 95: 2.9, 111: 2.1}

#: Images of ImageNet's validation set that each branch localizes (section 4.3).
IMAGES: Final = {63: 15050, 95: 18047, 111: 16903}

#: Printed GMACs ("FLOPs (G)") by network: at 224 px, by scale, and overall.
PRINTED: Final[Mapping[str, Mapping[str, float]]] = {
    "resnet50": {"224": 4.1, "63": 1.9, "95": 2.2, "111": 2.2, "all": 2.1},
    "resnext50": {"224": 4.3, "63": 2.0, "95": 2.3, "111": 2.4, "all": 2.2},
    "densenet169": {"224": 3.4, "63": 1.6, "95": 1.8, "111": 1.8, "all": 1.7},
    "hcgnet_c": {"224": 7.1, "63": 3.3, "95": 3.8, "111": 3.9, "all": 3.7},
}

_Forward: TypeAlias = Callable[[torch.Tensor], Any]

#: A number of outputs that no network has unless it is asked for.
_SOME_CLASSES: Final = 7

#: What networks raise when an image has a side that they cannot take.
_REFUSALS = (AssertionError, RuntimeError, ValueError)


def parameters(module: nn.Module) -> int:
    """Return the number of parameters.

    Example:
        >>> parameters(AnchorNet(classes=1000))
        1550313
    """
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, size: int = CROP, forward: _Forward | None = None) -> int:
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
    try:
        _outputs(module, size)
    except _REFUSALS as error:
        return reason_of(error)[:120]
    return None


def _outputs(module: nn.Module, size: int) -> Any:
    """Return what a network makes of one image, on the device "meta" where it can."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shadow = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            try:
                return functional_call(module, shadow, torch.empty(1, 3, size, size, device="meta"))
            except (NotImplementedError, *_REFUSALS):
                parameter = next(module.parameters())
                return module(torch.zeros(1, 3, size, size, device=parameter.device))
    finally:
        module.train(training)


def check_sides(name: str, module: nn.Module, sides: Iterable[int] = SCALES) -> None:
    """Do nothing where a network takes images of all these sides, and returns logits of classes.

    Args:
        name: of the network.
        module: the network; see `refusal`.
        sides: in pixels.

    Raises:
        SettingsError: it cannot take a side, or it is one of the user that returns something else.
    """
    sides = tuple(sides)
    reasons = {side: reason for side in sides if (reason := refusal(module, side)) is not None}
    if reasons:
        listed = ", ".join(map(str, reasons))
        raise SettingsError(
            f"{name} cannot take images of {listed} px ({next(iter(reasons.values()))}): choose a "
            "network without a fixed or larger size of input, such as resnet50"
        )
    if is_own(name):
        logits = _outputs(build(name, _SOME_CLASSES), sides[0])
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        if found != (1, _SOME_CLASSES):
            raise SettingsError(
                f"{name}: expected a network for {_SOME_CLASSES} classes to return logits of shape "
                f"(1, {_SOME_CLASSES}) for one image, got {found}: return one output per class"
            )


class _Shortened(TorchFunctionMode):
    """Passes over what neither counts nor changes a shape: it takes nearly half of the time."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if args and func in (F.batch_norm, F.relu):
            return args[0]
        return func(*args, **(kwargs or {}))


def anchornet_receptive_fields(net: AnchorNet) -> tuple[int, ...]:
    """Return the side in pixels of what one location of each branch's map sees.

    Each convolution widens the field by (kernel - 1) times the strides before it; parallel 1 x 1
    paths (shortcuts, squeeze-and-excitation) change nothing.

    Example:
        >>> anchornet_receptive_fields(AnchorNet(classes=10))
        (63, 95, 111)
    """
    fields = []
    for branch in net.branches:
        field, jump = 1, 1
        for part in (net.stem, net.head, branch.get_submodule("localization")):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    field += (layer.kernel_size[0] - 1) * layer.dilation[0] * jump
                    jump *= layer.stride[0]
        fields.append(field)
    return tuple(fields)


def summaries(name: str, classes: int, sides: Sequence[int]) -> list[dict[str, Any]]:
    """Return what a network costs and sees, as JSON values.

    AnchorNet has two lines: as it is trained, and as it localizes. The peers of AnchorNet are
    counted with the maps that they localize by.

    Args:
        name: as `anchorpatch.models.registry.build` takes it.
        classes: number of outputs.
        sides: of a whole image first, then of patches, in pixels.
    """
    fields: list[int] | None = None
    if name == "anchornet":
        # Not on the meta device: it leaves autocast, which knows none.
        net = AnchorNet(classes)
        fields = list(anchornet_receptive_fields(net))
        heads = sum(parameters(b.get_submodule("attention_classifier")) for b in net.branches)
        lines: list[tuple[str, int, _Forward | None]] = [
            (name, parameters(net), net.full),
            (f"{name} (localizing)", parameters(net) - heads, net.localize),
        ]
        module: nn.Module = net
        counted = sides[:1]  # it takes whole images only: what it sees of them are the patches
    else:
        module, counted = build_on_meta(name, classes), sides
        forward = module.logit_map if isinstance(module, BagNet) else None
        if isinstance(module, BagNet | Saccader):
            fields = [module.theta]
        lines = [(name, parameters(module), forward)]
    rows = []
    for line, count, counted_forward in lines:
        gmacs = _gmacs(module, counted, counted_forward)
        rows.append(
            {
                "network": line,
                "parameters": count,
                "gmacs": gmacs.get(sides[0]),
                "gmacs_by_side": {str(side): gmacs.get(side) for side in sides},
                "receptive_fields": fields,
            }
        )
    return rows


def _gmacs(
    module: nn.Module, sides: Iterable[int], forward: _Forward | None = None
) -> dict[int, float]:
    """Return `macs` by side, 1e9, without the sides that the network cannot take."""
    gmacs = {}
    for side in sides:
        with suppress(*_REFUSALS):
            gmacs[side] = macs(module, side, forward) / 1e9
    return gmacs


class PrintedCost(NamedTuple):
    """One figure of Table 3's column of costs.

    Attributes:
        network: its name.
        scale: "224", "63", "95", "111", or "all" for the overall figure.
        gmacs: per image, computed.
        printed: by the paper.
        deviation: share by which the computed figure lies above the printed one.
    """

    network: str
    scale: str
    gmacs: float
    printed: float
    deviation: float


def printed_costs(network: str, gmacs: Mapping[int, float]) -> list[PrintedCost]:
    """Return a network's part of the column.

    Args:
        network: a name in `PRINTED`.
        gmacs: of one input, by its side: 63, 95, 111 and 224 px.

    Example:
        >>> costs = printed_costs("resnet50", {224: 4, 63: 0.3, 95: 0.7, 111: 1})
        >>> [round(cost.gmacs, 2) for cost in costs]
        [4, 1.68, 2.03, 2.1, 1.95]
    """
    values = {str(CROP): gmacs[CROP]}
    values |= {str(scale): gmacs[scale] * mean for scale, mean in MEAN_PATCHES.items()}
    weighted = sum(values[str(scale)] * images for scale, images in IMAGES.items())
    values["all"] = weighted / sum(IMAGES.values())
    return [
        PrintedCost(network, scale, value, printed, value / printed - 1)
        for (scale, printed), value in zip(PRINTED[network].items(), values.values(), strict=True)
    ]


def table_3_costs() -> list[PrintedCost]:
    """Return the whole column, computed from the networks."""
    return [
        cost
        for network in PRINTED
        for cost in printed_costs(network, _gmacs(build_on_meta(network), (CROP, *SCALES)))
    ]
