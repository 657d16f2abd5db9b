from __future__ import annotations

from pathlib import Path

import numpy as np

from anchorpatch.shards.facts import split_facts
from anchorpatch.shards.manifest import read_manifest
from tests.jobs.patch_shards import Drawn, classes_of, write_shards
from tests.shards.samples import make_split


def test_facts_are_the_sums_over_what_was_written(tmp_path: Path) -> None:
    manifest, batches = make_split(tmp_path / "val", store_images=True)
    facts = split_facts(manifest)
    scale = np.concatenate([batch.scale for batch in batches])
    counts = np.concatenate([batch.counts for batch in batches])
    for theta, found in facts.scales.items():
        assert found.images == int((scale == theta).sum())
        assert found.patches == int(counts[scale == theta].sum())
        assert found.mean_patches == found.patches / found.images
    assert (facts.images, facts.shards, facts.total_shards) == (21, 3, 3)
    assert facts.bytes == sum(path.stat().st_size for path in tmp_path.glob("val/*.h5"))
    # The network knows a class more than there are folders.
    assert (facts.same_classes, facts.top1) == (False, None)

    next(tmp_path.glob("val/*.h5")).unlink()
    assert split_facts(read_manifest(tmp_path / "val")).shards == 2


def test_accuracy_has_a_meaning_where_the_classes_are_the_same(tmp_path: Path) -> None:
    images = [Drawn(scale, 0, [[1, 0]]) for scale in (63, 63, 95)]
    folder = write_shards(tmp_path / "val", images, classes_of(2))
    facts = split_facts(read_manifest(folder))
    assert (facts.same_classes, facts.top1) == (True, 1.0)
    assert facts.scales[111].mean_patches is None
    document = facts.to_json()
    assert document["scales"]["63"] == {"images": 2, "patches": 2}
    assert document["settings"]["preset"] == "evaluate"
    assert document["top1"] == 1.0
