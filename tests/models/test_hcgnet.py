from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from anchorpatch.errors import SettingsError
from anchorpatch.models.complexity import macs, parameters
from anchorpatch.models.hcgnet import Cell, HCGNet, Transition, hcgnet_b, hcgnet_c

BLOCKS = {
    "b": ((32, 48, 64, 96), (3, 6, 12, 8)),
    "c": ((48, 56, 72, 112), (6, 12, 18, 14)),
}


def gated_parameters(k: int, ratio: int) -> int:
    hidden = 2 * k // ratio
    depthwise = 2 * (2 * k + 9 * k)
    contexts = 3 * (k + 1)
    update = (2 * k + 1) * hidden + 2 * hidden + 2 * (hidden + 1) * k
    forget = (k + 1) * (k // ratio) + 2 * (k // ratio) + (k // ratio + 1) * k
    return depthwise + contexts + update + forget


def cell_parameters(c: int, k: int) -> int:
    squeeze = 2 * c + 4 * k * c + 2 * 4 * k + 9 * (4 * k // 4) * k
    return squeeze + gated_parameters(k, 2)


def transition_parameters(c: int) -> int:
    out = c // 2
    between = c - (c - out) // 2
    squeeze = 2 * c + c * between + 2 * between + 9 * between * out
    return squeeze + gated_parameters(out, 4)


def network_parameters(growth: Sequence[int], cells: Sequence[int], classes: int) -> int:
    """The sum by hand, layer by layer."""
    total = 9 * (3 * 32 + 32 * 32 + 32 * 64) + 2 * (32 + 32 + 64)
    c = 64
    for block, (k, count) in enumerate(zip(growth, cells, strict=True)):
        if block:
            total += transition_parameters(c)
            c //= 2
        for _ in range(count):
            total += cell_parameters(c, k)
            c += k
    return total + 2 * c + (c + 1) * classes


# Those of the authors' own definition of the networks.
@pytest.mark.parametrize(
    ("name", "count", "gmacs"),
    [
        ("b", 12_845_501, {224: 2.003, 63: 0.166, 95: 0.370, 111: 0.526}),
        ("c", 42_153_208, {224: 6.972, 111: 1.829}),
    ],
)
def test_parameters_and_macs(name: str, count: int, gmacs: dict[int, float]) -> None:
    with torch.device("meta"):
        net = {"b": hcgnet_b, "c": hcgnet_c}[name]()
    assert parameters(net) == count == network_parameters(*BLOCKS[name], 1000)
    assert {size: round(macs(net, size) / 1e9, 3) for size in gmacs} == gmacs


def test_maps_halve_between_blocks() -> None:
    with torch.device("meta"):
        net = hcgnet_b().eval()
        x = net.stem(torch.zeros(2, 3, 224, 224))
        sides = []
        for stage in net.stages:
            x = stage(x)
            if not isinstance(stage, Transition):
                sides.append(x.shape[-1])
    assert sides == [56, 28, 14, 7]
    assert x.shape[1] == net.classifier.in_features == 476 + 8 * 96


def plain_cell(cell: Cell, x: torch.Tensor) -> torch.Tensor:
    """The cell of one image position by position, from the definition."""

    def conv(block: nn.Sequential, y: torch.Tensor) -> torch.Tensor:
        norm, _, conv = block
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        y = (y - norm.running_mean[:, None, None]) * scale[:, None, None]
        y = (y + norm.bias[:, None, None]).clamp(min=0)
        return nn.functional.conv2d(
            y[None], conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
        )[0]

    def context(part: nn.Module, y: torch.Tensor) -> torch.Tensor:
        w = part.attention.weight[0, :, 0, 0]
        logits = {
            (i, j): float(w @ y[:, i, j] + part.attention.bias[0])
            for i in range(y.shape[1])
            for j in range(y.shape[2])
        }
        top = sum(torch.tensor(v).exp() for v in logits.values())
        return sum(torch.tensor(v).exp() / top * y[:, i, j] for (i, j), v in logits.items())

    def norm1d(norm: nn.BatchNorm1d, v: torch.Tensor) -> torch.Tensor:
        return (v - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + (
            norm.bias
        )

    gated = cell.gated
    u = conv(cell.squeeze[1], conv(cell.squeeze[0], x))
    a, b = conv(gated.near, u), conv(gated.far, u)
    ctx_a, ctx_b = (context(c, m) for c, m in zip(gated.update.contexts, (a, b), strict=True))
    fc, norm, _ = gated.update.squeeze
    g = norm1d(norm, fc(torch.cat((ctx_a, ctx_b)))).tanh()
    e_a, e_b = (head(g).exp() for head in gated.update.logits)
    new = e_a / (e_a + e_b) * ctx_a + e_b / (e_a + e_b) * ctx_b
    fc1, norm, _, fc2, _ = gated.forget.gate
    f = torch.sigmoid(fc2(norm1d(norm, fc1(context(gated.forget.context, u))).tanh()))
    return torch.cat((x, u * f[:, None, None] + new[:, None, None]))


def test_a_cell_is_what_its_definition_says() -> None:
    torch.manual_seed(0)
    cell = Cell(6, 8).double()
    for module in cell.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            cell.eval()(x), torch.stack([plain_cell(cell, image) for image in x])
        )


def test_training_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    net = HCGNet((8, 8), (1, 2), classes=2)
    images, labels = torch.randn(8, 3, 63, 63), torch.arange(8) % 2
    images[labels == 1] += 0.5
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert losses[-1] < losses[0]


def test_a_lone_image_can_be_trained_on() -> None:
    torch.manual_seed(0)
    net = HCGNet((8, 8), (1, 1), classes=2)
    net(torch.randn(4, 3, 63, 63))
    vectors = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    before = [m.running_mean.clone() for m in vectors]
    net(torch.randn(1, 3, 63, 63)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(m.running_mean.equal(b) for m, b in zip(vectors, before, strict=True))


@pytest.mark.parametrize(
    ("growth", "cells", "classes"),
    [((8,), (1, 1), 2), ((), (), 2), ((8,), (0,), 2), ((6,), (1,), 2), ((8,), (1,), 0)],
)
def test_numbers_that_give_no_network(growth: tuple[int], cells: tuple[int], classes: int) -> None:
    with pytest.raises(SettingsError, match="HCGNet"):
        HCGNet(growth, cells, classes)
