"""What the training loop needs to know about a BagNet: the mean of its logits, one loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anchorpatch.jobs.scores import hits
from anchorpatch.jobs.training.config import ANCHORNET_ONLY
from anchorpatch.jobs.training.image_task import ImageTask, start_from
from anchorpatch.jobs.training.task import Batch
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import WeightsMeta
from anchorpatch.runtime.distributed import sum_ranks

__all__ = ["BagNetTask", "LogitFigures"]


class BagNetTask(ImageTask):
    """Learns one cross-entropy; ``config.arch`` names the network."""

    at_once = (4, 64)
    meaningless = ANCHORNET_ONLY

    def describe(self) -> WeightsMeta:
        """Return what the weights files say about themselves."""
        return WeightsMeta(self.config.arch, self.train.classes)

    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the device."""
        classes = self.train.classes
        net = build(self.config.arch, len(classes))
        if self.start is not None:
            start_from(net, self.start, classes)
        return net.to(self.device)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the cross-entropy of the mean logits, and top-1."""
        logits = module(batch.inputs).float()
        loss = functional.cross_entropy(
            logits, batch.labels, label_smoothing=self.config.label_smoothing
        )
        return loss, {"top1": hits(logits.detach(), batch.labels, 1).mean()}

    def figures(self) -> LogitFigures:
        """Return new sums for an evaluation."""
        return LogitFigures(self.device)


class LogitFigures:
    """Loss, top-1 and top-5 of one output; see `image_task.Figures`.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Count logits (n, C) of images with class indices (n,), int64."""
        logits = outputs.float()
        self._sums += torch.stack(
            (
                torch.full((), float(len(labels)), device=labels.device),
                functional.cross_entropy(logits, labels, reduction="sum"),
                hits(logits, labels, 1).sum(),
                hits(logits, labels, 5).sum(),
            )
        ).double()

    def result(self) -> dict[str, Any]:
        """Return images; loss, top1 and top5, means over all processes' images."""
        n, *rest = sum_ranks(self._sums).tolist()
        loss, top1, top5 = (value / max(n, 1.0) for value in rest)
        return {"images": int(n), "loss": loss, "top1": top1, "top5": top5}
