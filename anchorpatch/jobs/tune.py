"""Choose the settings of LSP for a goal: mean numbers of patches, or a budget of GMACs.

Heatmaps of a sample of images are kept, and K, T and P are tried on them. For a budget, each patch
that any of the settings tried would take goes through the network once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.classes import AS_NAMED, Matching
from anchorpatch.errors import DataError, SettingsError
from anchorpatch.images.source import open_source, without_images
from anchorpatch.jobs.localizer import resolve_engine
from anchorpatch.jobs.looks import not_trained_on
from anchorpatch.jobs.patch_scores import Distributions
from anchorpatch.jobs.selection import (
    SAMPLE_IMAGES,
    Sample,
    Taken,
    coverage_of,
    sample_images,
    taken,
    tune_counts,
)
from anchorpatch.lsp import crop
from anchorpatch.metrics import places
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.complexity import check_sides, macs
from anchorpatch.networks import Network, best_weights, load_network
from anchorpatch.runtime.checkpoint import load_weights, read_meta
from anchorpatch.runtime.device import computing_on, cpu_count, resolve_device, to_device
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import PRESETS, SCALES, STRIDE, Computing, LspSettings
from anchorpatch.tables import Table, count, decimal, named, share, text
from anchorpatch.text import counted

#: IoU thresholds that are tried.
_THRESHOLDS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)

#: Numbers of candidates that are tried, at most.
_CANDIDATES: Final = 32

#: Patches of an image that are tried, as a multiple of what the budget affords on average.
_ROOM: Final = 2.5


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Computing):
    """What is tuned, on what.

    Attributes:
        data: folder that holds the split's folder or archive.
        split: name of the split.
        weights: of AnchorNet.
        patches: mean patches per image at each scale; None with a budget.
        budget: GMACs per image in all, which the best settings may cost; None with patches.
        network: name of the network or its weights file, for a budget.
        network_weights: as `anchorpatch.networks.load_network` takes them; None for
            RUNS/NETWORK/best.safetensors.
        runs: folder of training runs.
        matching: of the outputs of the network's weights with the classes.
        lsp: where the search for ``patches`` begins: T, and the least K.
        labels: CSV with the labels of a flat split folder.
        files: list of images to take instead.
        only_labelled: leave out images without a label.
        limit: images of the sample, evenly spread.
        batch_size: patches in a batch.
        workers: processes that decode.
    """

    data: Path
    split: str
    weights: Path
    patches: tuple[float, float, float] | None = None
    budget: float | None = None
    network: str | None = None
    network_weights: str | Path | None = None
    runs: Path = Path("runs")
    matching: Matching = AS_NAMED
    lsp: LspSettings = PRESETS["dense"]
    labels: Path | None = None
    files: Path | None = None
    only_labelled: bool = False
    limit: int = SAMPLE_IMAGES
    batch_size: int = 64
    workers: int = field(default_factory=cpu_count)


@dataclass(frozen=True)
class Tuned:
    """Settings that were found, and what they give the sample.

    Attributes:
        settings: K, T and P.
        images: of the sample, by the scale that they chose.
        mean_patches: per image, by scale; None where no image chose it.
        wanted: by scale; None for a budget.
        budget: GMACs that were asked for; None without.
        gmacs: per image in all, with AnchorNet's; None without a network.
        top1: share of images that are decided right; None without a network.
        sample: which images, in words.
    """

    settings: LspSettings
    images: dict[int, int]
    mean_patches: dict[int, float | None]
    wanted: dict[int, float] | None
    budget: float | None
    gmacs: float | None
    top1: float | None
    sample: str

    @property
    def options(self) -> dict[str, Any]:
        """The settings as options of ``extract``: name and value."""
        return {
            "max-patches": list(self.settings.max_patches),
            "iou-threshold": self.settings.iou_threshold,
            "coverage": list(self.settings.coverage),
        }

    @property
    def arguments(self) -> str:
        """The same on the command line."""
        values = {k: v if isinstance(v, list) else [v] for k, v in self.options.items()}
        return " ".join(f"--{name} {','.join(map(str, value))}" for name, value in values.items())

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {**asdict(self), "options": self.arguments}

    def table(self) -> Table:
        """Return the settings and what they give, a line for each scale."""
        each = zip(SCALES, self.settings.max_patches, self.settings.coverage, strict=True)
        rows = tuple(
            (
                text(f"{scale} px"),
                count(self.images[scale]),
                decimal(None if self.wanted is None else self.wanted[scale]),
                decimal(self.mean_patches[scale]),
                count(k),
                decimal(p, 4),
            )
            for scale, k, p in each
        )
        total = sum(self.images.values())
        found = (self.images[s] * (self.mean_patches[s] or 0.0) for s in SCALES)
        foot = (
            text("all"),
            count(total),
            text(""),
            decimal(sum(found) / total),
            text(""),
            text(""),
        )
        notes = [f"IoU threshold: {self.settings.iou_threshold}.", f"Sample: {self.sample}."]
        if self.budget is not None:
            cost, top1 = decimal(self.gmacs, 3).text, share(self.top1).text
            notes.append(
                f"{cost} GMACs per image of {self.budget:g} asked for, AnchorNet's included; top-1 "
                f"{top1} on the sample that the settings were chosen on."
            )
        columns = named("scale", "images", "patches asked", "patches", "K", "P")
        return Table("Settings of LSP", columns, rows, (foot,), tuple(notes))


def run(config: TuneConfig, reporter: Reporter | None = None) -> Tuned:
    """Find settings.

    Raises:
        DataError: there are no images, or none that the network was not trained on.
        SettingsError: the goal cannot be met.
        WeightsError: weights cannot be used.
    """
    if (config.patches is None) == (config.budget is None):
        raise SettingsError("expected one of --patches and --budget")
    report = reporter or Reporter()
    weights, device = load_weights(config.weights), resolve_device(config.device)
    images = open_source(
        config.data,
        config.split,
        config.labels,
        files=config.files,
        only_labelled=config.only_labelled,
        report=report,
    )
    engine = resolve_engine(config.engine, device, config.precision)
    sample = f"of {images.root}"
    network = None
    if config.budget is not None:
        network = _network(config, images.classes, report)
        others = "or choose a --split of other images that are not measured later"
        rows, held = not_trained_on([network], images.paths, str(images.root), others)
        images = images.taking(rows)
        sample += ", held out by finetune" if held is not None else ""
    report.message(computing_on(device, engine))
    kept: list[Tensor] = []
    computing = device, engine, config.precision
    samples, index = sample_images(
        images,
        weights,
        computing,
        weights.meta.cropping,
        config.lsp,
        config.workers,
        config.limit,
        keep=kept.append if network is not None else None,
    )
    chosen = {scale: len(found.rows) for scale, found in samples.items()}
    sample = f"{counted(len(index), 'image')} {sample}"
    if config.patches is not None:
        settings, means = tune_counts(samples, config.patches, config.lsp)
        wanted = dict(zip(SCALES, config.patches, strict=True))
        return Tuned(settings, chosen, means, wanted, None, None, None, sample)
    assert network is not None
    assert config.budget is not None
    labels = images.labels[np.array(index)].astype(np.int64)
    if absent := without_images(labels, images.classes):
        report.message(absent)
    return _search(config, config.budget, network, samples, torch.cat(kept), labels, device, sample)


def _network(config: TuneConfig, classes: tuple[str, ...], report: Reporter) -> Network:
    """Load the network that decides."""
    if config.network is None:
        raise SettingsError("--budget needs --network NAME or a file that finetune wrote")
    name, given = config.network, config.network_weights
    if given is None and (Path(name).suffix == ".safetensors" or Path(name).is_file()):
        name, given = read_meta(name).architecture, name
    weights = given or best_weights(config.runs, name)
    found = load_network(name, classes, weights, report.message, matching=config.matching)
    check_sides(name, found.module)
    return found


# --- the search ---------------------------------------------------------------------------


class _Options(NamedTuple):
    """What settings of some scales cost and give, none better at no higher cost than another.

    Attributes:
        cost: GMACs of all images (k,), rising.
        right: images that are decided right (k,), rising.
        choice: K and candidates of each scale (k, scales, 2).
    """

    cost: NDArray[np.float64]
    right: NDArray[np.int64]
    choice: NDArray[np.int64]

    def best(self) -> _Options:
        """Return those that are right more often than all that cost no more."""
        order = np.lexsort((-self.right, self.cost))
        right = self.right[order]
        before = np.concatenate(([-1], np.maximum.accumulate(right)[:-1]))
        kept = order[right > before]
        return _Options(self.cost[kept], self.right[kept], self.choice[kept])

    def joined(self, other: _Options) -> _Options:
        """Return each of these options with each of others', for the images of both."""
        a, b = (i.ravel() for i in np.indices((len(self.cost), len(other.cost))))
        cost, right = self.cost[a] + other.cost[b], self.right[a] + other.right[b]
        return _Options(cost, right, np.concatenate((self.choice[a], other.choice[b]), 1)).best()


def _search(
    config: TuneConfig,
    budget: float,
    network: Network,
    samples: Mapping[int, Sample],
    pixels: Tensor,
    labels: NDArray[np.int64],
    device: torch.device,
    sample: str,
) -> Tuned:
    """Find the settings of the best top-1 within a budget.

    Raises:
        SettingsError: the budget is below what one patch per image costs.
    """
    n, side = len(labels), pixels.shape[1]
    localizer = AnchorNet(2)  # of which the classes are no part of the cost
    own = macs(localizer, side, localizer.localize) / 1e9
    each = {scale: macs(network.module, scale) / 1e9 for scale in SCALES}
    least = own + sum(len(found.rows) * each[s] for s, found in samples.items()) / n
    if budget < least:
        raise SettingsError(
            f"--budget {budget:g}: expected at least {least:.3f} GMACs, which one patch per image "
            f"costs, AnchorNet's {own:.3f} included"
        )
    module = network.module.to(device)
    run = Distributions(module, device, network.meta, config.precision == "bfloat16")
    by_threshold: dict[float, _Options] = {}
    for scale, found in samples.items():
        if not len(found.rows):
            continue
        afforded = ceil(_ROOM * (budget - own) / each[scale])
        most = min(found.locations, max(2, afforded))
        cut = {t: taken(found, scale, t, most) for t in _THRESHOLDS}
        own_pixels, own_labels = pixels[torch.from_numpy(found.rows)], labels[found.rows]
        how = cut, found.locations, config.batch_size
        right = _decided(run, own_pixels, own_labels, scale, *how)
        for threshold, patches in cut.items():
            options = _options(patches, right[threshold], found.locations, each[scale])
            so_far = by_threshold.get(threshold)
            by_threshold[threshold] = options if so_far is None else so_far.joined(options)
    best, threshold = None, 0.0
    for t, options in by_threshold.items():
        within = int(np.searchsorted(options.cost, (budget - own) * n + 1e-9, side="right")) - 1
        if within < 0:
            continue
        key = options.right[within], -options.cost[within]
        if best is None or key > best[0]:
            best, threshold = (key, options.choice[within]), t
    assert best is not None  # one patch per image is among them
    (right_most, cost), choice = best
    base, scales = config.lsp, [s for s in SCALES if len(samples[s].rows)]
    k, p = list(base.max_patches), list(base.coverage)
    means: dict[int, float | None] = dict.fromkeys(SCALES)
    for scale, (most, candidates) in zip(scales, choice.tolist(), strict=True):
        j = SCALES.index(scale)
        k[j], p[j] = most, coverage_of(candidates, samples[scale].locations)
        patches = taken(samples[scale], scale, threshold, most)
        means[scale] = float(patches.counts(candidates, most).mean())
    settings = LspSettings((k[0], k[1], k[2]), threshold, (p[0], p[1], p[2]))
    chosen = {scale: len(found.rows) for scale, found in samples.items()}
    spent, top1 = float(-cost / n + own), float(right_most / n)
    return Tuned(settings, chosen, means, None, budget, spent, top1, sample)


def _options(patches: Taken, right: NDArray[np.bool_], locations: int, gmacs: float) -> _Options:
    """Return what each K and number of candidates costs and gives at one scale."""
    image = np.arange(len(right))
    most = right.shape[1]
    numbers = np.unique(np.geomspace(1, locations, _CANDIDATES).round().astype(np.int64))
    choices = np.array(list(product(range(1, most + 1), numbers.tolist())), np.int64)
    looks = [patches.counts(candidates, k) for k, candidates in choices.tolist()]
    cost = np.array([gmacs * each.sum() for each in looks])
    found = np.array([right[image, each - 1].sum() for each in looks])
    return _Options(cost, found, choices[:, None]).best()


@torch.inference_mode()
def _decided(
    run: Distributions,
    pixels: Tensor,
    labels: NDArray[np.int64],
    scale: int,
    cut: Mapping[float, Taken],
    locations: int,
    batch_size: int,
) -> dict[float, NDArray[np.bool_]]:
    """Return whether the first k patches of each image decide right (n, K), by IoU threshold."""
    n, side = len(labels), pixels.shape[1]
    across = side // STRIDE + 1
    keys = {
        t: (np.arange(n)[:, None] * across + found.corners[..., 0] // STRIDE) * across
        + found.corners[..., 1] // STRIDE
        for t, found in cut.items()
    }
    every = np.unique(np.concatenate([key[cut[t].ranks < locations] for t, key in keys.items()]))
    rows, place = np.divmod(every, across * across)
    corners = np.stack(np.divmod(place, across), 1) * STRIDE

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(every), batch_size):
            part = slice(start, start + batch_size)
            # So that few images go to the device.
            of, image = np.unique(rows[part], return_inverse=True)
            few = pixels[torch.from_numpy(of)].to(run.device)
            at = to_device(image.astype(np.int64), run.device)
            where = to_device(corners[part], run.device)
            yield run(crop(few, at, where, scale)).float().cpu()

    probabilities = torch.cat(list(batches()))
    decided = {}
    for t, key in keys.items():
        index = np.minimum(np.searchsorted(every, key), len(every) - 1)  # behind the last too
        right = []
        for i in range(n):
            sums = probabilities[torch.from_numpy(index[i])].double().cumsum(0)
            label = torch.full((len(sums),), int(labels[i]))
            right.append((places(sums, label) < 1).numpy())
        decided[t] = np.stack(right)
    return decided


# --- the settings file --------------------------------------------------------------------


def with_options(toml: str, table: str, options: Mapping[str, Any]) -> str:
    """Return the text of a settings file in which a table has these options.

    Other lines stay as they are.

    Raises:
        DataError: one of the options is written over several lines.

    Example:
        >>> print(with_options("[extract]", "extract", {"coverage": [0.1]}))
        [extract]
        coverage = [0.1]
    """
    lines = toml.rstrip("\n").splitlines()
    heads = [i for i, line in enumerate(lines) if line.split("#")[0].strip() == f"[{table}]"]
    new = [f"{name} = {value}" for name, value in options.items()]
    if not heads:
        return "\n".join([*lines, *([""] if lines else []), f"[{table}]", *new])
    begin = heads[0] + 1
    end = next((i for i in range(begin, len(lines)) if lines[i].lstrip()[:1] == "["), len(lines))
    kept = []
    for line in lines[begin:end]:
        name, _, value = line.partition("=")
        if name.strip().strip("\"'").replace("_", "-") in options:
            if value.count("[") != value.count("]"):
                raise DataError(
                    f"[{table}] {name.strip()}: expected the value on one line, found several; "
                    "change it by hand"
                )
        else:
            kept.append(line)
    return "\n".join([*lines[:begin], *new, *kept, *lines[end:]])
