"""What a network is fine-tuned and measured on: patches, or the whole images for comparison."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import tee
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from anchorpatch.errors import DataError
from anchorpatch.images.crops import RandomCrop, load_training_batches
from anchorpatch.images.folder import ImageFolder
from anchorpatch.jobs.crops import ImageSource
from anchorpatch.jobs.finetuning.config import FinetuneConfig
from anchorpatch.jobs.finetuning.plan import Request
from anchorpatch.jobs.patch_scores import Distributions, score_images, score_patches
from anchorpatch.runtime.checkpoint import WeightsMeta
from anchorpatch.runtime.distributed import World
from anchorpatch.settings import CROP
from anchorpatch.shards.dataset import Loaded, epoch_rows, load_rows, visited
from anchorpatch.shards.reader import ShardReader

__all__ = ["Data", "PatchData", "WholeData"]


class Data(Protocol):
    """Training and validation data of a run."""

    #: What rows are, in the plural.
    unit: str

    @property
    def source(self) -> str:
        """Where the pixels come from, for people."""

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
        config: scales, patches an image, threads.
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
        """Where the pixels come from, for people."""
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
        """Where the pixels come from, for people."""
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
