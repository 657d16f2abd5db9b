"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from anchorpatch.errors import SettingsError
from anchorpatch.models.anchornet import AnchorNet

__all__ = ["NETWORKS", "Network", "build"]


@dataclass(frozen=True)
class Network:
    """A network that can be built by name.

    Attributes:
        build: takes the number of classes.
        about: one line for people.
    """

    build: Callable[[int], nn.Module]
    about: str


NETWORKS: dict[str, Network] = {
    "anchornet": Network(AnchorNet, "the localiser: three branches with attention (Tables 1, 2)"),
}


def build(name: str, classes: int = 1000) -> nn.Module:
    """Build a network by its name.

    Raises:
        SettingsError: no network has that name.
    """
    try:
        return NETWORKS[name].build(classes)
    except KeyError:
        known = ", ".join(NETWORKS)
        raise SettingsError(f"no network is named {name!r}; known are: {known}") from None
