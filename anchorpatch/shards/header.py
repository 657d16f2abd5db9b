"""What the shards of a split have in common: the settings that decide their bytes, and the rest.

Two of them are compared here in the words of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import anchorpatch
from anchorpatch.errors import SettingsError, ShardError
from anchorpatch.settings import (
    CODECS,
    CROP,
    DECODERS,
    ENGINES,
    PRECISIONS,
    PRESETS,
    CropSettings,
    LspSettings,
)
from anchorpatch.storage import from_json, to_json

#: Settings that the first shards of version 1 do not have; their defaults are what held then.
_NEWER: Final = frozenset(
    {"crop_mode", "background", "damaged", "device", "batch_size", "compile", "engine"}
    | {"img_size", "crop_pct", "patches", "decoder"}
)

#: Settings that shards do not mention by default.
_UNSAID: Final = (
    *(("engine", "torch"), ("img_size", CROP), ("crop_pct", None), ("patches", None)),
    ("decoder", "libjpeg"),
)

#: Settings that a preset decides.
_OF_A_PRESET: Final = ("max_patches", "iou_threshold", "coverage")


@dataclass(frozen=True)
class ShardSettings:
    """Everything that decides the bytes of a shard beside the images and the weights.

    Workers and processes are not among it.

    Attributes:
        max_patches: K of Algorithm 1 for each scale.
        iou_threshold: T of Algorithm 1.
        coverage: P of Algorithm 1 for each scale.
        codec: one of `anchorpatch.settings.CODECS`.
        store_images: store the crop of each image; always true for codec ``image``.
        shard_size: images in a shard.
        precision: one of `anchorpatch.settings.PRECISIONS`, the type that AnchorNet computed in.
        preset: name of the preset that K, T and P came from, if any.
        jpeg_quality: 1 to 100; without meaning, and 95, for the other codecs.
        crop_mode: as the fields below, of `anchorpatch.settings.CropSettings`.
        background: color behind transparent pixels.
        damaged: what became of images that were decoded with damage.
        device: kind of device that AnchorNet ran on, "cpu" or "cuda"; None where an older version
            did not record it.
        batch_size: images in a batch on a GPU, whose kernels sum in another order for other
            shapes; None on CPU, where it changes nothing.
        compile: AnchorNet ran through ``torch.compile``.
        engine: what computed AnchorNet's features, one of `anchorpatch.settings.ENGINES`.
        img_size: side of the crops in pixels, as ``crop_pct`` of `CropSettings`.
        crop_pct: share of the resized side that crops keep; None for that of the mode.
        patches: mean patches per image at each scale that P, and K, were chosen for; None where
            they were given.
        decoder: what decoded most JPEGs, one of `anchorpatch.settings.DECODERS`.

    Raises:
        SettingsError: a value outside its range.

    Example:
        >>> ShardSettings((1, 1, 1), 0.3, (0.1, 0.1, 0.1), codec="image").store_images
        True
    """

    max_patches: tuple[int, int, int]
    iou_threshold: float
    coverage: tuple[float, float, float]
    codec: str = "raw"
    store_images: bool = False
    shard_size: int = 1024
    precision: str = "float32"
    preset: str | None = None
    jpeg_quality: int = 95
    crop_mode: str = "center"
    background: str = "#ffffff"
    damaged: str = "keep"
    device: str | None = None
    batch_size: int | None = None
    compile: bool = False
    engine: str = "torch"
    img_size: int = CROP
    crop_pct: float | None = None
    patches: tuple[float, float, float] | None = None
    decoder: str = "libjpeg"

    @property
    def lsp(self) -> LspSettings:
        """The parameters of Algorithm 1."""
        return LspSettings(self.max_patches, self.iou_threshold, self.coverage)

    @property
    def crop(self) -> CropSettings:
        """How the images became crops."""
        return CropSettings(
            self.crop_mode, self.background, self.damaged, self.img_size, self.crop_pct
        )

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("codec", self.codec in CODECS, f"one of {', '.join(CODECS)}"),
            ("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            ("shard_size", self.shard_size >= 1, "at least 1 image"),
            ("jpeg_quality", 1 <= self.jpeg_quality <= 100, "1 to 100"),
            ("engine", self.engine in ENGINES, f"one of {', '.join(ENGINES)}"),
            ("decoder", self.decoder in DECODERS, f"one of {', '.join(DECODERS)}"),
            ("device", self.device in (None, "cpu", "cuda"), "cpu or cuda"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "at least 1 image"),
        ):
            if not fits:
                raise SettingsError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        # One spelling for one meaning, so that equal shards have equal settings.
        object.__setattr__(self, "background", self.crop.background)
        object.__setattr__(self, "crop_pct", self.crop.crop_pct)
        if self.device != "cuda":
            object.__setattr__(self, "batch_size", None)
        if self.codec == "image":
            object.__setattr__(self, "store_images", True)
        if self.codec != "jpeg":
            object.__setattr__(self, "jpeg_quality", 95)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as shards have them; the newest go unsaid by default."""
        data: dict[str, Any] = to_json(self)
        for name, default in _UNSAID:
            if data[name] == default:
                del data[name]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShardSettings:
        """Return settings from JSON, where all that format 1 began with must be there.

        Raises:
            ShardError: a field is missing, or one is there that this version does not know.
            ValueError: a value is of another type, or outside its range.
        """
        names = {field.name for field in fields(cls)}
        if odd := (names ^ data.keys()) - (_NEWER - data.keys()):
            raise ShardError(
                "settings: expected exactly the fields of format 1, differs: "
                + ", ".join(sorted(odd))
            )
        found = from_json(cls, data)
        if found.preset == "evaluate" and found.lsp == PRESETS["dense"]:  # its first name
            return replace(found, preset="dense")
        return found


@dataclass(frozen=True)
class ShardHeader:
    """What the shards of a split have in common: the attributes of each file.

    Attributes:
        split: name of the split, and of its folder.
        classes: the folders; ``label`` indexes it.
        network_classes: the weights' classes; ``predicted`` and ``branch_class`` index it.
        settings: what decides the bytes.
        weights_sha256: of the weights file.
        version: of anchorpatch.
    """

    split: str
    classes: tuple[str, ...]
    network_classes: tuple[str, ...]
    settings: ShardSettings
    weights_sha256: str
    version: str = anchorpatch.__version__


def extract_options(header: ShardHeader) -> list[str]:
    """Return the options of ``anchorpatch extract`` that a split was made with.

    What is as by default is left out, and so are the data and the weights, whose place a header
    does not know.

    Example:
        >>> settings = ShardSettings((6, 3, 2), 0.3, (0.3, 0.3, 0.3), codec="jpeg", preset=None)
        >>> " ".join(extract_options(ShardHeader("val", (), (), settings, "")))
        '--split val --max-patches 6,3,2 --iou-threshold 0.3 --coverage 0.3,0.3,0.3 --codec jpeg'
    """
    settings = header.settings
    implied = {*(_OF_A_PRESET if settings.preset is not None else ())}
    implied |= {"store_images"} if settings.codec == "image" else set()
    implied |= {"coverage"} if settings.patches is not None else set()  # which are found again
    defaults = {field.name: field.default for field in fields(settings)}
    if settings.device == "cpu":
        defaults["engine"] = "auto"
    words = ["--split", header.split]
    for name, value in to_json(settings).items():
        if name in implied or value == defaults[name]:
            continue
        words.append(_option(name))
        if value is not True:
            words.append(_shown(value))
    return words


def header_differences(old: ShardHeader, new: ShardHeader) -> list[str]:
    """Say what differs in two headers, one phrase each; the version of anchorpatch may.

    Example:
        >>> from dataclasses import replace
        >>> settings = ShardSettings((1, 1, 1), 0.3, (0.1, 0.1, 0.1))
        >>> old = ShardHeader("val", ("cat",), ("cat",), settings, weights_sha256="0" * 64)
        >>> header_differences(old, replace(old, settings=replace(settings, iou_threshold=0.8)))
        ['--iou-threshold was 0.3, now 0.8']
    """
    found = []
    then, now = to_json(old.settings), to_json(new.settings)
    if then["device"] is None and now["device"] == "cpu":
        # Not recorded by older versions, whose bytes on a CPU are the same. On a GPU they are not:
        # convolutions were rounded to TF32.
        then["device"] = "cpu"
    if then["device"] != now["device"]:
        then["device"] = then["device"] or "not recorded"
        then["batch_size"] = now["batch_size"]  # goes with the device
    for name, before in then.items():
        if before != now[name]:
            found.append(f"{_option(name)} was {_shown(before)}, now {_shown(now[name])}")
    if old.split != new.split:
        found.append(f"--split was {old.split}, now {new.split}")
    if old.weights_sha256 != new.weights_sha256:
        was, is_now = old.weights_sha256[:12], new.weights_sha256[:12]
        found.append(f"--weights had SHA-256 {was}..., now {is_now}...")
    for what, was_list, now_list in (
        ("classes of the folder", old.classes, new.classes),
        ("classes of the weights", old.network_classes, new.network_classes),
    ):
        if was_list != now_list:
            counts = f"{what} were {len(was_list)}, now {len(now_list)}"
            found.append(f"{counts} ({first_difference(was_list, now_list)})")
    return found


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def first_difference(was: Sequence[str], now: Sequence[str]) -> str:
    """Say the first of each list that the other one lacks."""
    known, present = set(was), set(now)
    gone = next((x for x in was if x not in present), None)
    come = next((x for x in now if x not in known), None)
    parts = [f"{gone} removed"] if gone is not None else []
    parts += [f"{come} added"] if come is not None else []
    return ", ".join(parts) or "in another order"
