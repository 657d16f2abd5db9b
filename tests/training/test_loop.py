"""The loop on a network that is no AnchorNet: what a second job would bring."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from anchorpatch.errors import StorageError, WeightsError
from anchorpatch.runtime.distributed import World
from anchorpatch.runtime.progress import Reporter
from anchorpatch.training.config import LoopConfig, rate_factor
from anchorpatch.training.loop import Batch, MovingAverage, Task, Trainer
from anchorpatch.training.run_folder import alone_in, best_record, check_identity

IMAGES, BATCH = 24, 8
CPU = torch.device("cpu")


class Linear(Task):
    """Classify points by a linear map, in the order of their rows."""

    kind = "linear"
    steps = IMAGES // BATCH
    unit = "images"
    size = IMAGES

    def __init__(self, config: LoopConfig, processes: int = 1) -> None:
        super().__init__(config, CPU, World())
        settings = {name: getattr(config, name) for name in ("lr", "epochs", "schedule")}
        self.identity = {**settings, "processes": processes}

    def points(self) -> Batch:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(IMAGES, 4, generator=generator, dtype=torch.float64)
        return Batch(inputs, (inputs[:, 0] > 0).long(), 1.0)

    def build(self) -> nn.Module:
        return nn.Linear(4, 2, dtype=torch.float64)

    def batches(self, epoch: int, step: int) -> Generator[Batch, None, None]:
        inputs, labels, _ = self.points()
        for now in range(epoch, self.config.epochs):
            for start in range(step * BATCH if now == epoch else 0, IMAGES, BATCH):
                for rows in torch.arange(start, start + BATCH).tensor_split(self.config.accumulate):
                    yield Batch(inputs[rows], labels[rows], len(rows) / BATCH)

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        return nn.functional.cross_entropy(module(batch.inputs), batch.labels), {}

    def evaluate(self, module: nn.Module, check: Any) -> dict[str, Any]:
        inputs, labels, _ = self.points()
        top1 = float((module(inputs).argmax(-1) == labels).double().mean())
        return {"top1": top1, "top5": 1.0, "loss": 0.0}

    def save(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        save_file(dict(tensors), path)


class Lines(Reporter):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def configured(folder: Path = Path(), **settings: Any) -> LoopConfig:
    return LoopConfig(**{"folder": folder, "epochs": 3, "batch_size": BATCH, "lr": 8.0, **settings})


def train(
    folder: Path,
    *,
    overwrite: bool = False,
    processes: int = 1,
    report: Reporter | None = None,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    config = configured(folder, overwrite=overwrite, **settings)
    folder.mkdir(exist_ok=True)
    records = Trainer(Linear(config, processes), report or Reporter()).run()
    return load_file(folder / "last.safetensors"), records


def oracle(config: LoopConfig, begun: LoopConfig | None = None) -> Tensor:
    """SGD written out; the epochs of ``begun`` come first, at its rates."""
    torch.manual_seed(config.seed)
    module = nn.Linear(4, 2, dtype=torch.float64)
    inputs, labels, _ = Linear(config).points()
    velocity = [torch.zeros_like(p) for p in module.parameters()]
    for step in range(config.epochs * 3):
        rows = slice(step % 3 * BATCH, step % 3 * BATCH + BATCH)
        loss = nn.functional.cross_entropy(module(inputs[rows]), labels[rows])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        planned = begun if begun and step < begun.epochs * 3 else config
        rate = config.lr * config.batch_size / 256 * rate_factor(planned, step, 3)
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
    config = configured(**settings)
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
    assert configured(optimizer="adamw", lr=1.0, batch_size=64).rate == 0.5
    assert configured(optimizer="sgd", lr=1.0, batch_size=64).rate == 0.25


def test_the_best_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scores = iter([0.5, 0.9, 0.9])
    monkeypatch.setattr(
        Linear, "evaluate", lambda *_: {"top1": next(scores), "top5": 1.0, "loss": 0.0}
    )
    last, records = train(tmp_path)
    assert best_record(records)["epoch"] == 2  # of equal ones the first
    best = load_file(tmp_path / "best.safetensors")
    monkeypatch.undo()
    second, _ = train(tmp_path / "two", epochs=2)
    assert torch.equal(best["weight"], second["weight"])
    assert not torch.equal(best["weight"], last["weight"])


def test_the_best_record_is_one_with_a_number():
    records: list[dict[str, Any]] = [
        *({}, {"val": None}, {"val": {"top1": "high"}}, {"val": {"top1": float("nan")}}),
        *({"val": {"top1": 0.0}, "epoch": 5}, {"val": {"top1": 0.0}, "epoch": 6}),
    ]
    assert best_record(records)["epoch"] == 5
    assert best_record(records[:4]) == {}


# --- going on ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_a_finished_run_goes_on_with_more_epochs(tmp_path: Path, schedule: str):
    train(tmp_path, epochs=1, schedule=schedule)
    report = Lines()
    tensors, records = train(tmp_path, epochs=3, schedule=schedule, report=report)
    note = f"{tmp_path / 'last.pt'}: 3 epochs instead of 1"
    if schedule == "cosine":
        note += (
            ": the rate follows the schedule of 3 epochs from here on, which is not what 3 epochs "
            "from the start would give"
        )
    assert report.lines[0] == note
    one, three = (configured(epochs=n, schedule=schedule) for n in (1, 3))
    assert torch.allclose(tensors["weight"], oracle(three, begun=one), rtol=1e-12)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    if schedule == "step":  # whose rates do not depend on the end
        assert torch.equal(tensors["weight"], train(tmp_path / "whole")[0]["weight"])


def test_epochs_do_not_become_fewer(tmp_path: Path):
    train(tmp_path, epochs=2)
    with pytest.raises(WeightsError, match=r"epochs 2 there, 1 here.*--epochs may be more"):
        train(tmp_path, epochs=1)


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (None, ["ant", "bee", "cat", "dog"], "None there, ant, bee, cat and 1 more here"),
        ([6, 3, 2], [6, 3], "6, 3, 2 there, 6, 3 here"),
    ],
)
def test_lists_that_differ_are_shortened(there: Any, here: Any, said: str):
    with pytest.raises(WeightsError, match=rf"last\.pt: .* configuration \(of {said}\);"):
        check_identity(Path("last.pt"), json.dumps({"of": there}), {"of": here})


def test_another_number_of_processes_goes_on_with_a_note(tmp_path: Path):
    train(tmp_path, epochs=1, processes=2)
    report = Lines()
    train(tmp_path, epochs=2, processes=1, report=report)
    assert report.lines[1].endswith(
        "started with 2 processes, resumed with 1: the result will not be the same bit for bit"
    )


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "log.jsonl"])
def test_results_of_others_are_not_overwritten(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"a colleague's")
    with pytest.raises(WeightsError, match=rf"holds {name}, but no last\.pt .* --overwrite"):
        train(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: b"a colleague's"}
    assert len(train(tmp_path, overwrite=True, epochs=1)[1]) == 1


def test_killed_in_the_first_epoch_s_end_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(Exception):
        pass

    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(Linear, "save", die)
    with pytest.raises(Killed):
        train(tmp_path / "run")
    assert (tmp_path / "run" / "log.jsonl").read_text()
    monkeypatch.undo()
    tensors, _ = train(tmp_path / "run")
    assert torch.equal(tensors["weight"], train(tmp_path / "whole")[0]["weight"])


def test_a_folder_has_one_run_at_a_time(tmp_path: Path):
    folder = tmp_path / "runs" / "net"
    with alone_in(folder, World(), CPU):
        with (
            pytest.raises(StorageError, match=f"{folder}: another run is training here; wait"),
            alone_in(folder, World(), CPU),
        ):
            pass
        with alone_in(folder, World(rank=1, size=2), CPU):  # the main process answers for it
            pass
    assert not list(tmp_path.iterdir())
    with alone_in(folder, World(), CPU):
        (folder / "log.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["log.jsonl"]
    (folder / ".run.lock").touch()  # as a killed run leaves it
    with alone_in(folder, World(), CPU):
        pass


def test_statistics_that_lag_are_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def build(self: Linear) -> nn.Module:
        norm = nn.BatchNorm1d(4, dtype=torch.float64)
        return nn.Sequential(norm, nn.Linear(4, 2, dtype=torch.float64))

    monkeypatch.setattr(Linear, "build", build)
    told = {}
    for loss in (0.1, 9.0):
        figures = {"top1": 0.1, "top5": 1.0, "loss": loss}
        monkeypatch.setattr(Linear, "evaluate", lambda *_, figures=figures: figures)
        report = Lines()
        train(tmp_path / str(loss), report=report)
        told[loss] = [line for line in report.lines if "running statistics" in line]
    assert told[0.1] == []
    assert len(told[9.0]) == 1
    assert told[9.0][0].startswith("val loss 9.000 is far above train loss 0.")
    assert "have seen 3 steps and lag behind the weights" in told[9.0][0]
