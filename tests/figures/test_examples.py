from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from anchorpatch.errors import SettingsError
from anchorpatch.figures.examples import Choice, spread
from anchorpatch.jobs.crops import CropSource
from anchorpatch.shards.reader import ShardReader
from tests.jobs.patch_shards import Drawn, classes_of, write_shards


@pytest.fixture(scope="module")
def source(image_folder: Path) -> CropSource:
    return CropSource.of_folder(image_folder, "val")


@pytest.fixture
def uneven(tmp_path: Path) -> CropSource:
    """Three classes of 9, 3 and 1 images."""

    labels = [0] * 9 + [1] * 3 + [2]
    images = [Drawn(63, label, [[i] * 3]) for i, label in enumerate(labels)]
    write_shards(tmp_path / "val", images, classes_of(3), store_images=True)
    return CropSource.of_shards(ShardReader(tmp_path / "val"))


def test_a_seed_settles_the_order(source: CropSource):
    orders = [Choice(seed=seed).rows(source) for seed in range(3)]
    assert [Choice(seed=seed).rows(source) for seed in range(3)] == orders
    assert all(sorted(rows) == list(range(40)) for rows in orders)
    assert len({tuple(rows) for rows in orders}) == 3


@pytest.mark.parametrize("limit", [1, 2, 7, 12, 40, 300])
def test_a_limit_takes_the_first_of_the_order(source: CropSource, limit: int):
    rows = Choice(seed=5, limit=limit).rows(source)
    assert rows == Choice(seed=5).rows(source)[:limit]
    assert len(rows) == min(limit, 40)
    counts = Counter(source.labels[rows].tolist())
    assert abs(counts[0] - counts[1]) <= 1


def test_each_round_takes_one_image_of_every_class_that_has_any_left(uneven: CropSource):
    labels = uneven.labels[Choice(seed=1).rows(uneven)].tolist()
    assert sorted(labels[:3]) == [0, 1, 2]
    assert sorted(labels[3:5]) == sorted(labels[5:7]) == [0, 1]
    assert labels[7:] == [0] * 6


def test_named_classes_alone_are_looked_at(source: CropSource):
    assert sorted(Choice(classes=("dog",)).rows(source)) == list(range(20, 40))
    assert sorted(Choice(classes=("dog", "cat")).rows(source)) == list(range(40))


def test_named_images_are_exactly_those_in_their_order(source: CropSource):
    names = ("dog/07.JPEG", "cat/00.JPEG", "dog/01.JPEG", "cat/00.JPEG")
    rows = Choice(images=names, limit=2).rows(source)
    assert [source.path(row) for row in rows] == ["dog/07.JPEG", "cat/00.JPEG", "dog/01.JPEG"]


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        (Choice(classes=("dgo",)), r"--classes: 'dgo' is not among the 2 classes of .*val; "),
        (Choice(classes=("cat", "doge")), r"did you mean dog\?"),
        (Choice(images=("03.JPEG",)), r"--images: '03.JPEG' is not among the 40 images of .*val; "),
        (Choice(images=("03.JPEG",)), r"did you mean cat/03.JPEG\?"),
        (Choice(images=("dog/04.jpg",)), r"did you mean dog/04.JPEG\?"),
        (Choice(classes=("zzz",)), "the first is cat"),
    ],
)
def test_a_name_that_is_unknown_says_which_is_near(source: CropSource, choice: Choice, why: str):
    with pytest.raises(SettingsError, match=why) as caught:
        choice.rows(source)
    assert "\n" not in str(caught.value)


def test_contradictions_are_refused():
    with pytest.raises(SettingsError, match="expected --images or --classes, got both"):
        Choice(images=("cat/00.JPEG",), classes=("cat",))
    with pytest.raises(SettingsError, match="limit: expected at least one image, got 0"):
        Choice(limit=0)


def test_spread_takes_the_rarest_first_key_then_the_rarest_second():
    candidates = [(63, 0), (63, 0), (63, 1), (95, 0), (95, 1), (111, 0)]
    chosen = spread(candidates, 4, lambda c: c[0], lambda c: c[1])
    assert chosen == [(63, 0), (95, 1), (111, 0), (63, 1)]
    assert spread(candidates, 9, lambda c: c[0])[:3] == [(63, 0), (95, 0), (111, 0)]
    assert len(spread(candidates, 9, lambda c: c[0])) == 6


def test_the_order_depends_on_the_labels_alone(source: CropSource):
    class Labels:
        labels, classes, name = np.array(source.labels), source.classes, "elsewhere"

        def __len__(self) -> int:
            return len(self.labels)

    assert Choice(seed=2).rows(Labels()) == Choice(seed=2).rows(source)  # type: ignore[arg-type]
