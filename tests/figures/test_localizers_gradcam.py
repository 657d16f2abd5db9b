from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from anchorpatch.errors import SettingsError
from anchorpatch.figures.localizers import FeatureMap, class_heatmaps, last_feature_map


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 5, stride=4)
        self.maps = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maps(self.stem(x).relu()).relu()
        return self.head(x.square().mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet18", "layer4"), ("mobilenet_v3_small", "features"), ("densenet121", "features")],
)
def test_the_last_map_with_places_is_found(name: str, layer: str):
    from anchorpatch.models.registry import build

    module = build(name, 5).train()
    assert last_feature_map(module) == FeatureMap(layer, "NCHW", (7, 7))
    assert module.training
    assert not any(m._forward_hooks for m in module.modules())


class ChannelsLast(nn.Module):
    """Gives (N, H, W, C) of a layer that no shape tells from (N, C, H, W)."""

    def __init__(self, resize: int | None = None) -> None:
        super().__init__()
        self.resize = resize
        self.stem = nn.Conv2d(3, 8, 16, stride=16)
        self.last = nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.resize:
            x = functional.interpolate(x, (self.resize, self.resize))
        return self.head(self.last(self.stem(x).relu().permute(0, 2, 3, 1)).mean((1, 2)))


class Tokens(ChannelsLast):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def test_the_layout_is_never_guessed():
    assert last_feature_map(ChannelsLast()) == FeatureMap("last", "NHWC", (14, 14))
    # Neither shows an axis that grows with the image, and (6, 14, 14) might be channels first.
    for module in (ChannelsLast(resize=224), Tokens()):
        with pytest.raises(SettingsError, match="needs a feature map that the logits"):
            last_feature_map(module)


def test_a_network_without_maps_is_refused():
    with pytest.raises(SettingsError, match="needs a feature map"):
        last_feature_map(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)), side=8)


def swin() -> nn.Module:
    size = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    return of_timm("swin_tiny_patch4_window7_224", **size)


def of_timm(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=4, **options)


def vit(**options: Any) -> nn.Module:
    size = {"embed_dim": 24, "depth": 3, "num_heads": 2}
    return of_timm("vit_tiny_patch16_224", **size, **options)


def grid(tokens: Tensor, prefix: int, side: int) -> Tensor:
    """The map of tokens, place by place."""
    rows = [[tokens[:, prefix + y * side + x] for x in range(side)] for y in range(side)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def swin_map(m: Any, x: Tensor) -> Tensor:
    return m.layers(m.patch_embed(x)).permute(0, 3, 1, 2)


def vit_map(m: Any, x: Tensor) -> Tensor:
    # The last block moves what the places know to the class token.
    return m.blocks[:-1](m.norm_pre(m._pos_embed(m.patch_embed(x))))


#: A network, its map (N, C, H, W) or tokens, how many tokens have no place, and the rest of it.
CASES: dict[str, tuple[Any, Any, int | None, Any]] = {
    "swin of timm": (
        *(swin, swin_map, None),
        lambda m, f: m.head(m.norm(f.permute(0, 2, 3, 1))),
    ),
    "swin of torchvision": (
        lambda: torchvision.models.SwinTransformer(
            *([4, 4], 24, [1, 1], [1, 1], [7, 7]), num_classes=4
        ),
        lambda m, x: m.permute(m.norm(m.features(x))),
        None,
        lambda m, f: m.head(m.flatten(m.avgpool(f))),
    ),
    "vit of timm": (vit, vit_map, 1, lambda m, f: m.forward_head(m.norm(m.blocks[-1](f)))),
    "vit with registers": (
        lambda: vit(reg_tokens=4),
        *(vit_map, 5, lambda m, f: m.forward_head(m.norm(m.blocks[-1](f)))),
    ),
    "vit of torchvision": (
        lambda: torchvision.models.VisionTransformer(224, 32, 3, 2, 24, 48, num_classes=4),
        lambda m, x: m.encoder.layers[:-1](
            torch.cat([m.class_token.expand(len(x), -1, -1), m._process_input(x)], 1)
            + m.encoder.pos_embedding
        ),
        1,
        lambda m, f: m.heads(m.encoder.ln(m.encoder.layers[-1](f))[:, 0]),
    ),
    "mixer": (
        lambda: pytest.importorskip("timm").models.mlp_mixer.MlpMixer(
            num_classes=4, patch_size=32, num_blocks=2, embed_dim=24
        ),
        lambda m, x: m.blocks(m.stem(x)),
        0,
        lambda m, f: m.head(m.norm(f).mean(1)),
    ),
    "convnext": (
        lambda: of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        lambda m, x: m.stages(m.stem(x)),
        None,
        lambda m, f: m.head(f),
    ),
    "maxvit": (
        lambda: torchvision.models.MaxVit(
            *((224, 224), 8, 7, [8, 16], [1, 1], 4, 0.0), num_classes=4
        ),
        lambda m, x: m.blocks[1](m.blocks[0](m.stem(x))),
        None,
        lambda m, f: m.classifier(f),
    ),
    "resnet": (
        lambda: of_timm("resnet10t"),
        lambda m, x: m.forward_features(x),
        None,
        lambda m, f: m.forward_head(f),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_heat_is_that_of_the_true_layout(name: str):
    torch.manual_seed(0)
    build, features, prefix, rest = CASES[name]
    net = build().eval()
    for layer in net.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == 4:
            nn.init.normal_(layer.weight)  # some begin with a head of zeros
    images = torch.randn(2, 3, 224, 224)
    found = class_heatmaps(net, last_feature_map(net), images)
    given = features(net, images).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(rest(net, given).amax(1).sum(), given)
    values = given.detach()
    if prefix is not None:
        side = round((values.shape[1] - prefix) ** 0.5)
        values, gradient = (grid(tensor, prefix, side) for tensor in (values, gradient))
    heat = (values * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True)
    expected = functional.interpolate(heat, (224, 224), mode="bilinear", align_corners=False)[:, 0]
    assert expected.std() > 0
    assert torch.allclose(found, expected, atol=float(expected.abs().max()) * 1e-4)


def test_heat_is_the_gradient_by_hand_of_each_image_alone():
    net = Small().eval()
    images = torch.randn(3, 3, 224, 224, generator=torch.manual_seed(1))
    found = class_heatmaps(net, last_feature_map(net), images)
    assert found.shape == (3, 224, 224)
    for i in range(3):
        maps = net.maps(net.stem(images[i : i + 1]).relu())
        activation = maps.detach().relu()
        logits = net.head(activation.square().mean((2, 3)))
        best = int(logits.argmax())
        # d logit / d map = weight * 2 map / places where the rectifier is open, else 0
        places = activation[0, 0].numel()
        gradient = net.head.weight[best][:, None, None] * 2 * activation[0] / places
        weights = gradient.mean((1, 2))
        heat = (weights[:, None, None] * maps[0]).sum(0)
        expected = functional.interpolate(
            heat[None, None], (224, 224), mode="bilinear", align_corners=False
        )
        assert torch.allclose(found[i], expected[0, 0].detach(), atol=1e-7, rtol=1e-4)


def test_it_works_where_no_parameter_asks_for_gradients_and_within_inference():
    net = Small().eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.manual_seed(2))
    expected = class_heatmaps(net, last_feature_map(net), images)
    features = last_feature_map(net.requires_grad_(False))
    with torch.no_grad():
        assert class_heatmaps(net, features, images).equal(expected)
