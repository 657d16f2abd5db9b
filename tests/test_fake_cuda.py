"""What runs on a GPU, run on a pretended one: devices, waits, and the type that is computed in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anchorpatch.errors import SettingsError
from anchorpatch.images.loader import Batch
from anchorpatch.jobs import extract_plan, finetune
from anchorpatch.jobs.crops import Crops
from anchorpatch.jobs.evaluate_anchornet import _Meter
from anchorpatch.jobs.finetune import FinetuneConfig, Request
from anchorpatch.jobs.localizer import Localizer
from anchorpatch.jobs.patch_scores import Distributions, Part, added_by_image, score_images
from anchorpatch.jobs.train import LocationTask, ReinforceTask
from anchorpatch.lsp import _parameters
from anchorpatch.metrics import Accuracy
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import Weights, WeightsMeta, load_weights, save_weights
from anchorpatch.runtime.device import exact_float32, resolve_device
from anchorpatch.runtime.distributed import World
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import PRESETS
from anchorpatch.shards.dataset import Loaded
from anchorpatch.training import image_tasks
from anchorpatch.training.config import TrainConfig
from anchorpatch.training.image_tasks import AnchorNetTask, ImageTask, open_images
from anchorpatch.training.loop import Trainer
from tests.fake_cuda import FakeGpu, why_not
from tests.jobs.finetune_runs import write_shards

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

GPU = torch.device("cuda", 0)
CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    _parameters.cache_clear()  # which keeps tensors by their device
    with FakeGpu() as gpu:
        yield gpu
    _parameters.cache_clear()


@pytest.fixture(scope="module")
def anchornet(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return load_weights(weights_file(tmp_path_factory.mktemp("weights"), "anchornet"))


def weights_file(folder: Path, arch: str) -> Path:
    path = folder / f"{arch}.safetensors"
    save_weights(path, build(arch, len(CLASSES)).state_dict(), WeightsMeta(arch, CLASSES))
    return path


def pixels(n: int, side: int = 224) -> Tensor:
    """Return a batch as the loaders give it, in page-locked memory."""
    return torch.zeros(n, side, side, 3, dtype=torch.uint8).pin_memory()


def batch_of(rows: np.ndarray) -> Batch:
    return Batch(rows, pixels(len(rows)), np.zeros((len(rows), 2), np.int32), [], [])


# --- extraction -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "recorded"), [("cuda", 32, 32), ("cuda", None, 256), ("cpu", 32, None)]
)
def test_shards_record_what_decides_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int, recorded: int
) -> None:
    (tmp_path / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "cat" / "0.png")
    monkeypatch.setattr(extract_plan, "resolve_device", torch.device)
    config = extract_plan.ExtractConfig(
        data=tmp_path,
        split="val",
        weights=weights_file(tmp_path, "anchornet"),
        out=tmp_path / "shards",
        batch_size=size,
        device=kind,
        compile=True,
    )
    settings = extract_plan.make_plan(config).header.settings
    assert (settings.device, settings.batch_size, settings.compile) == (kind, recorded, True)


def test_nvjpeg_is_for_gpus_and_damaged_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_plan, "resolve_device", torch.device)
    config = extract_plan.ExtractConfig(
        data=tmp_path,
        split="val",
        weights=weights_file(tmp_path, "anchornet"),
        out=tmp_path / "shards",
        decoder="nvjpeg",
        device="cpu",
    )
    with pytest.raises(SettingsError, match="--decoder nvjpeg: expected a GPU, found none"):
        extract_plan.make_plan(config)
    with pytest.raises(SettingsError, match="which images are damaged, as --damaged skip must"):
        extract_plan.make_plan(replace(config, device="cuda", damaged="skip"))


@pytest.mark.parametrize(
    ("preset", "precision", "graph"),
    [("finetune", "float32", True), ("figure", "bfloat16", True), ("figure", "float32", False)],
)
def test_extraction_never_waits(
    gpu: FakeGpu, anchornet: Weights, preset: str, precision: str, graph: bool
) -> None:
    settings, how = PRESETS[preset], {"batch_size": 32, "precision": precision, "graph": graph}
    with Localizer(anchornet, settings, GPU, **how) as localizer:
        gpu.forget()
        first = localizer.submit(pixels(32))
        # The settings of Algorithm 1 go to the device once.
        assert [line.split(":")[0] for line in gpu.waits] == ["host -> device lsp.py"]
        launches = gpu.launches.copy()
        gpu.forget()
        localizer.submit(pixels(32))
        assert gpu.waits == {}
        if graph:  # two rounds to warm up, and the one that is recorded
            assert gpu.launches.keys() == {"slice", "copy_", "_to_copy"}
            launches = Counter({name: n // 3 for name, n in launches.items()})
        gpu.forget()
        localizer.submit(pixels(7))  # a last batch is filled up, where that needs no wait
        assert gpu.waits == {}
    assert {t.device.type for t in first.chunks[0].host} == {"cpu"}
    convolutions = [m for m in localizer.net.modules() if isinstance(m, torch.nn.Conv2d)]
    of_classes = len(localizer.net.branches)  # whose F is never built
    assert launches["convolution"] == len(convolutions) - of_classes
    assert gpu.rounded == {}


def test_the_event_is_of_the_device_that_computes(
    gpu: FakeGpu, anchornet: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        device = resolve_device("cuda")
    assert (device.index, gpu.current) == (1, 1)
    gpu.current = 0  # as another thread, or another library, may leave it
    with Localizer(anchornet, PRESETS["dense"], device, batch_size=4) as localizer:
        localizer.submit(pixels(4))
    assert localizer.net.stem[0].weight.device == device
    assert gpu.recorded == [1]
    assert gpu.blocking == [True]


def test_maps_are_exact(gpu: FakeGpu, anchornet: Weights) -> None:
    with Localizer(anchornet, PRESETS["dense"], GPU, batch_size=4) as localizer:
        found = localizer.maps(pixels(3), torch.zeros(3, 2, dtype=torch.int64))
    assert found.heatmaps[0].shape == (3, 2, 21, 21)
    assert gpu.launches["convolution"]
    assert gpu.rounded == {}


def test_float32_is_restored(gpu: FakeGpu) -> None:
    x, kernel = (torch.zeros(1, 1, 3, 3, device="cuda") for _ in range(2))
    with exact_float32():
        torch.conv2d(x, kernel)
    assert gpu.rounded == {}
    torch.conv2d(x, kernel)
    assert len(gpu.rounded) == 1
    assert not torch.backends.cudnn.deterministic


# --- evaluation -------------------------------------------------------------------------------


def test_anchornet_is_evaluated_without_waits(gpu: FakeGpu, anchornet: Weights) -> None:
    meter = _Meter(anchornet, GPU)
    labels = torch.zeros(16, dtype=torch.int64)
    meter.update(pixels(16), labels)
    gpu.forget()
    meter.update(pixels(16), labels)
    assert gpu.waits == {}
    assert gpu.rounded == {}


@pytest.mark.parametrize("amp", [False, True])
def test_networks_are_evaluated_without_waits(gpu: FakeGpu, amp: bool) -> None:
    meta = WeightsMeta("resnet18", CLASSES)
    module = build("resnet18", len(CLASSES)).eval().to(GPU)
    batch = Crops(np.arange(8), pixels(8), np.zeros(8, np.int64), np.ones((8, 2), np.int32))

    def batches() -> Iterator[Crops]:
        for _ in range(2):
            gpu.forget()
            yield batch

    with torch.inference_mode():
        run = Distributions(module, GPU, meta, amp)
        of, at = np.repeat([0, 1], [3, 5]), np.concatenate((np.arange(3), np.arange(5)))
        part = Part(95, np.arange(8), of, at, np.array([3, 5]), np.arange(1), np.array([3]), True)
        gpu.forget()
        added = added_by_image(run(pixels(8, 95)), part, None)
        added = added_by_image(run(pixels(8, 95)), part, added[-1])
        Accuracy(GPU).update(added, torch.zeros(2, dtype=torch.int64, device=GPU))
    assert gpu.waits == {}
    score_images(run, batches())
    assert gpu.waits == {}
    assert gpu.rounded == {}


# --- training ---------------------------------------------------------------------------------

TASKS = {
    "anchornet": (AnchorNetTask, None),
    "bagnet33": (ImageTask, None),
    "location": (LocationTask, "bagnet77"),
    "reinforce": (ReinforceTask, "saccader"),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("anchornet", {"label_smoothing": 0.1, "ema_decay": 0.99}),
        ("anchornet", {"amp": True, "accumulate": 2, "optimizer": "adamw"}),
        ("bagnet33", {"amp": True}),
        ("location", {}),
        ("reinforce", {}),
    ],
)
def test_training_never_waits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    name: str,
    options: dict[str, Any],
) -> None:
    for split in ("train", "val"):
        for folder in CLASSES:
            (tmp_path / split / folder).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8)).save(tmp_path / split / folder / f"{i}.png")
    kind, start = TASKS[name]
    config = TrainConfig(
        data=tmp_path,
        folder=tmp_path / "run",
        arch=name if start is None else "saccader",
        batch_size=8,
        epochs=1,
        init=None if start is None else weights_file(tmp_path, start),
        **options,
    )
    images = open_images(config, World(), Reporter())

    def batches(folder: Any, parts: Any, *_: Any, **__: Any) -> Iterator[Any]:
        while True:
            n = config.piece(World())
            yield batch_of(np.arange(n))

    def val_batches(folder: Any, parts: Any, **_: Any) -> Iterator[Any]:
        for part in parts:
            yield batch_of(np.array(part))

    monkeypatch.setattr(image_tasks, "load_training_batches", batches)
    monkeypatch.setattr(image_tasks, "load_batches", val_batches)
    gpu = request.getfixturevalue("gpu")
    task = kind(config, *images, GPU, World())
    trainer = new_trainer(task, config)
    assert waits_of_a_step(gpu, trainer) == {}
    gpu.forget()
    task.evaluate(trainer.module.eval(), lambda: None)
    # Devices of evaluation and training are the same; how it rounds differs.
    assert gpu.launches["convolution"]
    assert gpu.rounded == {}


@pytest.mark.parametrize(("side", "amp"), [(95, False), (224, True)])
def test_fine_tuning_never_waits(gpu: FakeGpu, tmp_path: Path, side: int, amp: bool) -> None:
    def load(*_: Any, threads: int, pin_memory: bool, whole: bool) -> Iterator[Any]:
        assert pin_memory
        assert whole == (side == 224)
        for k in range(9):
            request = Request((0, 0, k, 0), side, np.arange(8), 1.0)
            yield request, Loaded(pixels(8, side), torch.zeros(8, dtype=torch.int64))

    for split in ("train", "val"):
        write_shards(tmp_path / split, store_images=True)
    config = FinetuneConfig(
        network="resnet18",
        shards=tmp_path,
        folder=tmp_path / "run",
        weights="none",
        batch_size=8,
        epochs=1,
        amp=amp,
        baseline=side == 224,
    )
    task = finetune.prepare(config, GPU, World())
    assert task.min_area == (1.0 if side == 95 else 0.35)
    with mock.patch.object(finetune, "load_rows", load):
        assert waits_of_a_step(gpu, new_trainer(task, config)) == {}


def new_trainer(task: Any, config: Any) -> Trainer:
    return Trainer(task, Reporter())


def waits_of_a_step(gpu: FakeGpu, trainer: Trainer) -> dict[str, int]:
    """Train two steps; return what the host waited for in the second."""
    loaded = trainer.task.batches(0, 0)
    with mock.patch.object(trainer, "_collect"):  # is for the end of an epoch
        for _ in range(2):
            gpu.forget()
            trainer.task.steps = trainer.place.step + 1
            trainer._train_epoch(loaded)
    assert gpu.launches["convolution"]
    return dict(gpu.waits)
