"""Accuracy of AnchorNet: by branch, and by the decision of Eq. 7."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from anchorpatch.lsp import Decision, decide
from anchorpatch.models.anchornet import Logits
from anchorpatch.runtime.distributed import sum_ranks
from anchorpatch.settings import SCALES

__all__ = ["OUTPUTS", "Scores", "hits", "per_branch", "six_losses"]

#: The six supervised outputs, in the order of `six_losses`.
OUTPUTS = tuple(f"{part}_{scale}" for part in ("localization", "attention") for scale in SCALES)


def six_losses(logits: Logits, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of each of the `OUTPUTS` (6,), in float32.

    Args:
        logits: of N images.
        labels: class index (N,), int64.
        label_smoothing: share of the target that all classes get.
    """
    outputs = torch.cat((logits.localization, logits.attention), 1).float()
    n, six, classes = outputs.shape
    losses = functional.cross_entropy(
        outputs.reshape(n * six, classes),
        labels.repeat_interleave(six),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(n, six).mean(0)


class Scores:
    """Sums over validation images; several processes add up exactly.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        # images; loss, top-1, top-5 of six outputs; top-1, top-5 of Eq. 7; images by branch
        self._sums = torch.zeros(1 + 18 + 2 + 3, dtype=torch.float64, device=device)

    def update(self, logits: Logits, labels: Tensor) -> Decision:
        """Count a batch.

        Returns:
            The decision (Eq. 6-8) on each image.
        """
        n = len(labels)
        outputs = torch.cat((logits.localization, logits.attention), 1).float()
        probabilities = logits.localization.float().softmax(-1)
        decision = decide(probabilities)
        # gamma first, then the classes by their mean probability over the branches
        ranking = probabilities.mean(1).scatter(1, decision.predicted[:, None], 2.0)
        of_outputs = [hits(outputs, labels, k).sum(0) for k in (1, 5)]
        self._sums += torch.cat(
            (
                torch.full((1,), float(n), device=labels.device),
                six_losses(logits, labels) * n,
                *of_outputs,
                *(hits(ranking, labels, k).sum(0, keepdim=True) for k in (1, 5)),
                per_branch(decision.branch).sum(0),
            )
        ).double()
        return decision

    def result(self) -> dict[str, Any]:
        """Return the figures of all processes' images.

        Returns:
            images; loss, the sum of six; top1 and top5 by Eq. 7, shares; losses, top1_by_output
            and top5_by_output; branch_share by scale.
        """
        n, *rest = sum_ranks(self._sums).tolist()
        mean = [value / max(n, 1.0) for value in rest]
        return {
            "images": int(n),
            "loss": sum(mean[:6]),
            "top1": mean[18],
            "top5": mean[19],
            "losses": dict(zip(OUTPUTS, mean[:6], strict=True)),
            "top1_by_output": dict(zip(OUTPUTS, mean[6:12], strict=True)),
            "top5_by_output": dict(zip(OUTPUTS, mean[12:18], strict=True)),
            "branch_share": dict(zip(map(str, SCALES), mean[20:23], strict=True)),
        }


def per_branch(branch: Tensor) -> Tensor:
    """Return 1 in the column of each image's branch (N,), else 0; float32 (N, 3).

    Its sums count like `torch.bincount`, which makes the host wait for a GPU.
    """
    return functional.one_hot(branch, len(SCALES)).float()


def hits(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return 1 where an image's label is among the k best, else 0.

    Args:
        scores: of the classes (N, ..., C).
        labels: class index (N,), int64.
        k: how many are the best; all where there are fewer classes.

    Returns:
        float32 (N, ...).

    Example:
        >>> hits(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]]), torch.tensor([2, 0]), 1)
        tensor([0., 1.])
    """
    best = scores.topk(min(k, scores.shape[-1]), -1).indices
    return (best == labels.view(-1, *[1] * (scores.ndim - 1))).any(-1).float()
