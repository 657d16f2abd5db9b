"""Settings that several parts of the package share. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from PIL import ImageColor

from anchorpatch.errors import SettingsError

__all__ = ["CROP_MODES", "DAMAGED", "CropSettings"]

#: timm's names. ``center``: resize the short side to 256 px, then take the centre crop of 224 px,
#: which is the usual validation transform of ImageNet. ``squash``: resize both sides to 224 px
#: whatever the aspect ratio, as the paper does.
CROP_MODES: Final = ("center", "squash")

#: What becomes of an image that can only be decoded with damage.
DAMAGED: Final = ("keep", "skip")


@dataclass(frozen=True)
class CropSettings:
    """How an image file becomes the 224 px crop that AnchorNet sees.

    Attributes:
        mode: one of `CROP_MODES`.
        background: colour behind transparent pixels. Pillow's colour names and notations are
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
                f"--background: expected an opaque colour such as white or #rrggbb, "
                f"got {self.background!r}"
            )
        object.__setattr__(self, "background", f"#{red:02x}{green:02x}{blue:02x}")
