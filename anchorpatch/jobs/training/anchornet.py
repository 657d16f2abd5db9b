"""What the training loop needs to know about AnchorNet: six cross-entropies (section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from anchorpatch.errors import WeightsError
from anchorpatch.jobs.metrics import OUTPUTS, AnchorNetAccuracy, six_losses
from anchorpatch.jobs.training.image_task import ImageTask, start_from
from anchorpatch.jobs.training.task import Batch
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.runtime.checkpoint import WeightsMeta

__all__ = ["AnchorNetTask"]


class AnchorNetTask(ImageTask):
    """Learns from six losses, and is measured by branch and by Eq. 7."""

    def describe(self) -> WeightsMeta:
        """Return what the weights files say about themselves."""
        config = self.config
        return WeightsMeta("anchornet", self.train.classes, config.se, config.weighted_mean)

    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the device."""
        config, classes = self.config, self.train.classes
        net = AnchorNet(len(classes), se=config.se, weighted_mean=config.weighted_mean)
        if self.start is not None:
            try:
                start_from(net, self.start, classes)
            except WeightsError as error:
                raise WeightsError(f"{error}; --init needs weights of the same --se") from error
        return net.to(self.device)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the sum of six losses, and each of them."""
        losses = six_losses(module(batch.inputs), batch.labels, self.config.label_smoothing)
        # A factor of 0 keeps every parameter in the graph, as several processes need it.
        attention = float(self.config.attention_loss)
        total = losses[:3].sum() + attention * losses[3:].sum()
        return total, dict(zip(OUTPUTS, losses, strict=True))

    def figures(self) -> AnchorNetAccuracy:
        """Return new sums for an evaluation."""
        return AnchorNetAccuracy(self.device)
