from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from anchorpatch.errors import SettingsError
from anchorpatch.models.complexity import macs, parameters
from anchorpatch.models.saccader import GLIMPSES, Saccader, saccader
from tests.models.random_norms import randomize_norms


@pytest.fixture(scope="module")
def net() -> Saccader:
    torch.manual_seed(0)
    net = Saccader(5, width=4)
    randomize_norms(net)
    nn.init.normal_(net.bagnet.classifier.weight)
    nn.init.normal_(net.cell.location.weight, 0, 2)
    nn.init.normal_(net.mix.weight, 0, 0.005)  # the softmax over channels is not a maximum
    return net.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 101, 109, generator=torch.Generator().manual_seed(1))


def test_parameters_and_macs() -> None:
    with torch.device("meta"):
        net = saccader()
    assert parameters(net) == 35_523_112
    assert parameters(net.bagnet) == 20_573_736
    assert round(macs(net) / 1e9, 2) == 19.50
    assert (net.theta, net.stride, GLIMPSES) == (77, 8, 6)


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def plain_cell(features: list[list[float]], weight: list[float], visited: list[int]) -> list[float]:
    """Logits of the places, from the definition; ``features`` is by place, then channel."""
    channels = len(weight)
    scores = [
        sum(w * f for w, f in zip(weight, feature, strict=True)) / math.sqrt(channels) - 1e5 * seen
        for feature, seen in zip(features, visited, strict=True)
    ]
    location = softmax(scores)
    mean = [
        sum(w * feature[d] for w, feature in zip(location, features, strict=True))
        for d in range(channels)
    ]
    channel = softmax(mean)
    return [
        sum(c * f for c, f in zip(channel, feature, strict=True)) - 1e5 * seen
        for feature, seen in zip(features, visited, strict=True)
    ]


def test_the_cell_is_what_its_definition_says(net: Saccader, images: torch.Tensor) -> None:
    count = 7
    with torch.no_grad():
        found = net.look(net.maps(images), count)
        maps = net.maps(images)
        followed = net.follow(maps, found.places)
        features = net.bagnet.features(images)
        wide = net.bagnet.wide_features(images)
        mixed = net.mix(torch.cat((features, net.attention(wide)), 1)).flatten(2)
        logit_map = net.bagnet.logit_map(images).flatten(2)
    weight = net.cell.location.weight.flatten().tolist()
    assert len(set(map(tuple, found.places.tolist()))) > 1
    for n in range(len(images)):
        by_place = mixed[n].T.tolist()
        visited = [0] * len(by_place)
        for g in range(count):
            logits = plain_cell(by_place, weight, visited)
            place = logits.index(max(logits))
            assert found.places[n, g] == place
            # float32 holds a visited place's -1e5 to 0.01
            torch.testing.assert_close(followed[n, g], torch.tensor(logits), rtol=1e-6, atol=1e-4)
            expected = math.log(softmax(logits)[place])
            assert found.log_prob[n, g].item() == pytest.approx(expected, abs=1e-4)
            torch.testing.assert_close(found.logits[n, g], logit_map[n, :, place])
            visited[place] = 1


def test_forward_is_the_mean_over_six_glimpses(net: Saccader, images: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(net(images), net.look(net.maps(images), 6).logits.mean(1))
        for height in (85, 77):  # maps of 2 x 3 places and 1 x 3
            few = images[..., :height, :93]
            torch.testing.assert_close(net(few), net.bagnet(few), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sample", [False, True])
def test_no_place_is_visited_twice(net: Saccader, images: torch.Tensor, sample: bool) -> None:
    with torch.no_grad():
        maps = net.maps(images)
        size = maps.mixed.shape[-1]
        assert (size, maps.width) == (4 * 5, 5)
        places = net.look(maps, size, sample=sample).places
    assert all(sorted(row) == list(range(size)) for row in places.tolist())


def test_equal_places_are_visited_in_their_order(net: Saccader) -> None:
    even = torch.zeros(1, 3, 101, 109)
    with torch.no_grad():
        maps = net.maps(even)
        flat = maps._replace(mixed=maps.mixed[..., :1].expand_as(maps.mixed).contiguous())
        assert net.look(flat, 5).places.tolist() == [[0, 1, 2, 3, 4]]


def test_samples_are_drawn_with_their_probabilities(net: Saccader, images: torch.Tensor) -> None:
    many = 6000
    with torch.no_grad():
        maps = net.maps(images[:1, :, :85, :93])
        repeated = maps._replace(
            mixed=maps.mixed.expand(many, -1, -1), logits=maps.logits.expand(many, -1, -1)
        )
        seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
        drawn, again = (net.look(repeated, 2, sample=True, generator=g) for g in seeded)
        expected = net.follow(maps, drawn.places[:1])[0, 0].softmax(-1)
    assert torch.equal(drawn.places, again.places)
    shares = torch.bincount(drawn.places[:, 0], minlength=6) / many
    assert (shares - expected).abs().max() < 4 * math.sqrt(0.25 / many)
    assert expected.max() < 0.9
    probs = drawn.log_prob[:, 0].exp()
    torch.testing.assert_close(probs, expected[drawn.places[:, 0]])


def test_gradients_reach_every_part(net: Saccader, images: torch.Tensor) -> None:
    found = net.look(net.maps(images), 3, sample=True)
    net.zero_grad()
    found.log_prob.sum().backward(retain_graph=True)
    ours = [*net.attention.parameters(), *net.mix.parameters(), *net.cell.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours)
    assert any(p.grad.abs().sum() > 0 for p in net.cell.parameters())
    assert all(p.grad is None for p in net.bagnet.parameters())
    found.logits.sum().backward()
    assert all(p.grad is not None for p in net.bagnet.parameters())


def test_wrong_numbers(net: Saccader, images: torch.Tensor) -> None:
    with pytest.raises(SettingsError, match="expected 1 to 20 glimpses, got 21"):
        net.look(net.maps(images), 21)
    with pytest.raises(SettingsError, match="at least one glimpse"):
        Saccader(2, width=4, glimpses=0)
