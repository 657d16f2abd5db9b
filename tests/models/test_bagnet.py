from __future__ import annotations

import pytest
import torch
from torch import nn

from anchorpatch.errors import SettingsError
from anchorpatch.lsp import grid_size
from anchorpatch.models.bagnet import BagNet, bagnet33, bagnet77
from anchorpatch.models.complexity import macs, parameters, refusal
from anchorpatch.settings import STRIDE
from tests.models.random_norms import randomize_norms

BUILDERS = {33: bagnet33, 77: bagnet77}


@pytest.fixture(scope="module", params=[33, 77])
def narrow(request: pytest.FixtureRequest) -> BagNet:
    torch.manual_seed(0)
    net = BagNet(request.param, 5, width=8).double()
    randomize_norms(net)
    nn.init.normal_(net.classifier.weight)
    nn.init.normal_(net.classifier.bias)
    return net.eval()


@pytest.mark.parametrize(
    ("theta", "count", "gmacs", "mean_gmacs", "channels", "side"),
    [(33, 18_310_184, 17.18, 16.00, 2048, 24), (77, 20_573_736, 14.11, 13.92, 512, 19)],
)
def test_parameters_macs_and_maps(
    theta: int, count: int, gmacs: float, mean_gmacs: float, channels: int, side: int
) -> None:
    with torch.device("meta"):
        net = BUILDERS[theta]()
        images = torch.zeros(2, 3, 224, 224)
        assert net.features(images).shape == (2, channels, side, side)
        assert net.logit_map(images).shape == (2, 1000, side, side)
        assert net(images).shape == (2, 1000)
    assert (net.theta, net.stride, net.channels) == (theta, STRIDE, channels)
    assert parameters(net) == count
    assert round(macs(net, forward=net.logit_map) / 1e9, 2) == gmacs
    assert round(macs(net) / 1e9, 2) == mean_gmacs


def test_only_the_classifier_has_a_bias() -> None:
    with torch.device("meta"):
        for build in BUILDERS.values():
            net = build()
            convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
            assert convs == [net.classifier]


@pytest.mark.parametrize("theta", [33, 77])
@pytest.mark.parametrize("size", [(77, 77), (84, 85), (112, 96), (224, 131)])
def test_maps_have_the_places_of_the_grid(theta: int, size: tuple[int, int]) -> None:
    with torch.device("meta"):
        net = BagNet(theta, 5, width=4).eval()
        assert net.logit_map(torch.zeros(1, 3, *size)).shape[2:] == grid_size(*size, theta)


@pytest.mark.parametrize("theta", [33, 77])
def test_the_smallest_image_is_one_patch(theta: int) -> None:
    with torch.device("meta"):
        net = BagNet(theta, 5, width=4)
    assert refusal(net, theta) is None
    small = theta - 1
    expected = f"{small} x {small} px is smaller than a patch of {theta} x {theta} px"
    assert refusal(net, small) == f"an image of {expected}"


def test_a_location_sees_exactly_its_patch(narrow: BagNet) -> None:
    """Pixels outside [8h, 8h + theta) do not matter, those at its four edges do."""
    images, theta = torch.randn(1, 3, 131, 140, dtype=torch.double), narrow.theta
    with torch.no_grad():
        before = narrow.logit_map(images)
        rows, columns = before.shape[2:]
        for h, w in ((0, 0), (rows - 1, columns - 1), (2, columns // 2)):
            y, x = 8 * h, 8 * w
            outside = images.clone().normal_()
            outside[..., y : y + theta, x : x + theta] = images[..., y : y + theta, x : x + theta]
            found = narrow.logit_map(outside)
            assert torch.equal(found[..., h, w], before[..., h, w])
            assert not torch.equal(found, before)
            for row, column in (
                (y, x + theta // 2),
                (y + theta - 1, x + theta // 2),
                (y + theta // 2, x),
                (y + theta // 2, x + theta - 1),
            ):
                inside = images.clone()
                inside[..., row, column] += 10
                assert not torch.equal(narrow.logit_map(inside)[..., h, w], before[..., h, w])


def test_the_map_of_a_patch_alone_is_that_of_its_location(narrow: BagNet) -> None:
    images, theta = torch.randn(1, 3, 101, 93, dtype=torch.double), narrow.theta
    with torch.no_grad():
        whole = narrow.logit_map(images)
        patch = narrow.logit_map(images[..., 24 : 24 + theta, 8 : 8 + theta])
    torch.testing.assert_close(patch[..., 0, 0], whole[..., 3, 1])


def test_forward_is_the_mean_of_the_map(narrow: BagNet) -> None:
    images = torch.randn(3, 3, 90, 117, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(narrow(images), narrow.logit_map(images).mean((2, 3)))


def test_shortcuts_keep_the_center() -> None:
    """With silent layers, a bottleneck passes on what lies at the center of its kernel."""
    net = BagNet(77, 2, width=4).eval()
    same = net.groups[0][1]
    nn.init.zeros_(same.layers[-1][1].weight)
    x = torch.rand(1, 16, 9, 8)
    with torch.no_grad():
        assert torch.equal(same(x), x[..., 1:-1, 1:-1])
        strided = net.groups[0][0]
        nn.init.zeros_(strided.layers[-1][1].weight)
        x = torch.rand(1, 4, 9, 8)
        expected = strided.shortcut[1](
            nn.functional.conv2d(x, strided.shortcut[0].weight)[..., 1:8:2, 1:7:2]
        ).relu()
        torch.testing.assert_close(strided(x), expected)


def test_training_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    net = BagNet(77, 2, width=4)
    images, labels = torch.randn(8, 3, 85, 85), torch.arange(8) % 2
    images[labels == 1] += 0.5
    optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("theta", "classes", "width"), [(9, 2, 4), (33, 0, 4), (77, 2, 0)])
def test_numbers_that_give_no_network(theta: int, classes: int, width: int) -> None:
    with pytest.raises(SettingsError, match="BagNet"):
        BagNet(theta, classes, width=width)
