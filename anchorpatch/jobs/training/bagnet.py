"""What the training loop needs to know about a BagNet: the mean of its logits, one loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from anchorpatch.jobs.metrics import Accuracy, hits
from anchorpatch.jobs.training.config import ANCHORNET_ONLY
from anchorpatch.jobs.training.image_task import ImageTask, start_from
from anchorpatch.jobs.training.task import Batch
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import WeightsMeta

__all__ = ["BagNetTask"]


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

    def figures(self) -> Accuracy:
        """Return new sums for an evaluation."""
        return Accuracy(self.device)
