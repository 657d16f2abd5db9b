"""AnchorNet and LSP on images in memory: ``anchorpatch.localize``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from anchorpatch.demo import BUNDLED, bundled_weights
from anchorpatch.errors import DataError, ImageError, SettingsError, WeightsError
from anchorpatch.geometry import source_box
from anchorpatch.images.decode import Decoded, crop_image, decode
from anchorpatch.images.folder import read_image
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.runtime.device import resolve_device
from anchorpatch.settings import PRESETS, SCALES, CropSettings, LspSettings

#: An image: a picture of Pillow, pixels uint8 (H, W), (H, W, 3) or (H, W, 4), or a file.
ImageLike: TypeAlias = "Image.Image | NDArray[np.uint8] | str | os.PathLike[str]"


#: Images in a batch on a GPU.
_GPU_IMAGES: Final = 32


@dataclass(frozen=True, eq=False)
class LocalizedPatches:
    """The patches of one image, from the strongest to the weakest.

    Attributes:
        scale: side theta of the patches in pixels: 63, 95 or 111.
        pixels: RGB, uint8 (k, theta, theta, 3).
        corners: top-left (y, x) of each in ``crop``, int16 (k, 2).
        scores: activation of each, float32 (k,).
        boxes: x0, y0, x1, y1 of each in pixels of the image, float64 (k, 4); see
            `anchorpatch.geometry.source_box`.
        predicted: the class that AnchorNet decided on, by its name in the weights.
        probability: of this class, by the branch of the scale.
        size: height and width of the image in pixels.
        crop: the resized and cropped image that AnchorNet saw, uint8 (224, 224, 3) by default.
    """

    scale: int
    pixels: NDArray[np.uint8]
    corners: NDArray[np.int16]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float64]
    predicted: str
    probability: float
    size: tuple[int, int]
    crop: NDArray[np.uint8]

    def __len__(self) -> int:
        """Return how many patches there are."""
        return len(self.scores)

    def __repr__(self) -> str:
        return (
            f"LocalizedPatches({len(self)} of {self.scale} px, {self.predicted!r} "
            f"{self.probability:.1%})"
        )


@overload
def localize(  # type: ignore[overload-overlap]  # a name of a file is an iterable of text too
    images: ImageLike,
    weights: str | os.PathLike[str] | None = ...,
    *,
    lsp: str | LspSettings = ...,
    device: str = ...,
    engine: str = ...,
    precision: str = ...,
) -> LocalizedPatches: ...


@overload
def localize(
    images: Iterable[ImageLike],
    weights: str | os.PathLike[str] | None = ...,
    *,
    lsp: str | LspSettings = ...,
    device: str = ...,
    engine: str = ...,
    precision: str = ...,
) -> list[LocalizedPatches]: ...


def localize(
    images: Any,
    weights: str | os.PathLike[str] | None = None,
    *,
    lsp: str | LspSettings = "evaluate",
    device: str = "auto",
    engine: str = "auto",
    precision: str = "float32",
) -> LocalizedPatches | list[LocalizedPatches]:
    """Find the patches of images that carry their class.

    As `anchorpatch extract` does for files: the same transform, which the weights record, the same
    network, decision and Algorithm 1. The network of the last call is kept for the next one.

    Args:
        images: one, or any number of any sizes: pictures of Pillow of any mode, which are turned
            as their EXIF orientation says, arrays uint8 (H, W), (H, W, 3) or (H, W, 4), or files.
            An array of four dimensions (n, H, W, 3) is n images.
        weights: of AnchorNet: a file, or bundled ones: "photos", which know ten classes of
            photographs, or "demo", which know the drawn scenes of `anchorpatch demo`; None for
            ./runs/anchornet/best.safetensors.
        lsp: a preset, "figure", "finetune", "evaluate" or "dense", or K, T and P of Algorithm 1.
        device: "auto", "cpu" or "cuda".
        engine: what computes AnchorNet on a CPU: "auto", "openvino" or "torch".
        precision: "float32" or "bfloat16".

    Returns:
        The patches of the image, or a list in the order of the images.

    Raises:
        DataError: an image cannot be decoded, or is no image; names it.
        WeightsError: the weights cannot be found or read.
        SettingsError: there is no such preset, device, engine or precision.
        NonFiniteError: the network produced NaN or infinity.

    Example:
        >>> import numpy as np
        >>> picture = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
        >>> patches = localize(picture, "demo")
        >>> patches.pixels.shape == (len(patches), patches.scale, patches.scale, 3)
        True
    """
    if isinstance(lsp, str) and lsp not in PRESETS:
        raise SettingsError(f"lsp: expected one of {', '.join(PRESETS)}, got {lsp!r}")
    single = isinstance(images, Image.Image | str | os.PathLike) or (
        isinstance(images, np.ndarray) and images.ndim in (2, 3)
    )
    path = _weights_file(weights)
    try:
        info = path.stat()
        stamp = info.st_mtime_ns, info.st_size
    except OSError:
        stamp = 0, 0  # which is said below
    settings = PRESETS[lsp] if isinstance(lsp, str) else lsp
    # A forked process does not have the threads of the first one.
    localizer, crop, classes = _localizer(
        path, stamp, settings, device, engine, precision, os.getpid()
    )
    waiting = enumerate([images] if single else images)
    found: list[LocalizedPatches] = []
    while chunk := [_decoded(i, image, crop) for i, image in islice(waiting, localizer.chunk)]:
        pixels = torch.from_numpy(np.stack([decoded.pixels for decoded in chunk]))
        start = len(found)
        local = localizer.submit(pixels).result(lambda i: f"image {start + i}")  # noqa: B023
        for i, decoded in enumerate(chunk):
            scale, count = int(local.scale[i]), int(local.counts[i])
            corners = local.corners[i, :count]
            found.append(
                LocalizedPatches(
                    scale=scale,
                    pixels=np.stack(
                        [decoded.pixels[y : y + scale, x : x + scale] for y, x in corners.tolist()]
                    ),
                    corners=corners,
                    scores=local.scores[i, :count],
                    boxes=source_box(decoded.size, corners, scale, crop),
                    predicted=classes[local.predicted[i]],
                    probability=float(local.branch_prob[i, SCALES.index(scale)]),
                    size=decoded.size,
                    crop=decoded.pixels,
                )
            )
    return found[0] if single else found


def _weights_file(weights: str | os.PathLike[str] | None) -> Path:
    if weights in BUNDLED:
        return bundled_weights(str(weights))
    path = Path("runs", "anchornet", "best.safetensors") if weights is None else Path(weights)
    if weights is None and not path.is_file():
        raise WeightsError(
            f'{path} does not exist: give weights=FILE, or bundled ones: weights="photos" knows '
            'ten classes of photographs, weights="demo" the drawn scenes of `anchorpatch demo`'
        )
    return path


@lru_cache(maxsize=2)
def _localizer(
    path: Path,
    stamp: tuple[int, int],
    lsp: LspSettings,
    device: str,
    engine: str,
    precision: str,
    process: int,
) -> tuple[Localizer, CropSettings, tuple[str, ...]]:
    weights = load_weights(path)
    crop = weights.meta.cropping
    computing = resolve_device(device), engine, precision
    localizer = Localizer(weights, lsp, *computing, batch_size=_GPU_IMAGES)
    return localizer, crop, weights.meta.classes


def _decoded(index: int, image: Any, crop: CropSettings) -> Decoded:
    """Decode and crop one image.

    Raises:
        DataError: it is none, or cannot be decoded.
    """
    name = f"image {index}"
    try:
        if isinstance(image, str | os.PathLike):
            name = os.fspath(image)
            return decode(read_image(name), crop)
        if isinstance(image, np.ndarray):
            shape = image.shape
            if image.dtype != np.uint8 or not (
                (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))) and min(shape) > 0
            ):
                raise ImageError(
                    "expected pixels uint8 (H, W), (H, W, 3) or (H, W, 4), found "
                    f"{image.dtype} {shape}"
                )
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise ImageError(
                "expected a picture of Pillow, an array uint8 (H, W, 3) or a file, found "
                f"{type(image).__name__}"
            )
        return crop_image(image, crop)
    except ImageError as error:
        raise DataError(f"{name}: {error.reason}") from error
