"""Damaged image files of every format, a hundred per trial: each is decoded, to the same pixels
twice, or refused with a reason; none crashes the decoder, holds it up or takes all the memory."""

from __future__ import annotations

import os
import random
import resource
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from anchorpatch.errors import ImageError
from anchorpatch.images.decode import decode, decode_picture
from anchorpatch.settings import CropSettings
from tests.oddities import encoded, good_files, picture, transparent_files
from tests.soak.mutate import mutated, with_checksums
from tests.soak.server import Fault, Trial, in_child, soak

FILES = 100
MEMORY = 6 << 30
CPU_SECONDS = 20.0


def make_files() -> list[bytes]:
    """Return intact files of all formats and of many kinds."""
    rgb = Image.fromarray(picture(90, 120))
    kinds = ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    tiffs = [encoded(rgb, "TIFF", compression=kind) for kind in kinds]
    tiffs += [encoded(rgb.convert("1"), "TIFF", compression=kind) for kind in ("group3", "group4")]
    tiffs += [encoded(rgb.convert(mode), "TIFF") for mode in ("CMYK", "LAB", "YCbCr", "RGBA", "P")]
    webp = encoded(rgb, "WEBP", exif=Image.Exif(), icc_profile=b"x" * 99)
    files = {**good_files(), **transparent_files()}
    slow = ("long-text", "huge-aspect")
    return [d for name, d in files.items() if not name.startswith(slow)] + [*tiffs, webp]


def outcome(data: bytes, settings: CropSettings) -> str:
    """Decode, and check what comes out."""
    try:
        whole = decode_picture(data).image
        first, again = (decode(data, settings) for _ in range(2))
    except ImageError as error:
        return f"refused: {error.reason}"
    assert first.pixels.shape == (settings.img_size, settings.img_size, 3), first.pixels.shape
    assert np.array_equal(first.pixels, again.pixels), "other pixels the second time"
    assert first.size == (whole.height, whole.width), (first.size, whole.size)
    return "damaged" if first.damaged else "decoded"


def prepare(material: Path) -> Trial:
    intact = make_files()

    def trial(rng: random.Random, folder: Path) -> Counter[str]:
        files = []
        for _ in range(FILES):
            data = mutated(rng, rng.choice(intact), intact)
            files.append(with_checksums(data) if rng.random() < 0.7 else data)
        mode = rng.choice(("center", "squash", "border"))
        settings = CropSettings(img_size=111, mode=mode)
        status, sent = in_child(decoding(files, settings))
        if status:
            at = min(len([s for s in sent if not s.startswith("Traceback")]), FILES - 1)
            (folder / "file").write_bytes(files[at])
            raise Fault(f"{folder / 'file'}: status {status} ({sent[-1:]})")
        return Counter({"files": FILES, **Counter(sent)})

    return trial


def decoding(files: list[bytes], settings: CropSettings) -> Callable[[Connection], None]:
    """Return what decodes files in a process of its own."""

    def work(answers: Connection) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff has much to say
        for data in files:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            answers.send(outcome(data, settings))

    return work


if __name__ == "__main__":
    soak("images", prepare, __doc__)
