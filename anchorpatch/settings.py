"""Constants and settings that the whole package shares. Nothing here needs torch or HDF5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from anchorpatch.errors import SettingsError

#: Side theta of the patches of each branch, in pixels: the receptive fields of Table 2.
SCALES: Final = (63, 95, 111)

#: Distance of neighboring patches in pixels: the accumulated stride of every branch.
STRIDE: Final = 8

#: Side of the crop that AnchorNet sees, in pixels.
CROP: Final = 224

#: Short side of an image from which the center crop is taken, in pixels.
RESIZE: Final = 256

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

#: Types that AnchorNet computes in.
PRECISIONS: Final = ("float32", "bfloat16")

#: What computes them. OpenVINO is for CPUs.
ENGINES: Final = ("torch", "openvino")

#: timm's names. ``center``: resize the short side to 256 px, then take the center crop of 224 px,
#: which is the usual validation transform of ImageNet. ``squash``: resize both sides to 224 px
#: whatever the aspect ratio, as the paper does.
CROP_MODES: Final = ("center", "squash")

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
    """How an image file becomes the 224 px crop that AnchorNet sees.

    Attributes:
        mode: one of `CROP_MODES`.
        background: color behind transparent pixels. Pillow's color names and notations are
            accepted; kept as ``#rrggbb``.
        damaged: one of `DAMAGED`.

    Raises:
        SettingsError: a value that is not one of these.

    Example:
        >>> CropSettings(background="black").background
        '#000000'
    """

    mode: str = "center"
    background: str = "#ffffff"
    damaged: str = "keep"

    def __post_init__(self) -> None:
        # Here, as the command line reads this module before it knows what it will need.
        from PIL import ImageColor

        for name, value, known in (
            ("crop-mode", self.mode, CROP_MODES),
            ("damaged", self.damaged, DAMAGED),
        ):
            if value not in known:
                raise SettingsError(f"--{name}: expected one of {', '.join(known)}, got {value!r}")
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
#: paper does not print what gave its 5.6, 2.9 and 2.1 patches per image.
PRESETS: Final = {
    "figure": LspSettings((5, 3, 2), 0.3, (0.05, 0.04, 0.03)),
    "finetune": LspSettings((24, 10, 8), 0.8, (0.3, 0.3, 0.3)),
    "evaluate": LspSettings((24, 10, 8), 0.3, (0.3, 0.3, 0.3)),
}


def default_preset(split: str) -> str:
    """Return the preset for a split: many patches to train on, fewer to evaluate.

    Example:
        >>> default_preset("train"), default_preset("val")
        ('finetune', 'evaluate')
    """
    return "finetune" if split == "train" else "evaluate"
