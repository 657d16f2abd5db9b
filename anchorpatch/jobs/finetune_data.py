"""What a network is fine-tuned and measured on: patches, or the whole images for comparison.

The settings, the rows of each step, and how they are read and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import tee
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from anchorpatch.errors import DataError, SettingsError
from anchorpatch.images.crops import RandomCrop, load_training_batches
from anchorpatch.images.folder import ImageFolder
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.jobs.patch_scores import Distributions, score_images, score_patches
from anchorpatch.models.registry import check_name
from anchorpatch.runtime.checkpoint import WeightsMeta
from anchorpatch.runtime.distributed import World
from anchorpatch.settings import CROP, SCALES
from anchorpatch.shards.dataset import (
    Loaded,
    batches_of,
    epoch_rows,
    load_rows,
    pieces_of,
    visited,
)
from anchorpatch.shards.reader import ShardReader
from anchorpatch.training.config import LoopConfig

#: What replaces the defaults where a network starts from random weights: the rate that such
#: networks are usually trained with, and more epochs.
SCRATCH: Final[dict[str, Any]] = {"epochs": 30, "lr": 0.1}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LoopConfig):
    """How a network is fine-tuned; see `LoopConfig` for the rest.

    The paper says no more than "fine-tuned on training patches". The defaults are what is usual
    for pretrained networks: a tenth of the rate that they were trained with, falling to 0 by a
    cosine over a few epochs, after a short warm-up for heads with random weights. An epoch over all
    patches shows each image many times, so 5 epochs are not few.

    Attributes:
        network: its name, see `anchorpatch.models.registry.build`.
        shards: folder with ``train/`` and ``val/``.
        weights: to start from: "default" (torchvision's), "none" (random) or a file.
        scale: train and measure on the patches of one scale alone; None takes all three.
        patches_per_image: of each image in an epoch, drawn again each time; None takes all.
        baseline: train on whole images instead, at the same cost (see `like`).
        data: folder with the images, for a baseline where the shards hold no crops.
        like: folder of the run whose multiply-accumulates a baseline may spend, by convention
            that of the same network on patches. Where it holds no run, a run on patches with
            these settings is taken. None: a baseline makes ``epochs`` passes.
        flip: random horizontal flip (p = 0.5).
        jitter: of brightness, contrast and saturation.
        min_area: smallest share of a whole image that a baseline's training crop shows.
    """

    #: What the paths and the weights hold is compared instead.
    FREE: ClassVar[frozenset[str]] = LoopConfig.FREE | {"shards", "data", "like", "weights"}

    network: str
    shards: Path
    epochs: int = 5
    lr: float = 0.01
    nesterov: bool = True
    schedule: str = "cosine"
    warmup_epochs: float = 0.5
    weights: str = "default"
    scale: int | None = None
    patches_per_image: int | None = None
    baseline: bool = False
    data: Path = Path("data")
    like: Path | None = None
    flip: bool = True
    jitter: float = 0.2
    min_area: float = 0.35
    workers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.network)
        if self.network == "anchornet":
            raise SettingsError(
                "anchornet finds the patches; train it with `anchorpatch train`, and fine-tune "
                "an ordinary network such as resnet50"
            )
        if self.scale is not None and self.scale not in SCALES:
            known = ", ".join(map(str, SCALES))
            raise SettingsError(f"scale: expected one of {known}, got {self.scale}")
        if self.baseline and (self.scale or self.patches_per_image):
            raise SettingsError(
                "baseline: trains on whole images, so it takes no --scale or --patches-per-image; "
                "its budget is that of the run on patches"
            )
        if self.patches_per_image is not None and self.patches_per_image < 1:
            raise SettingsError(
                f"patches_per_image: expected at least 1, got {self.patches_per_image}"
            )
        if not 0 <= self.jitter < 1:
            raise SettingsError(f"jitter: expected a number from 0 to below 1, got {self.jitter}")
        if not 0 < self.min_area <= 1:
            raise SettingsError(f"min_area: expected a share above 0, got {self.min_area}")

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales of the patches that take part."""
        return SCALES if self.scale is None else (self.scale,)


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
        steps: optimiser steps of an epoch; None for those of a pass.
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


class Data(Protocol):
    """Training and validation data of a run."""

    #: What rows are, in the plural.
    unit: str

    @property
    def source(self) -> str:
        """Where the pixels come from, in words."""

    @property
    def min_area(self) -> float:
        """Smallest share of a picture in the crop that is still to be drawn; 1 for none."""

    def counts(self) -> dict[int, int]:
        """Return the rows of a pass by the side of their pixels."""

    def draw(self, rng: np.random.Generator) -> Mapping[int, NDArray[np.int64]]:
        """Return the rows of a pass in random order."""

    def load(
        self, requests: Iterator[Request], pin_memory: bool
    ) -> Generator[tuple[Request, Loaded], None, None]:
        """Read the pieces of a run ahead of their use."""

    def evaluate(
        self,
        module: nn.Module,
        meta: WeightsMeta,
        world: World,
        device: torch.device,
        check: Callable[[], object],
    ) -> dict[str, Any]:
        """Return loss, top1, top5 and what else there is to say of the validation images."""


def _eval_batch(device: torch.device) -> int:
    # CPU: larger ones spend their time on fresh memory.
    return 32 if device.type == "cpu" else 512


@dataclass(frozen=True)
class PatchData:
    """Patches of the shards.

    Attributes:
        config: scales, patches per image, threads.
        train: reader of the training shards.
        val: reader of the validation shards.
    """

    config: FinetuneConfig
    train: ShardReader
    val: ShardReader
    unit = "patches"
    min_area = 1.0

    @property
    def source(self) -> str:
        """Where the pixels come from, in words."""
        return f"the patches in {self.train.folder}"

    def counts(self) -> dict[int, int]:
        """Return the patches of a pass by scale."""
        return visited(self.train, self.config.scales, self.config.patches_per_image)

    def draw(self, rng: np.random.Generator) -> Mapping[int, NDArray[np.int64]]:
        """Return the patches of a pass in random order."""
        return epoch_rows(self.train, rng, self.config.scales, self.config.patches_per_image)

    def load(
        self, requests: Iterator[Request], pin_memory: bool
    ) -> Generator[tuple[Request, Loaded], None, None]:
        """Read the pieces of a run ahead of their use."""
        return load_rows(self.train, requests, threads=self.config.workers, pin_memory=pin_memory)

    def evaluate(
        self,
        module: nn.Module,
        meta: WeightsMeta,
        world: World,
        device: torch.device,
        check: Callable[[], object],
    ) -> dict[str, Any]:
        """Decide on the validation images by the sum of their patches' distributions."""
        run = Distributions(module, device, meta, self.config.amp)
        figures = score_patches(
            dict.fromkeys(self.config.scales, run),
            self.val,
            world=world,
            batch_size=_eval_batch(device),
            scales=self.config.scales,
            check=check,
        )
        by_scale = {str(scale): asdict(found) for scale, found in figures.by_scale.items()}
        return {**vars(figures), "by_scale": by_scale}


@dataclass(frozen=True)
class WholeData:
    """Whole images: the crops of 224 px in the shards, or else the files they were made from.

    Attributes:
        config: seed, workers and crops.
        train: the training images.
        val: the validation images.
    """

    config: FinetuneConfig
    train: ImageSource
    val: ImageSource
    unit = "images"

    @property
    def source(self) -> str:
        """Where the pixels come from, in words."""
        return self.train.description

    @property
    def min_area(self) -> float:
        """Share of the crop that is still to be drawn: of stored crops, on the device."""
        return self.config.min_area if self.train.folder is None else 1.0

    def counts(self) -> dict[int, int]:
        """Return the images of a pass."""
        return {CROP: len(self.train)}

    def draw(self, rng: np.random.Generator) -> Mapping[int, NDArray[np.int64]]:
        """Return the images of a pass in random order."""
        return {CROP: rng.permutation(len(self.train))}

    def load(
        self, requests: Iterator[Request], pin_memory: bool
    ) -> Generator[tuple[Request, Loaded], None, None]:
        """Read the pieces of a run ahead of their use."""
        if self.train.folder is not None:
            return self._decoded(self.train.folder, requests, pin_memory)
        assert self.train.reader is not None
        return load_rows(
            self.train.reader, requests, threads=self.config.workers, pin_memory=pin_memory
        )

    def _decoded(
        self, folder: ImageFolder, requests: Iterable[Request], pin_memory: bool
    ) -> Generator[tuple[Request, Loaded], None, None]:
        config = self.config
        asked, kept = tee(requests)
        loaded = load_training_batches(
            folder,
            ((request.visit, request.rows) for request in asked),
            RandomCrop(
                CROP,
                config.min_area,
                flip=False,
                seed=config.seed,
                background=self.train.crop.background,
            ),
            workers=config.workers,
            pin_memory=pin_memory,
        )
        with closing(loaded):
            for request, batch in zip(kept, loaded, strict=True):
                if batch.bad:
                    row, reason = batch.bad[0]
                    raise DataError(
                        f"{folder.root / folder.path(row)}: cannot be read any more ({reason}), "
                        "while the shards hold its patches; restore it, or extract again"
                    )
                labels = torch.from_numpy(self.train.labels[request.rows])
                yield request, Loaded(batch.pixels, labels)

    def evaluate(
        self,
        module: nn.Module,
        meta: WeightsMeta,
        world: World,
        device: torch.device,
        check: Callable[[], object],
    ) -> dict[str, Any]:
        """Decide on the validation images as they are."""
        rows = world.share(len(self.val))
        batches = self.val.batches(rows, _eval_batch(device), pin_memory=device.type == "cuda")
        with closing(batches):
            figures = score_images(
                module, batches, device=device, meta=meta, amp=self.config.amp, check=check
            )
            return asdict(figures)
