from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from anchorpatch.classes import AS_NAMED, Matching
from anchorpatch.errors import (
    CorruptShard,
    DataError,
    Interrupted,
    SettingsError,
    ShardError,
    StorageError,
    WeightsError,
)
from anchorpatch.jobs import finetune
from anchorpatch.jobs.finetune import FinetuneConfig, FinetuneSummary, forecast, prepare, run
from anchorpatch.jobs.patch_scores import Distributions, score_patches
from anchorpatch.models.complexity import macs
from anchorpatch.models.registry import build
from anchorpatch.networks import load_network
from anchorpatch.runtime.checkpoint import load_into, load_weights, save_state
from anchorpatch.runtime.distributed import World
from anchorpatch.settings import SCALES
from anchorpatch.shards import ShardReader
from anchorpatch.shards.dataset import held_out
from anchorpatch.training.run_folder import alone_in
from tests.jobs.finetune_runs import (
    CLASSES,
    FEW,
    TRAIN,
    VAL,
    DieAt,
    keep_tiny,
    register,
    run_tiny,
    tiny,
    write_shards,
)
from tests.program import run_alone, run_ranks
from tests.training.runs import StopAt, state_of

WEIGHTS = ("best.safetensors", "last.safetensors")
PATCHES = {63: 26, 95: 12, 111: 7}
STEPS = 7  # four of 63 px, two of 95, one of 111


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    register()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "train", TRAIN, store_images=True)
    write_shards(root / "val", VAL, seed=1, store_images=True)
    return root


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    run(tiny(shards, folder))
    return folder


def records(folder: Path) -> list[dict]:
    """The lines of the log without what depends on the clock and the machine."""
    free = {"seconds", "patches_per_second", "images_per_second", "peak_memory", "waiting"}
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in free} for line in lines]


def tensors_of(folder: Path, name: str = "last.safetensors") -> dict[str, torch.Tensor]:
    return load_weights(folder / name, None).tensors


def assert_same_run(a: Path, b: Path) -> None:
    assert records(a) == records(b)
    for name in WEIGHTS:
        ours, theirs = tensors_of(a, name), tensors_of(b, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (state_of(folder) for folder in (a, b))
    for part in ("module", "average"):
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])


def test_a_run_leaves_its_files(whole: Path, shards: Path):
    assert {p.name for p in whole.iterdir()} == {"config.json", "log.jsonl", "last.pt", *WEIGHTS}
    last = records(whole)[-1]
    assert set(last["train"]) == {"loss", "top1"}
    val = last["val"]
    assert {"loss", "top1", "top5"} <= set(val)
    assert (val["images"], val["patches"]) == (len(VAL), sum(image.patches for image in VAL))
    assert {scale: v["images"] for scale, v in val["by_scale"].items()} == {
        "63": 2,
        "95": 1,
        "111": 2,
    }
    line = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert 0 <= line["waiting"] < 1
    assert line["patches_per_second"] > 0
    meta = load_weights(whole / "last.safetensors", "tiny").meta
    assert meta.classes == CLASSES
    assert meta.training["record"]["val"] == val
    cost = json.loads((whole / "config.json").read_text())["cost"]
    assert cost["rows_an_epoch"] == {str(scale): n for scale, n in PATCHES.items()}
    each = {scale: macs(build("tiny", 3), scale) for scale in PATCHES}
    assert cost["macs"] == 2 * sum(n * each[scale] for scale, n in PATCHES.items())
    assert cost["steps_an_epoch"] == STEPS


def test_learning_shows(shards: Path, tmp_path: Path):
    config = tiny(shards, tmp_path, epochs=8, network="plain", ema_decay=0.0)
    found = run(config)
    assert found.last["val"]["top1"] == 1.0
    assert found.last["train"]["loss"] < records(tmp_path)[0]["train"]["loss"] - 0.2


def test_frozen_statistics_stay_as_they_were(shards: Path, tmp_path: Path, whole: Path):
    start = whole / "last.safetensors"
    for freeze in (False, True):
        config = tiny(shards, tmp_path / str(freeze), weights=str(start), freeze_bn=freeze)
        run(replace(config, ema_decay=0.0, epochs=2))
        before, after = tensors_of(whole), tensors_of(tmp_path / str(freeze))
        same = {key: torch.equal(before[key], tensor) for key, tensor in after.items()}
        running = {key for key in same if ".running_" in key}
        assert running
        assert {same[key] for key in running} == {freeze}
        assert not any(same[key] for key in same if key.endswith("weight"))
    # Runs from before there was such a choice go on.
    assert "freeze_bn" not in tiny(shards, tmp_path).decisive()


def test_pixels_and_labels_of_a_step(shards: Path, tmp_path: Path):
    """The loader, the pieces and the normalization against the reader, one patch at a time."""
    config = tiny(shards, tmp_path, jitter=0.0, flip=False, accumulate=3, epochs=1)
    task = prepare(config, torch.device("cpu"), World())
    task.build()
    requests, reader = list(task.plan.pieces(0, 0)), task.train
    batches = list(task.batches(0, 0))
    assert len(batches) == len(requests) == 3 * STEPS
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for request, batch in zip(requests, batches, strict=True):
        assert batch.share == request.share
        for row, inputs, label in zip(request.rows, batch.inputs, batch.labels, strict=True):
            image = reader.patch_image(request.scale, [row])[0]
            assert Path(reader.path[image].decode()).stem == CLASSES[label]
            pixels = reader.patches(request.scale, [row])[0]
            expected = (pixels / 255 - mean) / std
            assert np.allclose(inputs.numpy().transpose(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize(("images", "accumulate"), [(TRAIN, 3), (FEW, 4)], ids=["plenty", "few"])
def test_pieces_give_the_gradient_of_the_whole_batch(tmp_path: Path, images: list, accumulate: int):
    write_shards(tmp_path / "shards" / "train", images)
    write_shards(tmp_path / "shards" / "val", VAL)
    found = []
    for pieces in (1, accumulate):
        config = tiny(
            *(tmp_path / "shards", tmp_path / str(pieces)),
            network="plain",
            accumulate=pieces,
            jitter=0.0,
            flip=False,
            batch_size=9,
        )
        run(config)
        found.append((tensors_of(tmp_path / str(pieces)), records(tmp_path / str(pieces))))
    (one, first), (more, second) = found
    assert all(torch.allclose(one[key], more[key], atol=1e-5) for key in one)
    assert [r["train"]["loss"] for r in first] == pytest.approx(
        [r["train"]["loss"] for r in second], rel=0.05 if images is FEW else 1e-4
    )


def test_threads_change_nothing(shards: Path, whole: Path, tmp_path: Path):
    for workers in (0, 3):
        run(tiny(shards, tmp_path / str(workers), workers=workers))
        assert_same_run(tmp_path / str(workers), whole)


@pytest.mark.parametrize(
    ("number", "patches"), [(signal.SIGINT, 12), (signal.SIGTERM, 45), (signal.SIGTERM, 70)]
)
def test_a_signal_stops_and_the_same_run_goes_on(
    shards: Path, whole: Path, tmp_path: Path, number: int, patches: int
):
    class StopAfter(StopAt):
        def advance(self, n: int, **counts: int) -> None:
            super().advance(min(n, self.images), **counts)

    config = tiny(shards, tmp_path, checkpoint_minutes=10.0)
    with pytest.raises(Interrupted, match="run the same command again to resume") as caught:
        run(config, StopAfter(patches, number))
    assert caught.value.exit_status == 128 + number
    step = -(-patches * STEPS // 45)
    assert state_of(tmp_path)["epoch"] * STEPS + state_of(tmp_path)["step"] == step
    run(config)
    assert_same_run(tmp_path, whole)


def test_killed_within_an_epoch_and_resumed(shards: Path, whole: Path, tmp_path: Path):
    assert run_alone(run_tiny, shards, tmp_path, DieAt(10)) == -signal.SIGKILL
    assert (state_of(tmp_path)["epoch"], state_of(tmp_path)["step"]) == (1, 2)
    run(tiny(shards, tmp_path))
    assert_same_run(tmp_path, whole)


def test_two_processes_resume_where_they_stopped(shards: Path, tmp_path: Path):
    """Each has sums, running statistics and a state of dropout of its own."""
    for name, images in (("whole", -1), ("stopped", 3 * 45 // STEPS), ("stopped", -1)):
        folder, report = tmp_path / name, StopAt(images)
        done = run_ranks(shards, folder, report, target=run_tiny, cwd=tmp_path)
        assert (done.returncode == 0) == (images < 0), done.stderr
        assert state_of(folder)["step"] == (0 if images < 0 else 3)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_two_processes_end_with_the_same_weights(tmp_path: Path):
    """Also where a scale has fewer patches than there are pieces, here one and three of four."""
    shards, folder = tmp_path / "shards", tmp_path / "run"
    write_shards(shards / "train", FEW)
    write_shards(shards / "val", VAL)
    changes = {"epochs": 1, "accumulate": 2, "batch_size": 9}
    done = run_ranks(shards, folder, changes, target=keep_tiny, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(f"{folder}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    saved = load_weights(folder / "last.safetensors", "tiny")
    assert all(torch.equal(ranks[0][f"module.{k}"], v) for k, v in saved.tensors.items())
    # One process's figures of the same weights.
    module = build("tiny", 3).eval()
    load_into(module, saved)
    run = Distributions(module, torch.device("cpu"), saved.meta, amp=False)
    reader = ShardReader(shards / "val")
    alone = score_patches(dict.fromkeys(SCALES, run), reader, np.arange(len(reader)), batch_size=32)
    found = records(folder)[0]["val"]
    assert found["images"] == len(VAL)
    assert found["top1"] == alone.top1
    assert found["loss"] == pytest.approx(alone.loss, rel=1e-6)
    assert found["by_scale"].keys() == {str(scale) for scale in alone.by_scale}
    for scale, figures in alone.by_scale.items():
        assert found["by_scale"][str(scale)] == pytest.approx(asdict(figures), rel=1e-6)


def test_one_scale_alone(shards: Path, tmp_path: Path):
    found = run(tiny(shards, tmp_path, scale=95, epochs=1))
    assert found.cost["rows_an_epoch"] == {"95": PATCHES[95]}
    assert found.last["val"]["images"] == 1
    with pytest.raises(WeightsError, match="scale 95 there, 63 here"):
        run(tiny(shards, tmp_path, scale=63, epochs=1))


def test_some_patches_of_each_image(shards: Path, tmp_path: Path):
    found = run(tiny(shards, tmp_path, patches_per_image=2, epochs=1))
    assert found.cost["rows_an_epoch"] == {"63": 12, "95": 8, "111": 7}
    assert found.last["val"]["patches"] == sum(image.patches for image in VAL)


# --- whole images --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards without crops, and the crops as files."""
    root, data = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("pictures")
    for split, images, seed in (("train", TRAIN, 0), ("val", VAL, 1)):
        write_shards(root / split, images, seed=seed)
        reader = ShardReader(shards / split)
        for i, name in enumerate(reader.path.tolist()):
            path = data / split / name.decode()
            path.parent.mkdir(parents=True, exist_ok=True)
            Pillow.fromarray(reader.image(i)).resize((256, 256)).save(path)
    return root, data


def baseline(shards: Path, folder: Path, **changes: Any) -> FinetuneConfig:
    return tiny(shards, folder, baseline=True, like=folder.parent / "tiny", **changes)


def test_held_out_images_are_not_trained_on(shards: Path, tmp_path: Path):
    config = tiny(shards, tmp_path / "tiny", holdout=0.4, epochs=1)
    task = prepare(config, torch.device("cpu"), World())
    out = np.flatnonzero(held_out(task.train.path, 0.4))
    assert 0 < len(out) < len(TRAIN)
    seen: set[int] = set()
    for request in task.plan.pieces(0, 0):
        seen |= set(task.train.patch_image(request.scale, request.rows).tolist())
    assert seen == set(range(len(TRAIN))) - set(out.tolist())
    summary = run(config)
    assert summary.images == (len(TRAIN) - len(out), len(VAL))
    network = load_network("tiny", CLASSES, tmp_path / "tiny" / "best.safetensors")
    assert (network.holdout, network.trained_on) == (0.4, "patches")
    with pytest.raises(DataError, match=r"expected patches to train on, found none; .* --holdout"):
        prepare(replace(config, holdout=0.9999), torch.device("cpu"), World())
    # Another share is another run.
    with pytest.raises(WeightsError, match=r"holdout 0\.4 there, None here"):
        run(replace(config, holdout=0.0))
    baseline = prepare(replace(config, baseline=True), torch.device("cpu"), World())
    ((_, drawn),) = baseline.draw(np.random.default_rng(0)).items()
    assert set(drawn.tolist()) == seen


def test_a_baseline_costs_what_patches_cost(shards: Path, tmp_path: Path):
    lines: list[str] = []
    report = StopAt(-1)
    report.lines = lines
    found = run(baseline(shards, tmp_path / "tiny-baseline", epochs=9), report)
    each = {side: macs(build("tiny", 3), side) for side in (63, 95, 111, 224)}
    budget = 9 * sum(n * each[scale] for scale, n in PATCHES.items())
    passes = budget / (len(TRAIN) * each[224])
    assert passes > 1
    assert found.cost["budget"] == {"macs": budget, "of": "9 epochs of all patches"}
    # Epochs are whole steps, of which so few images give but two or three.
    half_a_step = 0.5 / found.cost["steps_an_epoch"]
    assert found.cost["macs"] == pytest.approx(budget, rel=half_a_step)
    assert found.epochs == round(passes)
    assert found.last["val"]["images"] == len(VAL)
    assert any("the budget of 9 epochs of all patches" in line for line in lines)
    assert json.loads((tmp_path / "tiny-baseline/log.jsonl").read_text().splitlines()[0])[
        "images_per_second"
    ]


def test_a_baseline_costs_what_the_run_on_patches_cost(shards: Path, tmp_path: Path):
    patches = forecast(tiny(shards, tmp_path / "tiny", epochs=20, patches_per_image=1))["cost"]
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({"cost": patches}))
    cost = forecast(baseline(shards, tmp_path / "tiny-baseline"))["cost"]
    assert cost["budget"] == {"macs": patches["macs"], "of": f"{tmp_path / 'tiny'}, 20 epochs"}
    lines: list[str] = []
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({"cost": patches, "holdout": 0.4}))
    prepare(baseline(shards, tmp_path / "b"), torch.device("cpu"), World(), lines.append)
    assert [line for line in lines if "holdout" in line] == [
        f"{tmp_path / 'tiny'} was trained with --holdout 0.4, this run with 0.0: they learn from "
        "different images"
    ]
    (tmp_path / "tiny" / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"tiny/config\.json: cannot read the cost of the run"):
        forecast(baseline(shards, tmp_path / "tiny-baseline"))


def test_a_forecast_looks_at_the_weights(shards: Path, whole: Path, tmp_path: Path):
    config = tiny(shards, tmp_path / "tiny", weights=str(whole / "best.safetensors"))
    assert forecast(config)["weights"] == config.weights
    with pytest.raises(WeightsError, match=r"nosuch\.pth: expected a weights file, found none"):
        forecast(replace(config, weights="nosuch.pth"))
    with pytest.raises(WeightsError, match="expected weights of resnet18, found tiny"):
        forecast(replace(config, network="resnet18"))
    with pytest.raises(WeightsError, match="tiny has no pretrained weights"):
        forecast(replace(config, weights="default"))


@pytest.mark.parametrize(
    ("budget", "expected"), [(0, (10, 1)), (100, (10, 1)), (140, (14, 1)), (333, (11, 3))]
)
def test_what_is_affordable(budget: int, expected: tuple[int, int]):
    assert finetune._affordable(budget, 10, 100) == expected


def test_epochs_of_a_baseline_are_passes_where_they_are_given(shards: Path, tmp_path: Path):
    cost = forecast(tiny(shards, tmp_path, baseline=True, epochs=3))["cost"]
    assert (cost["epochs"], cost["rows_an_epoch"]) == (3, {"224": len(TRAIN)})
    assert "budget" not in cost


def test_a_baseline_on_files(pictures: tuple[Path, Path], tmp_path: Path):
    shards, data = pictures
    config = tiny(shards, tmp_path / "a", baseline=True, data=data, workers=0)
    found = run(config)
    assert found.source == f"the images in {data / 'train'}"
    assert found.last["val"]["images"] == len(VAL)
    with pytest.raises(Interrupted):
        run(tiny(shards, tmp_path / "b", baseline=True, data=data, workers=0), StopAt(14))
    run(tiny(shards, tmp_path / "b", baseline=True, data=data, workers=1))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DataError, match=r"holds no whole images.*--store-images"):
        run(tiny(shards, tmp_path / "c", baseline=True, data=tmp_path))


def test_a_baseline_names_the_image_that_is_gone(pictures: tuple[Path, Path], tmp_path: Path):
    shards, _ = pictures
    names = [(s, p.decode()) for s in ("train", "val") for p in ShardReader(shards / s).path]
    for split, name in names:
        path = tmp_path / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"train/\d+/\w+\.png: .*\(not an image\).*restore it"):
        run(tiny(shards, tmp_path / "run", baseline=True, data=tmp_path, workers=0))


# --- errors --------------------------------------------------------------------------------------


def fails(error: type[Exception], match: str, config: FinetuneConfig) -> None:
    with pytest.raises(error, match=match) as caught:
        run(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_shards_say_how_to_make_them(tmp_path: Path, split: str):
    other = {"train": "val", "val": "train"}[split]
    write_shards(tmp_path / other, VAL)
    fails(
        ShardError,
        rf"{split}: expected shards, found no manifest\.json.*extract --split {split} --out",
        tiny(tmp_path, tmp_path / "run", batch_size=2),
    )


def test_other_classes_in_val(tmp_path: Path):
    write_shards(tmp_path / "train", TRAIN)
    write_shards(tmp_path / "val", VAL, classes=("blue", "lime", "rose"))
    fails(DataError, "red only in train, rose only in val", tiny(tmp_path, tmp_path / "run"))


def test_a_corrupt_shard_within_an_epoch_keeps_the_checkpoint(tmp_path: Path):
    write_shards(tmp_path / "train", TRAIN, codec="jpeg")
    write_shards(tmp_path / "val", VAL)
    config = tiny(tmp_path, tmp_path / "run")
    with pytest.raises(Interrupted):
        run(config, StopAt(45 // STEPS))
    before = state_of(tmp_path / "run")["step"]
    reader = ShardReader(tmp_path / "train")
    path = tmp_path / "train" / "train-00002.h5"
    for scale in PATCHES:
        offset, shape = reader._shard(2).places[f"patches/{scale}/blob"]
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(bytes(int(np.prod(shape))))
    fails(CorruptShard, r"train-00002\.h5: .*expected a JPEG file", config)
    assert state_of(tmp_path / "run")["step"] >= before


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (DataError, "45 patches per epoch are too few for a batch size of 64", {"batch_size": 64}),
        (SettingsError, "batch size 8 is too small for 1 processes x 5", {"accumulate": 5}),
        (SettingsError, "inception_v3 cannot take images of 63", {"network": "inception_v3"}),
        (SettingsError, "vit_b_16 cannot take images of 63, 95, 111", {"network": "vit_b_16"}),
        (WeightsError, "nowhere: expected a weights file", {"weights": "nowhere"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_together(
    shards: Path, tmp_path: Path, error: type[Exception], match: str, changes: dict
):
    fails(error, match, tiny(shards, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["identity", "module", "optimizer", "schedule", "random", "sums"])
def test_state_with_other_contents(whole: Path, shards: Path, tmp_path: Path, part: str):
    state = state_of(whole)
    for other in (None, [1], "text", {"state": {0: 1}}):
        save_state(tmp_path / "last.pt", "finetune", {**state, part: other})
        with pytest.raises((WeightsError, DataError), match=r"last\.pt: expected|log\.jsonl: exp"):
            run(tiny(shards, tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}\nno JSON\n",
        "[]\n[]\n",
        '{"val": {"top1": 0.5}}\n',
        "\xff",
        "epoch",
        "top5",
        "patches",
    ],
)
def test_a_log_with_other_contents(whole: Path, shards: Path, tmp_path: Path, text: str):
    shutil.copy(whole / "last.pt", tmp_path)
    if text.isascii() and text.isalnum():  # the name of a number that is gone
        text = (whole / "log.jsonl").read_text().replace(f'"{text}"', '"x"')
    (tmp_path / "log.jsonl").write_text(text, encoding="latin-1")
    fails(DataError, r"log\.jsonl: expected the record of an epoch", tiny(shards, tmp_path))


def test_a_scale_without_patches(tmp_path: Path):
    write_shards(tmp_path / "train", FEW[2:])
    write_shards(tmp_path / "val", VAL)
    fails(DataError, "expected patches of 63 px", tiny(tmp_path, tmp_path / "run", scale=63))


def test_other_shards_and_weights_are_another_run(whole: Path, shards: Path, tmp_path: Path):
    write_shards(tmp_path / "train", TRAIN, seed=5)
    write_shards(tmp_path / "val", VAL, weights_sha256="cd" * 32)
    report = StopAt(-1)
    run(tiny(tmp_path, tmp_path / "run", epochs=1), report)
    assert "the shards of val and train were extracted with different" in report.lines[0]
    for moved, match in (
        (tiny(shards, tmp_path / "run", epochs=1), "train_shards"),
        (tiny(tmp_path, tmp_path / "run", epochs=1, network="plain"), "network tiny there, plain"),
        (
            tiny(tmp_path, tmp_path / "run", epochs=1, weights=str(whole / "last.safetensors")),
            "weights none there, [0-9a-f]{64} here",
        ),
    ):
        with pytest.raises(WeightsError, match=match) as caught:
            run(moved)
        assert "--overwrite" in str(caught.value)


def test_results_of_others_are_not_overwritten(shards: Path, tmp_path: Path):
    (tmp_path / "best.safetensors").write_bytes(b"a colleague's")
    fails(WeightsError, r"holds best\.safetensors, but no last\.pt", tiny(shards, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_a_second_run_in_the_folder_is_refused_at_once(shards: Path, tmp_path: Path):
    with alone_in(tmp_path, World(), torch.device("cpu")):
        fails(StorageError, "another run is training here", tiny(shards, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_finished_run_goes_on_with_more_epochs(shards: Path, tmp_path: Path):
    run(tiny(shards, tmp_path, epochs=1))
    report = StopAt(-1)
    assert run(tiny(shards, tmp_path), report).epochs == 2
    assert report.lines[0].endswith("which is not what 2 epochs from the start would give")
    assert json.loads((tmp_path / "config.json").read_text())["cost"]["epochs"] == 2


def test_weights_of_a_run_start_another(whole: Path, shards: Path, tmp_path: Path):
    start = tensors_of(whole)
    config = tiny(
        *(shards, tmp_path / "a"),
        weights=str(whole / "last.safetensors"),
        epochs=1,
        lr=1e-12,
        ema_decay=0.0,
        weight_decay=0.0,
    )
    run(config)
    found = tensors_of(tmp_path / "a")
    assert all(torch.allclose(found[k], v) for k, v in start.items() if k.endswith("weight"))


def test_a_head_keeps_the_rows_of_its_classes(whole: Path, tmp_path: Path):
    classes = ("red", "lime", "blue", "rose")
    write_shards(tmp_path / "train", TRAIN, classes=classes)
    write_shards(tmp_path / "val", VAL, classes=classes)
    report = StopAt(-1)
    config = tiny(
        tmp_path, tmp_path / "run", weights=str(whole / "last.safetensors"), epochs=1, lr=1e-12
    )
    run(config, report)
    known = load_weights(whole / "last.safetensors", None)
    rows = [
        known.meta.classes.index(name) if name in known.meta.classes else -1 for name in classes
    ]
    assert sorted(rows) == [-1, 0, 1, 2]
    assert any("the classes are new to it: " in line for line in report.lines)
    head, old = tensors_of(tmp_path / "run")["6.weight"], known.tensors["6.weight"]
    assert len(head) == 4
    for row, value in zip(rows, head, strict=True):
        assert row < 0 or torch.allclose(value, old[row], atol=1e-6)


def test_the_rows_of_a_class_map(whole: Path, tmp_path: Path):
    names = load_weights(whole / "last.safetensors", None).meta.classes
    mapped = Matching(("x", "y", "z"), "map.txt")
    config = tiny(tmp_path, tmp_path / "run", weights=str(whole / "last.safetensors"), epochs=1)
    write_shards(tmp_path / "train", TRAIN)
    write_shards(tmp_path / "val", VAL)
    config = replace(config, lr=1e-12)
    with pytest.raises(
        WeightsError, match=r"found 3 by map\.txt \(x, y, z\), which lack 3 of them"
    ):
        run(replace(config, matching=mapped))
    turned = (names[1], names[2], names[0])
    run(replace(config, matching=Matching(turned, "map.txt")))
    head, old = (
        load_weights(folder / "last.safetensors", None).tensors["6.weight"]
        for folder in (tmp_path / "run", whole)
    )
    assert torch.allclose(head, old[[turned.index(name) for name in names]], atol=1e-6)
    # Another map is another run.
    with pytest.raises(WeightsError, match="class_map"):
        run(replace(config, matching=AS_NAMED, epochs=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "anchornet"},
        {"network": "resnet5"},
        {"scale": 64},
        {"patches_per_image": 0},
        {"baseline": True, "scale": 63},
        {"jitter": 1.0},
        {"min_area": 0.0},
        {"workers": -1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_settings_that_no_run_could_use(changes: dict):
    with pytest.raises(SettingsError, match=next(iter(changes))):
        tiny(Path(), Path(), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": True, "channels_last": False},
        {"optimizer": "adamw", "lr": 1e-3, "label_smoothing": 0.1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_train(shards: Path, tmp_path: Path, changes: dict):
    found: FinetuneSummary = run(tiny(shards, tmp_path, epochs=1, **changes))
    assert found.last["train"]["loss"] < 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_augments_as_cpu_and_resumes(shards: Path, tmp_path: Path):
    inputs = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        task = prepare(tiny(shards, tmp_path, baseline=True, epochs=1), device, World())
        task.build()
        inputs.append(torch.cat([batch.inputs.cpu() for batch in task.batches(0, 0)]))
    assert torch.allclose(*inputs, atol=1e-3)
    config = tiny(shards, tmp_path / "run", device="cuda", amp=True)
    with pytest.raises(Interrupted):
        run(config, StopAt(45 // STEPS))
    assert run(config).epochs == 2
