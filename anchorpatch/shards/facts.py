"""What the shards of a split hold, from its manifest alone: no shard is opened."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from anchorpatch.settings import SCALES
from anchorpatch.shards.layout import ShardSettings
from anchorpatch.shards.manifest import Manifest

__all__ = ["ScaleFacts", "SplitFacts", "split_facts"]


@dataclass(frozen=True)
class ScaleFacts:
    """What one scale has.

    Attributes:
        images: that chose the scale.
        patches: of them.
    """

    images: int
    patches: int

    @property
    def mean_patches(self) -> float | None:
        """Patches an image; None without images."""
        return self.patches / self.images if self.images else None


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    Attributes:
        folder: of the split.
        split: its name.
        shards: that are there.
        total_shards: of the complete split.
        images: stored, without the skipped ones.
        scales: by side of the patches in pixels.
        skipped: images that could not be read, by reason, the most frequent first.
        bytes: of all shards.
        classes: how many folders there are.
        network_classes: how many classes the weights have.
        same_classes: whether both lists are one, so that accuracy has a meaning.
        correct: images whose predicted class has the index of their label.
        settings: what decided the bytes.
        weights_sha256: of the weights file.
        anchorpatch_version: that wrote the shards.
    """

    folder: str
    split: str
    shards: int
    total_shards: int
    images: int
    scales: dict[int, ScaleFacts]
    skipped: dict[str, int]
    bytes: int
    classes: int
    network_classes: int
    same_classes: bool
    correct: int
    settings: ShardSettings
    weights_sha256: str
    anchorpatch_version: str

    @property
    def top1(self) -> float | None:
        """Share of images that AnchorNet decided right; None where the classes differ."""
        return self.correct / self.images if self.same_classes and self.images else None

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON knows them."""
        return {
            **{k: v for k, v in vars(self).items() if k != "correct"},
            "scales": {str(scale): vars(found) for scale, found in self.scales.items()},
            "settings": self.settings.to_json(),
            "top1": self.top1,
        }


def split_facts(manifest: Manifest) -> SplitFacts:
    """Sum up a split."""
    entries, header = manifest.entries, manifest.header
    return SplitFacts(
        folder=str(manifest.folder),
        split=header.split,
        shards=manifest.shard_count - len(manifest.missing()),
        total_shards=manifest.shard_count,
        images=sum(entry.images for entry in entries),
        scales={
            scale: ScaleFacts(
                sum(entry.chosen[scale] for entry in entries),
                sum(entry.patches[scale] for entry in entries),
            )
            for scale in SCALES
        },
        skipped=dict(Counter(reason for e in entries for _, reason in e.skipped).most_common()),
        bytes=sum(entry.bytes for entry in entries),
        classes=len(header.classes),
        network_classes=len(header.network_classes),
        same_classes=header.classes == header.network_classes,
        correct=sum(entry.correct for entry in entries),
        settings=header.settings,
        weights_sha256=header.weights_sha256,
        anchorpatch_version=header.version,
    )
