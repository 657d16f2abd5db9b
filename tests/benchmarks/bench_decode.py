"""Compare ways to decode JPEG photographs: ``python -m tests.benchmarks.bench_decode FOLDER``.

CPU time of one thread, from the bytes in memory to the uint8 crop of 224 x 224. The ways take
turns within each round, so that a change of the machine's clock meets all of them; the best
round counts. The ratio is to the way that `anchorpatch.images.decode` takes for a JPEG.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode
from torchvision.io import decode_jpeg as decode_by_torchvision
from torchvision.transforms.v2 import functional as F

from anchorpatch.images import decode as ours
from anchorpatch.settings import CROP, CropSettings

Way = Callable[[bytes], object]

RESIZE = 256


def _pillow_box(data: bytes) -> object:
    with Image.open(BytesIO(data)) as image:
        return ours._resized(ours._load_upright(image, "#ffffff"), CropSettings())


def _pillow_v2(data: bytes) -> object:
    with Image.open(BytesIO(data)) as image:
        resized = F.resize(image.convert("RGB"), [RESIZE], antialias=True)
    return np.asarray(F.center_crop(resized, [CROP]))


def _pillow_then_torch(data: bytes) -> object:
    with Image.open(BytesIO(data)) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return F.center_crop(F.resize(pixels, [RESIZE], antialias=True), [CROP])


def _torchvision_only(data: bytes) -> torch.Tensor:
    encoded = torch.frombuffer(data, dtype=torch.uint8)
    pixels: torch.Tensor = decode_by_torchvision(encoded, ImageReadMode.RGB)
    return pixels


def _torchvision_v2(data: bytes) -> object:
    return F.center_crop(F.resize(_torchvision_only(data), [RESIZE]), [CROP])


def _simplejpeg_only(data: bytes) -> object:
    return ours.decode_jpeg(data, "RGB")


def _simplejpeg_then_box(data: bytes) -> object:
    return ours._resized(Image.fromarray(ours.decode_jpeg(data, "RGB")), "center")


def _pillow_only(data: bytes) -> object:
    with Image.open(BytesIO(data)) as image:
        return image.convert("RGB")


def _pillow_draft(data: bytes) -> object:
    with Image.open(BytesIO(data)) as image:
        image.draft("RGB", (RESIZE, RESIZE))
        return ours._resized(image.convert("RGB"), "center")


WAYS: dict[str, Way] = {
    "simplejpeg, v2 resize (decode.py, JPEG)": ours.decode,
    "simplejpeg, Pillow resize with box": _simplejpeg_then_box,
    "torchvision, v2 resize": _torchvision_v2,
    "Pillow, resize with box (decode.py, other)": _pillow_box,
    "Pillow, v2 resize of a tensor": _pillow_then_torch,
    "Pillow, v2 resize and crop of the image": _pillow_v2,
    "Pillow, draft: other pixels": _pillow_draft,
    "simplejpeg, decoding alone": _simplejpeg_only,
    "torchvision, decoding alone": _torchvision_only,
    "Pillow, decoding alone": _pillow_only,
}


def measure(files: list[bytes], rounds: int) -> dict[str, float]:
    """Return the CPU time of each way in seconds an image."""
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for name, way in WAYS.items():
            start = time.process_time()
            for data in files:
                way(data)
            best[name] = min(best[name], (time.process_time() - start) / len(files))
    return best


def table(best: dict[str, float]) -> str:
    """Format the times as lines of ``way, ms an image, ratio``."""
    first = next(iter(best.values()))
    return "\n".join(
        f"{name:44} {seconds * 1e3:6.2f} ms  {seconds / first:5.2f}"
        for name, seconds in best.items()
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="searched for .JPEG, .jpg and .jpeg")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(
        path
        for path in arguments.folder.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg") and path.is_file()
    )[: arguments.images]
    if not paths:
        parser.error(f"{arguments.folder}: no JPEG file below it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's decoders are deprecated
        best = measure([path.read_bytes() for path in paths], arguments.rounds)
    print(f"{len(paths)} images, best of {arguments.rounds} rounds, CPU time of one thread")
    print(table(best))


if __name__ == "__main__":
    main()
