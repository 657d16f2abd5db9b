from __future__ import annotations

import math
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from anchorpatch.errors import CorruptShard, NonFiniteError, ShardError, WeightsError
from anchorpatch.images.source import spread_rows
from anchorpatch.jobs.crops import Crops
from anchorpatch.jobs.patch_scores import (
    Distributions,
    score_images,
    score_patches,
)
from anchorpatch.metrics import Figures, PatchFigures
from anchorpatch.runtime.distributed import World
from anchorpatch.settings import SCALES
from anchorpatch.shards import ShardReader
from tests.jobs.patch_shards import (
    Drawn,
    Spelled,
    classes_of,
    meta_of,
    summed_softmax,
    write_shards,
)

CPU = torch.device("cpu")
SIX = classes_of(6)

#: Decided by hand below: six classes, five images, logits times ten.
IMAGES = (
    # Each patch alone says class 1 or 2; their sum says class 0.
    Drawn(63, 0, ((20, 25, 0, 0, 0, 0), (20, 0, 25, 0, 0, 0))),
    Drawn(63, 5, ((50, 40, 30, 20, 10, 0),)),  # sixth of six: wrong by top-5 too
    Drawn(111, 4, ((50, 40, 30, 20, 10, 0),)),  # fifth: right by top-5
    Drawn(111, 3, ((0, 0, 9, 9, 0, 0),)),  # ties with class 2, which goes first
    Drawn(111, 2, ((0, 0, 9, 9, 0, 0),) * 3),
)


def score(folder: Path, module: nn.Module | None = None, **options: object) -> PatchFigures:
    reader = ShardReader(folder)
    module = module or Spelled(len(reader.classes))
    run = Distributions(
        module,
        options.pop("device", CPU),
        options.pop("meta", meta_of(reader.classes)),
        options.pop("amp", False),
    )
    networks = dict.fromkeys(options.pop("scales", SCALES), run)
    images = spread_rows(len(reader), options.pop("limit", None))
    images = images[list(options.pop("world", World()).share(len(images)))]
    return score_patches(networks, reader, images, **{"batch_size": 2, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "val", IMAGES, SIX)


def test_figures_worked_out_by_hand(folder: Path):
    figures = score(folder)
    assert (figures.images, figures.patches) == (5, 8)
    assert (figures.top1, figures.top5) == (2 / 5, 4 / 5)
    small, middle, large = (figures.by_scale[scale] for scale in SCALES)
    assert (small.images, small.patches, small.mean_patches) == (2, 3, 1.5)
    assert (small.top1, small.top5) == (1 / 2, 1 / 2)
    assert (large.images, large.patches, large.top1, large.top5) == (3, 5, 1 / 3, 1.0)
    assert (middle.images, middle.top1, middle.loss, middle.mean_patches) == (0, None, None, None)
    # The label of the first image: the same share of either patch.
    own = math.exp(2.0) / (math.exp(2.0) + math.exp(2.5) + 4)
    last = 1 / sum(math.exp(v) for v in range(6))
    assert small.loss == pytest.approx((-math.log(own) - math.log(last)) / 2, rel=1e-6)
    weighted = (small.images * small.loss + large.images * large.loss) / 5
    assert figures.loss == pytest.approx(weighted, rel=1e-12)
    assert figures.by_scale[95] == Figures(0, 0, None, None, None)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_change_nothing(folder: Path, size: int):
    assert score(folder, batch_size=size) == score(folder)


def test_the_strongest_patch_the_first_images_and_one_scale(folder: Path):
    strongest = score(folder, most=1)
    assert (strongest.patches, strongest.top1) == (5, 1 / 5)  # the first image is lost alone
    assert score(folder, limit=1).top1 == 1.0
    one = score(folder, scales=(63,))
    assert (one.images, one.patches, list(one.by_scale)) == (2, 3, [63])
    with pytest.raises(ShardError, match="expected images of the scales 95 px, found none"):
        score(folder, scales=(95,))


def test_keep_gets_mean_distributions(folder: Path):
    kept: dict[int, np.ndarray] = {}
    score(folder, keep=lambda rows, p: kept.update(zip(rows.tolist(), p, strict=True)))
    assert sorted(kept) == [0, 1, 2, 3, 4]
    for row, image in enumerate(IMAGES):
        expected = np.array(summed_softmax(image)) / len(image.logits)
        np.testing.assert_allclose(kept[row], expected, rtol=1e-6)


def oracle(images: list[Drawn]) -> dict[str, float]:
    top1 = top5 = loss = 0.0
    for image in images:
        total = summed_softmax(image)
        ranking = sorted(range(len(total)), key=lambda c: (-total[c], c))
        top1 += ranking[0] == image.label
        top5 += image.label in ranking[:5]
        loss -= math.log(total[image.label] / len(image.logits))
    n = len(images)
    return {"images": n, "top1": top1 / n, "top5": top5 / n, "loss": loss / n}


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[Drawn]]:
    classes = draw(st.integers(1, 9))
    patch = st.lists(st.integers(0, 255), min_size=classes, max_size=classes)
    image = st.builds(
        Drawn,
        st.sampled_from(SCALES),
        st.integers(0, classes - 1),
        st.lists(patch, min_size=1, max_size=8),
    )
    return classes, draw(st.lists(image, min_size=1, max_size=7))


@settings(max_examples=25, deadline=None)
@given(splits(), st.integers(1, 9), st.integers(1, 3))
def test_equals_plain_python(split: tuple[int, list[Drawn]], size: int, ranks: int):
    classes, images = split
    for image in images:
        total = sorted(summed_softmax(image))
        # Sums that only rounding tells apart are for no one to order.
        gaps = [b - a for a, b in pairwise(total)]
        assume(all(gap == 0 or gap > 1e-5 * b for gap, b in zip(gaps, total[1:], strict=True)))
    with tempfile.TemporaryDirectory() as root:
        folder = write_shards(Path(root) / "val", images, classes_of(classes), per_shard=3)
        whole = score(folder, batch_size=size)
        shares = [
            score(folder, batch_size=size, world=World(rank, ranks))
            for rank in range(min(ranks, len(images)))
        ]
    parts = {s: [image for image in images if image.scale == s] for s in SCALES}
    for found, expected in [
        (whole, images),
        *((whole.by_scale[s], part) for s, part in parts.items() if part),
    ]:
        assert found.patches == sum(len(image.logits) for image in expected)
        for name, value in oracle(expected).items():
            assert getattr(found, name) == pytest.approx(value, rel=1e-5), name
    # What the processes would add up.
    assert sum(share.images for share in shares) == len(images)
    right = sum(share.top1 * share.images for share in shares)
    assert right == pytest.approx(whole.top1 * whole.images)


def test_check_and_advance_are_called_between_batches(folder: Path):
    done: list[int] = []
    score(folder, advance=done.append)
    assert sum(done) == 5

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(folder, check=stop)


def test_whole_images(folder: Path):
    pixels, sizes = torch.zeros(3, 8, 8, 3, dtype=torch.uint8), np.ones((3, 2), np.int32)
    pixels[0, 0, 1, 0] = pixels[1, 0, 2, 0] = pixels[2, 0, 5, 0] = 90
    batches = [
        Crops(np.array([4, 7]), pixels[:2], np.array([1, 1]), sizes[:2]),
        Crops(np.array([9]), pixels[2:], np.array([5]), sizes[2:]),
    ]
    run = Distributions(Spelled(6), CPU, meta_of(SIX), amp=False)
    figures = score_images(run, batches)
    assert (figures.images, figures.patches, figures.top1, figures.top5) == (3, 3, 2 / 3, 1.0)
    assert score_images(run, []).top1 is None


def test_a_probability_of_zero_keeps_the_loss_finite(tmp_path: Path):
    folder = write_shards(tmp_path / "val", [Drawn(63, 0, ((0, 255),))], classes_of(2))
    module = Spelled(2)
    module.weight.data[...] = 1e4
    assert 700 < score(folder, module).loss < 710


def test_logits_of_other_classes_are_refused(folder: Path):
    with pytest.raises(WeightsError, match=r"expected logits \(2, 6\) of 2 inputs, found \(2, 5\)"):
        score(folder, Spelled(5))


def test_nan_is_refused(folder: Path):
    module = Spelled(6)
    module.weight.data[...] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity for 5 of 5 images"):
        score(folder, module)


def test_a_corrupt_shard_is_named(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "val")
    shard = copy / "val-00001.h5"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(CorruptShard, match=r"val-00001\.h5: expected a shard"):
        score(copy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(folder: Path):
    gpu = torch.device("cuda", 0)
    found, expected = score(folder, Spelled(6).to(gpu), device=gpu), score(folder)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (found.top1, found.top5) == (expected.top1, expected.top5)
