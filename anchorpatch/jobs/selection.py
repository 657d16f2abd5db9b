"""Settings of LSP for wanted numbers of patches, found on a sample of images.

The heatmaps of the sample are kept. Algorithm 1 visits locations by falling activation and never
takes a decision back, so one run over all locations, noting at which place of that order each patch
was taken, tells the patches for every K and P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import DataError, SettingsError, ShardError
from anchorpatch.images.loader import Batch, load_batches
from anchorpatch.images.source import ImageSource, spread_rows
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.lsp import select
from anchorpatch.runtime.checkpoint import Weights
from anchorpatch.settings import SCALES, STRIDE, CropSettings, LspSettings
from anchorpatch.shards.manifest import read_manifest
from anchorpatch.text import counted

#: Images of a sample: means of patches then differ from those of the split by about 2 %.
SAMPLE_IMAGES: Final = 2000

#: Images in a batch.
_BATCH: Final = 64

#: Most patches of an image where K must be raised.
_MOST: Final = 100


@dataclass(frozen=True, eq=False)
class Sample:
    """What AnchorNet makes of images of one scale.

    Attributes:
        rows: of the images among those of the sample (n,).
        heatmaps: M of the decided class (n, H, W), float32.
    """

    rows: NDArray[np.int64]
    heatmaps: NDArray[np.float32]

    @property
    def locations(self) -> int:
        """H * W."""
        return int(np.prod(self.heatmaps.shape[1:]))


class Taken(NamedTuple):
    """The patches that Algorithm 1 takes of n images where every location is a candidate.

    Attributes:
        corners: top-left (y, x) in pixels (n, K, 2), int64.
        ranks: place of each patch in the order of falling activations, from 0 (n, K); H * W behind
            the last. A patch is taken if its rank is below the number of candidates.
    """

    corners: NDArray[np.int64]
    ranks: NDArray[np.int64]

    def counts(self, candidates: int, most: int) -> NDArray[np.int64]:
        """Return the patches of each image (n,) for a number of candidates and K."""
        found: NDArray[np.int64] = (self.ranks[:, :most] < candidates).sum(1)
        return found


def sample_heatmaps(
    localizer: Localizer,
    batches: Iterable[Batch],
    keep: Callable[[Tensor], object] | None = None,
) -> tuple[dict[int, Sample], list[int]]:
    """Run AnchorNet on batches of images.

    Returns:
        What it makes of them, by the scale that they chose; and the rows of the images in their
        source, without those that cannot be read.
    """
    rows: dict[int, list[int]] = {scale: [] for scale in SCALES}
    maps: dict[int, list[NDArray[np.float32]]] = {scale: [] for scale in SCALES}
    index: list[int] = []
    for batch in batches:
        if not len(batch.index):
            continue
        branch, heatmaps = localizer.heatmaps(batch.pixels)
        if keep is not None:
            keep(batch.pixels)
        for j, scale in enumerate(SCALES):
            chosen = np.flatnonzero(branch == j)
            rows[scale] += (chosen + len(index)).tolist()
            maps[scale].append(heatmaps[j][chosen])
        index += batch.index.tolist()
    return {s: Sample(np.array(rows[s], np.int64), np.concatenate(maps[s])) for s in SCALES}, index


def taken(sample: Sample, scale: int, iou_threshold: float, most: int) -> Taken:
    """Run Algorithm 1 on all locations of a sample's heatmaps, for up to ``most`` patches."""
    n, _, width = sample.heatmaps.shape
    patches = select(torch.from_numpy(sample.heatmaps), scale, most, iou_threshold, 1.0)
    corners = patches.corners.numpy()
    # Of equal activations the first in reading order is stronger; -0.0 is 0.0.
    order = np.argsort(-sample.heatmaps.reshape(n, -1), axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(order.shape[1])[None], 1)
    location = corners[..., 0] // STRIDE * width + corners[..., 1] // STRIDE
    ranks = np.take_along_axis(places, location, 1)
    ranks[np.arange(most) >= patches.counts.numpy()[:, None]] = order.shape[1]
    return Taken(corners, ranks)


def coverage_of(candidates: int, locations: int) -> float:
    """Return a share P, of few digits, that makes so many of the locations candidates.

    Example:
        >>> from anchorpatch.lsp import candidate_count
        >>> all(candidate_count(15, 15, coverage_of(n, 225)) == n for n in range(1, 226))
        True
        >>> coverage_of(132, 441), coverage_of(441, 441)
        (0.3005, 1.0)
    """
    return min(1.0, round((candidates + 0.5) / locations, 4))


def tune_counts(
    samples: Mapping[int, Sample], wanted: tuple[float, float, float], base: LspSettings
) -> tuple[LspSettings, dict[int, float | None]]:
    """Find P, and K where it must be larger, so that images have so many patches on average.

    Args:
        samples: by scale.
        wanted: mean patches per image at each scale.
        base: T, and the least K; P of a scale that no image chose.

    Returns:
        The settings, and the mean patches that they give; None where no image chose the scale.

    Raises:
        SettingsError: a number cannot be had at this T.
    """
    most, coverage = list(base.max_patches), list(base.coverage)
    means: dict[int, float | None] = {}
    for j, (scale, target) in enumerate(zip(SCALES, wanted, strict=True)):
        sample = samples[scale]
        means[scale] = None
        if not len(sample.rows):
            continue
        found, n = taken(sample, scale, base.iou_threshold, _MOST), len(sample.rows)
        full = np.minimum(found.counts(sample.locations, _MOST)[:, None], np.arange(1, _MOST + 1))
        # 1 % of room, so that P can decide; or the limit itself, where it is all there is.
        enough = np.flatnonzero(full.mean(0) >= min(1.01 * target, full.mean(0)[-1]))
        if target < 1 or full.mean(0)[-1] < 0.99 * target:
            advice = "an image has at least one patch" if target < 1 else "raise --iou-threshold"
            raise SettingsError(
                f"--patches: expected 1 to {full.mean(0)[-1]:.2f} at {scale} px, as all locations "
                f"of {n:,} images give at an IoU threshold of {base.iou_threshold}, got "
                f"{target:g}; {advice}"
            )
        most[j] = max(most[j], int(enough[0]) + 1)
        ranks = np.sort(found.ranks[:, : most[j]], axis=None)
        by_candidates = np.searchsorted(ranks, np.arange(1, sample.locations + 1)) / n
        best = int(np.argmin(np.abs(by_candidates - target)))
        coverage[j] = coverage_of(best + 1, sample.locations)
        means[scale] = float(by_candidates[best])
    k, p = (most[0], most[1], most[2]), (coverage[0], coverage[1], coverage[2])
    return replace(base, max_patches=k, coverage=p), means


@dataclass(frozen=True)
class TunedCounts:
    """Settings for wanted numbers of patches.

    Attributes:
        settings: K, T and P.
        means: patches per image that they give the sample, by scale; None where no image of it
            chose the scale.
        images: of the sample.
    """

    settings: LspSettings
    means: dict[int, float | None]
    images: int

    def __str__(self) -> str:
        means = "/".join("-" if mean is None else f"{mean:.2f}" for mean in self.means.values())
        return (
            f"{self.settings} gives {means} patches per image in a sample of "
            f"{counted(self.images, 'image')}"
        )


def tune_images(
    images: ImageSource,
    weights: Weights,
    computing: tuple[torch.device, str, str],
    crop: CropSettings,
    wanted: tuple[float, float, float],
    base: LspSettings,
    workers: int,
    limit: int = SAMPLE_IMAGES,
) -> TunedCounts:
    """Find settings for wanted numbers of patches on images that are evenly spread over a source.

    Args:
        images: the source.
        weights: of AnchorNet.
        computing: device, engine and precision.
        crop: how images become crops.
        wanted: as of `tune_counts`, with ``base``.
        base: K, T and P to begin with.
        workers: that decode.
        limit: images of the sample.

    Raises:
        DataError: no image can be read.
        SettingsError: as `tune_counts`.
    """
    samples, index = sample_images(images, weights, computing, crop, base, workers, limit)
    return TunedCounts(*tune_counts(samples, wanted, base), len(index))


def tuned_or_begun(
    folder: Path,
    images: ImageSource,
    weights: Weights,
    computing: tuple[torch.device, str, str],
    crop: CropSettings,
    wanted: tuple[float, float, float],
    base: LspSettings,
    workers: int,
) -> TunedCounts:
    """Return the settings of shards that were begun for the same numbers, else of `tune_images`.

    Settings of shards in ``folder`` come without a sample.
    """
    with suppress(ShardError):
        begun = read_manifest(folder).header
        then, asked = begun.settings, (wanted, base.max_patches, base.iou_threshold, weights.sha256)
        if asked == (then.patches, then.max_patches, then.iou_threshold, begun.weights_sha256):
            return TunedCounts(then.lsp, dict.fromkeys(SCALES), 0)
    return tune_images(images, weights, computing, crop, wanted, base, workers)


def sample_images(
    images: ImageSource,
    weights: Weights,
    computing: tuple[torch.device, str, str],
    crop: CropSettings,
    base: LspSettings,
    workers: int,
    limit: int = SAMPLE_IMAGES,
    keep: Callable[[Tensor], object] | None = None,
) -> tuple[dict[int, Sample], list[int]]:
    """Run AnchorNet on images that are evenly spread over a source; see `sample_heatmaps`.

    ``keep`` gets the pixels of each batch that can be read, uint8 (n, S, S, 3).

    Raises:
        DataError: no image can be read.
    """
    rows = spread_rows(len(images), limit).tolist()
    parts = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
    loaded = load_batches(images, parts, workers=min(workers, len(parts)), crop=crop)
    localizer = Localizer(weights, base, *computing, side=crop.img_size, batch_size=_BATCH)
    with localizer, closing(loaded):
        samples, index = sample_heatmaps(localizer, loaded, keep)
    if not index:
        raise DataError(f"{images.root}: none of {len(rows):,} images tried can be read")
    return samples, index
