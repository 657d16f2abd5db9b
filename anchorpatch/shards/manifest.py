"""The manifest of a split: what its shards were made from, and which are done.

``OUT/SPLIT/manifest.json`` is JSON with one line per shard. A shard counts as done when its
entry is here and its file has the size of the entry. Everything else is made again: the same
inputs give the same bytes, so doing a shard twice is safe, and adopting a file that nobody
vouches for would not be. The manifest vouches for itself: its last field is the SHA-256 of all
that stands before it. Manifests of earlier versions lack that field and are read too.

Several processes, also on several hosts, commit entries to one manifest. Each commit takes
the lock ``.manifest.lock``, reads the manifest again, adds its entry and replaces the file.
Where a filesystem has no locks (Lustre without ``-o flock``, some FUSE mounts), two commits
in the same moment may lose one of the entries. That shard is then pending again, and the next
run of the same command writes it again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from anchorpatch import storage
from anchorpatch.errors import ManifestMismatch, ShardError, reason_of
from anchorpatch.settings import SCALES
from anchorpatch.shards.header import ShardHeader, ShardSettings
from anchorpatch.shards.layout import FORMAT_VERSION, MANIFEST_NAME, shard_name
from anchorpatch.tables import Table, scale_table

LOCK_NAME: Final = ".manifest.lock"
MANIFEST_FORMAT: Final = "anchorpatch shards"
_SEAL: Final = ',\n  "sha256": "'

#: Fields of the manifest that are those of `ShardHeader`, under the same name.
_OF_HEADER: Final = ("split", "classes", "network_classes", "weights_sha256")

#: Half-written files, of killed runs too.
LEFTOVERS: Final = re.compile(
    r"\.manifest\.json\.[0-9a-f]{12}\.tmp|\..+\.h5\.[0-9a-f]{12}\.tmp|.+\.h5\.tmp"
)


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest knows of a shard.

    Attributes:
        name: of the file.
        images: stored, without the skipped ones.
        patches: stored, by scale.
        chosen: images that chose each scale.
        correct: images whose predicted class has the index of their label.
        bytes: size of the file.
        sha256: of the file.
        skipped: path and reason of each image that could not be read.
        files_sha256: digest of the shard's part of the file list.
        damaged: path of each stored image that was decoded with damage.

    Raises:
        ValueError: a count cannot be one.
    """

    name: str
    images: int
    patches: dict[int, int]
    chosen: dict[int, int]
    correct: int
    bytes: int
    sha256: str
    skipped: tuple[tuple[str, str], ...] = ()
    files_sha256: str = ""
    damaged: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not {*self.patches} == {*self.chosen} == {*SCALES}:
            raise ValueError(f"expected counts for the scales {SCALES}")
        counts = (self.images, self.correct, *self.patches.values(), *self.chosen.values())
        # Rows are int32 in a shard.
        if min(*counts, self.bytes) < 0 or max(counts) >= 1 << 31 or self.bytes >= 1 << 63:
            raise ValueError(f"{self.name!r}: expected counts, found {counts}, {self.bytes} bytes")


@dataclass(frozen=True)
class FilesDigest:
    """The file list that a split is made from, as digests.

    Attributes:
        count: how many files.
        sha256: of the whole list.
        shards: of each shard's part of the list, in order.
        paths: returns the relative paths from ``start`` to ``stop``, in order. Called only to
            name the first file that differs.
    """

    count: int
    sha256: str
    shards: tuple[str, ...]
    paths: Callable[[int, int], Sequence[str]] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Manifest:
    """A snapshot of the manifest; `refreshed` and `commit` look at the disk again.

    Attributes:
        folder: the split's folder.
        header: what the shards have in common.
        files_count: images of the split, the unreadable ones included.
        files_sha256: digest of the file list.
        entries: of the shards that are done, in order.
    """

    folder: Path
    header: ShardHeader
    files_count: int
    files_sha256: str
    entries: tuple[ShardEntry, ...] = ()

    @property
    def shard_count(self) -> int:
        """How many shards the split has when it is complete."""
        return -(-self.files_count // self.header.settings.shard_size)

    def shard_path(self, index: int) -> Path:
        """Return the path of a shard, whether it is done or not."""
        return self.folder / shard_name(self.header.split, index)

    def shard_range(self, index: int) -> range:
        """Return the part of the file list that a shard holds."""
        size = self.header.settings.shard_size
        return range(index * size, min((index + 1) * size, self.files_count))

    def missing(self) -> list[int]:
        """Return the shards that are not done, as of this snapshot."""
        return [i for i in range(self.shard_count) if not self.has(i)]

    def has(self, index: int) -> bool:
        """Tell whether a shard is done, as of this snapshot."""
        path = self.shard_path(index)
        with suppress(OSError, KeyError):
            return self._sizes[path.name] == path.stat().st_size
        return False

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {entry.name: entry.bytes for entry in self.entries}

    def refreshed(self) -> Manifest:
        """Return the manifest as it is on the disk right now.

        Raises:
            ManifestMismatch: another run has replaced the folder's inputs meanwhile.
        """
        now = read_manifest(self.folder)
        if (now.header, now.files_sha256) != (self.header, self.files_sha256):
            raise ManifestMismatch(
                f"{self.folder / MANIFEST_NAME}: another run has started this folder over with "
                "other inputs: choose another --out for one of them"
            )
        return now

    def commit(self, entry: ShardEntry) -> Manifest:
        """Add the entry of a shard that has its final name, in place of an older one.

        Returns:
            The manifest as it is now, with what others committed meanwhile.

        Raises:
            ManifestMismatch: another run has replaced the folder's inputs meanwhile.
            StorageError: the disk refuses; the manifest is as it was.
        """
        return self._changed(lambda found: [*(e for e in found if e.name != entry.name), entry])

    def forget(self, entries: Collection[ShardEntry]) -> Manifest:
        """Remove entries, unless they have changed meanwhile, so that their shards are made again.

        Returns and raises as `commit`.
        """
        return self._changed(lambda found: [e for e in found if e not in entries])

    def _changed(self, change: Callable[[Sequence[ShardEntry]], list[ShardEntry]]) -> Manifest:
        with storage.locked(self.folder / LOCK_NAME):
            now = self.refreshed()
            # val-100000.h5 goes behind val-99999.h5.
            entries = sorted(change(now.entries), key=lambda e: (len(e.name), e.name))
            now = replace(now, entries=tuple(entries))
            write_manifest(now)
        return now


def read_manifest(folder: Path) -> Manifest:
    """Read a split's manifest.

    Raises:
        ShardError: it is missing, damaged, of another program or of another format version.
    """
    path = Path(folder) / MANIFEST_NAME
    again = "restore it, or write it and its shards again with --overwrite"
    try:
        text = path.read_bytes().decode()
        data = json.loads(text)
    except FileNotFoundError:
        raise ShardError(
            f"{path}: not found: expected a folder that `anchorpatch extract` wrote"
        ) from None
    except OSError as error:
        raise ShardError(f"{path}: cannot read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: damaged, not JSON ({error}): {again}") from error
    if not isinstance(data, dict) or data.get("format") != MANIFEST_FORMAT:
        raise ShardError(f"{path}: expected a manifest of anchorpatch, found other JSON")
    if data.get("format_version") != FORMAT_VERSION:
        raise ShardError(
            f"{path}: expected format version {FORMAT_VERSION}, "
            f"found {data.get('format_version')}: choose another --out, or --overwrite"
        )
    try:
        if "sha256" in data and text != _sealed(text.rpartition(_SEAL)[0]):
            raise ValueError("its bytes are not those of its own checksum")
        header = {
            **{name: data.pop(name) for name in _OF_HEADER},
            "settings": ShardSettings.from_json(data.pop("settings")),
            "version": data.pop("anchorpatch_version"),
        }
        count = data.pop("files_count")
        if type(count) is not int or not 0 <= count < 1 << 31:
            raise ValueError(f"files_count: expected an integer from 0, found {count!r:.60}")
        entries = tuple(storage.from_json(ShardEntry, line) for line in data.pop("shards"))
        if len({entry.name for entry in entries}) < len(entries):
            raise ValueError("expected each shard once")
        found = Manifest(
            folder=Path(folder),
            header=storage.from_json(ShardHeader, header),
            files_count=count,
            files_sha256=str(data.pop("files_sha256")),
            entries=entries,
        )
        if unknown := data.keys() - {"format", "format_version", "shard_count", "sha256"}:
            raise ValueError(f"unknown field {min(unknown)!r}")
        return found
    except (KeyError, TypeError, ValueError, AttributeError, ShardError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ShardError(f"{path}: damaged ({what}): {again}") from error


def write_manifest(manifest: Manifest) -> None:
    """Replace the manifest file; the caller holds the lock."""
    header = manifest.header
    document = {
        "format": MANIFEST_FORMAT,
        "format_version": FORMAT_VERSION,
        "anchorpatch_version": header.version,
        "split": header.split,
        "settings": header.settings.to_json(),
        "weights_sha256": header.weights_sha256,
        "files_count": manifest.files_count,
        "files_sha256": manifest.files_sha256,
        "shard_count": manifest.shard_count,
        "classes": header.classes,
        "network_classes": header.network_classes,
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in document.items()]
    shards = ",\n".join(f"    {json.dumps(storage.to_json(entry))}" for entry in manifest.entries)
    text = _sealed("{\n" + "".join(lines) + f'  "shards": [\n{shards}\n  ]')
    storage.write_atomically(
        manifest.folder / MANIFEST_NAME, lambda file: file.write(text.encode())
    )


def _sealed(text: str) -> str:
    """Return all of the manifest, from what stands before its checksum."""
    return f'{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


# --- facts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    Attributes:
        folder: of the split.
        split: its name.
        shards: that are there.
        total_shards: of the complete split.
        images: stored, without the skipped ones.
        scales: "images" that chose each scale, and "patches" of them.
        skipped: images that could not be read, by reason, the most frequent first.
        bytes: of all shards.
        classes: how many folders there are.
        network_classes: how many classes the weights have.
        same_classes: whether both lists are one, so that accuracy has a meaning.
        settings: what decided the bytes.
        weights_sha256: of the weights file.
        anchorpatch_version: that wrote the shards.
        top1: share of images that AnchorNet decided right; None where the classes differ.
    """

    folder: str
    split: str
    shards: int
    total_shards: int
    images: int
    scales: dict[int, dict[str, int]]
    skipped: dict[str, int]
    bytes: int
    classes: int
    network_classes: int
    same_classes: bool
    settings: ShardSettings
    weights_sha256: str
    anchorpatch_version: str
    top1: float | None

    def table(self) -> Table:
        """Return images and patches by chosen scale."""
        images, patches = (
            {scale: found[what] for scale, found in self.scales.items()}
            for what in ("images", "patches")
        )
        return scale_table(images, patches)


def split_facts(manifest: Manifest) -> SplitFacts:
    """Sum up a split."""
    entries, header = manifest.entries, manifest.header
    images, same = sum(e.images for e in entries), header.classes == header.network_classes
    return SplitFacts(
        folder=str(manifest.folder),
        split=header.split,
        shards=manifest.shard_count - len(manifest.missing()),
        total_shards=manifest.shard_count,
        images=images,
        scales={
            scale: {
                "images": sum(e.chosen[scale] for e in entries),
                "patches": sum(e.patches[scale] for e in entries),
            }
            for scale in SCALES
        },
        skipped=dict(Counter(reason for e in entries for _, reason in e.skipped).most_common()),
        bytes=sum(e.bytes for e in entries),
        classes=len(header.classes),
        network_classes=len(header.network_classes),
        same_classes=same,
        settings=header.settings,
        weights_sha256=header.weights_sha256,
        anchorpatch_version=header.version,
        top1=sum(e.correct for e in entries) / images if same and images else None,
    )
