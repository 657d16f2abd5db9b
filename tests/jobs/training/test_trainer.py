"""The loop on a network that is no AnchorNet: what a second job would bring."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from anchorpatch.jobs.training.averaging import MovingAverage
from anchorpatch.jobs.training.loop_config import LoopConfig, rate_factor
from anchorpatch.jobs.training.runlog import RunLog
from anchorpatch.jobs.training.task import Piece, Waiting
from anchorpatch.jobs.training.trainer import Trainer
from anchorpatch.runtime.distributed import World
from anchorpatch.runtime.progress import Reporter

IMAGES, BATCH = 24, 8


@dataclass
class Linear:
    """Classify points by a linear map, in the order of their rows."""

    config: LoopConfig
    kind = "linear"
    steps = IMAGES // BATCH
    unit = "images"
    size = IMAGES
    waiting = Waiting()

    @property
    def identity(self) -> dict[str, Any]:
        return {"lr": self.config.lr}

    def points(self) -> Piece:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(IMAGES, 4, generator=generator, dtype=torch.float64)
        return Piece(inputs, (inputs[:, 0] > 0).long(), 1.0)

    def build(self) -> nn.Module:
        return nn.Linear(4, 2, dtype=torch.float64)

    def batches(self, epoch: int, step: int) -> Generator[Piece, None, None]:
        inputs, labels, _ = self.points()
        for now in range(epoch, self.config.epochs):
            for start in range(step * BATCH if now == epoch else 0, IMAGES, BATCH):
                for rows in torch.arange(start, start + BATCH).tensor_split(self.config.accumulate):
                    yield Piece(inputs[rows], labels[rows], len(rows) / BATCH)

    def loss(self, module: nn.Module, batch: Piece) -> tuple[Tensor, Mapping[str, Tensor]]:
        return nn.functional.cross_entropy(module(batch.inputs), batch.labels), {}

    def evaluate(self, module: nn.Module, check: Any) -> dict[str, Any]:
        inputs, labels, _ = self.points()
        top1 = float((module(inputs).argmax(-1) == labels).double().mean())
        return {"top1": top1, "top5": 1.0, "loss": 0.0}

    def save(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        save_file(dict(tensors), path)


def train(folder: Path, **settings: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    config = LoopConfig(**{"epochs": 3, "batch_size": BATCH, "lr": 8.0, **settings})
    folder.mkdir(exist_ok=True)
    trainer = Trainer(
        Linear(config), config, folder, torch.device("cpu"), World(), Reporter(), RunLog(folder)
    )
    trainer.resume()
    records = trainer.run()
    return load_file(folder / "last.safetensors"), records


def oracle(config: LoopConfig) -> Tensor:
    """SGD written out."""
    torch.manual_seed(config.seed)
    module = nn.Linear(4, 2, dtype=torch.float64)
    inputs, labels, _ = Linear(config).points()
    velocity = [torch.zeros_like(p) for p in module.parameters()]
    for step in range(config.epochs * 3):
        rows = slice(step % 3 * BATCH, step % 3 * BATCH + BATCH)
        loss = nn.functional.cross_entropy(module(inputs[rows]), labels[rows])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        rate = config.lr * config.batch_size / 256 * rate_factor(config, step, 3)
        with torch.no_grad():
            for p, v, g in zip(module.parameters(), velocity, gradients, strict=True):
                v.mul_(config.momentum).add_(g + config.weight_decay * p)
                p -= rate * v
    return module.weight.detach()


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_steps_are_those_of_the_whole_batch(tmp_path: Path, accumulate: int, schedule: str):
    settings: dict[str, Any] = {"schedule": schedule, "step_epochs": 2, "warmup_epochs": 1.0}
    tensors, records = train(tmp_path, accumulate=accumulate, **settings)
    config = LoopConfig(epochs=3, batch_size=BATCH, lr=8.0, **settings)
    assert torch.allclose(tensors["weight"], oracle(config), rtol=1e-12)
    assert records[-1]["train"]["loss"] < records[0]["train"]["loss"]


def test_the_average_of_a_run(tmp_path: Path):
    plain = [train(tmp_path / str(n), epochs=n)[0]["weight"] for n in (1, 2, 3)]
    tensors, _ = train(tmp_path / "average", ema_decay=0.999)
    # Young averages weigh the present much, so it lies among the last weights, not before them.
    assert not torch.equal(tensors["weight"], plain[-1])
    assert (tensors["weight"] - plain[-1]).norm() < (plain[0] - plain[-1]).norm()


def test_the_average_is_that_of_torch_bit_for_bit():
    def update(average: Any, current: Any, count: Any) -> None:
        weight = 1 - min(0.9, (1 + float(count)) / (10 + float(count)))
        for a, c in zip(average, current, strict=True):
            a.copy_(torch.lerp(a, c, weight) if a.is_floating_point() else c)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    expected = AveragedModel(net, multi_avg_fn=update, use_buffers=True)
    found = MovingAverage(net, 0.9)
    for _ in range(5):
        net(torch.randn(8, 3))
        with torch.no_grad():
            net[0].weight.normal_()
        expected.update_parameters(net)
        found.update_parameters(net)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_adamw_scales_its_rate_by_the_square_root():
    assert LoopConfig(optimizer="adamw", lr=1.0, batch_size=64).rate == 0.5
    assert LoopConfig(optimizer="sgd", lr=1.0, batch_size=64).rate == 0.25


def test_the_best_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scores = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr(
        Linear, "evaluate", lambda *_: {"top1": next(scores), "top5": 1.0, "loss": 0.0}
    )
    last, _ = train(tmp_path)
    best = load_file(tmp_path / "best.safetensors")
    monkeypatch.undo()
    second, _ = train(tmp_path / "two", epochs=2)
    assert torch.equal(best["weight"], second["weight"])
    assert not torch.equal(best["weight"], last["weight"])
