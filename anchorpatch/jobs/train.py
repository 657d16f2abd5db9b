"""Train AnchorNet (section 4.1), or one of its peers.

Folder -> random crops -> loss of the network -> SGD -> runs/ARCH/{best,last}.safetensors.
AnchorNet and the BagNets are one run of the trainer; Saccader (Elsayed et al., 2019) is three,
one after the other, each in a folder below its own:

1. ``1-bagnet``: BagNet-77 learns the classes by cross-entropy.
2. ``2-location``: BagNet rests, and attention network, mixing and cell learn to look where the
   logit of the true class is highest: glimpse g shall go to the g-th best place. The cell is told
   the right places of the glimpses before, and learns the next one by cross-entropy.
3. ``3-reinforce``: places are sampled. What chooses them learns by REINFORCE: the reward is the
   probability of the true class by the mean logits of the sampled places, less the same by the
   places that the network would take without sampling, which leaves the gradient's mean as it is
   and takes most of its noise. BagNet learns by cross-entropy of the sampled places' mean logits.
   This stage refines, so its rate is a tenth of the others'.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from anchorpatch.metrics import hits
from anchorpatch.models.registry import build
from anchorpatch.models.saccader import Saccader
from anchorpatch.networks import Network, load_network
from anchorpatch.runtime.checkpoint import Weights, load_into, load_weights
from anchorpatch.runtime.device import joined
from anchorpatch.runtime.progress import Reporter
from anchorpatch.storage import write_atomically
from anchorpatch.training.config import TrainConfig
from anchorpatch.training.image_tasks import AnchorNetTask, ImageTask, open_images
from anchorpatch.training.loop import Batch, Trainer
from anchorpatch.training.run_folder import BEST, RunSummary, alone_in, best_record, refuse_foreign

#: A run of the trainer: its name, what is trained, and how and in which folder.
_Stage: TypeAlias = "tuple[str, Callable[..., ImageTask], TrainConfig]"

#: Of the rate of Saccader's third stage in the others'.
_REFINE: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainSummary(RunSummary):
    """Result of a training run; of several stages, the epochs and records are those of the last.

    Attributes:
        bad: training images that could not be decoded, by reason, in this start.
        damaged: training images that were decoded with damage, in this start.
        ignored: files of train and val that were passed over, by extension.
        earlier: of the stages before the last, by name: the best record.
    """

    bad: dict[str, int]
    damaged: int
    ignored: dict[str, int]
    earlier: dict[str, dict[str, Any]]


def run(config: TrainConfig, progress: Reporter | None = None) -> TrainSummary:
    """Train a network, or go on with a run that was stopped.

    Raises:
        DataError: the folders do not fit together, or hold too few images.
        WeightsError: ``init`` or last.pt cannot be used.
        Interrupted: a signal came; the checkpoint is written.
        NonFiniteError: training diverged.
        StorageError: the disk refused, or another run is at work in the folder.
    """
    with (
        joined(config.device, progress) as (device, world, report),
        alone_in(config.folder, world, device),
    ):
        train, val, cache = open_images(config, world, report)
        classes = train.classes
        kind: Callable[..., ImageTask] = ImageTask
        if config.arch == "anchornet":
            kind = partial(AnchorNetTask, teacher=_teacher(config, classes, report))
        stages: list[_Stage] = [(config.arch, kind, config)]
        if config.arch == "saccader":
            stages = _stages(config, classes)
        last = stages[-1][-1].folder
        if not config.overwrite:
            refuse_foreign(config.folder, last)
        bad: dict[int, str] = {}
        damaged: set[int] = set()
        earlier: dict[str, dict[str, Any]] = {}
        for number, (name, of_task, of_stage) in enumerate(stages, start=1):
            if len(stages) > 1:
                report.message(f"stage {number} of {len(stages)}, {name}")
            task = of_task(of_stage, train, val, cache, device, world)
            records = Trainer(task, report).run()
            bad.update(task.bad)
            damaged.update(task.damaged)
            if number < len(stages):
                earlier[name] = best_record(records)
        weights = config.folder / BEST
        if last != config.folder and world.is_main:
            content = (last / BEST).read_bytes()
            write_atomically(weights, lambda file: file.write(content))
        world.wait()
        return TrainSummary(
            weights=weights,
            epochs=len(records),
            classes=len(classes),
            images=(len(train), len(val)),
            best=best_record(records),
            last=records[-1],
            bad=dict(Counter(bad.values())),
            damaged=len(damaged),
            ignored=dict(Counter(train.ignored) + Counter(val.ignored)),
            earlier=earlier,
        )


def _teacher(config: TrainConfig, classes: tuple[str, ...], report: Reporter) -> Network | None:
    if config.teacher is None:
        return None
    return load_network(
        config.teacher, classes, config.teacher_weights, report.message, matching=config.matching
    )


# --- Saccader -----------------------------------------------------------------------------------


def _stages(config: TrainConfig, classes: tuple[str, ...]) -> list[_Stage]:
    """Return the stages of a Saccader: two where ``init`` brings the trained BagNet.

    Args:
        config: of the whole; its folder gets those of the stages.
        classes: of the images. A BagNet of other classes is what the first stage starts from.

    Raises:
        WeightsError: ``init`` holds no BagNet-77.
    """
    first, second, third = (
        config.folder / name for name in ("1-bagnet", "2-location", "3-reinforce")
    )
    found, bagnet = list[_Stage](), config.init
    if config.init is None or load_weights(config.init, "bagnet77").meta.classes != classes:
        found = [("BagNet-77", ImageTask, replace(config, arch="bagnet77", folder=first))]
        bagnet = first / BEST
    location = replace(config, folder=second, init=bagnet)
    reinforce = replace(config, folder=third, init=second / BEST, lr=_REFINE * config.lr)
    return [*found, ("places", LocationTask, location), ("REINFORCE", ReinforceTask, reinforce)]


class _SaccaderTask(ImageTask):
    """What the second and the third stage share."""

    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the device."""
        net = build("saccader", len(self.train.classes))
        assert isinstance(net, Saccader)
        assert self.start is not None
        return self.wrap(net, self.start).to(self.device)

    @abstractmethod
    def wrap(self, net: Saccader, start: Weights) -> nn.Module:
        """Return the module that is trained."""

    def outputs(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Return the mean logits of the best places."""
        logits: Tensor = module.get_submodule("net")(inputs)
        return logits

    def save(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a weights file of the network in the module that is trained."""
        super().save(path, {k.removeprefix("net."): v for k, v in tensors.items()}, record)


class LocationTask(_SaccaderTask):
    """The second stage: where to look, from a frozen BagNet."""

    kind = "saccader-location"

    starts_from = "bagnet77"

    def wrap(self, net: Saccader, start: Weights) -> nn.Module:
        """Return the network with a trained BagNet."""
        load_into(net.bagnet, start)
        return _Location(net)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the cross-entropy of the right places, and how often each was the best."""
        logits, places = module(batch.inputs, batch.labels)
        n, glimpses, size = logits.shape
        flat, right = logits.reshape(n * glimpses, size), places.reshape(-1)
        return functional.cross_entropy(flat, right), {
            "place_top1": hits(flat.detach(), right).mean()
        }


class ReinforceTask(_SaccaderTask):
    """The third stage: sampled places, rewarded for the class."""

    kind = "saccader-reinforce"

    def wrap(self, net: Saccader, start: Weights) -> nn.Module:
        """Return the network as the second stage has left it."""
        load_into(net, start)
        return _Policy(net)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return REINFORCE's loss plus the cross-entropy, and what they come from."""
        logits, log_prob, greedy = module(batch.inputs)
        reward, baseline = (_score(x, batch.labels) for x in (logits, greedy))
        reinforce = -((reward - baseline) * log_prob).mean()
        classification = functional.cross_entropy(
            logits, batch.labels, label_smoothing=self.config.label_smoothing
        )
        return reinforce + classification, {
            "classification": classification,
            "reinforce": reinforce,
            "reward": reward.mean(),
            "baseline": baseline.mean(),
            "top1": hits(logits.detach(), batch.labels).mean(),
        }


class _Location(nn.Module):
    """Saccader in the second stage: BagNet is not trained, its batch statistics are frozen too."""

    def __init__(self, net: Saccader) -> None:
        super().__init__()
        self.net = net
        net.bagnet.requires_grad_(False)

    def train(self, mode: bool = True) -> _Location:
        super().train(mode)
        self.net.bagnet.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the places (N, G, P), and the right ones (N, G)."""
        maps = self.net.maps(images)
        weight = self.net.bagnet.classifier.weight[labels, :, 0, 0]
        places = best_places(maps.features, weight, self.net.default_glimpses)
        return self.net.follow(maps, places), places


class _Policy(nn.Module):
    """Saccader in the third stage."""

    def __init__(self, net: Saccader) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample places.

        Returns:
            Mean logits of the sampled places (N, C); the logarithm of the probability of having
            sampled them (N,); mean logits of the best places (N, C), without gradient.
        """
        maps = self.net.maps(images)
        with torch.no_grad():
            greedy = self.net.look(maps).logits.float().mean(1)
        sampled = self.net.look(maps, sample=True)
        return sampled.logits.float().mean(1), sampled.log_prob.sum(1), greedy


def best_places(features: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return the places where one class has its highest logits, the best first.

    Args:
        features: what the classifier reads (N, D, P).
        weight: of one class for each image (N, D). The bias is the same for all places.
        count: G, or more than there are places.

    Returns:
        Row-major indices (N, G), int64; of equal places the first comes first.

    Example:
        >>> best_places(torch.tensor([[[1.0, 3.0, 2.0, 3.0]]]), torch.tensor([[2.0]]), 3)
        tensor([[1, 3, 2]])
    """
    # Products and sums, in float32: the logits themselves may be bfloat16, too coarse to order.
    logits = (features.float() * weight[:, :, None]).sum(1)
    order: Tensor = logits.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :count]


def _score(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the probability of the true class (N,), without gradient."""
    return logits.detach().softmax(-1).gather(1, labels[:, None])[:, 0]
