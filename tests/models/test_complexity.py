from __future__ import annotations

import re
import types

import pytest
from torch import Tensor, nn

from anchorpatch.errors import SettingsError
from anchorpatch.models.complexity import check_sides
from anchorpatch.models.registry import build, build_on_meta

SMALL = "shufflenet_v2_x0_5"


def test_sides_that_networks_cannot_take() -> None:
    check_sides(SMALL, build(SMALL, 3))
    with pytest.raises(SettingsError, match=r"vit_b_32 cannot take images of 63, 95, 111 px \(Wr"):
        check_sides("vit_b_32", build_on_meta("vit_b_32", 3))
    inception = build_on_meta("inception_v3", 3).train()
    check_sides("inception_v3", inception, (95, 111))
    with pytest.raises(SettingsError, match=r"inception_v3 cannot take images of 63 px"):
        check_sides("inception_v3", inception)
    assert inception.training


@pytest.mark.parametrize("name", ["bagnet77", "saccader"])
def test_peers_that_see_more_than_a_small_patch(name: str) -> None:
    message = (
        f"{name} cannot take images of 63 px (an image of 63 x 63 px is smaller than a patch of "
        "77 x 77 px): choose a network"
    )
    with pytest.raises(SettingsError, match=re.escape(message)):
        check_sides(name, build_on_meta(name, 3))
    check_sides("bagnet33", build_on_meta("bagnet33", 3))


def test_trying_sides_changes_nothing_and_needs_no_meta_device() -> None:
    net = build(SMALL, 3).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    check_sides(SMALL, net)
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())
    assert net.training

    def stubborn(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * float(x.mean())  # a number that the meta device has not

    net = nn.Conv2d(3, 3, 1)
    net.forward = types.MethodType(stubborn, net)
    check_sides("stubborn", net)
