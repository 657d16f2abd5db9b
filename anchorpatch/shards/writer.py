"""Writing one shard: crops are spooled as they come, the file is made at the end.

A contiguous dataset needs its exact size before its first byte, and how many patches a shard
holds is known only after its last image. So crops go to a spool, a file without a name in the
output folder or in $ANCHORPATCH_SPOOL (gone even after SIGKILL). `ShardWriter.close` lays the HDF5
file out and writes it from its first byte to its last, hashing on the way; patches are cut from the
crops as their turn comes. Those of codec jpeg, which are encoded as they come, have spools of their
own. Memory does not grow with the number of patches but by some 12 bytes each.

HDF5 reacts badly to a disk that fills up: handles that cannot be closed, noise at the end of
the interpreter. So it never sees the disk. It writes its metadata and the small tables into
a `_Skeleton` in memory, which stores only the pages that were written; large datasets get their
place in the file and nothing else.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anchorpatch import storage
from anchorpatch.errors import ShardBusy
from anchorpatch.settings import SCALES
from anchorpatch.shards.header import ShardHeader
from anchorpatch.shards.layout import (
    IMAGE_TABLE,
    PATCH_TABLE,
    Schema,
    check_corners,
    cut_patches,
    encode_text,
    write_attributes,
)
from anchorpatch.shards.manifest import ShardEntry

#: Threads that encode JPEG; Pillow releases the interpreter lock. torchvision makes files of the
#: same mean size at four fifths of the speed, as it wants the colors in planes.
_JPEG_THREADS: Final = min(4, os.cpu_count() or 1)

#: Patches that are cut and encoded at once, which bounds the memory.
_CUT_ROWS: Final = 1024

#: Crops that are read, cut, hashed and written at once: the cache of a core holds them.
_CROPS: Final = 8

#: Bytes of a page of the skeleton; large datasets start at multiples of it.
_PAGE: Final = 1 << 12


class PatchBatch(NamedTuple):
    """Results for n images, in the order of their paths; patches padded to K rows.

    Attributes:
        path: relative to the split folder, UTF-8, dtype S (n,).
        label: index into the folders' classes, int32 (n,).
        predicted: gamma, index into the network's classes, int32 (n,).
        scale: chosen theta: 63, 95 or 111, uint8 (n,).
        branch_class: Y of each branch, int32 (n, 3).
        branch_prob: P of each branch, float32 (n, 3).
        size: height and width of the source image in pixels, int32 (n, 2).
        pixels: the crops that AnchorNet saw, uint8 (n, S, S, 3), S as the header says.
        counts: patches of each image, int32 (n,).
        corners: top-left (y, x) of each patch in pixels, strongest first, int (n, K, 2).
        scores: activation of each patch, float32 (n, K).
    """

    path: NDArray[np.bytes_]
    label: NDArray[Any]
    predicted: NDArray[Any]
    scale: NDArray[Any]
    branch_class: NDArray[Any]
    branch_prob: NDArray[Any]
    size: NDArray[Any]
    pixels: NDArray[np.uint8]
    counts: NDArray[Any]
    corners: NDArray[Any]
    scores: NDArray[Any]


def _check_batch(batch: PatchBatch, side: int) -> None:
    """Raise ValueError unless the arrays of a batch, with crops of a side, fit together."""
    n = len(batch.path)
    wrong = [name for name, array in zip(batch._fields, batch, strict=True) if len(array) != n]
    if wrong:
        raise ValueError(f"expected {n} rows in every array of the batch, not so in {wrong}")
    if batch.pixels.shape[1:] != (side, side, 3) or batch.pixels.dtype != np.uint8:
        raise ValueError(
            f"expected crops uint8 (n, {side}, {side}, 3), "
            f"got {batch.pixels.dtype} {batch.pixels.shape}"
        )
    if not np.isin(batch.scale, SCALES).all():
        raise ValueError(f"expected scales of {SCALES}, got {np.unique(batch.scale).tolist()}")
    if n and not 0 <= batch.counts.min() <= batch.counts.max() <= batch.corners.shape[1]:
        raise ValueError(f"expected 0 to {batch.corners.shape[1]} patches per image")


def encode_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Return one patch (T, T, 3) as a baseline JPEG file, chroma at half resolution (4:2:0)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=2)
    return buffer.getvalue()


class ShardWriter:
    """Writes one shard; as a context manager it closes at the end, or aborts on an exception.

    Only one process writes a shard at a time: it holds a lock on ``NAME.h5.lock`` from here until
    the shard is closed or aborted; the lock of a process that dies is free again. Where a
    filesystem has no locks, two processes that write the same shard each write a file of their
    own, and the second one takes the place of the first, which has the same bytes.

    Args:
        path: final name of the shard. Its folder is made.
        header: the attributes.
        files_sha256: digest of the shard's part of the file list.
        spools: of earlier shards, whose own are added when it ends: to write over a file takes
            half the time of making a new one.

    Raises:
        ShardBusy: another process is writing this shard.
        StorageError: the disk refuses; so do `append` and `close`, after which nothing of the
            shard is left.

    Example:
        Every image of this shard was unreadable.

        >>> import tempfile
        >>> from anchorpatch.shards.header import ShardSettings
        >>> settings = ShardSettings((1, 1, 1), 0.3, (0.1, 0.1, 0.1))
        >>> header = ShardHeader("val", ("cat",), ("cat",), settings, weights_sha256="0" * 64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(Path(folder, "val-00000.h5"), header) as writer:
        ...         writer.skip("cat/1.jpg", "empty file")
        ...     writer.entry.images, writer.entry.skipped
        (0, (('cat/1.jpg', 'empty file'),))
    """

    entry: ShardEntry

    def __init__(
        self,
        path: Path,
        header: ShardHeader,
        *,
        files_sha256: str = "",
        spools: list[BinaryIO] | None = None,
    ) -> None:
        self.path = Path(path)
        self.header = header
        self.files_sha256 = files_sha256
        self._paths: list[bytes] = []
        self._skipped: list[tuple[str, str]] = []
        self._damaged: list[str] = []
        self._columns: defaultdict[str, list[NDArray[Any]]] = defaultdict(list)
        self._patch_count = dict.fromkeys(SCALES, 0)
        self._blob_sizes: dict[int, list[int]] = {scale: [] for scale in SCALES}
        self._spools: dict[str, Any] = {}  # binary files
        self._spare = spools
        self._spool_folder = Path(os.environ.get("ANCHORPATCH_SPOOL") or self.path.parent)
        self._pool = ThreadPoolExecutor(_JPEG_THREADS)
        self._closed = False
        lock_path = self.path.with_name(self.path.name + ".lock")
        with storage.refusals(lock_path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        busy = ShardBusy(
            f"{self.path}: another process is writing this shard: "
            "wait for it, or end it and run again"
        )
        self._lock = ExitStack()
        self._lock.enter_context(storage.lock_file(lock_path, busy))

    def append(self, batch: PatchBatch) -> None:
        """Add images.

        Raises:
            ValueError: the arrays of the batch do not fit together.
            IndexError: a patch reaches outside its crop.
            StorageError: the disk refuses.
        """
        settings, before = self.header.settings, len(self._paths)
        _check_batch(batch, settings.img_size)
        first = np.zeros(len(batch.path), np.int32)
        with self._aborting():
            for scale in SCALES:
                chosen = batch.scale == scale
                counts = np.where(chosen, batch.counts, 0)
                first[chosen] = (self._patch_count[scale] + np.cumsum(counts) - counts)[chosen]
                self._patch_count[scale] += int(counts.sum())
                taken = np.arange(batch.corners.shape[1]) < counts[:, None]
                image = np.repeat(np.arange(len(counts)), counts)
                corner, score = batch.corners[taken], batch.scores[taken]
                check_corners(batch.pixels, image, corner, scale)
                table = {"corner": corner, "score": score, "image": image + before}
                self._note(f"patches/{scale}", PATCH_TABLE, table)
                if settings.codec == "jpeg":
                    self._spool_blobs(batch.pixels, image, corner, scale)
            table = {**batch._asdict(), "first": first, "count": batch.counts}
            self._note("images", IMAGE_TABLE, table)
            self._paths += [bytes(path) for path in batch.path]
            if settings.store_images or settings.codec == "raw":
                self._spool("images/pixels", np.ascontiguousarray(batch.pixels))

    def skip(self, path: str, reason: str) -> None:
        """Note an image that could not be read."""
        self._skipped.append((path, reason))

    def note_damage(self, path: str) -> None:
        """Note an appended image that was decoded with damage."""
        self._damaged.append(path)

    def close(self, commit: Callable[[ShardEntry], object] | None = None) -> ShardEntry:
        """Write the shard under its final name.

        Args:
            commit: enters the shard into the manifest, while no other process can write it.

        Returns:
            The entry to commit to the manifest.

        Raises:
            StorageError: the disk refuses.
        """
        with self._aborting():
            self._skipped.sort(key=lambda skipped: os.fsencode(skipped[0]))
            skeleton = _Skeleton()
            placed = self._lay_out(skeleton)

            def write(file: BinaryIO) -> str:
                storage.allocate(file, skeleton.size)
                return storage.write_hashed(file, self._chunks(skeleton, placed))

            sha256 = storage.write_atomically(self.path, write, needed=skeleton.size)
            scale = self._column("images/scale")
            right = self._column("images/label") == self._column("images/predicted")
            self.entry = ShardEntry(
                name=self.path.name,
                images=len(self._paths),
                patches=dict(self._patch_count),
                chosen={theta: int((scale == theta).sum()) for theta in SCALES},
                correct=int(right.sum()),
                bytes=skeleton.size,
                sha256=sha256,
                skipped=tuple(self._skipped),
                files_sha256=self.files_sha256,
                damaged=tuple(sorted(self._damaged, key=os.fsencode)),
            )
            if commit is not None:
                commit(self.entry)
        self._release()
        return self.entry

    def abort(self) -> None:
        """Leave nothing behind. Without effect on a shard that is closed."""
        if not self._closed:
            self._release()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and not self._closed:
            self.close()
        self.abort()

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        try:
            yield
        except BaseException:  # an interrupt too
            self.abort()
            raise

    def _release(self) -> None:
        self._closed = True
        for file in self._spools.values():
            if self._spare is not None:
                self._spare.append(file)
            else:
                with suppress(OSError):  # what it could not flush is not wanted any more
                    file.close()
        self._spools.clear()
        self._lock.close()
        self._pool.shutdown()

    def _spool(self, name: str, data: Any) -> None:
        """Add bytes, or an array's, to what will be a dataset."""
        with storage.refusals(self._spool_folder / self.path.name):
            if name not in self._spools:
                if self._spare:
                    self._spools[name] = self._spare.pop()
                    self._spools[name].seek(0)
                else:
                    self._spools[name] = tempfile.TemporaryFile(dir=self._spool_folder)  # noqa: SIM115
            self._spools[name].write(data)

    def _spool_blobs(
        self, crops: NDArray[np.uint8], image: NDArray[Any], corner: NDArray[Any], scale: int
    ) -> None:
        encode = partial(encode_jpeg, quality=self.header.settings.jpeg_quality)
        for start in range(0, len(image), _CUT_ROWS):
            rows = slice(start, start + _CUT_ROWS)
            for blob in self._pool.map(
                encode, cut_patches(crops, image[rows], corner[rows], scale)
            ):
                self._blob_sizes[scale].append(len(blob))
                self._spool(f"patches/{scale}/blob", blob)

    def _note(self, group: str, schema: Schema, columns: Mapping[str, Any]) -> None:
        for name, (dtype, _) in schema.items():
            self._columns[f"{group}/{name}"].append(np.array(columns[name], dtype=dtype))

    def _column(self, name: str) -> NDArray[Any]:
        """Return all rows of a column of ``images`` or ``patches/T``."""
        group, _, column = name.rpartition("/")
        dtype, shape = (IMAGE_TABLE if group == "images" else PATCH_TABLE)[column]
        return np.concatenate([np.empty((0, *shape), dtype), *self._columns[name]])

    def _lay_out(self, skeleton: _Skeleton) -> dict[str, int]:
        """Write all but the pixels; return the offset of each dataset of those."""
        settings = self.header.settings
        # create_dataset, never file[name] = ...: that would store the time of day.
        with _open_skeleton(skeleton) as file:
            write_attributes(file, self.header, self.files_sha256)
            file.create_dataset("images/path", data=encode_text(self._paths))
            for name in IMAGE_TABLE:
                file.create_dataset(f"images/{name}", data=self._column(f"images/{name}"))
            for i, name in enumerate(("path", "reason")):
                text = encode_text([skipped[i] for skipped in self._skipped])
                file.create_dataset(f"skipped/{name}", data=text)
            for scale in SCALES:
                for name in (f"patches/{scale}/{column}" for column in PATCH_TABLE):
                    file.create_dataset(name, data=self._column(name))
                if settings.codec == "jpeg":
                    offsets = np.cumsum([0, *self._blob_sizes[scale]], dtype="<i8")
                    file.create_dataset(f"patches/{scale}/offset", data=offsets)
            shapes: dict[str, tuple[int, ...]] = {}
            if settings.store_images:
                side = settings.img_size
                shapes["images/pixels"] = len(self._paths), side, side, 3
            for scale in SCALES:
                if settings.codec == "raw":
                    shapes[f"patches/{scale}/pixels"] = self._patch_count[scale], scale, scale, 3
                elif settings.codec == "jpeg":
                    shapes[f"patches/{scale}/blob"] = (sum(self._blob_sizes[scale]),)
            placed = {name: _reserve(file, name, shape) for name, shape in shapes.items()}
        return {name: offset for name, offset in placed.items() if offset is not None}

    def _chunks(self, skeleton: _Skeleton, placed: Mapping[str, int]) -> Iterator[Any]:
        """Yield the bytes of the file from the first to the last."""
        position = 0
        for name, offset in sorted(placed.items(), key=lambda place: place[1]):
            yield skeleton.part(position, offset)
            position = offset
            for chunk in self._pixels(name):
                yield chunk
                position += chunk.nbytes
        yield skeleton.part(position, skeleton.size)

    def _pixels(self, name: str) -> Iterator[NDArray[np.uint8]]:
        """Yield a dataset of pixels piece by piece; each piece takes the place of the last one."""
        group, _, kind = name.rpartition("/")
        # A map of the spool would count as memory of this process.
        side = self.header.settings.img_size
        crops = np.empty((_CROPS, side, side, 3), np.uint8)
        if name in self._spools:
            left = len(self._paths) * crops[0].size
            if kind == "blob":
                left = sum(self._blob_sizes[int(group.rpartition("/")[2])])
            self._spools[name].seek(0)
            while n := self._spools[name].readinto(crops.reshape(-1)[:left]):
                yield crops.reshape(-1)[:n]
                left -= n
            return
        image, corner = self._column(f"{group}/image"), self._column(f"{group}/corner")
        rows, spool = np.unique(image), self._spools["images/pixels"]
        for some in np.split(rows, range(_CROPS, len(rows), _CROPS)):
            for crop, row in zip(crops, some.tolist(), strict=False):
                spool.seek(row * crop.nbytes)
                spool.readinto(crop)
            first, last = np.searchsorted(image, (some[0], some[-1] + 1))
            local = np.searchsorted(some, image[first:last])
            yield cut_patches(crops, local, corner[first:last], int(group.rpartition("/")[2]))


class _Skeleton(io.RawIOBase):
    r"""A sparse file in memory; as much of one as h5py needs.

    Example:
        >>> skeleton = _Skeleton()
        >>> _ = skeleton.seek(1 << 40), skeleton.write(b"far")
        >>> skeleton.part((1 << 40) - 1, skeleton.size)
        b'\x00far'
    """

    def __init__(self) -> None:
        self.size = 0
        self._position = 0
        self._pages: defaultdict[int, bytearray] = defaultdict(lambda: bytearray(_PAGE))

    def part(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to ``stop``."""
        self.seek(start)
        return self.read(stop - start)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self.size - self._position)]
        for done, page, part in self._parts(len(view)):
            # What was never written is zero.
            stored = self._pages.get(page)
            view[done : done + part.stop - part.start] = (stored or bytes(_PAGE))[part]
        return len(view)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for done, page, part in self._parts(len(view)):
            self._pages[page][part] = view[done : done + part.stop - part.start]
        self.size = max(self.size, self._position)
        return len(view)

    def _parts(self, n: int) -> Iterator[tuple[int, int, slice]]:
        """Move on by ``n`` bytes; yield what came before, page, and part of it of each piece."""
        done = 0
        while done < n:
            page, start = divmod(self._position, _PAGE)
            stop = min(_PAGE, start + n - done)
            yield done, page, slice(start, stop)
            done += stop - start
            self._position += stop - start


def _open_skeleton(skeleton: _Skeleton) -> h5py.File:
    """Open a new HDF5 file in memory, whose bytes depend on nothing but what is written to it.

    The format is fixed to that of HDF5 1.10, whatever newer library writes it. Large datasets
    start at multiples of 4 KiB.
    """
    return h5py.File(
        skeleton,
        "w",
        libver=("v110", "v110"),
        track_order=True,
        alignment_threshold=1 << 16,
        alignment_interval=_PAGE,
    )


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...]) -> int | None:
    """Create a contiguous uint8 dataset that has its place in the file, but no bytes yet.

    Returns:
        Its offset in the file in bytes; None for a dataset without elements.
    """
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    group, _, leaf = name.rpartition("/")
    dataset = h5py.h5d.create(
        file.require_group(group).id,
        leaf.encode(),
        h5py.h5t.py_create(np.dtype("u1")),
        h5py.h5s.create_simple(shape),
        properties,
    )
    offset: int | None = dataset.get_offset()
    return offset
