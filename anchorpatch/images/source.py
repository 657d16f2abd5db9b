"""Where the images of a split come from: one interface to folders, archives and lists.

What lies at DATA/SPLIT decides: a folder of class folders or of WebDataset shards,
DATA/SPLIT.tar, DATA/SPLIT.zip or DATA/ILSVRC2012_img_SPLIT.tar. DATA may also be an archive
itself, or a pattern of several. The same images with the same paths, sizes and labels are the same
source, wherever they lie.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from anchorpatch.errors import DataError, SettingsError, TooManyBadImages
from anchorpatch.images.archives import SPLITS, list_archives
from anchorpatch.images.folder import (
    LAYOUT,
    OUTSIDE,
    FolderReader,
    Listing,
    archives_in,
    class_names,
    factorized,
    list_class_folders,
    list_files,
    list_folder,
    loose_images,
)
from anchorpatch.images.labels import EXTENSIONS, read_labels
from anchorpatch.images.members import COMPRESSED, MISSING, ArchiveReader
from anchorpatch.runtime.progress import Reporter
from anchorpatch.text import counted, few, nearest

#: Classes that are numbers end below this.
_MOST_CLASSES: Final = 1_000_000


@dataclass(frozen=True, eq=False)
class ImageSource:
    """The images of one split, sorted by the bytes of their paths.

    Paths are one array of bytes and not a list of strings: a list of 1.3 million objects would
    be copied into every forked worker as their reference counts change.

    Attributes:
        root: the split folder, or the archive.
        split: its name.
        paths: UTF-8, relative to ``root``, with slashes, ``S`` (n,).
        labels: index into ``classes``, int32 (n,).
        sizes: bytes of each image, int64 (n,); 0 for what is not a regular file.
        classes: names of the classes, sorted by their bytes, or numbers in their order.
        ignored: files that were passed over, by extension: not images by their names, or images
            outside the class folders. Hidden files are not counted.
        read_at: from the place of an image to its bytes; None: files below ``root``. Workers take
            it along, and it opens what it needs in each process.
        places: where each image lies (n,); None: at its path.
    """

    root: Path
    split: str
    paths: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    ignored: Mapping[str, int] = field(default_factory=dict)
    read_at: Callable[[Any], bytes] | None = None
    places: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, i: int) -> str:
        """Return the path of image ``i`` relative to `root`."""
        return bytes(self.paths[i]).decode()

    def name(self, i: int) -> str:
        """Return what messages call image ``i``: its file, or ``archive.tar::path``."""
        if self.places is None:
            return str(self.root / self.path(i))
        assert isinstance(self.read_at, ArchiveReader)
        return self.read_at.name(self.places["archive"][i], self.path(i))

    @property
    def reader(self) -> Callable[[Any], bytes]:
        """What reads an image, given its place; see `places_of`."""
        return self.read_at or FolderReader(str(self.root))

    def places_of(self, rows: Any) -> npt.NDArray[Any]:
        """Return the places of some images (n,), whose ``tolist()`` a `reader` takes."""
        places: npt.NDArray[Any] = (self.paths if self.places is None else self.places)[rows]
        return places

    def read(self, i: int) -> bytes:
        """Return the bytes of image ``i``.

        Raises:
            ImageError: it cannot be read.
            DataError: the disk or network does not answer, or the archive has changed.
        """
        data: bytes = self.reader(self.places_of([i]).tolist()[0])
        return data

    def taking(self, rows: Any) -> ImageSource:
        """Return the source of some of the images; the classes stay."""
        return replace(
            self,
            paths=self.paths[rows],
            labels=self.labels[rows],
            sizes=self.sizes[rows],
            places=None if self.places is None else self.places[rows],
        )

    def limited(self, limit: int | None) -> ImageSource:
        """Return the source of the images that ``--limit`` takes; the classes stay."""
        return self.taking(spread_rows(len(self), limit))

    def passed_over(self) -> str | None:
        """Name what was passed over; None where there is nothing."""
        if not self.ignored:
            return None
        found = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        counts = few([f"{count:,} {name}" for name, count in found], 5)
        return (
            f"{self.root}: {counted(sum(self.ignored.values()), 'file')} passed over ({counts}); "
            f"images are {', '.join(EXTENSIONS)}"
        )

    def too_many_bad(
        self, bad: int, of: int, max_bad: float, details: str = ""
    ) -> TooManyBadImages:
        """Return the error of a run that found more unreadable images than it may.

        Args:
            bad: unreadable images.
            of: all that were to be read.
            max_bad: share of them that is accepted.
            details: more to say, with what leads to it.
        """
        return TooManyBadImages(
            f"{self.root}: {bad} of {of} images cannot be read, more than --max-bad "
            f"{max_bad:.2%}{details}; fix or remove the files, or raise --max-bad"
        )

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """Return the SHA-256 of path, label and size of the images ``start`` to ``stop``.

        It depends on nothing else: not on the machine, where the folder lies, or the other
        images.
        """
        rows = slice(*slice(start, stop).indices(len(self)))
        digest = hashlib.sha256()
        for i in range(rows.start, rows.stop, 1 << 16):  # not a million objects at a time
            paths = self.paths[i : min(i + (1 << 16), rows.stop)].tolist()
            # No path holds a NUL, so it is plain where each ends.
            digest.update(b"".join(path + b"\0" for path in paths))
        digest.update(self.labels[rows].astype("<i4").tobytes())
        digest.update(self.sizes[rows].astype("<i8").tobytes())
        return digest.hexdigest()


def spread_rows(count: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Return the rows of a sorted list that ``--limit`` takes, evenly spread over the list.

    The list is sorted by class, so every class gets its share of the limit; the choice depends on
    the two numbers alone.

    Args:
        count: rows of the list.
        limit: how many to take at most; None for all.

    Example:
        >>> spread_rows(10, 4).tolist(), spread_rows(3, None).tolist()
        ([0, 2, 5, 7], [0, 1, 2])
    """
    taken = count if limit is None else min(limit, count)
    return np.arange(taken, dtype=np.int64) * count // max(taken, 1)


def without_images(labels: npt.NDArray[np.integer], classes: Sequence[str]) -> str | None:
    """Name the classes that none of some images has; None where each class has one.

    Args:
        labels: index of each image's class (n,).
        classes: names of the classes.

    Example:
        >>> without_images(np.array([0, 2]), ("ant", "bee", "cat", "dog"))
        '2 of 4 classes have no image among the 2 images taken: bee, dog'
    """
    absent = np.setdiff1d(np.arange(len(classes)), labels)
    if not len(absent):
        return None
    have = "has" if len(absent) == 1 else "have"
    return (
        f"{len(absent):,} of {counted(len(classes), 'class')} {have} no image among the "
        f"{counted(len(labels), 'image')} taken: {few([classes[i] for i in absent])}"
    )


def open_source(
    data: Path,
    split: str,
    labels: Path | None = None,
    *,
    files: Path | None = None,
    only_labelled: bool = False,
    unlabelled: bool = False,
    classes: Sequence[str] | None = None,
    classes_of: str = "train",
    allow_empty: bool = False,
    report: Reporter | None = None,
) -> ImageSource:
    """Find the images of a split.

    Without ``labels`` every folder below the split is a class, and images may lie in folders
    below it. Links are followed. Hidden files and folders and files with other extensions are
    passed over. Anything with an image's extension counts, even a folder, a pipe or a dangling
    link: that becomes a skipped image with its reason when it is read.

    In an archive the names of members are such paths, or each tar within a tar is a class, or
    labels lie beside the images as in WebDataset. Labels that are numbers there, or in a list, are
    the indices of the classes, those of train where it has as many; negative ones are no labels.

    The classes of another split than train are those of DATA/train where they include all of the
    split's, so that the indices agree; the split may then lack images of some of them.

    Args:
        data: the folder that holds the splits; or an archive, or a pattern of archives such as
            ``train-{0000..1023}.tar``, in which ``{split}`` stands for the split.
        split: name of the split's folder or archive.
        labels: Kaggle's ``LOC_val_solution.csv`` or a CSV of ``path,label`` for images that do
            not lie in class folders.
        files: take the images of this list instead; see `anchorpatch.images.labels.read_list`.
        only_labelled: leave out images without a label.
        unlabelled: take images that do not all have a class too; all are then of one class, which
            bears the name of the folder or archive.
        classes: the classes, in their order; None to find them.
        classes_of: what has these ``classes``, for messages.
        allow_empty: accept class folders without images.
        report: is told which of several was taken, and shows the progress of an index.

    Raises:
        DataError: the folder, archive, list or labels file is not as expected.
        SettingsError: the split is no name of a folder.
    """
    data, report = Path(data), report or Reporter()
    if files is not None:
        found = list_files(Path(files), labelled=labels is None, subset=only_labelled)
    else:
        find = _find_any if unlabelled and labels is None else _find
        found = find(data, split, report, flat=labels is not None)
    if not len(found.paths):
        raise DataError(found.why_not)
    if labels is not None:
        paths = [path.decode() for path in found.paths.tolist()]
        of_images = read_labels(Path(labels), paths, found.root, subset=only_labelled)
        names, values = factorized(of_images)
        found = replace(found, names=names, labels=values, numbered=False, empty={})
    found = _labelled(found, only_labelled)
    classes = _classes(found, data, split, report, classes, classes_of, labels, allow_empty)
    index = {name: i for i, name in enumerate(classes)}
    if found.numbered and not set(found.names) <= set(index):
        index = {name: int(name) for name in found.names}  # positions in the classes
    if not (found.paths[1:] > found.paths[:-1]).all():
        found = found.taking(np.argsort(found.paths, kind="stable"))
    return ImageSource(
        found.root,
        split,
        found.paths,
        np.array([index[name] for name in found.names], np.int32)[found.labels],
        found.sizes,
        tuple(classes),
        dict(found.others),
        found.read,
        found.places,
    )


def source_of(
    data: Path,
    split: str,
    paths: npt.NDArray[np.bytes_],
    labels: npt.NDArray[np.int32],
    classes: tuple[str, ...],
    report: Reporter | None = None,
) -> tuple[ImageSource, list[str]]:
    """Find the images of known paths, in their order.

    Args:
        data: as of `open_source`.
        split: as of `open_source`.
        paths: UTF-8, ``S`` (n,).
        labels: index into ``classes``, int32 (n,).
        classes: names of the classes.
        report: as of `open_source`.

    Returns:
        The source, and the paths that are not there; sizes are not looked up.

    Raises:
        DataError: there is no such folder or archive, or it cannot be used.
    """
    root, archives = _locate(Path(data), split, report or Reporter())
    sizes = np.zeros(len(paths), np.int64)
    if archives is None:
        source = ImageSource(root, split, paths, labels, sizes, classes)
        missing = [path for path in paths.tolist() if not (root / path.decode()).exists()]
        return source, [path.decode() for path in missing]
    found = list_archives(
        root, archives, split, report or Reporter(), flat=True, named=root != Path(data)
    )
    if not len(found.paths):
        raise DataError(found.why_not)
    order = np.argsort(found.paths, kind="stable")
    rows = np.searchsorted(found.paths, paths, sorter=order)
    rows = order[np.minimum(rows, len(order) - 1)]
    absent = found.paths[rows] != paths
    assert found.places is not None
    places = found.places[rows]
    places["kind"][absent] = MISSING  # or each would be the image that follows in the archive
    source = ImageSource(root, split, paths, labels, sizes, classes, {}, found.read, places)
    return source, [path.decode() for path in paths[absent].tolist()]


def _labelled(found: Listing, only: bool) -> Listing:
    """Return the images with a label; raise unless all have one, or only those are wanted."""
    without = found.labels < 0
    count = int(without.sum())
    if not count:
        return found
    total, first = len(without), found.paths[without.argmax()].decode()
    if not only or count == total:
        raise DataError(
            f"{found.root}: no label for {count:,} of {counted(total, 'image')}, such as {first}; "
            "expected class folders, NAME.cls or a label in NAME.json beside each image, or a "
            "table with --labels FILE; --only-labelled leaves images without a label out"
        )
    others = Counter(found.others) + Counter({"without a label": count})
    return replace(found.taking(~without), others=others)


def _classes(
    found: Listing,
    data: Path,
    split: str,
    report: Reporter,
    classes: Sequence[str] | None,
    classes_of: str,
    labels: Path | None,
    allow_empty: bool,
) -> Sequence[str]:
    """Return the classes in their order; see `open_source`."""
    present = set(found.names) - found.empty.keys()
    if found.numbered and (largest := max(present, key=int)) and int(largest) >= _MOST_CLASSES:
        raise DataError(
            f"{found.root}: expected numbers of classes below {_MOST_CLASSES:,}, found {largest}"
        )
    if classes is None and split != "train":
        of_train = _classes_of_train(data, report)
        positions = found.numbered and not any(name.isdecimal() for name in of_train)
        if present.issubset(of_train) or (positions and max(map(int, present)) < len(of_train)):
            classes = of_train
    if classes is None:
        if found.numbered:
            return [str(i) for i in range(max(map(int, present)) + 1)]
        if found.empty and not allow_empty:
            what = few(list(found.empty.values()), 5)
            raise DataError(
                f"{found.root}: {len(found.empty)} of {len(present) + len(found.empty)} class "
                f"folders are empty ({what}); add images ({', '.join(EXTENSIONS)}), remove the "
                "folders, or accept them with --allow-empty"
            )
        return sorted(present.union(found.empty), key=str.encode)
    by_name = any(name.isdecimal() for name in classes)
    if found.numbered and not by_name and max(map(int, present)) < len(classes):
        report.message(
            f"{found.root}: the labels are numbers, taken as positions in the "
            f"{len(classes):,} classes of {classes_of}: 0 is {classes[0]}"
        )
        return classes
    if unknown := sorted(present.difference(classes), key=str.encode):
        raise DataError(
            f"{labels or found.root}: expected only the {len(classes):,} classes of {classes_of}, "
            f"found {len(unknown):,} more ({few(unknown, 5)}); rename or remove them"
        )
    return classes


def _classes_of_train(data: Path, report: Reporter) -> list[str]:
    """Return the classes of DATA/train; none where it is missing, flat or not told apart."""
    folder = data / "train"
    if folder.is_dir() and not _shards_in(folder):
        return class_names(folder)
    if data.is_dir() and not (folder.is_dir() or _archives_of(data, "train")):
        return []
    try:
        found = _find(data, "train", report)
    except DataError:
        if data.is_dir():
            raise
        return []  # DATA is an archive or a pattern, of this split alone
    if found.numbered:
        return [str(i) for i in range(max(map(int, found.names)) + 1)]
    return sorted({*found.names, *found.empty}, key=str.encode)


# --- what lies at DATA/SPLIT --------------------------------------------------------------------


def _find(data: Path, split: str, report: Reporter, *, flat: bool = False) -> Listing:
    """List the images of DATA/SPLIT, without labels if they are to be ``flat``."""
    root, archives = _locate(data, split, report)
    if archives is not None:
        return list_archives(root, archives, split, report, flat=flat, named=root != data)
    return list_folder(root) if flat else list_class_folders(root)


def _find_any(data: Path, split: str, report: Reporter, *, flat: bool = False) -> Listing:
    """List the images of DATA/SPLIT with their classes, or all of one where some have none."""
    with suppress(DataError):  # raised again unless only the classes are missing
        found = _find(data, split, report, flat=flat)
        outside = any(name.endswith(OUTSIDE) for name in found.others)
        if len(found.paths) and not outside and (found.labels >= 0).all():
            return found
    found = _find(data, split, report, flat=True)
    name = found.root.stem if found.root.is_file() else found.root.name
    return replace(found, names=(name,), labels=np.zeros_like(found.labels))


def find_split(path: Path) -> tuple[Path, str]:
    """Return DATA and SPLIT of images at a path: the split, or what has splits in it.

    Of several splits, that is the first of `SPLITS`.

    Raises:
        DataError: there is no such folder or archive.
    """
    if "{" in str(path) or path.is_file():
        return path, SPLITS[0]
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or archive; expected one with images")
    folders = class_names(path)
    for name in SPLITS:
        if (folders and name in folders and {*folders} <= {*SPLITS}) or _archives_of(path, name):
            return path, name
    here = Path(os.path.abspath(path))
    return here.parent, here.name


def _locate(data: Path, split: str, report: Reporter) -> tuple[Path, list[Path] | None]:
    """Return the folder of a split, or what stands for it in messages and its archives.

    Raises:
        DataError: there is none, or several could be meant.
        SettingsError: the split is no name of a folder.
    """
    # The name of a split is one of files too, which must not end up elsewhere.
    if "/" in split or split in (".", ".."):
        raise SettingsError(f"--split: expected the name of a folder below --data, got {split!r}")
    if "{" in str(data) and not data.exists():
        return data, _matching(data, split)
    if data.is_file():
        return data, [data]
    if not data.is_dir():
        what = "is not a folder" if data.exists() else "no such folder"
        pattern = ", or a pattern such as train-{0000..1023}.tar" if "*" in data.name else ""
        raise DataError(f"{data}: {what}; {LAYOUT}: give DATA with --data{pattern}")
    archives = _archives_of(data, split)
    if split and (root := data / split).is_dir():
        if archives:
            report.message(f"reading the folder {root}, not {archives[0].name} beside it")
        return root, _shards_in(root)
    if len(archives) > 1:
        raise DataError(
            f"{data}: {few([path.name for path in archives])} could all be the split {split!r}; "
            f"name the one to read: --data {archives[0]}"
        )
    if archives:
        return archives[0], archives
    for suffix in COMPRESSED:
        for name in (f"{split}{suffix}", f"ILSVRC2012_img_{split}{suffix}"):
            if (data / name).is_file():
                raise DataError(_why_not_compressed(data / name))
    raise DataError(_why_no_split(data, split))


def _why_not_compressed(archive: Path) -> str:
    return (
        f"{archive}: compressed, so that no image can be read without all before it; decompress it "
        "to a plain .tar first (gunzip, bunzip2, unxz or unzstd)"
    )


def _archives_of(data: Path, split: str) -> list[Path]:
    """Return the archives that stand for DATA/SPLIT."""
    stems = (split, f"ILSVRC2012_img_{split}")
    found = archives_in(data, ".tar", ".zip") if split else []
    found = [path for path in found if path.stem in stems and path.is_file()]
    return sorted(found, key=lambda path: stems.index(path.stem))


def _shards_in(root: Path) -> list[Path] | None:
    """Return the tars in a folder that holds neither images nor folders; None if there are none.

    Raises:
        DataError: they are compressed.
    """
    tars, compressed = archives_in(root, ".tar"), archives_in(root, *COMPRESSED)
    if not (tars or compressed) or class_names(root) or loose_images(root):
        return None
    if compressed:
        raise DataError(_why_not_compressed(compressed[0]))
    return tars


def _matching(data: Path, split: str) -> list[Path]:
    """Return the archives of a pattern, as a shell expands its braces.

    Raises:
        DataError: it is malformed, or one of them is missing.
    """
    pattern = str(data).replace("{split}", split)
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[piece] if i % 2 == 0 else _alternatives(piece) for i, piece in enumerate(pieces)]
    if any("{" in c or "}" in c for alternatives in choices for c in alternatives) or [] in choices:
        raise DataError(
            f"{data}: no such folder; or expected a pattern such as train-{{0000..1023}}.tar or "
            "train-{a,b}.tar"
        )
    paths = [Path("".join(parts)) for parts in itertools.product(*choices)]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise DataError(
            f"{data}: {len(missing):,} of {counted(len(paths), 'archive')} are missing, such as "
            f"{missing[0]}"
        )
    return paths


def _alternatives(piece: str) -> list[str]:
    """Return what ``a..b`` or ``a,b`` within braces stands for; nothing if it is neither.

    Example:
        >>> _alternatives("08..10"), _alternatives("a,b"), _alternatives("a")
        (['08', '09', '10'], ['a', 'b'], [])
    """
    first, dots, last = piece.partition("..")
    if dots and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        return [f"{i:0{width}d}" for i in range(int(first), int(last) + 1)]
    return piece.split(",") if "," in piece else []


def _why_no_split(data: Path, split: str) -> str:
    """Say what is there instead of DATA/SPLIT."""
    folders = class_names(data)
    archives = [path.stem for path in archives_in(data, ".tar", ".zip")]
    splits = [*folders, *(name.removeprefix("ILSVRC2012_img_") for name in archives)]
    if not splits:
        return f"{data}: no folder for split {split!r}, nor any other; {LAYOUT}"
    if any(loose_images(data / name) for name in folders[:10]):
        here = data.absolute()
        return (
            f"{data}: no folder for split {split!r}, but class folders with images "
            f"({few(folders, 5)}): it looks like a split itself; "
            f"did you mean --data {here.parent} --split {here.name}?"
        )
    near = nearest(split, splits)
    hint = f"did you mean --split {near}?" if near else "choose one with --split"
    return f"{data}: no folder or archive for split {split!r}; there are {few(splits, 5)}; {hint}"
