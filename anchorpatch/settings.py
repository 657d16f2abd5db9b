"""Constants and settings that the whole package shares. Nothing here needs torch or HDF5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from anchorpatch.errors import SettingsError

#: Side theta of the patches of each branch, in pixels: the receptive fields of Table 2.
SCALES: Final = (63, 95, 111)

#: Distance of neighboring patches in pixels: the accumulated stride of every branch.
STRIDE: Final = 8

#: Side of the crop that AnchorNet sees, in pixels: the paper's, and the default.
CROP: Final = 224

#: Smallest and largest side of a crop, in pixels: one location of the largest scale, and what the
#: corners of patches can say in shards.
CROP_SIDES: Final = (max(SCALES), 32_767)

#: What `anchorpatch train` trains, and the side of the largest patch that one location sees, in
#: pixels.
ARCHITECTURES: Final[Mapping[str, int]] = {
    "anchornet": 111,
    "bagnet33": 33,
    "bagnet77": 77,
    "saccader": 77,
}

#: How shards store patches. ``raw``: the pixels of each patch. ``jpeg``: each patch as a JPEG
#: file. ``image``: each crop once and no pixels of patches; the reader cuts them.
CODECS: Final = ("raw", "jpeg", "image")

#: What the patches of shards can be exported as.
EXPORT_FORMATS: Final = ("folder", "webdataset", "csv", "parquet")

#: Types that AnchorNet computes in.
PRECISIONS: Final = ("float32", "bfloat16")

#: What computes them. OpenVINO is for CPUs.
ENGINES: Final = ("torch", "openvino")

#: What decodes JPEGs for an extraction. nvJPEG is for GPUs.
DECODERS: Final = ("libjpeg", "nvjpeg")

#: How images become crops, by timm's names, and which share of the resized side a crop keeps by
#: default. ``center``: resize the short side, then take the center crop, which is the usual
#: validation transform of ImageNet (256 and 224 px). ``squash``: resize both sides to one length,
#: whatever the aspect ratio, as the paper does. ``border``: resize the long side, and put what is
#: missing of the square around it in the background color. timm takes 0.875 for all of them, which
#: cuts a margin off where the mode is chosen to keep all of the image.
CROP_PCT: Final[Mapping[str, float]] = {"center": 0.875, "squash": 1.0, "border": 1.0}
CROP_MODES: Final = tuple(CROP_PCT)

#: How the confidence of a decision is measured, and the thresholds of a curve.
CONFIDENCES: Final = ("max", "margin", "entropy")
THRESHOLDS: Final = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)

#: What becomes of an image that can only be decoded with damage.
DAMAGED: Final = ("keep", "skip")


@dataclass(frozen=True, kw_only=True)
class Computing:
    """By what AnchorNet is computed; part of the settings of each job that runs it.

    Attributes:
        device: auto, cpu or cuda.
        engine: for CPUs: auto, or one of `ENGINES`.
        precision: one of `PRECISIONS`, of AnchorNet and of the network that decides.
    """

    device: str = "auto"
    engine: str = "auto"
    precision: str = "float32"


@dataclass(frozen=True)
class CropSettings:
    """How an image file becomes the crop that AnchorNet sees; see `anchorpatch.geometry`.

    Attributes:
        mode: one of `CROP_MODES`.
        background: color behind transparent pixels, and of the border of mode ``border``. Pillow's
            color names and notations are accepted; kept as ``#rrggbb``.
        damaged: one of `DAMAGED`.
        img_size: side of the crop in pixels, within `CROP_SIDES`.
        crop_pct: share of the resized side that the crop keeps, 0.1 to 1; None, and kept as None,
            for that of the mode in `CROP_PCT`.

    Raises:
        SettingsError: a value that is not one of these.

    Example:
        >>> CropSettings(background="black").background
        '#000000'
        >>> print(CropSettings(), CropSettings("squash", img_size=256), sep=" | ")
        center, short side 256 px, crop 224 px | squash, both sides 256 px
    """

    mode: str = "center"
    background: str = "#ffffff"
    damaged: str = "keep"
    img_size: int = CROP
    crop_pct: float | None = None

    @property
    def resize(self) -> int:
        """Length in pixels to which a side is resized: the short one, both or the long one."""
        return math.floor(self.img_size / (self.crop_pct or CROP_PCT[self.mode]))

    def __str__(self) -> str:
        sides = {"center": "short side", "squash": "both sides", "border": "long side"}
        resized = f"{self.mode}, {sides[self.mode]} {self.resize} px"
        return f"{resized}, crop {self.img_size} px" if self.resize > self.img_size else resized

    def __post_init__(self) -> None:
        # Here, as the command line reads this module before it knows what it will need.
        from PIL import ImageColor

        for name, value, known in (
            ("crop-mode", self.mode, CROP_MODES),
            ("damaged", self.damaged, DAMAGED),
        ):
            if value not in known:
                raise SettingsError(f"--{name}: expected one of {', '.join(known)}, got {value!r}")
        low, high = CROP_SIDES
        if not low <= self.img_size <= high:
            raise SettingsError(
                f"--img-size: expected {low} to {high:,} px, as the largest patch has {low} px, "
                f"got {self.img_size:,}"
            )
        if self.crop_pct is not None and not 0.1 <= self.crop_pct <= 1:
            raise SettingsError(f"--crop-pct: expected a number from 0.1 to 1, got {self.crop_pct}")
        if self.crop_pct == CROP_PCT[self.mode]:
            object.__setattr__(self, "crop_pct", None)
        try:
            red, green, blue, *alpha = ImageColor.getrgb(self.background)
        except (ValueError, AttributeError, TypeError):
            alpha = [0]
        if alpha and alpha != [255]:
            raise SettingsError(
                f"--background: expected an opaque color such as white or #rrggbb, "
                f"got {self.background!r}"
            )
        object.__setattr__(self, "background", f"#{red:02x}{green:02x}{blue:02x}")


@dataclass(frozen=True)
class LspSettings:
    """The parameters of Algorithm 1, one value for each scale where the paper has one.

    Attributes:
        max_patches: K, the most patches an image may have.
        iou_threshold: T; a patch is taken while its IoU with every taken patch is below it.
        coverage: P, the share of all locations that are candidates, in (0, 1].

    Raises:
        SettingsError: a value outside its range.

    Example:
        >>> print(LspSettings((5, 3, 2), 0.3, (0.05, 0.04, 0.03)))
        K 5/3/2, T 0.3, P 0.05/0.04/0.03
    """

    max_patches: tuple[int, int, int]
    iou_threshold: float
    coverage: tuple[float, float, float]

    def __str__(self) -> str:
        k, p = "/".join(map(str, self.max_patches)), "/".join(map(str, self.coverage))
        return f"K {k}, T {self.iou_threshold}, P {p}"

    def __post_init__(self) -> None:
        if len(self.max_patches) != len(SCALES) or min(self.max_patches) < 1:
            raise SettingsError(
                f"max_patches: expected {len(SCALES)} whole numbers of at least 1, "
                f"one for each scale, got {self.max_patches}"
            )
        if not 0 <= self.iou_threshold <= 1:
            raise SettingsError(
                f"iou_threshold: expected a number from 0 to 1, got {self.iou_threshold}"
            )
        if len(self.coverage) != len(SCALES) or not all(0 < p <= 1 for p in self.coverage):
            raise SettingsError(
                f"coverage: expected {len(SCALES)} shares above 0 and up to 1, "
                f"one for each scale, got {self.coverage}"
            )


#: ``figure`` and ``finetune`` are the two settings of section 4.1. ``evaluate`` is ours: the
#: paper does not print what gave its 5.6, 2.9 and 2.1 patches per image, and these were the best of
#: about as many (examples/results.md). ``dense`` has twice as many.
PRESETS: Final = {
    "figure": LspSettings((5, 3, 2), 0.3, (0.05, 0.04, 0.03)),
    "finetune": LspSettings((24, 10, 8), 0.8, (0.3, 0.3, 0.3)),
    "evaluate": LspSettings((6, 3, 2), 0.3, (0.3, 0.3, 0.3)),
    "dense": LspSettings((24, 10, 8), 0.3, (0.3, 0.3, 0.3)),
}


def default_preset(split: str) -> str:
    """Return the preset for a split: many patches to train on, fewer to evaluate.

    Example:
        >>> default_preset("train"), default_preset("val")
        ('finetune', 'evaluate')
    """
    return "finetune" if split == "train" else "evaluate"
