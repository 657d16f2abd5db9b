from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from anchorpatch.errors import NonFiniteError
from anchorpatch.metrics import (
    OUTPUTS,
    Accuracy,
    AnchorNetAccuracy,
    Figures,
    places,
    six_distances,
    six_losses,
)
from anchorpatch.models.anchornet import Logits


def draw(seed: int, n: int, classes: int) -> tuple[Logits, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, 3, classes, generator=generator) * 2 for _ in range(2))
    return Logits(a, b), torch.randint(classes, (n,), generator=generator)


def oracle(logits: Logits, labels: torch.Tensor) -> dict[str, list[float]]:
    """The figures in plain Python, image by image."""
    n = len(labels)
    losses, top1, top5 = [0.0] * 6, [0.0] * 6, [0.0] * 6
    decided = [0.0, 0.0]
    for i in range(n):
        y = int(labels[i])
        rows = [*logits.localization[i].tolist(), *logits.attention[i].tolist()]
        for o, row in enumerate(rows):
            losses[o] += (math.log(sum(math.exp(v) for v in row)) - row[y]) / n
            ranking = sorted(range(len(row)), key=lambda c, row=row: -row[c])
            top1[o] += (ranking[0] == y) / n
            top5[o] += (y in ranking[:5]) / n
        soft = [[math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in rows[:3]]
        voted = [p.index(max(p)) for p in soft]
        majority = [c for c in voted if voted.count(c) >= 2]
        gamma = majority[0] if majority else max(zip(map(max, soft), voted, strict=True))[1]
        mean = [sum(p[c] for p in soft) for c in range(len(soft[0]))]
        ranking = sorted(range(len(mean)), key=lambda c, g=gamma, m=mean: (c != g, -m[c]))
        decided[0] += (ranking[0] == y) / n
        decided[1] += (y in ranking[:5]) / n
    return {"losses": losses, "top1": top1, "top5": top5, "decided": decided}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), classes=st.integers(2, 9))
def test_figures_equal_plain_python_s(seed: int, n: int, classes: int):
    logits, labels = draw(seed, n, classes)
    scores = AnchorNetAccuracy(torch.device("cpu"))
    for part in torch.arange(n).split(5):
        scores.update(Logits(logits.localization[part], logits.attention[part]), labels[part])
    result, expected = scores.result(), oracle(logits, labels)
    assert result["images"] == n
    assert [result["losses"][o] for o in OUTPUTS] == pytest.approx(
        expected["losses"], rel=1e-4, abs=1e-6
    )
    assert [result["top1_by_output"][o] for o in OUTPUTS] == pytest.approx(expected["top1"])
    assert [result["top5_by_output"][o] for o in OUTPUTS] == pytest.approx(expected["top5"])
    assert [result["top1"], result["top5"]] == pytest.approx(expected["decided"])
    assert result["loss"] == pytest.approx(sum(expected["losses"]), rel=1e-4, abs=1e-6)
    assert sum(result["branch_share"].values()) == pytest.approx(1)


def test_label_smoothing_mixes_in_the_uniform_target():
    logits, labels = draw(0, 4, 5)
    plain, smooth = six_losses(logits, labels), six_losses(logits, labels, 0.2)
    outputs = torch.cat((logits.localization, logits.attention), 1)
    uniform = -outputs.log_softmax(-1).mean(-1).mean(0)
    assert torch.allclose(smooth, 0.8 * plain + 0.2 * uniform)


def test_distances_are_divergences_of_softened_distributions():
    logits, _ = draw(0, 4, 5)
    generator = torch.Generator().manual_seed(1)
    taught = torch.randn(4, 5, generator=generator)
    outputs = torch.cat((logits.localization, logits.attention), 1)
    target = (taught / 3).softmax(-1)[:, None]
    divergence = (target * (target.log() - (outputs / 3).softmax(-1).log())).sum(-1)
    assert torch.allclose(six_distances(logits, taught, 3.0), 9 * divergence.mean(0), rtol=1e-4)
    same = Logits(outputs[:, :1].expand(4, 3, 5), outputs[:, :1].expand(4, 3, 5))
    assert torch.allclose(six_distances(same, outputs[:, 0], 3.0), torch.zeros(6), atol=1e-6)


def test_one_output_equals_the_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, 9, generator=generator)
    labels = torch.randint(9, (23,), generator=generator)
    figures = Accuracy(torch.device("cpu"))
    for part in (slice(0, 10), slice(10, 23)):
        figures.update(logits[part], labels[part])
    ranks = [
        sorted(range(9), key=lambda c: -row[c]).index(label)
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    assert figures.result() == {
        "images": 23,
        "loss": pytest.approx(functional.cross_entropy(logits, labels).item()),
        "top1": pytest.approx(sum(rank < 1 for rank in ranks) / 23),
        "top5": pytest.approx(sum(rank < 5 for rank in ranks) / 23),
    }


def test_a_label_without_a_number_is_last_and_ties_go_to_the_lower_class():
    nan = float("nan")
    scores = torch.tensor([[nan, 1.0, 2.0], [nan, 1.0, 2.0], [2.0, 2.0, 2.0]])
    assert places(scores, torch.tensor([0, 2, 1])).tolist() == [3, 1, 1]
    accuracy = Accuracy(torch.device("cpu"), 2)
    accuracy.update(scores, torch.tensor([0, 2, 1]), torch.ones(3), group=1, patches=7)
    with pytest.raises(NonFiniteError, match="NaN or infinity for 2 of 3 images"):
        accuracy.figures()
    total, (empty, group) = accuracy.figures(check=False)
    assert total == group == Figures(3, 7, 0.0, 1.0, 1.0)
    assert empty == Figures(0, 0, None, None, None)
