from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anchorpatch.classes import ClassNames
from anchorpatch.demo.scene_folder import make_scenes, read_boxes, scene_path
from anchorpatch.demo.scenes import CLASSES, SIZES
from anchorpatch.demo.score import score_photos, score_scenes
from anchorpatch.errors import DataError, ShardError
from anchorpatch.lsp import grid_size
from anchorpatch.settings import SCALES
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.layout import shard_name
from anchorpatch.shards.manifest import FilesDigest
from anchorpatch.shards.splits import open_manifest
from anchorpatch.shards.writer import PatchBatch, ShardWriter
from anchorpatch.storage import to_json

IMAGES = 30  # one of each class and size


@pytest.fixture(scope="module")
def boxes_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, train=0, val=IMAGES, jobs=1)
    return folder / "boxes.csv"


def make_batch(scale: np.ndarray, corner: np.ndarray, predicted: np.ndarray) -> PatchBatch:
    """Patches for the images of the set: the strongest as given, behind it one at (0, 0)."""
    names = sorted(scene_path("val", i).removeprefix("val/") for i in range(IMAGES))
    label = np.array([CLASSES.index(name.split("/")[0]) for name in names], np.int32)
    corners = np.stack([corner, np.zeros_like(corner)], 1)
    return PatchBatch(
        path=np.array([name.encode() for name in names]),
        label=label,
        predicted=np.where(predicted < 0, label, predicted).astype(np.int32),
        scale=scale.astype(np.uint8),
        branch_class=np.zeros((IMAGES, 3), np.int32),
        branch_prob=np.zeros((IMAGES, 3), np.float32),
        size=np.full((IMAGES, 2), 256, np.int32),
        pixels=np.zeros((IMAGES, 224, 224, 3), np.uint8),
        counts=np.full(IMAGES, 2, np.int32),
        corners=corners,
        scores=np.tile(np.float32([2, 1]), (IMAGES, 1)),
    )


def write_split(
    folder: Path, batch: PatchBatch, network_classes: tuple[str, ...] = CLASSES, per_shard: int = 11
) -> Path:
    shard_settings = ShardSettings((2, 2, 2), 0.3, (0.3,) * 3, codec="jpeg", shard_size=per_shard)
    header = ShardHeader("val", CLASSES, network_classes, shard_settings, "ab" * 32)
    n = len(batch.path)
    starts = range(0, n, per_shard)
    files = FilesDigest(n, "f0" * 32, tuple(f"{i:064x}" for i, _ in enumerate(starts)))
    manifest = open_manifest(folder, header, files)
    for i, start in enumerate(starts):
        part = PatchBatch(*(column[start : start + per_shard] for column in batch))
        name = folder / shard_name("val", i)
        with ShardWriter(name, header, files_sha256=files.shards[i]) as writer:
            writer.append(part)
        manifest = manifest.commit(writer.entry)
    return folder


def fit(corner: tuple[int, int], theta: int, box: tuple[int, ...]) -> tuple[bool, float]:
    """The oracle: hit and covered share, pixel by pixel."""
    x0, y0, x1, y1 = box
    inside = np.zeros((224, 224), bool)
    inside[y0:y1, x0:x1] = True
    y, x = corner
    hit = bool(inside[y + theta // 2, x + theta // 2])
    return hit, inside[y : y + theta, x : x + theta].sum() / inside.sum()


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_score_equals_the_oracle(
    boxes_csv: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scale = rng.choice(SCALES, IMAGES)
    grid = np.array([grid_size(224, 224, int(theta))[0] for theta in scale])
    corner = rng.integers(0, grid[:, None], (IMAGES, 2)) * 8
    predicted = np.where(rng.random(IMAGES) < 0.5, -1, rng.integers(0, 10, IMAGES))
    batch = make_batch(scale, corner, predicted)
    folder = write_split(tmp_path_factory.mktemp("shards") / "val", batch)
    score = score_scenes(folder, boxes_csv)

    truth = read_boxes(boxes_csv)
    strongest, chance, center, sizes = [], [], [], []
    for i in range(IMAGES):
        size, source = truth["val/" + batch.path[i].decode()]
        box, theta, n = source.in_crop(), int(scale[i]), int(grid[i])
        sizes.append(list(SIZES).index(size))
        strongest.append(fit(tuple(corner[i]), theta, box))
        everywhere = [fit((8 * h, 8 * w), theta, box) for h in range(n) for w in range(n)]
        chance.append(np.mean(everywhere, 0))
        center.append(fit((8 * (n // 2),) * 2, theta, box))
        assert 8 * (n // 2) + theta // 2 == 111  # the middle patch is about the crop's center
    for found, expected in (
        (score.strongest, strongest),
        (score.random, chance),
        (score.center, center),
    ):
        hit, covered = np.mean(expected, 0)
        assert math.isclose(found.hit, hit, abs_tol=1e-12)
        assert math.isclose(found.covered, covered, abs_tol=1e-12)

    assert score.images == IMAGES
    assert score.top1 == (batch.label == batch.predicted).mean()
    for s, size in enumerate(SIZES):
        chosen = [int(t) for t, k in zip(scale, sizes, strict=True) if k == s]
        assert score.counts[size] == {theta: chosen.count(theta) for theta in SCALES}
        assert score.mean_scale[size] == pytest.approx(np.mean(chosen))
    good = pairs = 0.0
    for i, j in combinations(range(IMAGES), 2):
        if sizes[i] != sizes[j]:
            a, b = (i, j) if sizes[i] < sizes[j] else (j, i)
            good += (scale[a] < scale[b]) + (scale[a] == scale[b]) / 2
            pairs += 1
    assert score.ordered == pytest.approx(good / pairs)
    matched = [SCALES[k] == theta for k, theta in zip(sizes, scale, strict=True)]
    assert score.matched == pytest.approx(np.mean(matched))


def sizes_of(boxes_csv: Path) -> np.ndarray:
    truth = read_boxes(boxes_csv)
    names = sorted(scene_path("val", i) for i in range(IMAGES))
    return np.array([list(SIZES).index(truth[name][0]) for name in names])


def test_perfect_patches_score_one(boxes_csv: Path, tmp_path: Path) -> None:
    truth = read_boxes(boxes_csv)
    scale = np.array(SCALES)[sizes_of(boxes_csv)]
    boxes = np.array(
        [truth[n][1].in_crop() for n in sorted(scene_path("val", i) for i in range(IMAGES))]
    )
    middle = (boxes[:, [1, 0]] + boxes[:, [3, 2]]) // 2
    corner = (middle - scale[:, None] // 2).clip(0, 224 - scale[:, None])
    score = score_scenes(
        write_split(tmp_path / "val", make_batch(scale, corner, np.full(IMAGES, -1))), boxes_csv
    )
    assert (score.top1, score.matched, score.ordered, score.grows) == (1, 1, 1, True)
    assert score.mean_scale == {"small": 63, "medium": 95, "large": 111}
    assert score.strongest.hit > score.center.hit > 0
    assert score.strongest.hit > score.random.hit > 0
    assert score.strongest.covered > 0.75
    text = to_json(score)
    assert json.loads(json.dumps(text)) == text
    assert text["counts"]["small"] == {"63": 10, "95": 0, "111": 0}
    assert text["grows"] is True


def test_a_scale_that_shrinks_does_not_grow(boxes_csv: Path, tmp_path: Path) -> None:
    scale = np.array(SCALES)[2 - sizes_of(boxes_csv)]
    batch = make_batch(scale, np.zeros((IMAGES, 2), int), np.full(IMAGES, -1))
    score = score_scenes(write_split(tmp_path / "val", batch), boxes_csv)
    assert (score.ordered, score.grows) == (0, False)
    assert score.matched == pytest.approx(1 / 3)


def test_one_scale_for_all_is_chance(boxes_csv: Path, tmp_path: Path) -> None:
    batch = make_batch(np.full(IMAGES, 95), np.zeros((IMAGES, 2), int), np.full(IMAGES, -1))
    score = score_scenes(write_split(tmp_path / "val", batch), boxes_csv)
    assert (score.ordered, score.grows) == (0.5, False)


def test_top1_needs_equal_classes(boxes_csv: Path, tmp_path: Path) -> None:
    batch = make_batch(np.full(IMAGES, 95), np.zeros((IMAGES, 2), int), np.full(IMAGES, -1))
    folder = write_split(tmp_path / "val", batch, network_classes=(*CLASSES, "elk"))
    assert score_scenes(folder, boxes_csv).top1 is None


def test_shards_of_other_images_are_refused(boxes_csv: Path, tmp_path: Path) -> None:
    batch = make_batch(np.full(IMAGES, 95), np.zeros((IMAGES, 2), int), np.full(IMAGES, -1))
    names = batch.path.copy()
    names[0] = b"cat/1.JPEG"  # in the order of the paths
    folder = write_split(tmp_path / "val", batch._replace(path=names))
    with pytest.raises(DataError, match=r"expected a box for val/cat/1\.JPEG, found none"):
        score_scenes(folder, boxes_csv)
    with pytest.raises(ShardError):
        score_scenes(tmp_path / "nothing", boxes_csv)


@pytest.mark.parametrize("known", [CLASSES, ("elk", *CLASSES[7:2:-1]), ("elk", "fox")])
def test_photographs_are_counted_by_prediction(tmp_path: Path, known: tuple[str, ...]) -> None:
    """All labels, some, or none are classes of the weights."""
    rng = np.random.default_rng(0)
    scale, predicted = rng.choice(SCALES, IMAGES), rng.integers(0, len(known), IMAGES)
    chances = rng.random((IMAGES, 3), np.float32)
    batch = make_batch(scale, np.zeros((IMAGES, 2), np.int64), predicted)
    batch = batch._replace(branch_prob=chances)
    score = score_photos(write_split(tmp_path / "val", batch, known))
    rows = [
        (CLASSES[batch.label[i]], known[predicted[i]], chances[i, SCALES.index(int(scale[i]))])
        for i in range(IMAGES)
    ]
    right = [label == seen for label, seen, _ in rows if label in known]
    assert (score.images, score.labelled) == (IMAGES, len(right))
    assert score.top1 == (pytest.approx(np.mean(right)) if right else None)
    seen = {of: [chance for _, name, chance in rows if name == of] for of in known}
    assert score.predicted == {
        of: {"images": len(found), "probability": pytest.approx(np.mean(found))}
        for of, found in seen.items()
        if found
    }
    counts = [row["images"] for row in score.predicted.values()]
    assert counts == sorted(counts, reverse=True)
    [note] = score.table(ClassNames()).notes
    assert ("unknown" in note) == (not right)
