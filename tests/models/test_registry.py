from __future__ import annotations

import sys

import pytest
import torch

from anchorpatch.errors import MissingDependency, SettingsError
from anchorpatch.models.complexity import macs, parameters
from anchorpatch.models.registry import (
    NETWORKS,
    build,
    build_on_meta,
    check_name,
    torchvision_names,
)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet50", 25_557_032),
        ("resnext50", 25_028_904),
        ("densenet169", 14_149_480),
        ("squeezenet1_1", 1_235_496),
    ],
)
def test_networks_of_torchvision(name: str, count: int) -> None:
    net = build_on_meta(name)
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert parameters(net) == count


def test_every_name_of_torchvision_is_known() -> None:
    assert len(torchvision_names()) >= 80
    for name in (*NETWORKS, *torchvision_names()):
        check_name(name)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_further_outputs_in_training_have_one(name: str) -> None:
    with torch.device("meta"):
        net = build(name, 7).train()
        assert net(torch.zeros(2, 3, 111, 111)).shape == (2, 7)
    assert net.transform_input


@pytest.mark.parametrize("name", ["resnet18", "hcgnet_b", "regnet_x_400mf", "swin_t"])
def test_meta_counts_what_the_real_network_counts(name: str) -> None:
    assert macs(build_on_meta(name, 10), 63) == macs(build(name, 10), 63)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "'resnet5O': did you mean 'resnet50'? "),
        ("hcgnet-b", "did you mean 'hcgnet_b'? "),
        ("no such thing", "'no such thing': `anchorpatch models` lists"),
        ("", "network ''"),
    ],
)
def test_mistyped_names(name: str, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        build(name)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_timm() -> None:
    pytest.importorskip("timm")
    net = build("timm:resnet10t", 5).eval()
    assert net(torch.zeros(1, 3, 63, 63)).shape == (1, 5)
    with pytest.raises(SettingsError, match=r"did you mean 'timm:resnet"):
        build("timm:resnett10t")


def test_timm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match=r"run pip install 'anchorpatch\[timm\]'"):
        build("timm:resnet18")
