"""What an extraction will do: its settings, images, weights and the header of its shards."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from anchorpatch.errors import SettingsError, ShardError
from anchorpatch.images.loader import Batch, load_batches
from anchorpatch.images.nvjpeg import NvJpeg
from anchorpatch.images.source import ImageSource, open_source
from anchorpatch.jobs.localizer import Localizer, resolve_engine
from anchorpatch.jobs.selection import tuned_or_begun
from anchorpatch.runtime.checkpoint import Weights, WeightsMeta, load_weights
from anchorpatch.runtime.device import cpu_count, resolve_device
from anchorpatch.runtime.distributed import Task
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import PRESETS, Computing, CropSettings, LspSettings, default_preset
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.manifest import FilesDigest, read_manifest


@dataclass(frozen=True)
class ExtractConfig(Computing):
    """What to extract, from where, to where.

    Attributes:
        data: folder that holds the split's folder or archive, or archives.
        split: name of the split.
        weights: a weights file of AnchorNet.
        out: folder that gets SPLIT/SPLIT-00000.h5, ...
        labels: CSV with the labels of a flat split folder.
        files: list of images to take instead; see `anchorpatch.images.labels.read_list`.
        only_labelled: leave out images without a label.
        unlabelled: take images without labels too; see `anchorpatch.images.source.open_source`.
        preset: a name in `anchorpatch.settings.PRESETS`; None: by the split.
        lsp: K, T and P in place of the preset's.
        patches: mean patches per image at each scale, for which P is found on a sample of the
            images, and K where that of ``lsp`` is too small.
        codec: raw, jpeg or image.
        jpeg_quality: 1 to 100, for codec jpeg.
        store_images: store the crop of each image too.
        shard_size: images in a shard.
        batch_size: images in a batch; None: 64 on CPU, 256 on a GPU, where shards of another
            batch size may differ.
        workers: decoding processes; by default one per CPU core.
        engine: auto: as the shards in ``out`` were made, else as for
            `anchorpatch.jobs.localizer.resolve_engine`.
        decoder: libjpeg, or nvjpeg for a GPU; see `anchorpatch.images.nvjpeg`.
        compile: use ``torch.compile``.
        limit: take only so many images, evenly spread over the sorted list.
        crop_mode: how images become crops; None, as for the next three: as the weights record it.
        crop_pct: share of the resized side that a crop keeps; None with another ``crop_mode``: that
            of the mode.
        img_size: side of the crops in pixels.
        background: color behind transparent pixels.
        damaged: what becomes of images that are decoded with damage, keep or skip.
        allow_empty: accept class folders without images.
        max_bad: share of unreadable images that fails the run when exceeded.
        overwrite: replace shards of other settings, weights or files instead of refusing.
        retry_skipped: read skipped and damaged images again, and make the shards again of those
            that come out otherwise now.
        repair: verify the shards that are there, and make damaged ones again.
        task: the part of the shards that this process does.
        ranks: processes of ``torchrun`` for whose parts `run` waits, to sum them up too; 1 for none
            but this one's.
    """

    data: Path
    split: str
    weights: Path
    out: Path
    labels: Path | None = None
    files: Path | None = None
    only_labelled: bool = False
    unlabelled: bool = False
    preset: str | None = None
    lsp: LspSettings | None = None
    patches: tuple[float, float, float] | None = None
    codec: str = "raw"
    jpeg_quality: int = 95
    store_images: bool = False
    shard_size: int = 1024
    batch_size: int | None = None
    workers: int = field(default_factory=cpu_count)
    decoder: str = "libjpeg"
    compile: bool = False
    limit: int | None = None
    crop_mode: str | None = None
    crop_pct: float | None = None
    img_size: int | None = None
    background: str | None = None
    damaged: str = "keep"
    allow_empty: bool = False
    max_bad: float = 0.01
    overwrite: bool = False
    retry_skipped: bool = False
    repair: bool = False
    task: Task = field(default_factory=Task)
    ranks: int = 1


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first image is decoded."""

    config: ExtractConfig
    images: ImageSource
    weights: Weights
    device: torch.device
    batch_size: int
    header: ShardHeader
    files: FilesDigest

    @property
    def out(self) -> Path:
        """Folder of the shards."""
        return self.config.out / self.config.split

    @property
    def owned(self) -> range:
        """Shards of this task."""
        task = self.config.task
        return range(task.index, len(self.files.shards), task.total)

    @property
    def overridden(self) -> str:
        """What is to be said where the crops are not those that the weights were trained for."""
        trained, taken = str(self.weights.meta.cropping), str(self.header.settings.crop)
        if trained == taken:
            return ""
        return f"the crops are {taken}, but the weights were trained for {trained}"

    def load(self, batches: Iterable[Sequence[int]], workers: int) -> Generator[Batch, None, None]:
        """Decode batches of the images, each given by its rows."""
        crop = self.header.settings.crop
        return load_batches(
            self.images,
            batches,
            workers=workers,
            crop=crop,
            pin_memory=self.device.type == "cuda",
            nvjpeg=NvJpeg(self.device, crop) if self.config.decoder == "nvjpeg" else None,
        )

    def localizer(self) -> Localizer:
        """Build the network, with the settings of the shards."""
        settings = self.header.settings
        return Localizer(
            self.weights,
            settings.lsp,
            self.device,
            settings.engine,
            settings.precision,
            side=settings.img_size,
            batch_size=self.batch_size,
            compile=settings.compile,
        )


def make_plan(
    config: ExtractConfig, reporter: Reporter | None = None, device: torch.device | None = None
) -> Plan:
    """Look at weights, images and the shards that are there, and settle what will be extracted.

    Args:
        config: what is asked for.
        reporter: where to show progress.
        device: kind of device of other machines that compute; None: this one does.

    Raises:
        AnchorpatchError: something is missing, or does not fit together.
    """
    gpus_elsewhere = device is not None and device.type == "cuda"
    if gpus_elsewhere and config.patches is not None and not torch.cuda.is_available():
        raise SettingsError(
            "--patches: this machine has no GPU to find the settings with; run anchorpatch tune "
            "on one that has, and use --coverage"
        )
    device = device or resolve_device(config.device)
    batch_size = config.batch_size or (256 if device.type == "cuda" else 64)
    weights = load_weights(config.weights)
    crop = _crop(config, weights.meta)
    if config.decoder == "nvjpeg":
        if device.type != "cuda":
            raise SettingsError(
                "--decoder nvjpeg: expected a GPU, found none; use --decoder libjpeg"
            )
        if crop.damaged == "skip":
            raise SettingsError(
                "--decoder nvjpeg: it does not tell which images are damaged, as --damaged skip "
                "must; use --decoder libjpeg"
            )
        if not gpus_elsewhere:
            NvJpeg(device, crop)  # which tries it, before anything is replaced
    images = open_source(
        config.data,
        config.split,
        config.labels,
        files=config.files,
        only_labelled=config.only_labelled,
        unlabelled=config.unlabelled,
        allow_empty=config.allow_empty,
        report=reporter,
    ).limited(config.limit)
    preset = config.preset or default_preset(config.split)
    lsp = config.lsp or PRESETS[preset]
    engine = _engine(config, device, "float32" if gpus_elsewhere else config.precision)
    if config.patches is not None:
        how = weights, (device, engine, config.precision), crop
        found = tuned_or_begun(
            config.out / config.split, images, *how, config.patches, lsp, config.workers
        )
        lsp = found.settings
        if reporter is not None and found.images:
            reporter.message(f"--patches: {found}")
    settings = ShardSettings(
        **vars(lsp),
        codec=config.codec,
        store_images=config.store_images,
        shard_size=config.shard_size,
        precision=config.precision,
        preset=preset if PRESETS[preset] == lsp else None,
        jpeg_quality=config.jpeg_quality,
        crop_mode=crop.mode,
        background=crop.background,
        damaged=crop.damaged,
        device=device.type,
        batch_size=batch_size,
        compile=config.compile,
        engine=engine,
        img_size=crop.img_size,
        crop_pct=crop.crop_pct,
        patches=config.patches,
        decoder=config.decoder,
    )
    header = ShardHeader(
        split=config.split,
        classes=images.classes,
        network_classes=weights.meta.classes,
        settings=settings,
        weights_sha256=weights.sha256,
    )
    files = files_digest(images, config.shard_size)
    return Plan(config, images, weights, device, batch_size, header, files)


def _engine(config: ExtractConfig, device: torch.device, precision: str) -> str:
    name = config.engine
    if name == "auto" and device.type == "cpu":
        with suppress(ShardError):
            begun = read_manifest(config.out / config.split).header.settings
            if begun.device != "cuda" and begun.engine == "torch":
                name = "torch"
    return resolve_engine(name, device, precision, compile=config.compile)


def _crop(config: ExtractConfig, meta: WeightsMeta) -> CropSettings:
    """Return how images become crops: as the weights record it, but for what is asked for."""
    found = replace(meta.cropping, damaged=config.damaged)
    if config.crop_mode not in (None, found.mode):
        found = replace(found, mode=config.crop_mode, crop_pct=None)
    asked = ("img_size", "crop_pct", "background")
    given = {name: value for name in asked if (value := getattr(config, name)) is not None}
    return replace(found, **given)


def files_digest(images: ImageSource, shard_size: int) -> FilesDigest:
    """Return the digests of the images of a source, in all and by shard."""
    return FilesDigest(
        count=len(images),
        sha256=images.digest(),
        shards=tuple(images.digest(i, i + shard_size) for i in range(0, len(images), shard_size)),
        paths=lambda start, stop: [images.path(i) for i in range(start, stop)],
    )
