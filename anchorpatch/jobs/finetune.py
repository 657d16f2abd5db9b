"""Fine-tune an ordinary network on semantic patches (section 4.3).

Shards -> patches of one scale a batch -> flip and jitter -> cross-entropy with the label of the
patch's image -> runs/NETWORK/{best,last}.safetensors, measured by the sum of the softmax
distributions of an image's patches. A baseline learns from whole images instead, at the same cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import tee
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from anchorpatch.errors import DataError, SettingsError
from anchorpatch.images.crops import RandomCrop, load_training_batches
from anchorpatch.jobs.crops import CropSource, open_shards
from anchorpatch.jobs.patch_scores import Distributions, score_images, score_patches
from anchorpatch.models.complexity import check_sides, macs
from anchorpatch.models.registry import build_on_meta
from anchorpatch.networks import OR_NONE, load_network
from anchorpatch.runtime.device import joined
from anchorpatch.runtime.distributed import World
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import SCALES
from anchorpatch.shards.dataset import (
    Loaded,
    batches_of,
    epoch_rows,
    held_out,
    load_rows,
    pieces_of,
    visited,
)
from anchorpatch.shards.reader import ShardReader
from anchorpatch.state_dicts import find_pretrained
from anchorpatch.storage import sha256_of, to_json
from anchorpatch.text import counted, differing
from anchorpatch.training.augment import Augmentation
from anchorpatch.training.config import FinetuneConfig, LoopConfig
from anchorpatch.training.loop import Batch, Task, Trainer
from anchorpatch.training.run_folder import BEST, RunSummary, alone_in, best_record


@dataclass(frozen=True, kw_only=True)
class FinetuneSummary(RunSummary):
    """Result of a fine-tuning run.

    Attributes:
        network: its name.
        source: where the pixels came from.
        cost: steps, patches and multiply-accumulates, see `FinetuneTask`.
    """

    network: str
    source: str
    cost: dict[str, Any]


def run(config: FinetuneConfig, progress: Reporter | None = None) -> FinetuneSummary:
    """Fine-tune a network, or go on with a run that was stopped.

    Raises:
        ShardError: shards are missing or damaged.
        DataError: train and val do not fit together, or hold too few patches.
        SettingsError: network, batch and shards do not fit together.
        WeightsError: ``weights`` or last.pt cannot be used.
        Interrupted: a signal came; the checkpoint is written.
        NonFiniteError: training diverged.
        StorageError: the disk refused, or another run is at work in the folder.
    """
    with (
        joined(config.device, progress) as (device, world, report),
        alone_in(config.folder, world, device),
    ):
        task = prepare(config, device, world, report.message)
        train, val = task.train, task.val
        differ = {
            "AnchorNet weights": train.header.weights_sha256 != val.header.weights_sha256,
            f"transforms ({val.settings.crop}; {train.settings.crop})": str(train.settings.crop)
            != str(val.settings.crop),
        }
        if found := " and ".join(what for what, different in differ.items() if different):
            report.message(
                f"{config.shards}: the shards of val and train were extracted with different "
                f"{found}; the results will mix the two"
            )
        cost = task.cost
        if "budget" in cost:
            more = cost["macs"] > 1.05 * cost["budget"]["macs"]
            over = ", which is more: every image is seen at least once" if more else ""
            report.message(
                f"the budget of {cost['budget']['of']}: {cost['budget']['macs'] / 1e9:,.1f} GMACs; "
                f"{counted(cost['epochs'], 'epoch')} of {cost['steps_an_epoch']:,} steps over "
                f"whole images take {cost['macs'] / 1e9:,.1f} GMACs{over}"
            )
        records = Trainer(task, report).run(cost=cost)
        return FinetuneSummary(
            network=config.network,
            weights=config.folder / BEST,
            source=task.source,
            epochs=len(records),
            classes=len(task.train.classes),
            images=(task.training_images, len(task.val)),
            cost=cost,
            best=best_record(records),
            last=records[-1],
        )


def forecast(config: FinetuneConfig) -> dict[str, Any]:
    """Return what a run would do, as JSON values; see `run` for errors.

    Weights of a file are read and tried; a pretrained set must exist, and is not downloaded.
    """
    task = prepare(config, torch.device("cpu"), World())
    if config.weights == "default":
        find_pretrained(config.network, OR_NONE)
    elif config.weights != "none":
        options: dict[str, Any] = {"replace_head": True, "matching": config.matching}
        load_network(config.network, task.train.classes, config.weights, **options)
    return {
        "network": config.network,
        "weights": config.weights,
        "folder": str(config.folder),
        "source": task.source,
        "unit": task.unit,
        "classes": len(task.train.classes),
        "images": [task.training_images, len(task.val)],
        "batch_size": config.batch_size,
        "cost": task.cost,
    }


def prepare(
    config: FinetuneConfig,
    device: torch.device,
    world: World,
    message: Callable[[str], None] = lambda text: None,
) -> FinetuneTask:
    """Check shards, network and settings, and plan the run.

    Raises:
        ShardError: the shards of a split are missing or damaged.
        DataError: train and val hold other classes, too few patches, or whole images that a
            baseline needs are missing.
        SettingsError: the network cannot take the patches, or the batch is too small.
    """
    train, val = (open_shards(config.shards, split) for split in ("train", "val"))
    if train.classes != val.classes:
        raise DataError(
            f"{config.shards}: expected train and val shards of the same classes, found "
            f"{differing(train.classes, val.classes)}; extract val again from a data folder "
            "that also has train with all of these classes"
        )
    kind = BaselineTask if config.baseline else FinetuneTask
    return kind(config, train, val, device, world, message)


# --- the steps ----------------------------------------------------------------------------------


class Request(NamedTuple):
    """The rows of a piece of a step.

    Attributes:
        key: seed, pass, step of the pass and number of the piece: what augmentation follows from.
        scale: side of the pixels.
        rows: of patches of this scale, or of images (n,).
        share: of the step's rows; 0 for a piece that stands in for a missing one.
    """

    key: tuple[int, int, int, int]
    scale: int
    rows: NDArray[np.int64]
    share: float

    @property
    def visit(self) -> int:
        """Number of the pass."""
        return self.key[1]


@dataclass(frozen=True)
class Plan:
    """The steps of a run. All pieces of a step have one scale, on all processes.

    A pass visits every row once. An epoch, after which the network is measured, is a pass over
    patches. A baseline's epochs are equal parts of its steps, and may be shorter or longer.

    Attributes:
        draw: returns the rows of a pass by scale, in random order.
        counts: how many these are.
        config: batch size, pieces, epochs and seed.
        world: the processes.
        steps: optimizer steps of an epoch; None for those of a pass.
    """

    draw: Callable[[np.random.Generator], Mapping[int, NDArray[np.int64]]]
    counts: Mapping[int, int]
    config: LoopConfig
    world: World
    steps: int | None = None

    @property
    def steps_per_pass(self) -> int:
        """How many batches the rows of a pass make."""
        return sum(-(-n // self.config.batch_size) for n in self.counts.values())

    @property
    def steps_per_epoch(self) -> int:
        """How many steps lie between two measurements."""
        return self.steps or self.steps_per_pass

    @property
    def rows_per_epoch(self) -> int:
        """About how many rows an epoch visits; exact where it is a pass."""
        return sum(self.counts.values()) * self.steps_per_epoch // self.steps_per_pass

    def pieces(self, epoch: int, step: int) -> Iterator[Request]:
        """Yield this process's pieces from a step of an epoch to the end of the run."""
        config, world = self.config, self.world
        steps, total = self.steps_per_epoch, self.config.epochs * self.steps_per_epoch
        drawn, batches = -1, []
        for done in range(epoch * steps + step, total):
            visit, index = divmod(done, self.steps_per_pass)
            if visit != drawn:
                rng = np.random.default_rng((config.seed, visit))
                drawn, batches = visit, batches_of(self.draw(rng), config.batch_size, rng)
            scale, rows = batches[index]
            pieces = pieces_of(rows, world.size * config.accumulate)
            for number in range(world.rank, len(pieces), world.size):
                found, counted = pieces[number]
                key = (config.seed, visit, index, number)
                yield Request(key, scale, found, counted / len(rows))


# --- what is learned from -----------------------------------------------------------------------


class FinetuneTask(Task):
    """A network that learns from the patches of shards.

    Args:
        config: of the run.
        train: reader of the training shards.
        val: reader of the validation shards.
        device: where the network is.
        world: the processes of the run.
        message: called with what users may not expect of the weights.

    Attributes:
        plan: the steps.
        taken: training images that are not held out (n,), bool; None for all.
        cost: what the run takes, as JSON values: its epochs, the steps of each, the patches of an
            epoch by scale (for a baseline, images by side), the multiply-accumulates of one of
            them and of the whole run, and what a baseline may spend, by which run. Those are of
            the forward passes in training. The backward passes take about twice as many, for
            patches and whole images alike.

    Raises:
        DataError: there are too few patches, or the run whose cost counts cannot be read.
        SettingsError: the network cannot take the patches, or the batch is too small.
    """

    config: FinetuneConfig
    kind = "finetune"
    unit = "patches"

    #: Smallest share of a picture in the crop that is still to be drawn; 1 for none.
    min_area = 1.0

    def __init__(
        self,
        config: FinetuneConfig,
        train: ShardReader,
        val: ShardReader,
        device: torch.device,
        world: World,
        message: Callable[[str], None],
    ) -> None:
        super().__init__(config, device, world)
        self.train, self.val, self.message = train, val, message
        self.taken = ~held_out(train.path, config.holdout) if config.holdout else None
        counts = self.counts()
        self._refuse_too_few(sum(counts.values()))
        module = build_on_meta(config.network, len(train.classes)).eval()
        check_sides(config.network, module, tuple(counts))
        each = {side: macs(module, side) for side in counts}
        macs_per_pass = _total(counts, each)
        plan = Plan(self.draw, counts, config, world)
        budget = {}
        if config.baseline and config.like is not None:
            budget = {"budget": self._budget(module)}
            steps, epochs = _affordable(
                budget["budget"]["macs"], plan.steps_per_pass, macs_per_pass
            )
            self.config = config = replace(config, epochs=epochs)
            plan = replace(plan, config=config, steps=steps)
        self.plan, self.steps, self.size = plan, plan.steps_per_epoch, plan.rows_per_epoch
        part = plan.steps_per_epoch / plan.steps_per_pass
        self.cost: dict[str, Any] = {
            "epochs": config.epochs,
            "steps_an_epoch": plan.steps_per_epoch,
            "rows_an_epoch": {str(side): round(n * part) for side, n in counts.items()},
            "macs_by_side": {str(side): n for side, n in each.items()},
            "macs": round(config.epochs * part * macs_per_pass),
            **budget,
        }
        self.augment = Augmentation(config.jitter, config.flip, self.min_area)

    def _refuse_too_few(self, rows: int) -> None:
        config, world = self.config, self.world
        parts = world.size * config.accumulate
        if config.batch_size < 2 * parts:
            raise SettingsError(
                f"batch size {config.batch_size} is too small for {world.size} processes x "
                f"{config.accumulate} pieces of at least 2; choose --batch-size {2 * parts} or more"
            )
        if not rows:
            what, advice = f"{self.unit} to train on", "choose a smaller --holdout"
            if config.scale is not None:
                what, advice = f"patches of {config.scale} px", "choose another --scale"
            raise DataError(f"{self.train.folder}: expected {what}, found none; {advice}")
        if rows < config.batch_size:
            raise DataError(
                f"{self.train.folder}: {rows} {self.unit} per epoch are too few for a batch "
                f"size of {config.batch_size}; choose a smaller --batch-size"
            )

    def _budget(self, module: nn.Module) -> dict[str, Any]:
        """Return what a baseline may spend in MACs, and the run on patches that spends as much."""
        config = self.config
        assert config.like is not None
        path = config.like / "config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            cost, held = found["cost"], found.get("holdout", 0.0)
            if held != config.holdout:
                self.message(
                    f"{config.like} was trained with --holdout {held}, this run with "
                    f"{config.holdout}: they learn from different images"
                )
            of = f"{config.like}, {counted(cost['epochs'], 'epoch')}"
            return {"macs": int(cost["macs"]), "of": of}
        except FileNotFoundError:
            counts = visited(self.train, SCALES, taken=self.taken)
            total = _total(counts, {scale: macs(module, scale) for scale in counts})
            of = f"{counted(config.epochs, 'epoch')} of all patches"
            return {"macs": config.epochs * total, "of": of}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: cannot read the cost of the run on patches, which sets that "
                f"of the baseline ({type(error).__name__}); give --epochs, or remove that run"
            ) from error

    def build(self) -> nn.Module:
        """Return the network with its initial weights, on the device."""
        config, crop = self.config, self.train.settings.crop
        found = load_network(
            config.network,
            self.train.classes,
            config.weights,
            message=self.message,
            replace_head=True,
            matching=config.matching,
        )
        self.meta = found.meta.cropped(crop)
        weights = config.weights
        if weights not in ("default", "none"):
            with open(weights, "rb") as file:
                weights = sha256_of(file)
        self.identity = {
            **config.decisive(),
            "weights": weights,
            "processes": self.world.size,
            "steps": self.steps,
            "files": self.min_area == 1.0 and config.baseline,
            "train_shards": _digest_of_shards(self.train),
            "val_shards": _digest_of_shards(self.val),
        }
        if config.matching.class_map is not None:
            self.identity["class_map"] = list(config.matching.class_map)
        self.origin = {"settings": self.identity, "cost": self.cost}
        return found.module.to(self.device)

    def ready(self, module: nn.Module) -> None:
        """Keep the statistics of the initial weights with ``freeze_bn``."""
        if self.config.freeze_bn:
            for layer in module.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()

    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        """Yield the augmented pieces from a step of an epoch to the end of the run."""
        loaded = self.load(self.plan.pieces(epoch, step))
        with closing(loaded):
            for request, (pixels, labels) in self.waits.each("data", loaded):
                rng = np.random.default_rng(request.key)
                inputs = self.augment(pixels.to(self.device, non_blocking=True), rng)
                yield self.batch(inputs.permute(0, 2, 3, 1), labels, request.share)

    @property
    def training_images(self) -> int:
        """How many images are trained on."""
        return len(self.train) if self.taken is None else int(self.taken.sum())

    @property
    def eval_batch(self) -> int:
        """Images or patches of a batch in evaluation."""
        # CPU: larger ones spend their time on fresh memory.
        return 32 if self.device.type == "cpu" else 512

    @property
    def source(self) -> str:
        """Where the pixels come from, in words."""
        return f"the patches in {self.train.folder}"

    def counts(self) -> dict[int, int]:
        """Return the rows of a pass by the side of their pixels."""
        config = self.config
        return visited(self.train, config.scales, config.patches_per_image, self.taken)

    def draw(self, rng: np.random.Generator) -> Mapping[int, NDArray[np.int64]]:
        """Return the rows of a pass in random order."""
        config = self.config
        return epoch_rows(self.train, rng, config.scales, config.patches_per_image, self.taken)

    def load(self, requests: Iterator[Request]) -> Generator[tuple[Request, Loaded], None, None]:
        """Read the pieces of a run ahead of their use."""
        return self._read(requests, whole=False)

    def _read(
        self, requests: Iterator[Request], *, whole: bool
    ) -> Generator[tuple[Request, Loaded], None, None]:
        return load_rows(
            self.train,
            requests,
            threads=self.config.workers,
            pin_memory=self.device.type == "cuda",
            whole=whole,
        )

    def evaluate(self, module: nn.Module, check: Callable[[], object]) -> dict[str, Any]:
        """Decide on the validation images by the sum of their patches' distributions."""
        run = Distributions(module, self.device, self.meta, self.config.amp)
        figures = score_patches(
            dict.fromkeys(self.config.scales, run),
            self.val,
            np.arange(self.world.rank, len(self.val), self.world.size),
            batch_size=self.eval_batch,
            check=check,
        )
        found: dict[str, Any] = to_json(figures)
        return found


class BaselineTask(FinetuneTask):
    """A network that learns from whole images, at the cost of a run on patches.

    Their pixels are the crops in the shards, or else the files they were made from.
    """

    unit = "images"

    def __init__(
        self, config: FinetuneConfig, train: ShardReader, val: ShardReader, *more: Any
    ) -> None:
        self.images, self.val_images = (
            CropSource.of_shards(reader, config.data, split=split, workers=config.workers)
            for reader, split in ((train, "train"), (val, "val"))
        )
        if self.images.images is None:
            self.min_area = config.min_area
        super().__init__(config, train, val, *more)

    @property
    def source(self) -> str:
        """Where the pixels come from, in words."""
        return self.images.description

    def counts(self) -> dict[int, int]:
        """Return the images of a pass."""
        return {self.images.crop.img_size: self.training_images}

    def draw(self, rng: np.random.Generator) -> Mapping[int, NDArray[np.int64]]:
        """Return the images of a pass in random order."""
        rows = np.arange(len(self.images)) if self.taken is None else np.flatnonzero(self.taken)
        return {self.images.crop.img_size: rng.permutation(rows)}

    def load(self, requests: Iterator[Request]) -> Generator[tuple[Request, Loaded], None, None]:
        """Read or decode the pieces of a run ahead of their use."""
        config, images = self.config, self.images.images
        if images is None:
            yield from self._read(requests, whole=True)
            return
        asked, kept = tee(requests)
        crop = RandomCrop(
            self.images.crop.img_size,
            config.min_area,
            flip=False,
            seed=config.seed,
            background=self.images.crop.background,
        )
        loaded = load_training_batches(
            images,
            ((request.visit, request.rows) for request in asked),
            crop,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        with closing(loaded):
            for request, batch in zip(kept, loaded, strict=True):
                if batch.bad:
                    row, reason = batch.bad[0]
                    raise DataError(
                        f"{images.name(row)}: can no longer be read ({reason}), "
                        "but the shards have its patches; restore it, or extract again"
                    )
                labels = torch.from_numpy(self.images.labels[request.rows])
                yield request, Loaded(batch.pixels, labels)

    def evaluate(self, module: nn.Module, check: Callable[[], object]) -> dict[str, Any]:
        """Decide on the validation images as they are."""
        rows, pin_memory = self.world.share(len(self.val_images)), self.device.type == "cuda"
        batches = self.val_images.batches(rows, self.eval_batch, pin_memory=pin_memory)
        with closing(batches):
            run = Distributions(module, self.device, self.meta, self.config.amp)
            return asdict(score_images(run, batches, check=check))


def _total(counts: Mapping[int, int], each: Mapping[int, int]) -> int:
    """Return the multiply-accumulates of all rows, from those of one by its side."""
    return sum(n * each[side] for side, n in counts.items())


def _affordable(budget: int, steps_per_pass: int, macs_per_pass: int) -> tuple[int, int]:
    """Return steps of an epoch and epochs that cost the budget, but at least one pass.

    Example:
        >>> _affordable(budget=250, steps_per_pass=10, macs_per_pass=100)
        (12, 2)
        >>> _affordable(budget=30, steps_per_pass=10, macs_per_pass=100)
        (10, 1)
    """
    total = max(steps_per_pass, round(budget / macs_per_pass * steps_per_pass))
    epochs = max(1, round(total / steps_per_pass))
    return round(total / epochs), epochs


def _digest_of_shards(reader: ShardReader) -> dict[str, Any]:
    """Return which AnchorNet made the shards, and a digest of their bytes."""
    digest = hashlib.sha256("".join(reader.sha256).encode())
    return {"anchornet": reader.header.weights_sha256, "sha256": digest.hexdigest()}
