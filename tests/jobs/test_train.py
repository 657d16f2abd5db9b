from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from anchorpatch.classes import Matching
from anchorpatch.errors import (
    DataError,
    Interrupted,
    MissingDependency,
    NonFiniteError,
    SettingsError,
    StorageError,
    TooManyBadImages,
    WeightsError,
)
from anchorpatch.jobs import evaluate_anchornet
from anchorpatch.jobs.train import run
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import WeightsMeta, load_weights, save_weights
from anchorpatch.runtime.distributed import World
from anchorpatch.settings import CropSettings
from anchorpatch.training.config import RECIPES, TrainConfig
from anchorpatch.training.run_folder import alone_in
from tests.oddities import encoded, picture
from tests.program import run_alone, run_ranks
from tests.training.runs import (
    TRAIN,
    VAL,
    WEIGHTS,
    StopAt,
    assert_same_run,
    keep_trained,
    make_pictures,
    records,
    state_of,
    tiny,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on busy cores wait for each other; tests share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "anchornet"
    run(tiny(data, folder))
    return folder


def test_a_run_leaves_its_files(whole: Path, data: Path):
    names = {"config.json", "log.jsonl", "last.pt", *WEIGHTS}
    assert {path.name for path in whole.iterdir()} == names
    first, last = records(whole)
    assert (first["epoch"], last["epoch"]) == (1, 2)
    assert first["val"]["images"] == VAL
    assert set(first["train"]) == {"loss", *first["val"]["losses"]}
    assert len(first["val"]["losses"]) == 6
    six = sum(v for k, v in first["train"].items() if k != "loss")
    assert first["train"]["loss"] == pytest.approx(six)
    meta = load_weights(whole / "last.safetensors").meta
    assert meta.classes == ("cat", "dog")
    assert meta.training["record"]["val"] == last["val"]
    assert meta.training["settings"]["batch_size"] == 4
    assert json.loads((whole / "config.json").read_text())["data"] == str(data)


def test_the_whole_run_again_is_equal_bit_for_bit(data: Path, whole: Path, tmp_path: Path):
    run(tiny(data, tmp_path))
    assert_same_run(tmp_path, whole)


def test_workers_and_cache_change_nothing(data: Path, whole: Path, tmp_path: Path):
    # The pictures are smaller than the cache's limit, so it holds them unchanged.
    config = tiny(data, tmp_path / "run", workers=2, image_cache=tmp_path / "cache")
    run(config)
    assert records(tmp_path / "run") == records(whole)


@pytest.mark.parametrize(
    ("number", "images"),
    [(signal.SIGINT, 8), (signal.SIGTERM, TRAIN), (signal.SIGTERM, TRAIN + 12)],
)
def test_a_signal_stops_and_the_same_run_goes_on(
    data: Path, whole: Path, tmp_path: Path, number: int, images: int
):
    config = tiny(data, tmp_path, checkpoint_minutes=10.0)
    with pytest.raises(Interrupted, match="run the same command again to resume") as caught:
        run(config, StopAt(images, number))
    assert caught.value.exit_status == 128 + number
    state = state_of(tmp_path)
    assert (state["epoch"] * TRAIN + state["step"] * 4) == images
    rest = StopAt(-1)
    run(config, rest)
    assert f"epoch {images // TRAIN + 1}, step {images % TRAIN // 4}" in rest.lines[0] or (
        images == TRAIN
    )
    assert_same_run(tmp_path, whole)


def test_a_signal_during_evaluation(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from anchorpatch.metrics import AnchorNetAccuracy

    update = AnchorNetAccuracy.update

    def interrupted(self: AnchorNetAccuracy, *args: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return update(self, *args)

    monkeypatch.setattr(AnchorNetAccuracy, "update", interrupted)
    with pytest.raises(Interrupted):
        run(tiny(data, tmp_path))
    monkeypatch.undo()
    run(tiny(data, tmp_path))
    assert_same_run(tmp_path, whole)


def test_killed_within_an_epoch_and_resumed(data: Path, whole: Path, tmp_path: Path):
    # It dies after its sixth step, whose checkpoint is not yet written.
    assert run_alone(run, tiny(data, tmp_path), StopAt(24, signal.SIGKILL)) == -signal.SIGKILL
    assert (state_of(tmp_path)["epoch"], state_of(tmp_path)["step"]) == (1, 1)
    run(tiny(data, tmp_path))
    assert_same_run(tmp_path, whole)


def test_killed_between_log_and_checkpoint(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(Exception):
        pass

    def die(*args: object) -> None:
        raise Killed

    monkeypatch.setattr("anchorpatch.training.loop.save_weights", die)
    with pytest.raises(Killed):
        run(tiny(data, tmp_path))
    assert len(records(tmp_path)) == 1
    monkeypatch.undo()
    run(tiny(data, tmp_path))
    assert_same_run(tmp_path, whole)


def test_two_processes_end_with_the_same_weights(data: Path, tmp_path: Path):
    folder = tmp_path / "run"
    done = run_ranks("train", tiny(data, folder), target=keep_trained, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(f"{folder}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    # Five validation images, of which one process has three and the other two.
    assert [record["val"]["images"] for record in records(folder)] == [VAL, VAL]
    saved = load_weights(folder / "last.safetensors").tensors
    assert all(torch.equal(ranks[0][f"module.{key}"], value) for key, value in saved.items())
    assert state_of(folder)["sums"] == {}
    # One process goes on with it, and with another epoch.
    rest = StopAt(-1)
    assert run(tiny(data, folder, epochs=3), rest).epochs == 3
    assert [line.split(": ")[1] for line in rest.lines[:2]] == [
        "3 epochs instead of 2",
        "started with 2 processes, resumed with 1",
    ]


def test_a_finished_run_is_only_reported(data: Path, whole: Path, tmp_path: Path):
    before = {path.name: path.stat().st_mtime_ns for path in whole.glob("*.safetensors")}
    summary = run(tiny(data, whole))
    assert summary.epochs == 2
    assert {path.name: path.stat().st_mtime_ns for path in whole.glob("*.safetensors")} == before


def test_other_settings_are_refused_until_overwrite(data: Path, tmp_path: Path):
    run(tiny(data, tmp_path, epochs=1))
    changed = tiny(data, tmp_path, epochs=1, lr=0.5)
    with pytest.raises(WeightsError, match=r"lr 1\.0 there, 0\.5 here.*--overwrite"):
        run(changed)
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 1.0
    assert run(replace(changed, overwrite=True)).epochs == 1
    assert len(records(tmp_path)) == 1
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.5


@pytest.mark.parametrize("arch", ["anchornet", "saccader"])
def test_weights_of_others_are_not_overwritten(data: Path, tmp_path: Path, arch: str):
    (tmp_path / "best.safetensors").write_bytes(b"a colleague's")
    with pytest.raises(WeightsError, match=r"holds best\.safetensors, but no last\.pt"):
        run(tiny(data, tmp_path, arch=arch))
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_a_second_run_in_the_folder_is_refused_at_once(data: Path, whole: Path):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    with (
        alone_in(whole, World(), torch.device("cpu")),
        pytest.raises(StorageError, match="another run is training here"),
    ):
        run(tiny(data, whole, overwrite=True, seed=1))
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_overwrite_resumes_the_same_run(data: Path, whole: Path, tmp_path: Path):
    config = tiny(data, tmp_path, overwrite=True)
    with pytest.raises(Interrupted):
        run(config, StopAt(TRAIN + 4))
    rest = StopAt(-1)
    run(config, rest)
    assert "resuming from" in rest.lines[0]
    assert_same_run(tmp_path, whole)


def test_synchronized_normalization_needs_gpus(data: Path, tmp_path: Path):
    with pytest.raises(SettingsError, match="sync_batchnorm"):
        run(tiny(data, tmp_path, sync_batchnorm=True))


def test_other_images_are_refused(data: Path, tmp_path: Path):
    other = make_pictures(tmp_path / "data")
    run(tiny(other, tmp_path / "run", epochs=1))
    (other / "train" / "cat" / "00.png").unlink()
    with pytest.raises(WeightsError, match="train_images"):
        run(tiny(other, tmp_path / "run", epochs=1))


def test_classes_must_be_the_same(tmp_path: Path):
    data = make_pictures(tmp_path)
    (data / "val" / "dog").rename(data / "val" / "wolf")
    with pytest.raises(DataError, match=r"only the 2 classes of .*found 1 more \(wolf\)"):
        run(tiny(data, tmp_path / "run"))


def test_val_may_lack_classes_and_the_crop_mode_goes_with_the_weights(tmp_path: Path):
    data = make_pictures(tmp_path / "data")
    shutil.rmtree(data / "val" / "dog")
    (data / "val" / "notes.txt").write_text("not in a class folder")
    jpeg = encoded(picture(130, 130), "JPEG")
    start = jpeg.index(b"\xff\xda") + 200
    (data / "train" / "cat" / "00.png").write_bytes(jpeg[:start] + jpeg[start + 40 :])
    said = StopAt(-1)
    side = {"img_size": 128, "crop_pct": 0.9}
    config = tiny(data, tmp_path / "run", epochs=1, crop_mode="squash", background="navy", **side)
    summary = run(config, said)
    assert f"{data}/val: 1 of 2 classes has no image among the 3 images taken: dog" in said.lines
    assert (summary.damaged, summary.bad, summary.ignored) == (1, {}, {})
    weights = load_weights(tmp_path / "run" / "last.safetensors")
    assert weights.meta.classes == ("cat", "dog")
    assert weights.meta.cropping == CropSettings("squash", "#000080", **side)
    assert weights.meta.resize == 142


def test_evaluation_crops_as_the_weights_say(data: Path, weights: Path, tmp_path: Path):
    lively = load_weights(weights)
    squash = tmp_path / "squash.safetensors"
    save_weights(squash, lively.tensors, replace(lively.meta, crop_mode="squash"))
    squashed = tmp_path / "val" / "cat"
    squashed.mkdir(parents=True)
    for path in (data / "val").glob("*/*.png"):
        Image.open(path).resize((224, 224), Image.Resampling.BILINEAR).save(squashed / path.name)
    center, ours, theirs = (
        evaluate_anchornet.run(
            evaluate_anchornet.EvaluateAnchorNetConfig(folder, file, device="cpu")
        )
        for folder, file in ((data, weights), (data, squash), (tmp_path, squash))
    )
    # What does not depend on the labels. Pictures that are squashed already stay as they are.
    assert (ours.branch_share, ours.mean_patches) == (theirs.branch_share, theirs.mean_patches)
    assert ours.loss != pytest.approx(center.loss, rel=1e-4)


def test_empty_classes_are_refused(tmp_path: Path):
    data = make_pictures(tmp_path)
    (data / "train" / "emu").mkdir()
    with pytest.raises(DataError, match="emu"):
        run(tiny(data, tmp_path / "run"))


def test_too_few_images_for_a_batch(data: Path, tmp_path: Path):
    with pytest.raises(DataError, match="16 images are too few for a batch of 32"):
        run(tiny(data, tmp_path, batch_size=32))


def test_a_batch_must_divide_into_pieces(data: Path, tmp_path: Path):
    with pytest.raises(SettingsError, match="choose a multiple of 3"):
        run(tiny(data, tmp_path, accumulate=3))


def test_divergence_stops_and_keeps_the_last_checkpoint(data: Path, tmp_path: Path):
    with pytest.raises(NonFiniteError, match=r"at step \d+ of epoch \d+ \(rate .*lower --lr"):
        run(tiny(data, tmp_path, lr=1e30))
    for value in state_of(tmp_path)["sums"].values():
        assert value == value


def test_too_many_bad_images(tmp_path: Path):
    data = make_pictures(tmp_path)
    (data / "train" / "cat" / "00.png").write_bytes(b"no image")
    with pytest.raises(TooManyBadImages, match=r"cat/00\.png \(not an image\)"):
        run(tiny(data, tmp_path / "run", epochs=1))
    summary = run(tiny(data, tmp_path / "run", epochs=1, max_bad=0.2))
    assert summary.bad == {"not an image": 1}
    (data / "val" / "cat" / "00.png").write_bytes(b"no image")
    with pytest.raises(TooManyBadImages, match="1 of 5 images"):
        run(tiny(data, tmp_path / "run2", epochs=1, max_bad=0.1))


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_crafted_pickle_does_not_run(data: Path, tmp_path: Path):
    trace, folder = tmp_path / "trace", tmp_path / "run"
    folder.mkdir()
    for write in (
        lambda p: p.write_bytes(pickle.dumps(Bomb(trace))),
        lambda p: torch.save(Bomb(trace), p),
    ):
        write(folder / "last.pt")
        with pytest.raises(WeightsError, match=r"last\.pt: .* was not run"):
            run(tiny(data, folder))
        write(tmp_path / "init.safetensors")
        with pytest.raises(WeightsError, match=r"init\.safetensors: expected safetensors"):
            run(tiny(data, tmp_path / "other", init=tmp_path / "init.safetensors"))
    assert not trace.exists()


def test_a_truncated_checkpoint_is_refused(data: Path, tmp_path: Path):
    run(tiny(data, tmp_path, epochs=1))
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"last\.pt: expected training state, found a damaged"):
        run(tiny(data, tmp_path, epochs=1))
    assert run(tiny(data, tmp_path, epochs=1, overwrite=True)).epochs == 1


def test_init_takes_over_what_fits(data: Path, whole: Path, tmp_path: Path):
    config = tiny(data, tmp_path / "a", epochs=1, lr=1e-12, init=whole / "last.safetensors")
    run(replace(config, ema_decay=0.0, weight_decay=0.0))
    ours, theirs = (load_weights(f / "last.safetensors").tensors for f in (tmp_path / "a", whole))
    for key, value in ours.items():
        if key.endswith("weight"):
            assert torch.allclose(value, theirs[key])
    three = make_pictures(tmp_path / "data", ("cat", "dog", "emu"))
    run(replace(config, data=three, folder=tmp_path / "b", ema_decay=0.0, weight_decay=0.0))
    ours = load_weights(tmp_path / "b" / "last.safetensors").tensors
    assert torch.allclose(ours["stem.0.weight"], theirs["stem.0.weight"])
    assert ours["branches.0.classifier.weight"].shape[0] == 3


def test_init_of_another_network_is_refused(data: Path, whole: Path, tmp_path: Path):
    with pytest.raises(WeightsError, match="same --se"):
        run(tiny(data, tmp_path, se=False, init=whole / "last.safetensors"))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "lr": 1e-3},
        {"attention_loss": False},
        {"se": False, "weighted_mean": False},
        {"schedule": "cosine", "label_smoothing": 0.1, "nesterov": True, "ema_decay": 0.0},
        {"amp": True},
        {"channels_last": False},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_train(data: Path, tmp_path: Path, changes: dict):
    summary = run(tiny(data, tmp_path, epochs=1, **changes))
    assert summary.last["train"]["loss"] < 20
    meta = load_weights(summary.weights).meta
    assert meta.se is changes.get("se", True)
    assert meta.weighted_mean is changes.get("weighted_mean", True)


def test_tensorboard_gets_every_figure_of_an_epoch(data: Path, tmp_path: Path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    summary = run(tiny(data, tmp_path, epochs=1, tensorboard=True))
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"lr", "train/loss", "val/top1", "val/top1_by_output/attention_63"} <= set(
        found.Tags()["scalars"]
    )
    assert found.Scalars("val/top1")[0].value == pytest.approx(summary.last["val"]["top1"])


def test_tensorboard_that_is_not_there_is_one_clear_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependency, match=r"pip install 'anchorpatch\[tensorboard\]'"):
        run(tiny(data, tmp_path, tensorboard=True))
    assert not list(tmp_path.iterdir())


def test_attention_branches_rest_without_their_losses(data: Path, tmp_path: Path):
    run(tiny(data, tmp_path, epochs=1, attention_loss=False, weight_decay=0.0, ema_decay=0.0))
    tensors = load_weights(tmp_path / "last.safetensors").tensors
    assert not tensors["branches.0.attention_classifier.bias"].any()
    assert tensors["branches.0.classifier.bias"].any()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The options for a teacher of further classes, in another order."""
    torch.manual_seed(0)
    net = build("shufflenet_v2_x0_5", 3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_weights(path, net.state_dict(), WeightsMeta("shufflenet_v2_x0_5", ("ox", "dog", "cat")))
    return {"teacher": "shufflenet_v2_x0_5", "teacher_weights": str(path), "distill_weight": 0.25}


def test_a_teacher_has_its_part_in_the_loss(data: Path, whole: Path, teacher: dict, tmp_path: Path):
    reporter = StopAt(-1)
    run(tiny(data, tmp_path, **teacher), reporter)
    assert "2 of its 3 outputs are the classes" in " ".join(reporter.lines)
    first, plain = records(tmp_path)[0]["train"], records(whole)[0]["train"]
    six = sum(v for k, v in first.items() if k not in ("loss", "distillation"))
    assert first["loss"] == pytest.approx(0.75 * six + 0.25 * first["distillation"])
    assert first["distillation"] > 0
    assert first["localization_63"] != plain["localization_63"]
    assert set(records(tmp_path)[0]["val"]["losses"]) == set(plain) - {"loss"}
    recorded = load_weights(tmp_path / "best.safetensors").meta.training["settings"]
    assert (recorded["teacher"], recorded["temperature"]) == ("shufflenet_v2_x0_5", 1.0)
    with pytest.raises(WeightsError, match=r"temperature 1\.0 there, 4\.0 here"):
        run(tiny(data, tmp_path, **teacher, temperature=4.0))
    with pytest.raises(WeightsError, match="teacher shufflenet_v2_x0_5 there, None here"):
        run(tiny(data, tmp_path))


def test_a_run_with_a_teacher_resumes(data: Path, teacher: dict, tmp_path: Path):
    run(tiny(data, tmp_path / "whole", **teacher))
    with pytest.raises(Interrupted):
        run(tiny(data, tmp_path / "stopped", **teacher), StopAt(20))
    run(tiny(data, tmp_path / "stopped", **teacher))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_teacher_that_lacks_classes_is_refused(data: Path, teacher: dict, tmp_path: Path):
    path = tmp_path / "teacher.safetensors"
    net = build("shufflenet_v2_x0_5", 2)
    save_weights(path, net.state_dict(), WeightsMeta("shufflenet_v2_x0_5", ("ox", "cat")))
    with pytest.raises(WeightsError, match="lack 1 of them: dog"):
        run(tiny(data, tmp_path / "run", **{**teacher, "teacher_weights": str(path)}))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"ema_decay": -0.1},
        {"schedule": "linear"},
        {"optimizer": "adam"},
        {"recipe": "big"},
        {"crop_size": 110},
        {"min_area": 0.0},
        {"nesterov": True, "momentum": 0.0},
        {"seed": -1},
        {"distill_weight": 0.0},
        {"temperature": 0.0},
        {"teacher": "resnet18", "arch": "bagnet33"},
        {"teacher_weights": "none", "teacher": "resnet18"},
        {"teacher_weights": "teacher.safetensors"},
        {"distill_weight": 0.7},
        {"temperature": 2.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_settings_that_no_run_could_use(changes: dict):
    name = next(iter(changes))
    with pytest.raises(SettingsError, match=name):
        TrainConfig(data=Path("data"), folder=Path("runs"), **changes)


def test_a_class_map_is_for_a_teacher():
    with pytest.raises(SettingsError, match="class_map: only with a teacher"):
        TrainConfig(data=Path(), folder=Path(), matching=Matching(("cat", "dog")))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_settings(recipe: str):
    TrainConfig(data=Path(), folder=Path(), recipe=recipe, **RECIPES[recipe])


def test_learning_shows_in_the_losses(data: Path, tmp_path: Path):
    run(tiny(data, tmp_path, epochs=5, ema_decay=0.0, min_area=0.9, checkpoint_minutes=9.0))
    losses = [record["train"]["loss"] for record in records(tmp_path)]
    assert losses[-1] < losses[0] - 0.3
