"""From a picture to the crop that AnchorNet sees, and from the patches back to the picture.

Sizes and offsets are rounded as by torchvision and timm. Everything that speaks of where a patch
lies in its picture asks `source_box`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anchorpatch.settings import CropSettings


class Geometry(NamedTuple):
    """Size of the resized image and corner of the crop in it, in pixels.

    ``top`` and ``left`` are negative where the crop is larger than the resized image, which mode
    ``border`` puts into its middle.
    """

    height: int
    width: int
    top: int
    left: int


@lru_cache(1 << 14)  # a data set has few sizes, and many images of each
def geometry(height: int, width: int, crop: CropSettings | None = None) -> Geometry:
    """Return how an image of ``height`` x ``width`` px is resized and cropped.

    Args:
        height: of the image in pixels, after EXIF orientation.
        width: of the image in pixels.
        crop: mode, side of the crop, and the share of the resized side that it keeps; None for
            the defaults.

    Example:
        >>> geometry(375, 500)
        Geometry(height=256, width=341, top=16, left=58)
        >>> geometry(375, 500, CropSettings("squash"))
        Geometry(height=224, width=224, top=0, left=0)
        >>> geometry(375, 500, CropSettings("border"))
        Geometry(height=168, width=224, top=-28, left=0)
    """
    crop = crop or CropSettings()
    side = crop.resize
    if crop.mode == "squash":
        h = w = side
    elif crop.mode == "border":
        ratio = max(height / side, width / side)
        h, w = (max(1, round(length / ratio)) for length in (height, width))
    elif height <= width:
        h, w = side, int(side * width / height)
    else:
        h, w = int(side * height / width), side
    top, left = (_offset(length, crop.img_size) for length in (h, w))
    return Geometry(h, w, top, left)


def _offset(length: int, size: int) -> int:
    """Return where a crop of ``size`` begins in the middle of ``length``, as timm rounds it."""
    return -((size - length) // 2) if length < size else round((length - size) / 2)


def source_box(
    size: ArrayLike, corner: ArrayLike, theta: int, crop: CropSettings
) -> NDArray[np.float64]:
    """Return the boxes of patches in pixels of the pictures that they were cut from.

    Args:
        size: height and width of each patch's picture (m, 2), or of the one picture (2,), in
            pixels, after EXIF orientation.
        corner: top-left (y, x) of each patch in the crop (m, 2), in pixels.
        theta: side of the patches in the crop, in pixels.
        crop: how the pictures became crops.

    Returns:
        x0, y0, x1, y1 of each patch (m, 4), float64, exact and not rounded: distances from the left
        and upper edge of the picture as it is looked at, turned as its EXIF orientation says (by
        Pillow, ``ImageOps.exif_transpose``). Pixel i reaches from i to i + 1, so that a box of
        whole numbers is what ``Image.crop`` takes. Boxes are not clipped: those of patches that
        show some of the border of mode ``border`` reach outside the picture.

    Example:
        >>> source_box((375, 500), [[0, 0], [16, 160]], 63, CropSettings("squash")).round(1)
        array([[  0. ,   0. , 140.6, 105.5],
               [357.1,  26.8, 497.8, 132.3]])
    """
    corners = np.asarray(corner).reshape(-1, 2)
    sizes = np.broadcast_to(np.asarray(size), corners.shape)
    distinct, of_patch = np.unique(sizes, axis=0, return_inverse=True)
    found = [geometry(h, w, crop) for h, w in distinct.tolist()]
    # (m, 2) as (y, x): size of the resized picture, and the crop's place in it.
    resized, place = (
        np.array(found, np.float64).reshape(-1, 2, 2)[of_patch.reshape(-1)].swapaxes(0, 1)
    )
    first = (corners + place) * sizes / resized
    last = (corners + place + theta) * sizes / resized
    return np.concatenate((first[:, ::-1], last[:, ::-1]), axis=1)
