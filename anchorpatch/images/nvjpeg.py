"""JPEGs decoded and cropped on a GPU: by nvJPEG, which torchvision comes with.

The workers read the files, and decode those that nvJPEG would not decode as libjpeg does
(`anchorpatch.images.decode.size_for_nvjpeg`). Pixels differ a little from libjpeg's, since nvJPEG
interpolates color otherwise, and it does not tell of corrupt data within a file.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from anchorpatch.errors import ImageError, SettingsError
from anchorpatch.images.decode import crop_tensor, decode
from anchorpatch.images.loader import Batch, Piece, Pieces, unpacked
from anchorpatch.settings import CropSettings
from anchorpatch.signals import shut_down, waiting_for


class NvJpeg:
    """Decodes on a GPU, a batch ahead, in a thread and on a stream of its own.

    Args:
        device: the GPU. On a CPU, torchvision's libjpeg does the same.
        crop: how an image becomes a crop.

    Raises:
        SettingsError: torchvision has no nvJPEG, or this GPU cannot run it.
    """

    def __init__(self, device: torch.device, crop: CropSettings) -> None:
        self.device, self.crop, self._gpu = device, crop, device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if self._gpu:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        file = BytesIO()
        Image.new("RGB", (64, 64)).save(file, "JPEG")
        try:
            with self._on_stream():
                self._decode([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)])
        except RuntimeError as error:
            raise SettingsError(
                f"--decoder nvjpeg: this torchvision cannot decode on {device}: "
                f"{str(error).splitlines()[0]}; use --decoder libjpeg"
            ) from error

    def batches(self, pieces_of_batches: Pieces) -> Generator[Batch, None, None]:
        """Yield batches of packed pieces, whose pixels are in page-locked memory.

        Raises:
            AnchorpatchError: while iterating, as `anchorpatch.images.loader.serve_batches`.
        """
        pool, ahead = ThreadPoolExecutor(1), deque[Future[Batch]]()
        try:
            with closing(pieces_of_batches):
                for pieces in pieces_of_batches:
                    ahead.append(pool.submit(self._batch, pieces.copy()))
                    pieces.clear()
                    if len(ahead) > 1:
                        yield self._awaited(ahead)
                while ahead:
                    yield self._awaited(ahead)
        finally:
            shut_down(pool, "the GPU to decode")

    def _awaited(self, ahead: deque[Future[Batch]]) -> Batch:
        with waiting_for("the GPU to decode"):
            return ahead.popleft().result()

    def _batch(self, pieces: Sequence[Piece]) -> Batch:
        side = self.crop.img_size
        images = [image for piece in pieces for image in unpacked(piece, side)]
        indices, _, sizes, bad_parts, damaged_parts = zip(*pieces, strict=True)
        rows, bad = np.concatenate(indices), [row for part in bad_parts for row in part]
        damaged = [row for part in damaged_parts for row in part]
        pixels = torch.empty((len(images), side, side, 3), dtype=torch.uint8, pin_memory=self._gpu)
        files = [i for i, image in enumerate(images) if image.ndim == 1]
        good = np.ones(len(images), bool)
        with self._on_stream():
            crops = self._crops([torch.from_numpy(images[i]) for i in files])
            for i, crop in zip(files, crops, strict=True):
                if crop is not None:
                    pixels[i].copy_(crop, non_blocking=True)
        for i, crop in zip(files, crops, strict=True):
            if crop is not None:
                continue
            try:  # what nvJPEG refuses, libjpeg judges
                decoded = decode(images[i].tobytes(), self.crop)
            except ImageError as error:
                good[i] = False
                bad.append((int(rows[i]), error.reason))
            else:
                pixels[i] = torch.from_numpy(decoded.pixels)
                damaged += [int(rows[i])] * decoded.damaged
        for i in set(range(len(images))).difference(files):
            pixels[i] = torch.from_numpy(images[i])
        size = np.concatenate(sizes)
        if not good.all():
            pixels = pixels[torch.from_numpy(good)]
            pixels = pixels.pin_memory() if self._gpu else pixels
        return Batch(rows[good], pixels, size[good], bad, damaged)

    def _crops(self, files: list[Tensor]) -> list[Tensor | None]:
        """Return a crop of each file on the device; None for one that nvJPEG refuses."""
        if not files:
            return []
        try:
            return [crop_tensor(image, self.crop) for image in self._decode(files)]
        except RuntimeError:  # does not say which
            if len(files) == 1:
                return [None]
            return [crop for file in files for crop in self._crops([file])]

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._stream)
            done.synchronize()

    def _decode(self, files: list[Tensor]) -> list[Tensor]:
        if self._stream is not None:
            # nvJPEG's hardware does not keep to the order of a stream: it would write into memory
            # that work queued earlier still reads.
            self._stream.synchronize()
        with warnings.catch_warnings():
            # torchvision hands its decoders on to torchcodec, which few have yet.
            warnings.simplefilter("ignore", DeprecationWarning)
            found: list[Tensor] = decode_jpeg(files, ImageReadMode.RGB, self.device)
            return found
