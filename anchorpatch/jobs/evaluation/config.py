"""Settings of the evaluation of an ordinary network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anchorpatch.settings import SCALES

__all__ = ["EvaluateNetworkConfig"]


@dataclass(frozen=True)
class EvaluateNetworkConfig:
    """What is evaluated, and on what.

    Attributes:
        network: name of the network.
        shards: folder that holds the split's shards.
        split: name of the split's folder.
        runs: folder of training runs.
        weights: for patches: a file, "default" or "none"; None for
            RUNS/NETWORK/best.safetensors, or where there is none for one network per scale,
            RUNS/NETWORK-SCALE/best.safetensors.
        per_scale: take one network per scale also where there is one for all.
        whole: also evaluate whole images, where there are some.
        whole_weights: the same as ``weights`` for whole images, and for both columns of
            Table 4; None for the first of RUNS/NETWORK-baseline/best.safetensors, ``weights``
            unless they were fine-tuned on patches, the pretrained set, and ``weights``.
        data: folder of the images, for shards that hold no whole images.
        anchornet_weights: of AnchorNet, to measure speed; None for
            RUNS/anchornet/best.safetensors where it exists.
        speed: measure images a second.
        scales: the images that chose one of these are counted.
        predictions: file for the decision on each image, .csv or .npz.
        batch_size: patches or images in a batch; None for 32 on CPU and 256 on a GPU.
        workers: processes that decode the images of ``data``.
        device: auto, cpu or cuda.
        amp: compute in bfloat16.
        limit: take only so many images, evenly spread over the split.
    """

    network: str
    shards: Path = Path("shards")
    split: str = "val"
    runs: Path = Path("runs")
    weights: str | Path | None = None
    per_scale: bool = False
    whole: bool = True
    whole_weights: str | Path | None = None
    data: Path = Path("data")
    anchornet_weights: Path | None = None
    speed: bool = True
    scales: tuple[int, ...] = SCALES
    predictions: Path | None = None
    batch_size: int | None = None
    workers: int = 0
    device: str = "auto"
    amp: bool = False
    limit: int | None = None
