from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from anchorpatch.errors import SettingsError
from anchorpatch.jobs.figures.gradcam import GradCam, last_feature_map


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
    assert last_feature_map(module) == layer
    assert module.training
    assert not any(m._forward_hooks for m in module.modules())


def test_a_network_without_maps_is_refused():
    with pytest.raises(SettingsError, match="no feature map"):
        last_feature_map(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)), side=8)


def test_heat_is_the_gradient_by_hand_of_each_image_alone():
    net = Small().eval()
    images = torch.randn(3, 3, 224, 224, generator=torch.manual_seed(1))
    found = GradCam(net)(images)
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
    expected = GradCam(net)(images)
    cam = GradCam(net.requires_grad_(False))
    with torch.no_grad():
        assert cam(images).equal(expected)
