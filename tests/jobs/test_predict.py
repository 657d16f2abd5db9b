from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anchorpatch.errors import NonFiniteError, SettingsError, WeightsError
from anchorpatch.images.decode import decode
from anchorpatch.jobs.extract import run
from anchorpatch.jobs.extract_plan import ExtractConfig
from anchorpatch.jobs.looks import score_looks
from anchorpatch.jobs.patch_scores import Distributions
from anchorpatch.jobs.predict import PredictConfig, Prediction, Predictor, Unreadable
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.complexity import macs
from anchorpatch.models.registry import build
from anchorpatch.networks import load_checkpoint
from anchorpatch.runtime.checkpoint import WeightsMeta, load_weights, save_weights
from anchorpatch.settings import PRESETS, SCALES
from anchorpatch.shards.reader import ShardReader
from tests.jobs.small_networks import save_small_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_network(tmp_path_factory.mktemp("network") / "best.safetensors")


def predict(config: PredictConfig, paths: list[Path]) -> list[Prediction | Unreadable]:
    with Predictor(config) as predictor:
        return list(predictor.predict(map(str, paths)))


def test_the_same_as_extracting_and_adding_softmaxes(
    tmp_path: Path, image_folder: Path, weights: Path, network: Path
) -> None:
    lsp = PRESETS["evaluate"]
    run(ExtractConfig(image_folder, "val", weights, tmp_path, lsp=lsp, workers=0))
    reader = ShardReader(tmp_path / "val")
    paths = [image_folder / "val" / path.decode() for path in reader.path]
    found = predict(PredictConfig(network, weights, lsp=lsp, top=2), paths)
    module = load_checkpoint(network).module
    mean = torch.tensor([0.485, 0.456, 0.406])
    std = torch.tensor([0.229, 0.224, 0.225])
    assert len(found) == len(reader) == 40
    scales = set()
    for i, prediction in enumerate(found):
        assert isinstance(prediction, Prediction)
        stored = reader.image_patches(i)
        assert prediction.path == str(paths[i])
        assert prediction.scale == stored.scale == prediction.patches.shape[1]
        assert prediction.size == tuple(reader.size[i])
        np.testing.assert_array_equal(prediction.corners, stored.corners)
        np.testing.assert_array_equal(prediction.scores, stored.scores)
        np.testing.assert_array_equal(prediction.patches, stored.pixels)
        scales.add(stored.scale)
        if i % 4:
            continue
        total = torch.zeros(3, dtype=torch.float64)
        for patch in torch.from_numpy(stored.pixels.copy()):
            inputs = ((patch / 255 - mean) / std).permute(2, 0, 1)[None]
            with torch.no_grad():
                total += module(inputs)[0].double().softmax(0)
        total /= len(stored.pixels)
        best = sorted(range(3), key=lambda c: -total[c])[:2]
        assert [name for name, _ in prediction.classes] == ["abc"[c] for c in best]
        for (_, p), c in zip(prediction.classes, best, strict=True):
            assert p == pytest.approx(float(total[c]), abs=1e-5)
    assert len(scales) > 1


def test_stopping_decides_as_the_evaluation(
    tmp_path: Path, image_folder: Path, weights: Path, network: Path
) -> None:
    run(ExtractConfig(image_folder, "val", weights, tmp_path, workers=0, limit=14))
    reader, loaded = ShardReader(tmp_path / "val"), load_checkpoint(network)
    runs = dict.fromkeys(SCALES, Distributions(loaded.module, CPU, loaded.meta, amp=False))
    rows = np.concatenate([np.flatnonzero(reader.scale == scale) for scale in SCALES])
    looks, _ = score_looks(runs, reader, rows, rows, batch_size=16, measure="margin")
    paths = [image_folder / "val" / reader.path[row].decode() for row in rows]
    anchornet = AnchorNet(2)
    own = macs(anchornet, 224, anchornet.localize) / 1e9
    stopped = set()
    for threshold in (0.0, 0.3, 0.6, 1.0):
        found = predict(
            PredictConfig(network, weights, stop_at=threshold, confidence="margin"), paths
        )
        taken = looks.stops(threshold)
        for i, prediction in enumerate(found):
            assert isinstance(prediction, Prediction)
            assert len(prediction.scores) == len(prediction.corners) == taken[i]
            assert prediction.localized == reader.counts[rows[i]]
            assert prediction.classes[0][0] == "abc"[looks.predicted[i, taken[i] - 1]]
            each = macs(loaded.module, prediction.scale) / 1e9
            assert prediction.gmacs == pytest.approx(own + taken[i] * each)
        stopped |= set(taken.tolist())
    assert len(stopped) > 3


def test_pictures_are_cropped_as_the_weights_say(
    tmp_path: Path, image_folder: Path, weights: Path, network: Path
) -> None:
    anchornet = load_weights(weights)
    squash = replace(anchornet.meta, crop_mode="squash")
    save_weights(tmp_path / "squash.safetensors", anchornet.tensors, squash)
    path = image_folder / "val" / "cat" / "03.JPEG"
    (found,) = predict(PredictConfig(network, tmp_path / "squash.safetensors"), [path])
    assert isinstance(found, Prediction)
    np.testing.assert_array_equal(found.crop, decode(path.read_bytes(), squash.cropping).pixels)


def test_bad_files_keep_their_places(
    tmp_path: Path, image_folder: Path, weights: Path, network: Path
) -> None:
    good = sorted((image_folder / "val" / "cat").iterdir())
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    bad = {
        tmp_path / "text.jpg": "not an image",
        tmp_path / "empty.jpg": "empty file",
        tmp_path / "none.jpg": "missing",
        tmp_path: "not a regular file",
    }
    paths = [*list(bad)[:2], *good[:17], list(bad)[2], good[0], list(bad)[3]]
    found = predict(PredictConfig(network, weights, lsp=PRESETS["dense"]), paths)
    assert [result.path for result in found] == [str(path) for path in paths]
    for result, path in zip(found, paths, strict=True):
        assert isinstance(result, Unreadable) == (path in bad)
        if isinstance(result, Unreadable):
            assert result.reason == bad[path]
    # A picture's result does not depend on those around it.
    first, again = found[2], found[20]
    assert isinstance(first, Prediction)
    assert isinstance(again, Prediction)
    assert first.to_json() == again.to_json()
    config = PredictConfig(network, weights)
    assert predict(config, []) == []
    assert [type(r) for r in predict(config, [tmp_path])] == [Unreadable]


def test_a_predictor_serves_any_number_of_calls(
    image_folder: Path, weights: Path, network: Path
) -> None:
    paths = [str(path) for path in sorted((image_folder / "val" / "cat").iterdir())[:3]]
    config = PredictConfig(network, weights)
    expected = [result.to_json() for result in predict(config, list(map(Path, paths)))]
    with Predictor(config) as predictor:
        abandoned = predictor.predict(paths)
        next(abandoned)
        abandoned.close()
        for _ in range(2):
            assert [result.to_json() for result in predictor.predict(paths)] == expected
        turns = zip(predictor.predict(paths), predictor.predict(paths), strict=True)
        for (one, other), result in zip(turns, expected, strict=True):
            assert one.to_json() == other.to_json() == result
    with pytest.raises(RuntimeError, match="after shutdown"):
        next(predictor.predict(paths))


def test_files_are_read_only_a_little_ahead(
    image_folder: Path, weights: Path, network: Path
) -> None:
    path = str(image_folder / "val" / "cat" / "00.JPEG")
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield path

    results = Predictor(PredictConfig(network, weights)).predict(endless())
    assert isinstance(next(results), Prediction)
    assert asked <= 64
    results.close()


def test_files_that_are_no_networks_for_patches(
    tmp_path: Path, weights: Path, network: Path
) -> None:
    path = tmp_path / "vit.safetensors"
    save_weights(path, {}, WeightsMeta("squeezenet1_1", ("a",)))
    for of_network, of_anchornet, message in (
        (path, weights, "expected weights of squeezenet1_1, found other tensors"),
        (tmp_path / "none", weights, "expected a weights file, found none"),
        (weights, weights, "expected a network for patches, found weights of anchornet"),
        (network, network, "expected weights of anchornet, found shufflenet"),
    ):
        with pytest.raises(WeightsError, match=message):
            Predictor(PredictConfig(of_network, of_anchornet))


def test_a_network_by_its_name(tmp_path: Path, weights: Path, network: Path) -> None:
    config = PredictConfig("shufflenet_v2_x0_5", weights, runs=tmp_path)
    with pytest.raises(WeightsError, match=r"finetune shufflenet_v2_x0_5`, or name weights with"):
        Predictor(config)
    with pytest.raises(SettingsError, match="unknown network 'shufflenet'"):
        Predictor(replace(config, network="shufflenet"))
    path = tmp_path / "shufflenet_v2_x0_5" / "best.safetensors"
    save_small_network(path)
    assert Predictor(config).network.meta.classes == ("a", "b", "c")
    # As many outputs as AnchorNet has classes.
    lines: list[str] = []
    state = build("shufflenet_v2_x0_5", 2).state_dict()
    torch.save(state, tmp_path / "two.pth")
    two = Predictor(replace(config, weights=tmp_path / "two.pth"), lines.append)
    assert two.network.meta.classes == ("cat", "dog")
    assert "names no classes; its 2 outputs are assumed to be the classes" in lines[0]


def test_nan_is_told_with_the_picture(
    tmp_path: Path, image_folder: Path, weights: Path, network: Path
) -> None:
    path = tmp_path / "nan.safetensors"
    save_small_network(path, bias=float("nan"))
    picture = image_folder / "val" / "dog" / "03.JPEG"
    with pytest.raises(NonFiniteError, match=r"03\.JPEG: .*nan\.safetensors produced NaN"):
        predict(PredictConfig(path, weights), [picture])
