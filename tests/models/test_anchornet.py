from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models._utils import _make_divisible
from torchvision.ops import SqueezeExcitation

from anchorpatch.errors import SettingsError
from anchorpatch.lsp import grid_size
from anchorpatch.models.anchornet import BRANCHES, HEAD, AnchorNet, spatial_attention
from anchorpatch.models.complexity import anchornet_receptive_fields, macs, parameters
from anchorpatch.models.registry import build
from anchorpatch.settings import SCALES
from tests.conftest import draw_photo
from tests.models.random_norms import randomize_norms


@pytest.fixture(scope="module")
def net() -> AnchorNet:
    """1,000 classes, with the statistics and offsets of a network that has seen training."""
    torch.manual_seed(0)
    net = AnchorNet(1000)
    randomize_norms(net)
    for branch in net.branches:
        nn.init.normal_(branch.classifier.weight, 0, 0.1)
        nn.init.normal_(branch.classifier.bias, 0, 0.1)
    return net.eval()


def test_parameters_and_macs_are_the_papers(net: AnchorNet) -> None:
    heads = sum(parameters(branch.attention_classifier) for branch in net.branches)
    assert parameters(net) == 1_550_313
    assert parameters(net) - heads == 1_259_313
    assert round(macs(net, forward=net.full) / 1e9, 4) == 0.4853
    assert round(macs(net, forward=net.localize) / 1e9, 4) == 0.3939
    assert anchornet_receptive_fields(net) == SCALES


def test_squeeze_and_excitation_of_expanded_features_would_be_too_large(net: AnchorNet) -> None:
    def expanded(n: int) -> int:  # squeezed to a multiple of 8, as in MobileNetV3
        return parameters(SqueezeExcitation(n, _make_divisible(n / 4, 8)))

    def projected(n: int) -> int:
        return parameters(SqueezeExcitation(n, n // 4))

    rows = [*HEAD, *(row for branch in BRANCHES.values() for row in branch)]
    more = sum(expanded(row.expand) - projected(row.out) for row in rows if row.se)
    assert parameters(net) + more == 2_529_443


def test_maps_are_those_of_table_2(net: AnchorNet) -> None:
    with torch.no_grad():
        shapes = [tuple(f.shape) for f in net.full(torch.zeros(1, 3, 224, 224))]
        wide = [tuple(f.shape[2:]) for f in net.full(torch.zeros(1, 3, 150, 311))]
        others = {
            side: [f.shape[2:] for f in net.full(torch.zeros(1, 3, side, side))]
            for side in (111, 225, 256, 320)
        }
    assert shapes == [(1, 1000, 21, 21), (1, 1000, 17, 17), (1, 1000, 15, 15)]
    assert wide == [(11, 32), (7, 28), (5, 26)]
    for side, maps in others.items():
        assert maps == [grid_size(side, side, theta) for theta in SCALES]


@pytest.mark.parametrize("fused", [False, True])
def test_fast_forward_equals_the_full_one(net: AnchorNet, fused: bool) -> None:
    images = torch.randn(3, 3, 224, 224)
    gamma = torch.tensor([3, 999, 0])
    with torch.no_grad():
        full = net.full(images)
        fast = net
        if fused:
            fast = AnchorNet(1000)
            fast.load_state_dict(net.state_dict())
            fast.fuse()
            assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
        logits, features = fast.localize(images)
        heatmaps = fast.heatmaps(features, gamma)
    for j, f in enumerate(full):
        scale = f.mean((2, 3)).abs().max()
        torch.testing.assert_close(
            logits[:, j], f.mean((2, 3)), rtol=1e-5, atol=1e-5 * float(scale)
        )
        expected = f[torch.arange(3), gamma]
        scale = expected.abs().max()
        torch.testing.assert_close(heatmaps[j], expected, rtol=1e-5, atol=1e-5 * float(scale))


def test_training_forward_gives_the_localizing_logits(net: AnchorNet) -> None:
    images = torch.randn(2, 3, 127, 140)
    with torch.no_grad():
        logits = net(images)
        torch.testing.assert_close(logits.localization, net.localize(images)[0])
    assert logits.attention.shape == (2, 3, 1000)


class FixedGates(nn.Module):
    """Multiplies channels by numbers that do not depend on the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gates = torch.linspace(0.5, 1, channels).view(-1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gates


@pytest.mark.parametrize("size", [111, 224, 225])
def test_a_location_sees_exactly_its_patch(net: AnchorNet, size: int) -> None:
    """Pixels outside [8h, 8h + theta) do not matter, those at its four edges do."""
    held = AnchorNet(10).double()
    for module in held.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, SqueezeExcitation):
                setattr(module, name, FixedGates(child.fc2.out_channels))
    held.eval()
    images = torch.randn(1, 3, size, size, dtype=torch.double)

    def local(image: torch.Tensor, j: int) -> torch.Tensor:
        return held.branches[j].localization(held.head(held.stem(image)))

    with torch.no_grad():
        for j, theta in enumerate(SCALES):
            before = local(images, j)
            side = before.shape[-1]
            for h, w in ((0, 0), (side - 1, side - 1), (side // 5, side // 2)):
                y, x = 8 * h, 8 * w
                outside = images.clone().normal_()
                outside[..., y : y + theta, x : x + theta] = images[
                    ..., y : y + theta, x : x + theta
                ]
                assert torch.equal(local(outside, j)[..., h, w], before[..., h, w])
                for row, column in (
                    (y, x + theta // 2),
                    (y + theta - 1, x + theta // 2),
                    (y + theta // 2, x),
                    (y + theta // 2, x + theta - 1),
                ):
                    inside = images.clone()
                    inside[..., row, column] += 10
                    assert not torch.equal(local(inside, j)[..., h, w], before[..., h, w])


def test_spatial_attention_equals_the_equations() -> None:
    x, gate = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 1, 3, 4).double()
    found = spatial_attention(x, gate)
    for n in range(2):
        g = gate[n, 0].exp() / gate[n, 0].exp().sum()  # (1)
        c = torch.stack([(x[n, i] * g).sum() for i in range(5)])  # (2)
        c = c.exp() / c.exp().sum()  # (3)
        s = sum(x[n, i] * c[i] for i in range(5))  # (4)
        torch.testing.assert_close(found[n, 0], s.exp() / s.exp().sum())  # (5)


@pytest.mark.parametrize("seed", [0, 1])
def test_rounding_does_not_decide_the_first_step(seed: int) -> None:
    # It does where a softmax starts out saturated: the cosine was 0.29 for the first seed.
    torch.manual_seed(seed)
    net = AnchorNet(10)
    photos = [np.asarray(draw_photo(100 * seed + i, (128, 128))) for i in range(16)]
    images = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2) / 128 - 1
    labels = (torch.arange(16) % 10).repeat_interleave(6)
    gradients = []
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = torch.cat(net(images), 1)
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad()
    assert torch.cosine_similarity(*gradients, dim=0) > 0.85


def test_ablations_change_what_they_name() -> None:
    assert parameters(AnchorNet(1000, se=False)) < parameters(AnchorNet(1000))
    printed = AnchorNet(7, weighted_mean=False)
    ours = AnchorNet(7)
    ours.load_state_dict(printed.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        shrunk, full = printed.eval().full(images), ours.eval().full(images)
    for a, b, side in zip(shrunk, full, (21, 17, 15), strict=True):
        torch.testing.assert_close(a * side * side, b)


def test_unknown_networks_are_named_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="'anchornett': did you mean 'anchornet'"):
        build("anchornett")
    with pytest.raises(SettingsError, match="at least one class"):
        AnchorNet(0)
