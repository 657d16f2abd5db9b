"""From picture files to classes in one pass, without shards.

Decode, AnchorNet, LSP, crop, network, sum of softmaxes: the same steps as extracting a split and
evaluating a network on it, and the same results.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from anchorpatch.classes import AS_NAMED, IMAGENET_NAMES, ClassNames, Matching
from anchorpatch.errors import ImageError, NonFiniteError, WeightsError
from anchorpatch.geometry import source_box
from anchorpatch.images.archives import named_in, read_named
from anchorpatch.images.decode import Decoded, decode, decode_picture
from anchorpatch.images.labels import EXTENSIONS
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.jobs.looks import LookCosts, look_until_sure
from anchorpatch.jobs.patch_scores import Distributions, sum_localized
from anchorpatch.models.complexity import check_sides, macs
from anchorpatch.models.registry import check_name
from anchorpatch.networks import Network, best_weights, load_checkpoint, load_network
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.runtime.device import cpu_count, resolve_device
from anchorpatch.settings import PRESETS, SCALES, Computing, CropSettings, LspSettings
from anchorpatch.signals import shut_down, waiting_for

#: Images in a batch on a GPU; few, since a batch is always filled up.
_GPU_IMAGES: Final = 32

#: Names of weights files end so.
_SUFFIXES: Final = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class PredictConfig(Computing):
    """What decides on the pictures.

    Attributes:
        network: a weights file that `anchorpatch finetune` wrote, or the name of a network.
        anchornet_weights: of AnchorNet.
        weights: of the named network: a file or "default"; None for
            RUNS/NETWORK/best.safetensors.
        matching: names of the outputs of ``weights``; by default what these say themselves, else
            those of AnchorNet if their number is right, else ImageNet's.
        class_names: what the classes are called.
        runs: folder of training runs.
        lsp: K, T and P of Algorithm 1.
        top: classes to tell of each picture.
        stop_at: confidence of the network at which the remaining patches of a picture are left out,
            as for `anchorpatch.jobs.looks.Looks.stops`; None to take all.
        confidence: how it is measured, one of `anchorpatch.settings.CONFIDENCES`.
        batch_size: patches in a batch of the network.
        workers: threads that decode; None for one per CPU core.
    """

    network: str | Path
    anchornet_weights: Path
    weights: str | Path | None = None
    matching: Matching = AS_NAMED
    class_names: ClassNames = IMAGENET_NAMES
    runs: Path = Path("runs")
    lsp: LspSettings = PRESETS["evaluate"]
    top: int = 5
    stop_at: float | None = None
    confidence: str = "max"
    batch_size: int = 64
    workers: int | None = None


@dataclass(frozen=True)
class Prediction:
    """What the network says of one picture.

    Attributes:
        path: of the file.
        size: height and width of the picture in pixels.
        scale: chosen theta in pixels.
        classes: the likeliest ones with their probabilities, the mean over the patches.
        names: what these classes are called; None where nothing says it.
        corners: top-left (y, x) of each patch that the network saw in the crop (k, 2), the
            strongest first.
        scores: activation of each patch (k,).
        boxes: x0, y0, x1, y1 of each patch in pixels of the picture (k, 4); see
            `anchorpatch.geometry.source_box`.
        crop: the crop that AnchorNet saw, uint8 (S, S, 3).
        localized: patches that AnchorNet and LSP found, of which the network may have seen fewer.
        gmacs: spent on the picture by AnchorNet and the network; None without ``stop_at``.
    """

    path: str
    size: tuple[int, int]
    scale: int
    classes: tuple[tuple[str, float], ...]
    names: tuple[str | None, ...]
    corners: NDArray[np.int16]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float64]
    crop: NDArray[np.uint8]
    localized: int
    gmacs: float | None = None

    @property
    def patches(self) -> NDArray[np.uint8]:
        """What the network saw, uint8 (k, theta, theta, 3)."""
        side = self.scale
        return np.stack([self.crop[y : y + side, x : x + side] for y, x in self.corners])

    def to_json(self) -> dict[str, Any]:
        """Return the prediction for JSON, without pixels."""
        spent = {"looks": len(self.scores), "localized": self.localized, "gmacs": self.gmacs}
        return {
            "path": self.path,
            "size": list(self.size),
            "class": self.classes[0][0],
            "name": self.names[0],
            "probability": self.classes[0][1],
            "top": [
                {"class": of, "name": name, "probability": p}
                for (of, p), name in zip(self.classes, self.names, strict=True)
            ],
            "scale": self.scale,
            "patches": [
                {"y": y, "x": x, "score": score, "box": box}
                for (y, x), score, box in zip(
                    self.corners.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True
                )
            ],
            **({} if self.gmacs is None else spent),
        }


@dataclass(frozen=True)
class Unreadable:
    """A file that is no picture.

    Attributes:
        path: of the file.
        reason: why, as `extract` counts it.
    """

    path: str
    reason: str


class Predictor:
    """AnchorNet and a network, loaded and checked, for any number of calls.

    Its threads end when it is closed as a context manager, or with it.

    Args:
        config: what decides.
        message: called with what takes long, and with what users may not expect.

    Raises:
        WeightsError: a file cannot be used.
        SettingsError: there is no such network or device, or the network cannot take patches of
            a scale.
    """

    def __init__(
        self, config: PredictConfig, message: Callable[[str], None] = lambda text: None
    ) -> None:
        self.config, device = config, resolve_device(config.device)
        anchornet = load_weights(config.anchornet_weights)
        self.network = _load(config, anchornet.meta.classes, message)
        self.class_names = config.class_names.of(self.network.meta.classes)
        check_sides(self.network.meta.architecture, self.network.module)
        self._crop = anchornet.meta.cropping
        computing = device, config.engine, config.precision
        self._localizer = Localizer(anchornet, config.lsp, *computing, batch_size=_GPU_IMAGES)
        module = self.network.module.to(device)
        amp = config.precision == "bfloat16"
        self._run = Distributions(module, device, self.network.meta, amp=amp)
        self._costs: LookCosts | None = None
        if config.stop_at is not None:
            net, side = self._localizer.net, self._localizer.side
            anchornet_macs = macs(net, side, net.localize) / 1e9
            each = {scale: macs(module, scale) / 1e9 for scale in SCALES}
            self._costs = LookCosts(each, anchornet_macs)
        # Images are too small to share out, and a new thread starts with all cores.
        self._decoders = ThreadPoolExecutor(
            cpu_count() if config.workers is None else max(1, config.workers),
            initializer=torch.set_num_threads,
            initargs=(1,),
        )

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *error: object) -> None:
        self._localizer.__exit__(*error)
        shut_down(self._decoders, "the threads that decode images")

    def predict(self, paths: Iterable[str]) -> Iterator[Prediction | Unreadable]:
        """Yield what each file is, in their order; files are read some ahead.

        Several calls may be under way at once, taking turns.

        Raises:
            NonFiniteError: one of the networks produced NaN or infinity.
        """
        names = iter(paths)
        chunks = iter(lambda: list(itertools.islice(names, self._localizer.chunk)), [])
        ahead: deque[tuple[list[str], list[Future[Decoded | str]]]] = deque()
        for chunk in chunks:
            images = [self._decoders.submit(_decoded, name, self._crop) for name in chunk]
            ahead.append((chunk, images))
            if len(ahead) > 1:
                yield from self._chunk(*ahead.popleft())
        for last in ahead:
            yield from self._chunk(*last)

    def picture(self, path: str) -> NDArray[np.uint8]:
        """Read the whole picture that a prediction is of, upright, uint8 (H, W, 3).

        Raises:
            ImageError: it cannot be decoded any more.
        """
        image, _ = decode_picture(read_named(path), self._crop.background)
        return np.asarray(image.convert("RGB"))

    def _chunk(
        self, paths: list[str], decoded: list[Future[Decoded | str]]
    ) -> Iterator[Prediction | Unreadable]:
        with waiting_for("the threads that decode images"):
            found = [future.result() for future in decoded]
        pairs = list(zip(paths, found, strict=True))
        good = [(path, image) for path, image in pairs if isinstance(image, Decoded)]
        predictions = iter(self._decide(good) if good else ())
        for path, image in pairs:
            yield next(predictions) if isinstance(image, Decoded) else Unreadable(path, image)

    @torch.inference_mode()
    def _decide(self, images: list[tuple[str, Decoded]]) -> list[Prediction]:
        pixels = torch.from_numpy(np.stack([image.pixels for _, image in images]))
        local = self._localizer.submit(pixels).result(lambda i: images[i][0])
        runs = dict.fromkeys(SCALES, self._run)
        config, looks = self.config, local.counts.astype(np.int64)
        if config.stop_at is None:
            means = sum_localized(runs, local, pixels, config.batch_size)
            means /= torch.from_numpy(looks)[:, None]
        else:
            how = config.batch_size, config.stop_at, config.confidence
            means, looks = look_until_sure(runs, local, pixels, *how)
        predictions = []
        for i, (path, image) in enumerate(images):
            if not means[i].isfinite().all():
                raise NonFiniteError(
                    f"{path}: {self.network.source} produced NaN or infinity: fine-tune it again"
                )
            # Stable: of equal probabilities the lower class goes first, as in the evaluation.
            order = torch.sort(means[i], descending=True, stable=True).indices
            best, count = order[: config.top].tolist(), int(looks[i])
            classes = tuple((self.network.meta.classes[c], float(means[i, c])) for c in best)
            corners, scale = local.corners[i, :count], int(local.scale[i])
            costs = self._costs
            predictions.append(
                Prediction(
                    path=path,
                    size=image.size,
                    scale=scale,
                    classes=classes,
                    names=tuple(self.class_names.name(of) for of, _ in classes),
                    corners=corners,
                    scores=local.scores[i, :count],
                    boxes=source_box(image.size, corners, scale, self._crop),
                    crop=image.pixels,
                    localized=int(local.counts[i]),
                    gmacs=None if costs is None else costs.anchornet + count * costs.patch[scale],
                )
            )
        return predictions


def _load(
    config: PredictConfig, otherwise: tuple[str, ...], message: Callable[[str], None]
) -> Network:
    """Load the network that decides; see `PredictConfig`."""
    name = str(config.network)
    if config.weights is not None:
        options: dict[str, Any] = {"otherwise": otherwise, "matching": config.matching}
        return load_network(name, None, config.weights, message, **options)
    if names_file(name):
        return load_checkpoint(name)
    check_name(name)
    path = best_weights(config.runs, name)
    if not path.is_file():
        raise WeightsError(
            f"{path} does not exist: run `anchorpatch finetune {name}`, or name weights with "
            "--weights FILE (--weights default: the pretrained ones)"
        )
    return load_network(name, None, path, message)


def names_file(network: str) -> bool:
    """Tell whether a network is given by a weights file, and not by its name.

    Example:
        >>> names_file("runs/resnet50/best.safetensors"), names_file("timm:resnet50.a1_in1k")
        (True, False)
    """
    path = Path(network)
    return path.suffix in _SUFFIXES or os.sep in network or path.is_file()


def images_in(folder: str) -> Iterator[str]:
    """Yield the images below a folder, sorted in each, and the folders that cannot be read.

    Or those in an archive, as ``archive.tar::member``.
    """
    if os.path.isfile(folder):
        yield from named_in(folder)
        return
    denied: list[str] = []
    seen: set[str] = set()
    for top, folders, files in os.walk(
        folder, onerror=lambda error: denied.append(error.filename), followlinks=True
    ):
        seen.add(os.path.realpath(top))
        for name in sorted(files, key=os.fsencode):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield os.path.join(top, name)
        folders[:] = [
            name
            for name in sorted(folders, key=os.fsencode)
            # A link may lead back to a folder that was here before.
            if not name.startswith(".") and os.path.realpath(os.path.join(top, name)) not in seen
        ]
    yield from denied


def _decoded(path: str, crop: CropSettings) -> Decoded | str:
    """Return the picture, or why there is none."""
    try:
        return decode(read_named(path), crop)
    except ImageError as error:
        return error.reason
