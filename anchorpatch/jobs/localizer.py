"""AnchorNet, decision and LSP as one stage: pixels in, patches out.

The stage works in chunks of one fixed shape. Convolution kernels sum in another order for
other shapes and other numbers of threads; with chunks that are always full, and one thread a
chunk on CPU, an image's result does not depend on the batch around it, on the batch size or on
the number of cores. This holds for each engine and precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anchorpatch.errors import NonFiniteError, SettingsError, WeightsError
from anchorpatch.lsp import Decision, decide, localize
from anchorpatch.models.anchornet import AnchorNet, Features
from anchorpatch.models.anchornet_openvino import OpenVinoFeatures, openvino_core
from anchorpatch.networks import Normalization
from anchorpatch.runtime.checkpoint import Weights, load_into
from anchorpatch.runtime.device import check_precision, exact_float32
from anchorpatch.settings import SCALES, LspSettings
from anchorpatch.signals import shut_down, waiting_for

#: Images in a chunk on CPU. Of 4 to 64 the one that needs the least CPU time per image: larger
#: chunks spend it on fresh memory, smaller ones on the overhead of each operator.
CPU_CHUNK = 16


class Localized(NamedTuple):
    """What AnchorNet and LSP say of n images, as numpy arrays.

    Attributes:
        branch_class: Y (n, 3), int32.
        branch_prob: P (n, 3), float32.
        predicted: gamma (n,), int32.
        scale: chosen theta (n,), uint8.
        counts: patches (n,), int32.
        corners: top-left (y, x) of each patch in pixels (n, K, 2), int16, zero-padded.
        scores: activation of each patch (n, K), float32, zero-padded.
    """

    branch_class: NDArray[np.int32]
    branch_prob: NDArray[np.float32]
    predicted: NDArray[np.int32]
    scale: NDArray[np.uint8]
    counts: NDArray[np.int32]
    corners: NDArray[np.int16]
    scores: NDArray[np.float32]

    def of_scale(
        self, scale: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the patches of one scale, for `anchorpatch.lsp.crop`.

        Returns:
            Rows of the images that chose the scale; of each of their patches the image (m,) and
            the top-left (y, x) in pixels (m, 2).
        """
        rows = np.flatnonzero(self.scale == scale)
        counts = self.counts[rows]
        valid = np.arange(self.corners.shape[1]) < counts[:, None]
        return rows, np.repeat(rows, counts), self.corners[rows][valid].astype(np.int64)


class Run(NamedTuple):
    """What AnchorNet makes of n images, on its device.

    Attributes:
        logits: of the localization branches (n, 3, C).
        features: of the branches.
        decision: class and branch (Eq. 6-8).
        heatmaps: M of each branch for the decided class, (n, H, W) each.
    """

    logits: Tensor
    features: Features
    decision: Decision
    heatmaps: tuple[Tensor, ...]


class Maps(NamedTuple):
    """What AnchorNet makes of n images before anything is decided, as numpy arrays.

    Attributes:
        probabilities: softmax outputs B of the branches (n, 3, C), float32.
        attention: S of each branch (n, H, W), float32, times H * W: 1 is the uniform weight.
        heatmaps: M of each branch for the k classes asked for (n, k, H, W), float32.
    """

    probabilities: NDArray[np.float32]
    attention: tuple[NDArray[np.float32], ...]
    heatmaps: tuple[NDArray[np.float32], ...]


def load_anchornet(weights: Weights) -> AnchorNet:
    """Build AnchorNet as a weights file describes it, in evaluation mode.

    Raises:
        WeightsError: the tensors do not fit, or the file asks for crops that there are not.
    """
    meta, known = weights.meta, weights.meta.cropping.resize
    if meta.crop_mode != "squash" and meta.resize != known:
        raise WeightsError(
            f"{weights.path}: expected weights for the transform {known} -> {meta.crop}, "
            f"found {meta.resize} -> {meta.crop}"
        )
    net = AnchorNet(len(meta.classes), se=meta.se, weighted_mean=meta.weighted_mean)
    load_into(net, weights)
    return net.eval()


def resolve_engine(
    name: str, device: torch.device, precision: str = "float32", *, compile: bool = False
) -> str:
    """Return what computes AnchorNet's features: ``auto`` is OpenVINO where it works, else torch.

    Raises:
        SettingsError: the engine cannot be used, or the device does not have the precision.
    """
    check_precision(precision, device)
    why = "is for CPUs" if device.type != "cpu" else "goes without --compile" if compile else None
    if why is None and name != "torch":
        try:
            types = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            if precision == "float32" or "BF16" in types:
                return "openvino"
            why = "has no bfloat16 on this CPU"
        except (ImportError, RuntimeError) as error:
            why = f"cannot be loaded ({error}): pip install openvino"
    if name == "openvino":
        raise SettingsError(f"--engine openvino {why}; or use --engine torch")
    return "torch"


@dataclass(frozen=True)
class _OnDevice:
    """A chunk whose results the GPU copies to host memory."""

    host: list[Tensor]
    done: torch.cuda.Event

    def result(self) -> Localized:
        self.done.synchronize()
        return _to_numpy(self.host)


@dataclass(frozen=True)
class Pending:
    """The results of at least one image, on their way."""

    chunks: Sequence[Future[Localized] | _OnDevice]
    images: int
    advice: str

    def result(self, name: Callable[[int], str] = "image {}".format) -> Localized:
        """Wait for the results.

        Args:
            name: returns what an error calls an image, by its row in the batch.

        Raises:
            NonFiniteError: the network produced NaN or infinity; names the image and the weights.
        """
        with waiting_for("AnchorNet"):
            parts = [chunk.result() for chunk in self.chunks]
        joined = Localized(*(np.concatenate(c)[: self.images] for c in zip(*parts, strict=True)))
        finite = np.isfinite(joined.branch_prob).all(1) & np.isfinite(joined.scores).all(1)
        if not finite.all():
            image = name(int(np.argmin(finite)))
            raise NonFiniteError(f"{image}: AnchorNet produced NaN or infinity; {self.advice}")
        return joined


class Runner:
    """AnchorNet on a device (Eq. 1-8), for inference.

    Args:
        weights: of AnchorNet.
        device: a CPU or a CUDA device.
        engine: as for `resolve_engine`.
        side: of the images in pixels; None for that of the weights' crops.
        precision: that the features are computed in; logits and heatmaps are always float32.
        compile: the features are for ``torch.compile``.
        streams: calls of `features` at once, which share the threads that torch has.
        latency: images come one by one, and not in batches.

    Raises:
        SettingsError: as `resolve_engine` says.
    """

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        engine: str = "auto",
        precision: str = "float32",
        *,
        side: int | None = None,
        compile: bool = False,
        streams: int = 1,
        latency: bool = False,
    ) -> None:
        self.device, self.amp = device, precision == "bfloat16"
        self.side = side or weights.meta.crop
        self.engine = resolve_engine(engine, device, precision, compile=compile)
        net = load_anchornet(weights).fuse().to(device)
        # A channels-last network takes the decoder's pixels as they lie in memory.
        self.net = net.to(memory_format=torch.channels_last)
        self._normalize = Normalization(weights.meta, device)
        self._openvino = None
        if self.engine == "openvino":
            options: dict[str, Any] = {"side": self.side, "precision": precision}
            options |= {"streams": streams, **({"images": 1} if latency else {})}
            self._openvino = OpenVinoFeatures(net, weights.meta.mean, weights.meta.std, **options)

    def features(self, pixels: Tensor) -> Features:
        """Return the features of uint8 pixels (n, side, side, 3)."""
        if self._openvino is not None:
            return self._openvino(pixels)
        if not self.amp:  # exported graphs would have a node for it
            return self.net.features(self._normalize(pixels))
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.net.features(self._normalize(pixels))

    def run(self, pixels: Tensor) -> Run:
        """Decide on uint8 pixels (n, side, side, 3), and return the heatmaps of the decision."""
        features = self.features(pixels)
        logits = self.net.logits(features)
        decision = decide(logits.softmax(-1))
        return Run(logits, features, decision, self.net.heatmaps(features, decision.predicted))


class _Graph(NamedTuple):
    """The stage as a CUDA graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    out: Sequence[Tensor]


class Localizer(Runner):
    """Runs AnchorNet (Eq. 1-5), the decision (Eq. 6-8) and Algorithm 1 on batches of pixels.

    Args:
        weights: of AnchorNet.
        settings: K, T and P of Algorithm 1.
        device: a CPU or a CUDA device.
        engine: as for `Runner`; with ``precision`` and ``side``.
        batch_size: images in a chunk on a GPU; on CPU chunks have `CPU_CHUNK` images.
        compile: pass the stage through ``torch.compile``.
        graph: on a GPU, record the stage as a CUDA graph: its 1,800 kernels are launched at once.
        latency: images come one by one, each for all threads: chunks have one image. Results may
            differ from those of full chunks in their last bits.
    """

    def __init__(
        self,
        weights: Weights,
        settings: LspSettings,
        device: torch.device,
        engine: str = "auto",
        precision: str = "float32",
        *,
        side: int | None = None,
        batch_size: int = 256,
        compile: bool = False,
        graph: bool = True,
        latency: bool = False,
    ) -> None:
        threads, calls = torch.get_num_threads(), 1 if latency else torch.get_num_threads()
        options: dict[str, Any] = {"compile": compile, "streams": calls, "latency": latency}
        super().__init__(weights, device, engine, precision, side=side, **options)
        self.settings = settings
        other = "use --precision float32" if self.amp else "train or download them again"
        self._advice = f"the weights {weights.path} may be damaged or badly trained: {other}"
        self._scales = torch.tensor(SCALES, device=device)
        self._stage: Callable[[Tensor], Sequence[Tensor]] = self.localize
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cpu":
            self.chunk = 1 if latency else CPU_CHUNK
            # The number of threads is a matter of each thread, and new ones start with all cores.
            self._pool = ThreadPoolExecutor(
                calls, initializer=torch.set_num_threads, initargs=(threads // calls,)
            )
        else:
            self.chunk = 1 if latency else batch_size
        self._graph: _Graph | None = None
        # A compiled stage may be compiled again within the recording, which no GPU allows.
        self._records = graph and not compile
        if compile:
            self._stage = torch.compile(self.localize)
            # Compiling is for one thread, before the pool's get there.
            self.submit(torch.zeros(1, self.side, self.side, 3, dtype=torch.uint8)).result()

    def __enter__(self) -> Localizer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            shut_down(self._pool, "the threads that compute")

    def submit(self, pixels: Tensor) -> Pending:
        """Start on a batch and return without waiting for it.

        Args:
            pixels: uint8 (n, side, side, 3), n at least 1; in pinned memory for a GPU.
        """
        chunks = torch.split(pixels, self.chunk)
        pool, results = self._pool, []
        for chunk in chunks:
            results.append(pool.submit(self._on_cpu, chunk) if pool else self._on_gpu(chunk))
        return Pending(results, len(pixels), self._advice)

    def maps(self, pixels: Tensor, classes: Tensor) -> Maps:
        """Return attention maps and class heatmaps, the numbers that `submit` decides on.

        Args:
            pixels: uint8 (n, side, side, 3), n at least 1.
            classes: whose heatmaps to return, for each image (n, k), int64.
        """
        parts = []
        for chunk, wanted in zip(
            torch.split(pixels, self.chunk), torch.split(classes, self.chunk), strict=True
        ):
            work = partial(self._maps, chunk, wanted)
            found = work() if self._pool is None else self._pool.submit(work).result()
            parts.append([array[: len(chunk)] for array in found])
        probabilities, *maps = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        n = len(SCALES)
        return Maps(probabilities, tuple(maps[:n]), tuple(maps[n:]))

    def heatmaps(self, pixels: Tensor) -> tuple[NDArray[np.int64], tuple[NDArray[np.float32], ...]]:
        """Return what Algorithm 1 reads: the branch, and M of each branch for the decided class.

        Args:
            pixels: uint8 (n, side, side, 3), n at least 1.

        Returns:
            Index into `SCALES` (n,), and a heatmap (n, H, W) of each branch.
        """

        def found(chunk: Tensor) -> list[NDArray[Any]]:
            with torch.inference_mode(), exact_float32():
                _, _, decision, heatmaps = self.run(self._filled(chunk))
                arrays = (decision.branch, *(heatmap.float() for heatmap in heatmaps))
                return [tensor[: len(chunk)].cpu().numpy() for tensor in arrays]

        chunks = torch.split(pixels, self.chunk)
        parts = self._pool.map(found, chunks) if self._pool else map(found, chunks)
        branch, *maps = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return branch, tuple(maps)

    def _maps(self, chunk: Tensor, classes: Tensor) -> list[NDArray[np.float32]]:
        with torch.inference_mode(), exact_float32():
            features = self.features(self._filled(chunk))
            attention = [s.float().squeeze(1) for s in features.attention]
            # Without `weighted_mean` the network's S sums to 1, else to H * W.
            attention = [s / s.mean((1, 2), keepdim=True) for s in attention]
            of_class = [self.net.heatmaps(features, c) for c in self._filled(classes).T]
            heatmaps = [torch.stack(branch, 1) for branch in zip(*of_class, strict=True)]
            out = [self.net.logits(features).softmax(-1), *attention, *heatmaps]
            return [tensor.cpu().numpy() for tensor in out]

    def _filled(self, chunk: Tensor) -> Tensor:
        """Copy a chunk to the device, from pinned memory, and pad it there: fewer bytes to copy."""
        chunk = chunk.to(self.device, non_blocking=True)
        missing = self.chunk - len(chunk)
        return torch.cat((chunk, chunk[:1].expand(missing, *chunk.shape[1:]))) if missing else chunk

    def _on_cpu(self, chunk: Tensor) -> Localized:
        with torch.inference_mode():
            return _to_numpy(self._stage(self._filled(chunk)))

    def _on_gpu(self, chunk: Tensor) -> _OnDevice:
        with torch.inference_mode(), exact_float32():
            if self._records:
                self._graph = self._graph or self._recorded()
                graph, pixels, out = self._graph
                # What is left of the chunk before does not matter to the images of this one.
                pixels[: len(chunk)].copy_(chunk, non_blocking=True)
                graph.replay()
            else:
                out = self._stage(self._filled(chunk))
            host = [tensor.to("cpu", non_blocking=True) for tensor in out]
        # Blocking: who waits for it sleeps, instead of keeping a core busy.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        return _OnDevice(host, done)

    def _recorded(self) -> _Graph:
        shape = (self.chunk, self.side, self.side, 3)
        with torch.cuda.device(self.device):
            pixels = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            now = torch.cuda.current_stream(self.device)
            # Libraries choose kernels and take their workspaces at first, which cannot be recorded.
            apart = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            apart.wait_stream(now)
            with torch.cuda.stream(apart):
                for _ in range(2):
                    self._stage(pixels)
            now.wait_stream(apart)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with this GPU.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = self._stage(pixels)
        return _Graph(graph, pixels, out)

    def localize(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the fields of `Localized`, as tensors, of uint8 pixels (n, side, side, 3)."""
        _, _, decision, heatmaps = self.run(pixels)
        # Unchecked, which would wait for the GPU: `Pending.result` checks what comes back.
        patches = localize(heatmaps, decision.branch, self.settings, check=False)
        return (
            decision.branch_class.int(),
            decision.branch_prob,
            decision.predicted.int(),
            self._scales[decision.branch].byte(),
            patches.counts.int(),
            patches.corners.short(),
            patches.scores,
        )


def _to_numpy(tensors: Sequence[Tensor]) -> Localized:
    return Localized(*(tensor.numpy() for tensor in tensors))
