from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from anchorpatch.errors import Interrupted, SettingsError, WeightsError
from anchorpatch.jobs.train import LocationTask, ReinforceTask, TrainConfig, best_places, run
from anchorpatch.models.bagnet import BagNet
from anchorpatch.models.registry import NETWORKS
from anchorpatch.models.saccader import GLIMPSES, Saccader
from anchorpatch.networks import load_checkpoint
from anchorpatch.runtime.checkpoint import load_weights
from anchorpatch.runtime.distributed import World
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import ARCHITECTURES
from anchorpatch.training.image_tasks import open_images
from tests.jobs.peer_runs import NARROW, STAGES, peer, run_narrow
from tests.program import run_alone
from tests.training.runs import (
    TRAIN,
    VAL,
    WEIGHTS,
    StopAt,
    assert_same_run,
    make_pictures,
    records,
    state_of,
)


@pytest.fixture(scope="module", autouse=True)
def _narrow_networks_and_one_thread() -> Iterator[None]:
    threads, wide = torch.get_num_threads(), dict(NETWORKS)
    torch.set_num_threads(1)
    NETWORKS.update(NARROW)
    yield
    NETWORKS.update(wide)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Saccader that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "saccader"
    run(peer("saccader", data, folder))
    return folder


@pytest.mark.parametrize("arch", ["bagnet33", "bagnet77"])
def test_a_bagnet_leaves_the_files_of_any_run(data: Path, tmp_path: Path, arch: str):
    summary = run(peer(arch, data, tmp_path))
    names = {"config.json", "log.jsonl", "last.pt", *WEIGHTS}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (summary.epochs, summary.images, summary.earlier) == (1, (TRAIN, VAL), {})
    (record,) = records(tmp_path)
    assert set(record["val"]) == {"images", "loss", "top1", "top5"}
    assert set(record["train"]) == {"loss", "top1"}
    assert (record["val"]["images"], record["val"]["top5"]) == (VAL, 1.0)
    found = load_checkpoint(summary.weights)
    assert isinstance(found.module, BagNet)
    assert found.module.theta == ARCHITECTURES[arch]
    assert (found.meta.architecture, found.meta.classes) == (arch, ("cat", "dog"))
    assert "se" not in load_weights(summary.weights, None).meta.training["settings"]


def test_a_bagnet_learns(data: Path, tmp_path: Path):
    changes = {"epochs": 6, "ema_decay": 0.0, "checkpoint_minutes": 9.0}
    run(peer("bagnet33", data, tmp_path, lr=5.0, min_area=0.9, **changes))
    losses = [record["train"]["loss"] for record in records(tmp_path)]
    assert losses[-1] < losses[0] - 0.2


def test_saccader_is_three_runs(data: Path, whole: Path):
    assert {path.name for path in whole.iterdir()} == {*STAGES, WEIGHTS[0]}
    for stage in STAGES:
        names = {"config.json", "log.jsonl", "last.pt", *WEIGHTS}
        assert {path.name for path in (whole / stage).iterdir()} == names
    best = load_weights(whole / WEIGHTS[0], "saccader")
    assert best.sha256 == load_weights(whole / STAGES[2] / WEIGHTS[0], "saccader").sha256
    assert isinstance(load_checkpoint(best.path).module, Saccader)
    parts = [set(records(whole / stage)[0]["train"]) for stage in STAGES]
    rewards = {"classification", "reinforce", "reward", "baseline"}
    assert parts == [{"loss", "top1"}, {"loss", "place_top1"}, {"loss", "top1", *rewards}]
    configs = [json.loads((whole / stage / "config.json").read_text()) for stage in STAGES]
    assert [config["arch"] for config in configs] == ["bagnet77", "saccader", "saccader"]
    assert [config["lr"] for config in configs] == pytest.approx([0.5, 0.5, 0.05])


def test_each_stage_starts_where_the_one_before_was_best(whole: Path):
    bagnet, location = (load_weights(whole / s / WEIGHTS[0], None) for s in STAGES[:2])
    for key, value in bagnet.tensors.items():
        # BagNet rests in the second stage, its statistics too.
        assert torch.equal(location.tensors[f"bagnet.{key}"], value)
    reinforce = load_weights(whole / STAGES[2] / WEIGHTS[0], "saccader")
    assert set(reinforce.tensors) == set(location.tensors)
    for stage, before in (STAGES[1:][0], bagnet), (STAGES[2], location):
        settings = load_weights(whole / stage / WEIGHTS[0], None).meta.training["settings"]
        assert settings["init"] == before.sha256
    changed = {k for k, v in reinforce.tensors.items() if not torch.equal(v, location.tensors[k])}
    # Every part learns in the third stage.
    for part in ("bagnet.stem", "bagnet.classifier", "attention", "mix", "cell"):
        assert any(key.startswith(part) for key in changed), part


def test_a_finished_saccader_is_only_reported(data: Path, whole: Path):
    files = sorted(whole.glob("*/*.safetensors"))
    before = [path.stat().st_mtime_ns for path in files]
    summary = run(peer("saccader", data, whole))
    assert [path.stat().st_mtime_ns for path in files] == before
    assert (summary.epochs, summary.weights) == (1, whole / WEIGHTS[0])
    assert list(summary.earlier) == ["BagNet-77", "places"]


def test_killed_within_the_last_stage_and_resumed(data: Path, whole: Path, tmp_path: Path):
    # It dies after the third step of the stage, whose checkpoint is not yet written.
    images = 2 * TRAIN + 12
    killed = StopAt(images, signal.SIGKILL)
    assert run_alone(run_narrow, peer("saccader", data, tmp_path), killed) == -signal.SIGKILL
    assert state_of(tmp_path / STAGES[2])["step"] == 2
    assert not (tmp_path / WEIGHTS[0]).exists()
    run(peer("saccader", data, tmp_path))
    for name in STAGES:
        assert_same_run(tmp_path / name, whole / name)


def test_a_trained_bagnet_saves_the_first_stage(data: Path, whole: Path, tmp_path: Path):
    config = peer("saccader", data, tmp_path, init=whole / STAGES[0] / WEIGHTS[0])
    first, rest = StopAt(8), StopAt(-1)
    with pytest.raises(Interrupted):
        run(config, first)
    summary = run(config, rest)
    assert first.lines[0] == rest.lines[0] == "stage 1 of 2, places"
    assert {path.name for path in tmp_path.iterdir()} == {*STAGES[1:], WEIGHTS[0]}
    assert list(summary.earlier) == ["places"]
    assert_same_run(tmp_path / STAGES[1], whole / STAGES[1])


def test_a_bagnet_of_other_classes_starts_the_first_stage(data: Path, whole: Path, tmp_path: Path):
    three = make_pictures(tmp_path / "data", ("cat", "dog", "emu"))
    bagnet = whole / STAGES[0] / WEIGHTS[0]
    still = {"lr": 1e-12, "ema_decay": 0.0, "weight_decay": 0.0}
    run(peer("saccader", three, tmp_path / "run", init=bagnet, **still))
    ours, theirs = (load_weights(f, "bagnet77").tensors for f in (
        tmp_path / "run" / STAGES[0] / WEIGHTS[0], bagnet
    ))  # fmt: skip
    torch.testing.assert_close(ours["stem.0.weight"], theirs["stem.0.weight"])
    assert len(ours["classifier.weight"]) == 3


def test_weights_of_another_network_are_refused(data: Path, whole: Path, tmp_path: Path):
    saccader = whole / WEIGHTS[0]
    for arch, wanted in (("saccader", "bagnet77"), ("bagnet33", "bagnet33")):
        with pytest.raises(WeightsError, match=f"expected weights of {wanted}, found saccader"):
            run(peer(arch, data, tmp_path, init=saccader))
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_network_is_refused(data: Path, whole: Path):
    with pytest.raises(WeightsError, match="expected training state of bagnet33, found bagnet77"):
        run(peer("bagnet33", data, whole / STAGES[0]))


def test_other_settings_are_refused_until_overwrite(data: Path, tmp_path: Path):
    bagnet = peer("bagnet77", data, tmp_path / "bagnet77", checkpoint_minutes=9.0)
    run(bagnet)
    config = peer("saccader", data, tmp_path / "saccader", init=tmp_path / "bagnet77" / WEIGHTS[0])
    run(config)
    run(replace(bagnet, seed=1, overwrite=True))
    with pytest.raises(WeightsError, match=r"\(init [0-9a-f]+ there, [0-9a-f]+ here\)"):
        run(config)
    run(replace(config, overwrite=True))


def test_bfloat16_and_fewer_places_than_glimpses(data: Path, tmp_path: Path):
    changes = {"amp": True, "crop_size": 85, "label_smoothing": 0.1, "accumulate": 2}
    summary = run(peer("saccader", data, tmp_path, checkpoint_minutes=9.0, **changes))
    assert all(abs(value) < 20 for value in summary.last["train"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "bagnet9"}, "arch: expected one of anchornet, bagnet33, bagnet77, saccader"),
        ({"arch": "bagnet77", "crop_size": 76}, "largest patch of bagnet77 needs 77 px, got 76"),
        ({"arch": "saccader", "crop_size": 76}, "largest patch of saccader needs 77 px, got 76"),
        ({"arch": "bagnet33", "crop_size": 32}, "largest patch of bagnet33 needs 33 px, got 32"),
        ({"arch": "bagnet33", "se": False}, "se: only for anchornet"),
        ({"arch": "saccader", "attention_loss": False}, "attention_loss: only for anchornet"),
    ],
)
def test_settings_that_no_run_could_use(changes: dict, message: str):
    with pytest.raises(SettingsError, match=message):
        TrainConfig(data=Path("data"), folder=Path("runs"), **changes)


def test_the_right_places_are_those_of_the_true_class():
    torch.manual_seed(0)
    net = Saccader(3, width=4).eval()
    torch.nn.init.normal_(net.bagnet.classifier.weight)
    images, labels = torch.randn(4, 3, 101, 109), torch.tensor([2, 0, 1, 2])
    with torch.no_grad():
        maps = net.maps(images)
        weight = net.bagnet.classifier.weight[labels, :, 0, 0]
        found = best_places(maps.features, weight, GLIMPSES)
    for n, label in enumerate(labels):
        logits = maps.logits[n, label].tolist()
        assert found[n].tolist() == sorted(range(20), key=lambda p: -logits[p])[:GLIMPSES]


def test_the_location_network_learns_to_look_where_the_class_is(data: Path, whole: Path):
    config = peer("saccader", data, whole, init=whole / STAGES[0] / WEIGHTS[0])
    images = open_images(config, World(), Reporter())
    task = LocationTask(config, *images, torch.device("cpu"), World())
    torch.manual_seed(0)
    module = task.build().train()
    with closing(task.batches(0, 0)) as batches:
        batch = next(batches)
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    found = []
    for _ in range(40):
        loss, parts = task.loss(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append((loss.item(), parts["place_top1"].item()))
    (first_loss, first_share), *_, (last_loss, last_share) = found
    assert last_loss < first_loss - 0.3
    assert last_share > first_share
    assert all(p.grad is None for p in module.net.bagnet.parameters())


def test_reinforce_weighs_the_samples_by_what_they_gain():
    """Against the definition, image by image; and only the samples' probability is pulled."""

    class Sampled(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return logits, log_prob, greedy

    class Batch:
        inputs, labels, share = torch.zeros(3, 3, 8, 8), torch.tensor([1, 0, 1]), 1.0

    class Task:
        class config:
            label_smoothing = 0.0

    torch.manual_seed(0)
    logits, greedy = torch.randn(3, 2).requires_grad_(), torch.randn(3, 2)
    log_prob = -torch.rand(3).requires_grad_()
    log_prob.retain_grad()
    loss, parts = ReinforceTask.loss(Task, Sampled(), Batch)
    loss.backward()
    gains = [
        (logits[n].softmax(0)[label] - greedy[n].softmax(0)[label]).item()
        for n, label in enumerate(Batch.labels)
    ]
    cross = functional.cross_entropy(logits, Batch.labels).item()
    expected = -sum(gain * log_prob[n].item() for n, gain in enumerate(gains)) / 3
    assert parts["reinforce"].item() == pytest.approx(expected, abs=1e-6)
    assert loss.item() == pytest.approx(expected + cross, abs=1e-6)
    assert (parts["reward"] - parts["baseline"]).item() == pytest.approx(sum(gains) / 3, abs=1e-6)
    torch.testing.assert_close(log_prob.grad, -torch.tensor(gains) / 3)
    alone = torch.autograd.grad(functional.cross_entropy(logits, Batch.labels), logits)[0]
    torch.testing.assert_close(logits.grad, alone)
