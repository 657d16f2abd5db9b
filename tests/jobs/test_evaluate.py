from __future__ import annotations

import csv
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from anchorpatch.classes import Matching
from anchorpatch.errors import (
    AnchorpatchError,
    CorruptShard,
    DataError,
    SettingsError,
    ShardError,
    StorageError,
    WeightsError,
)
from anchorpatch.images.decode import decode
from anchorpatch.jobs.crops import CropSource
from anchorpatch.jobs.evaluate import EvaluateConfig, run, run_rescale
from anchorpatch.models.anchornet import AnchorNet
from anchorpatch.models.complexity import macs
from anchorpatch.models.registry import build
from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights
from anchorpatch.runtime.progress import Reporter
from anchorpatch.settings import SCALES
from anchorpatch.shards import ShardReader
from tests.jobs.patch_shards import Drawn, classes_of, write_shards

NETWORK, SEVEN = "mobilenet_v3_small", classes_of(7)


class Lines(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def images(n: int = 9, seed: int = 0) -> list[Drawn]:
    rng = random.Random(seed)
    return [
        Drawn(
            rng.choice(SCALES),
            rng.randrange(7),
            [[rng.randrange(256) for _ in range(200)] for _ in range(rng.randint(1, 5))],
        )
        for _ in range(n)
    ]


def lively(seed: int) -> nn.Module:
    """A network whose outputs differ from picture to picture."""
    torch.manual_seed(seed)
    module = build(NETWORK, len(SEVEN))
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
    return module.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of patches and crops, shards of patches alone, their images, and weights."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, stored in (("stored", True), ("shards", False)):
        write_shards(root / name / "val", images(), SEVEN, store_images=stored)
    reader = ShardReader(root / "stored" / "val")
    for i, path in enumerate(reader.path.tolist()):
        file = root / "data" / "val" / path.decode()
        file.parent.mkdir(parents=True, exist_ok=True)
        # Of 256 px, the transform of validation cuts the middle out.
        framed = np.zeros((256, 256, 3), np.uint8)
        framed[16:240, 16:240] = reader.image(i)
        Image.fromarray(framed).save(file)
    for name, seed in ((NETWORK, 0), (f"{NETWORK}-baseline", 1)):
        meta = WeightsMeta(NETWORK, SEVEN)
        save_weights(root / "runs" / name / "best.safetensors", lively(seed).state_dict(), meta)
    return root


def config_of(root: Path, **changes: object) -> EvaluateConfig:
    config = EvaluateConfig(
        NETWORK,
        shards=root / "stored",
        runs=root / "runs",
        data=root / "data",
        speed=False,
        device="cpu",
        batch_size=4,
    )
    return replace(config, **changes)


@torch.no_grad()
def softmax(module: nn.Module, pixels: np.ndarray) -> list[float]:
    """The distribution of one picture, uint8 (H, W, 3), in plain Python from the logits on."""
    mean, std = (np.array(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    values = torch.from_numpy((pixels / 255 - mean) / std).float().permute(2, 0, 1)[None]
    powers = [math.exp(v) for v in module(values)[0].tolist()]
    return [p / sum(powers) for p in powers]


def summed(module: nn.Module, reader: ShardReader, i: int, most: int = 99) -> list[float]:
    parts = [softmax(module, pixels) for pixels in reader.image_patches(i).pixels[:most]]
    return [sum(column) for column in zip(*parts, strict=True)]


def ranking(total: list[float]) -> list[int]:
    return sorted(range(len(total)), key=lambda c: (-total[c], c))


def test_table_3_equals_image_by_image(root: Path):
    table = run(config_of(root))
    reader, module = ShardReader(root / "stored" / "val"), lively(0)
    decided = [ranking(summed(module, reader, i)) for i in range(len(reader))]
    cost = {side: macs(module, side) / 1e9 for side in (*SCALES, 224)}
    net = AnchorNet(7)
    both = macs(net, 224, net.localize) / 1e9
    spent = 0.0
    for row, scale in zip(table.rows[1:-1], SCALES, strict=True):
        rows = [i for i in range(len(reader)) if reader.scale[i] == scale]
        assert (row.scale, row.images) == (str(scale), len(rows))
        assert row.top1 == sum(decided[i][0] == reader.label[i] for i in rows) / len(rows)
        assert row.top5 == sum(reader.label[i] in decided[i][:5] for i in rows) / len(rows)
        patches = sum(int(reader.counts[i]) for i in rows)
        assert row.mean_patches == patches / len(rows)
        assert row.gmacs == pytest.approx(patches * cost[scale] / len(rows))
        spent += patches * cost[scale]
    last = table.rows[-1]
    right = [decided[i][0] == reader.label[i] for i in range(len(reader))]
    assert (last.scale, last.images, last.top1) == ("all", 9, sum(right) / 9)
    assert last.gmacs_with_anchornet == pytest.approx(spent / 9 + both)
    assert last.saved == pytest.approx(1 - spent / 9 / cost[224])


def test_whole_images_by_the_baseline_from_crops_or_files(root: Path):
    reader, module = ShardReader(root / "stored" / "val"), lively(1)
    best = [ranking(softmax(module, reader.image(i))) for i in range(len(reader))]
    expected = sum(b[0] == reader.label[i] for i, b in enumerate(best)) / len(reader)
    stored = run(config_of(root, speed=True))
    files = run(config_of(root, shards=root / "shards"))
    assert stored.whole_source == "the stored crops"
    assert files.whole_source == f"the images in {root / 'data' / 'val'}"
    assert stored.whole_weights == f"{root}/runs/{NETWORK}-baseline/best.safetensors"
    assert (stored.rows[0].scale, stored.rows[0].top1) == ("224", expected)
    assert files.rows == stored.rows
    assert "anchornet/best.safetensors does not exist" in stored.left_out[0]
    assert files.left_out == ()


def test_one_scale_counts_its_images_alone(root: Path, tmp_path: Path):
    one = run(config_of(root, scales=(63,), whole_weights="none"))
    n = sum(image.scale == 63 for image in images())
    assert [(row.scale, row.images) for row in one.rows] == [("224", n), ("63", n), ("all", n)]
    assert one.whole_weights == "random weights"
    alone = tmp_path / f"{NETWORK}-63" / "best.safetensors"
    alone.parent.mkdir()
    alone.hardlink_to(root / "runs" / NETWORK / "best.safetensors")
    own = run(config_of(root, scales=(63,), runs=tmp_path, whole=False))
    assert (own.weights, own.rows[0].weights) == (str(alone), str(alone))
    assert replace(own.rows[0], weights=None) == replace(one.rows[1], weights=None)
    lines = Lines()
    part = run(config_of(root, limit=4, whole=False), lines)
    taken = [images()[i] for i in (0, 2, 4, 6)]
    assert part.rows[-1].mean_patches == sum(len(image.logits) for image in taken) / 4
    assert any("classes have no image among the 4 images taken: " in line for line in lines.lines)
    assert (part.rows[-1].images, part.whole_source, part.left_out) == (4, None, ())


def save_runs(runs: Path, **seeds: int) -> None:
    """Runs by what stands behind the network's name: "_63" for RUNS/NETWORK-63."""
    for name, seed in seeds.items():
        path = runs / (NETWORK + name.replace("_", "-")) / "best.safetensors"
        save_weights(path, lively(seed).state_dict(), WeightsMeta(NETWORK, SEVEN))


def test_one_network_per_scale(root: Path, tmp_path: Path):
    save_runs(tmp_path, _63=0, _95=1)
    with pytest.raises(WeightsError, match=r"-111/best.safetensors .* finetune .* --scale 111"):
        run(config_of(root, runs=tmp_path))
    save_runs(tmp_path, _111=2)
    found = run(config_of(root, runs=tmp_path, speed=True))
    reader = ShardReader(root / "stored" / "val")
    modules = dict(zip(SCALES, map(lively, range(3)), strict=True))
    right = []
    for i in range(len(reader)):
        best = ranking(summed(modules[int(reader.scale[i])], reader, i))
        right.append(best[0] == reader.label[i])
    for row, scale in zip(found.rows, SCALES, strict=False):
        rows = [i for i in range(len(reader)) if reader.scale[i] == scale]
        assert row.top1 == sum(right[i] for i in rows) / len(rows)
        assert row.weights == f"{tmp_path}/{NETWORK}-{scale}/best.safetensors"
    assert (found.rows[-1].top1, found.rows[-1].weights) == (sum(right) / 9, None)
    assert found.weights.startswith(f"{tmp_path}/{NETWORK}-63/best.safetensors (63 px), ")
    assert found.left_out[0].startswith(f"row 224: {tmp_path}/{NETWORK}-baseline/")
    # One network for all scales goes first, unless the others are asked for.
    save_runs(tmp_path, **{"": 3})
    one = run(config_of(root, runs=tmp_path, whole=False))
    assert one.weights == one.rows[0].weights == f"{tmp_path}/{NETWORK}/best.safetensors"
    three = run(config_of(root, runs=tmp_path, whole=False, per_scale=True))
    assert three.rows == found.rows


def test_a_network_on_patches_is_asked_about_whole_images_only_with_a_warning(
    root: Path, tmp_path: Path
):
    save_runs(tmp_path, **{"": 0})
    report = Lines()
    table = run(config_of(root, runs=tmp_path), report)
    best = f"{tmp_path}/{NETWORK}/best.safetensors"
    assert (table.whole_weights, table.rows[0].weights) == (best, best)
    assert table.tables()[0].notes[1].endswith(f"weights: {best} (fine-tuned on patches).")
    (warning,) = [line for line in report.lines if line.startswith("warning: ")]
    assert warning.startswith(f"warning: {best} was fine-tuned on patches and understates")
    assert f"run `anchorpatch finetune {NETWORK} --baseline`, or name weights with" in warning
    report = Lines()
    assert run_rescale(config_of(root, runs=tmp_path), report).trained_on == "patches"
    assert len([line for line in report.lines if line.startswith("warning: ")]) == 1
    save_runs(tmp_path, _baseline=1)
    report = Lines()
    table = run(config_of(root, runs=tmp_path), report)
    assert (table.rows[0].weights, table.rows[1].weights) == (table.whole_weights, best)
    assert not [line for line in report.lines if line.startswith("warning: ")]


def test_what_is_left_out_is_said(root: Path, tmp_path: Path):
    config = config_of(root, shards=root / "shards", data=tmp_path, speed=True)
    table = run(config)
    assert table.rows[0].scale == "63"
    assert table.left_out[0].startswith("row 224: ")
    assert f"{tmp_path}: no folder for split 'val'" in str(table)
    assert "extract with --store-images" in str(table)
    assert table.left_out[1].startswith("speed: ")
    shutil.copytree(root / "data" / "val", tmp_path / "val")
    next((tmp_path / "val").glob("*/*")).unlink()
    with pytest.raises(DataError, match="1 of its 9 images are not in"):
        CropSource.of_shards(ShardReader(root / "shards" / "val"), tmp_path, split="val")


def test_speed_is_measured(root: Path, weights: Path):
    report = Lines()
    speed = run(
        config_of(root, speed=True, anchornet_weights=weights, batch_size=16, whole=False), report
    ).speed
    assert speed is not None
    assert (speed.images, speed.rounds) == (9, 3)
    assert speed.ratio == pytest.approx(speed.patches / speed.whole)
    assert min(speed.whole, speed.patches) > 0
    assert speed.mean_patches >= 1
    assert any("not the weights that the shards were made with" in line for line in report.lines)


def test_predictions(root: Path, tmp_path: Path):
    reader, module = ShardReader(root / "stored" / "val"), lively(0)
    text, binary = tmp_path / "out" / "p.csv", tmp_path / "p.npz"
    for path in (text, binary):
        run(config_of(root, predictions=path, whole=False, scales=(63, 111)))
    chosen = [i for i in range(len(reader)) if reader.scale[i] != 95]
    lines = list(csv.DictReader(text.read_text().splitlines()))
    with np.load(binary) as arrays:
        found = dict(arrays)
    assert [line["path"] for line in lines] == found["path"].tolist()
    assert found["classes"].tolist() == list(SEVEN)
    for k, i in enumerate(chosen):
        mean = [v / reader.counts[i] for v in summed(module, reader, i)]
        best = ranking(mean)[:5]
        line = lines[k]
        assert line["path"] == reader.path[i].decode()
        assert line["label"] == SEVEN[reader.label[i]]
        assert (line["scale"], line["patches"]) == (str(reader.scale[i]), str(reader.counts[i]))
        assert [line[f"class{n}"] for n in range(1, 6)] == [SEVEN[c] for c in best]
        values = [float(line[f"probability{n}"]) for n in range(1, 6)]
        assert values == pytest.approx([mean[c] for c in best], rel=1e-4)
        assert found["top5"][k].tolist() == best
        np.testing.assert_allclose(found["probabilities"][k], mean, rtol=1e-4)
    assert len(lines) == len(found["label"]) == len(chosen)


def test_table_4_equals_image_by_image(root: Path):
    places = ("center", "random")
    table = run_rescale(config_of(root, localizers=places, seed=3, batch_size=3))
    reader, module = ShardReader(root / "stored" / "val"), lively(1)
    asked = f"weights: {root}/runs/{NETWORK}-baseline/best.safetensors."
    assert table.tables()[0].notes[0].endswith(asked)
    given = run_rescale(config_of(root, weights=root / "runs" / NETWORK / "best.safetensors"))
    assert given.weights == f"{root}/runs/{NETWORK}/best.safetensors"
    for row, scale in zip(table.rows, (*SCALES, None), strict=True):
        rows = [i for i in range(len(reader)) if scale in (None, reader.scale[i])]
        localized = [ranking(summed(module, reader, i, most=1)) for i in rows]
        small, elsewhere = [], {place: [] for place in places}
        for i in rows:
            side = int(reader.scale[i])
            size = (side, side)
            y, x = 8 * np.random.default_rng((3, i)).integers((224 - side) // 8 + 1, size=2)
            middle = (224 - side) // 2
            for place, (top, left) in zip(places, ((middle, middle), (y, x)), strict=True):
                patch = reader.image(i)[top : top + side, left : left + side]
                elsewhere[place].append(ranking(softmax(module, np.ascontiguousarray(patch))))
            # Pillow's reducing filters are antialiased.
            image = Image.fromarray(reader.image(i)).resize(size, Image.Resampling.BILINEAR)
            small.append(ranking(softmax(module, np.asarray(image))))
        right = [
            sum(best[0] == reader.label[i] for i, best in zip(rows, found, strict=True))
            for found in (small, localized, *elsewhere.values())
        ]
        assert row.images == len(rows)
        assert [*row.other_top1] == ["center", "random"]
        assert [*row.other_top1.values()] == pytest.approx([n / len(rows) for n in right[2:]])
        assert row.rescaled_top1 == pytest.approx(right[0] / len(rows))
        assert row.localized_top1 == pytest.approx(right[1] / len(rows))
    with pytest.raises(
        DataError, match=r"--protocol rescale needs the whole images, but .* --data"
    ):
        run_rescale(config_of(root, shards=root / "shards", data=root / "nowhere"))


def test_a_file_that_cannot_be_read(root: Path, tmp_path: Path):
    data = shutil.copytree(root / "data", tmp_path / "data")
    reader = ShardReader(root / "shards" / "val")
    (data / "val" / reader.path[2].decode()).write_bytes(b"no image")
    # Whole images become crops as they did for the shards.
    reader.settings = replace(reader.settings, crop_mode="squash")
    found = CropSource.of_shards(reader, data, split="val")
    (batch,) = found.batches(np.arange(2), 4)
    squashed = [
        decode((data / "val" / p.decode()).read_bytes(), reader.settings.crop).pixels
        for p in reader.path[:2]
    ]
    assert np.array_equal(batch.pixels, squashed)
    with pytest.raises(DataError, match=r"0002\.png: expected the image .* cannot be read"):
        list(found.batches(np.arange(9), 4))
    # Another archive or folder may have another image of the same name.
    Image.new("RGB", (31, 33)).save(data / "val" / reader.path[3].decode())
    with pytest.raises(DataError, match=r"0003\.png: expected the image .* one of 31 x 33 px"):
        list(found.batches([3], 4))


def test_networks_of_further_classes(root: Path, tmp_path: Path):
    some = (SEVEN[5], SEVEN[1], SEVEN[3])
    drawn = [image._replace(label=image.label % 3) for image in images(seed=3)]
    write_shards(tmp_path / "val", drawn, some, store_images=True)
    reader = ShardReader(tmp_path / "val")
    rows = [5, 1, 3]

    def decided(module: nn.Module, kept: list[int]) -> float:
        """Top-1 of the rows of the head, by hand."""
        few = lively(0)
        few.classifier[-1] = nn.Linear(1024, len(kept))
        state = module.state_dict()
        for key in ("classifier.3.weight", "classifier.3.bias"):
            state[key] = state[key][kept]
        few.load_state_dict(state)
        right = [
            ranking(summed(few.eval(), reader, i))[0] == reader.label[i] for i in range(len(reader))
        ]
        return sum(right) / len(right)

    config = config_of(root, shards=tmp_path, predictions=tmp_path / "p.csv")
    left_out = run(config)
    assert left_out.rows[-1].top1 == pytest.approx(decided(lively(0), rows))
    assert left_out.rows[-1].top5 == 1  # of three classes
    (note, baseline) = left_out.notes
    assert "3 of its 7 outputs are the classes; the logits of the others are left out" in note
    assert "-baseline" in baseline
    assert left_out.to_json()["notes"] == left_out.notes
    assert any(note in line for line in left_out.tables()[0].notes)
    # The network decides among all of its classes: others count as wrong.
    weights = root / "runs" / NETWORK / "best.safetensors"
    every = Matching(all_classes=True)
    kept = run(replace(config, weights=weights, matching=every, whole=False))
    assert kept.rows[-1].top1 == pytest.approx(decided(lively(0), [*rows, 0, 2, 4, 6]))
    assert "compete with its 4 others" in kept.notes[0]
    with (tmp_path / "p.csv").open(newline="") as file:
        named = [row["class1"] for row in csv.DictReader(file)]
    assert set(named) <= set(SEVEN)
    assert not set(named) <= set(some)
    # Names of a file, shuffled together with the outputs, give the same figures.
    state, order = lively(0).state_dict(), [3, 6, 0, 2, 5, 1, 4]
    for key in ("classifier.3.weight", "classifier.3.bias"):
        state[key] = state[key][order]
    torch.save(state, tmp_path / "shuffled.pth")
    (tmp_path / "map.txt").write_text("\n".join(SEVEN[i] for i in order))
    for all_classes, expected in ((False, left_out), (True, kept)):
        matching = Matching.read(tmp_path / "map.txt", all_classes=all_classes)
        found = run(
            replace(config, weights=tmp_path / "shuffled.pth", matching=matching, whole=False)
        )
        for of_rows in zip(found.rows[-4:], expected.rows[-4:], strict=True):
            one, other = (replace(row, weights=None) for row in of_rows)
            assert one.top1 == other.top1
            assert one.loss == pytest.approx(other.loss)


def test_the_interpolation_of_the_weights_is_followed(root: Path, tmp_path: Path):
    found = {}
    for how in ("bilinear", "bicubic"):
        path = tmp_path / f"{how}.safetensors"
        meta = WeightsMeta(NETWORK, SEVEN, interpolation=how)
        save_weights(path, lively(1).state_dict(), meta)
        found[how] = run_rescale(config_of(root, whole_weights=path, scales=(63,)))
    assert found["bilinear"].notes == ()
    (note,) = found["bicubic"].notes
    assert note.endswith(
        "trained with bicubic resizing; extract resized the images and their patches bilinearly"
    )


def test_errors_are_one_clear_line(root: Path, tmp_path: Path):
    def fails(kind: type[AnchorpatchError], *parts: str, **changes: object) -> None:
        with pytest.raises(kind) as caught:
            run(config_of(root, **changes))
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value)

    missing = tmp_path / "s"
    fails(
        ShardError,
        f"{missing}/val: expected shards",
        "anchorpatch extract --split val",
        shards=missing,
    )
    fails(SettingsError, "unknown network 'resnet51'", network="resnet51")
    fails(SettingsError, "vit_b_16 cannot take images of 63, 95, 111 px", network="vit_b_16")
    fails(WeightsError, "run `anchorpatch finetune squeezenet1_0`", network="squeezenet1_0")
    weights = root / "runs" / NETWORK / "best.safetensors"
    other = {"network": "squeezenet1_0", "weights": weights}
    fails(WeightsError, f"expected weights of squeezenet1_0, found {NETWORK}", **other)
    write_shards(tmp_path / "eight" / "val", [Drawn(63, 1, [[5] * 8])], classes_of(8))
    eight = ("expected outputs for the 8 classes class00", "found 7 (class00", "1 of them: class07")
    fails(WeightsError, *eight, shards=tmp_path / "eight")
    renamed = tuple(f"other{i}" for i in range(7))
    write_shards(tmp_path / "renamed" / "val", [Drawn(63, 1, [[5] * 7])], renamed)
    fails(WeightsError, "classes other0", "found 7 (class00", shards=tmp_path / "renamed")
    copy = shutil.copytree(root / "stored", tmp_path / "copy")
    (copy / "val" / "val-00001.h5").write_bytes(b"cut")
    fails(CorruptShard, "val-00001.h5: expected", "found 3: run the same extract", shards=copy)
    fails(SettingsError, ".csv or .npz, found .txt", predictions=tmp_path / "p.txt")
    (tmp_path / "folder.csv").mkdir()
    fails(StorageError, "it is a folder", predictions=tmp_path / "folder.csv")
    fails(StorageError, "cannot write", predictions=weights / "p.csv")
