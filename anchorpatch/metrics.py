"""Loss, top-1 and top-5 of decided images: sums that several processes add up exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from anchorpatch.errors import NonFiniteError
from anchorpatch.lsp import Decision, decide
from anchorpatch.models.anchornet import Logits
from anchorpatch.runtime.distributed import sum_ranks
from anchorpatch.settings import SCALES

#: The six supervised outputs of AnchorNet, in the order of `six_losses`.
OUTPUTS: Final = tuple(f"{part}_{s}" for part in ("localization", "attention") for s in SCALES)

#: Means over images, as results of a training run name them.
_MEANS: Final = ("loss", "top1", "top5")

#: A class of probability 0 counts with the smallest number that has a logarithm.
_TINY: Final = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Figures:
    """The figures of some images; shares from 0 to 1, None without images.

    Attributes:
        images: each counted once.
        patches: that the network saw.
        top1: share of images whose label has the highest score.
        top5: share of images whose label is among the five highest.
        loss: mean over images.
    """

    images: int
    patches: int
    top1: float | None
    top5: float | None
    loss: float | None

    @property
    def mean_patches(self) -> float | None:
        """Patches per image; None without images."""
        return self.patches / self.images if self.images else None


@dataclass(frozen=True)
class PatchFigures(Figures):
    """The figures of a network on patches.

    Attributes:
        by_scale: the same of the images that chose each scale.
    """

    by_scale: dict[int, Figures]


class _Sum(IntEnum):
    """Columns of what is summed over images and processes."""

    IMAGES, PATCHES, TOP1, TOP5, LOSS, BAD = range(6)


class Accuracy:
    """Loss, top-1 and top-5 of any number of images, of one group of them or several.

    Args:
        device: where the scores are.
        groups: such as the scales of images, or the outputs of a network.
    """

    def __init__(self, device: torch.device, groups: int = 1) -> None:
        self._sums = torch.zeros(groups, len(_Sum), dtype=torch.float64, device=device)

    def update(
        self,
        scores: Tensor,
        labels: Tensor,
        losses: Tensor | None = None,
        *,
        group: int | None = None,
        patches: int = 0,
    ) -> None:
        """Count a batch, without waiting for the device.

        Args:
            scores: of the classes (n, C); (n, groups, C) where each group scores every image.
            labels: class index (n,), int64.
            losses: one for each row of scores (n,) or (n, groups); None for the cross-entropies
                of ``scores``, which are logits then.
            group: that the images belong to; None for all groups.
            patches: that the network saw of these images.
        """
        if losses is None:
            scores = scores.float()
            losses = _cross_entropies(scores, labels)
        place = places(scores, labels)
        finite = scores.isfinite().all(-1)
        columns = torch.stack(
            [
                torch.ones_like(losses, dtype=torch.float64),
                torch.zeros_like(losses, dtype=torch.float64),
                (place < 1).double(),
                (place < 5).double(),
                losses.double(),
                (~finite).double(),
            ],
            -1,
        ).sum(0)
        columns[..., _Sum.PATCHES].fill_(patches)  # assigning may copy from the host
        rows = slice(None) if group is None else slice(group, group + 1)
        self._sums[rows] += columns

    def figures(self, *, check: bool = True) -> tuple[Figures, list[Figures]]:
        """Return the figures of all processes' images: in all, and of each group.

        Args:
            check: look for scores that are no numbers.

        Raises:
            NonFiniteError: the network produced NaN or infinity.
        """
        groups = sum_ranks(self._sums).tolist()
        total = [sum(column) for column in zip(*groups, strict=True)]
        if check and total[_Sum.BAD]:
            raise NonFiniteError(
                f"the network produced NaN or infinity for {total[_Sum.BAD]:,.0f} of "
                f"{total[_Sum.IMAGES]:,.0f} images; use other weights, or no --amp"
            )
        return _figures(total), [_figures(group) for group in groups]

    def result(self) -> dict[str, Any]:
        """Return images, loss, top1 and top5 of all processes' images; 0 without images."""
        found, _ = self.figures(check=False)
        return {"images": found.images, **{k: getattr(found, k) or 0.0 for k in _MEANS}}


def _figures(sums: Sequence[float]) -> Figures:
    images, patches, *rest = sums
    top1, top5, loss = (value / images if images else None for value in rest[:3])
    return Figures(int(images), int(patches), top1, top5, loss)


class AnchorNetAccuracy:
    """Accuracy of AnchorNet: of each output, and of the decision of Eq. 7.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        self._accuracy = Accuracy(device, len(OUTPUTS) + 1)
        self._chosen = torch.zeros(len(SCALES), dtype=torch.float64, device=device)

    def update(self, logits: Logits, labels: Tensor) -> Decision:
        """Count a batch.

        Returns:
            The decision (Eq. 6-8) on each image.
        """
        outputs = torch.cat((logits.localization, logits.attention), 1).float()
        probabilities = logits.localization.float().softmax(-1)
        decision = decide(probabilities)
        # gamma first, then the classes by their mean probability over the branches
        ranking = probabilities.mean(1).scatter(1, decision.predicted[:, None], 2.0)
        losses = _cross_entropies(outputs, labels)
        self._accuracy.update(
            torch.cat((outputs, ranking[:, None]), 1),
            labels,
            torch.cat((losses, losses.sum(1, keepdim=True)), 1),
        )
        self._chosen += per_branch(decision.branch).sum(0)
        return decision

    def result(self) -> dict[str, Any]:
        """Return the figures of all processes' images.

        Returns:
            images; loss, the sum of six; top1 and top5 by Eq. 7, shares; losses, top1_by_output
            and top5_by_output; branch_share by scale.
        """
        _, (*outputs, decided) = self._accuracy.figures(check=False)
        loss, top1, top5 = (
            {name: getattr(f, k) or 0.0 for name, f in zip(OUTPUTS, outputs, strict=True)}
            for k in _MEANS
        )
        chosen, n = sum_ranks(self._chosen).tolist(), max(decided.images, 1)
        return {
            "images": decided.images,
            **{k: getattr(decided, k) or 0.0 for k in _MEANS},
            "losses": loss,
            "top1_by_output": top1,
            "top5_by_output": top5,
            "branch_share": {str(s): value / n for s, value in zip(SCALES, chosen, strict=True)},
        }


def six_losses(logits: Logits, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of each of the `OUTPUTS` (6,), in float32.

    Args:
        logits: of N images.
        labels: class index (N,), int64.
        label_smoothing: share of the target that all classes get.
    """
    outputs = torch.cat((logits.localization, logits.attention), 1).float()
    return _cross_entropies(outputs, labels, label_smoothing).mean(0)


def six_distances(logits: Logits, taught: Tensor, temperature: float) -> Tensor:
    """Return how far each of the `OUTPUTS` is from a teacher, the mean over images (6,), float32.

    It is the Kullback-Leibler divergence of the distributions at a temperature, times the square
    of the temperature, so that gradients keep their size (Hinton et al., 2015).

    Args:
        logits: of N images and C classes.
        taught: the teacher's logits (N, C).
        temperature: by which logits are divided.
    """
    outputs = torch.cat((logits.localization, logits.attention), 1).float() / temperature
    targets = (taught.float() / temperature).log_softmax(-1).unsqueeze(1).expand_as(outputs)
    distances = functional.kl_div(
        outputs.log_softmax(-1), targets, reduction="none", log_target=True
    )
    return distances.sum(-1).mean(0) * temperature**2


def _cross_entropies(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each row of logits (n, ..., C) with its image's label."""
    flat = logits.flatten(0, -2)
    losses = functional.cross_entropy(
        flat,
        labels.repeat_interleave(len(flat) // max(len(labels), 1)),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(logits.shape[:-1])


def probability_losses(sums: Tensor, labels: Tensor) -> Tensor:
    """Return -log of the label's mean probability (n,).

    Args:
        sums: of the distributions of each image (n, C), float64.
        labels: class index (n,), int64.
    """
    own = sums.gather(1, labels[:, None])[:, 0]
    # Distributions sum to 1, so the sum over classes is their number.
    return -(own / sums.sum(1)).clamp_min(_TINY).log()


def per_branch(branch: Tensor) -> Tensor:
    """Return 1 in the column of each image's branch (N,), else 0; float32 (N, 3).

    Its sums count like `torch.bincount`, which makes the host wait for a GPU.
    """
    return functional.one_hot(branch, len(SCALES)).float()


def places(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the place of each image's label in the order of falling scores, from 0.

    Of equal scores the lower class is first. A label whose score is NaN is last.

    Args:
        scores: of the classes (n, ..., C).
        labels: class index (n,), int64.

    Returns:
        int64 (n, ...).

    Example:
        >>> places(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.5]]), torch.tensor([2, 2]))
        tensor([1, 1])
    """
    label = labels.view(-1, *[1] * (scores.ndim - 1))
    own = scores.gather(-1, label.expand(*scores.shape[:-1], 1))
    lower = torch.arange(scores.shape[-1], device=scores.device) < label
    return (~(scores <= own) | ((scores == own) & lower)).sum(-1)


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Return 1 where an image's label is the best of `places`, else 0; float32 (n, ...).

    Example:
        >>> hits(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]]), torch.tensor([2, 0]))
        tensor([0., 1.])
    """
    return (places(scores, labels) < 1).float()
