"""The members of a tar or zip file: where they lie, from its headers alone, and reading them.

The stdlib's `tarfile` walks the headers of a tar (35 us each), so that long names, pax headers and
sparse files are what they are for everybody. It ends quietly where a header is damaged or the file
is cut off; here that is an error. `zipfile` holds an object of 600 bytes per member, 0.8 GB for
ImageNet, so that a zip's directory is read here.
"""

from __future__ import annotations

import os
import posixpath
import stat
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from anchorpatch.errors import DataError, ImageError, reason_of
from anchorpatch.images.folder import MAX_BYTES, printable
from anchorpatch.storage import patiently

#: Where an image lies: number of the archive; how it is stored, see below; offset of its bytes, or
#: of its local header in a zip; bytes that it takes there; its own bytes; CRC-32 of them and of
#: its name in a zip.
PLACE: Final = np.dtype(
    [
        *(("archive", "<u4"), ("kind", "u1"), ("offset", "<i8")),
        *(("stored", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("name_crc", "<u4")),
    ]
)

#: Kinds of members: plain bytes, the two methods of a zip that are read, folders, links.
PLAIN, ZIP_STORED, ZIP_DEFLATED, FOLDER, LINK = 0, 1, 2, 10, 11

#: Kinds that cannot be read, and why.
ENCRYPTED, UNSUPPORTED, SPARSE, MISSING, NOT_REGULAR = 3, 4, 5, 6, 7
_REASONS: Final = {
    ENCRYPTED: "encrypted",
    UNSUPPORTED: "unsupported compression",
    SPARSE: "sparse file",
    MISSING: "missing",
    NOT_REGULAR: "not a regular file",
}

#: First bytes of what is no tar that can be read at an offset, and what makes one of it.
_COMPRESSIONS: Final = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}

#: Archives that a process has open at a time.
_OPEN: Final = 32

#: Names of compressed archives end so.
COMPRESSED: Final = tuple(
    f".{name}" for name in ("tar.gz", "tgz", "tar.bz2", "tbz2", "tar.xz", "txz", "tar.zst")
)


class Archive(NamedTuple):
    """A file of an archive, as it was when its index was made.

    Attributes:
        path: of the file.
        size: in bytes.
        mtime: when it was last changed, in ns.
    """

    path: str
    size: int
    mtime: int

    @classmethod
    def of(cls, path: str) -> Archive:
        """Look at a file.

        Raises:
            DataError: there is none.
        """
        try:
            info = patiently(path, lambda: os.stat(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {reason_of(error)}") from error
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path}: expected an archive, found no regular file")
        return cls(path, info.st_size, info.st_mtime_ns)


class Member(NamedTuple):
    """A member of an archive; see `PLACE`. ``link`` is what a link names, from the top."""

    name: bytes
    kind: int
    offset: int = 0
    stored: int = 0
    size: int = 0
    crc: int = 0
    name_crc: int = 0
    link: bytes = b""


def check_kind(file: BinaryIO, archive: Archive) -> None:
    """Raise DataError for what is empty, or compressed as a whole."""
    begin = file.read(8)
    for magic, (name, program) in _COMPRESSIONS.items():
        if begin.startswith(magic):
            raise DataError(
                f"{archive.path}: compressed by {name}, so that no image can be read without all "
                f"before it; decompress it first ({program})"
            )
    if not begin:
        raise DataError(f"{archive.path}: expected a tar or zip file, found an empty file")
    file.seek(0)


def tar_members(
    file: BinaryIO, archive: Archive, start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Yield the members of a tar that takes the bytes ``start`` to ``end`` of a file.

    Raises:
        DataError: it is cut off or damaged, or something lies behind its end.
    """
    end = archive.size if end is None else end
    file.seek(start)

    def bad(what: str) -> DataError:
        inner = f" (a tar at byte {start:,})" if start else ""
        return DataError(f"{archive.path}{inner}: {what}")

    tar, at = None, start
    while True:
        # Also of what a hostile header makes of tarfile: ValueError, OverflowError, RecursionError.
        try:
            tar = tar or tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
            member = tar.next()
        except OSError:
            raise
        except Exception as error:
            what = (
                "neither a tar nor a zip file"
                if at == start
                else f"damaged or cut off at byte {at:,}"
            )
            raise bad(f"{what}: {reason_of(error)}; copy or pack it again") from error
        if member is None:
            break
        tar.members = []  # type: ignore[attr-defined]  # or all of them would be kept
        if member.size < 0 or tar.offset <= at:
            raise bad(f"damaged header at byte {at:,}; copy or pack it again")
        stored = member.size if member.isreg() and not member.issparse() else 0
        if member.offset_data + stored > end:
            raise bad(
                f"cut off: {printable(_encoded(member.name))} needs {member.size:,} bytes at byte "
                f"{member.offset_data:,}, the archive ends at {end:,}; copy or pack it again"
            )
        at = tar.offset
        yield _tar_member(member)
    _check_tar_end(file, at, end, bad)


def _encoded(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


def _tar_member(member: tarfile.TarInfo) -> Member:
    name, kind, link = _encoded(member.name), NOT_REGULAR, b""
    if member.issparse():
        kind = SPARSE
    elif member.isreg():
        kind = PLAIN
    elif member.isdir():
        kind = FOLDER
    elif member.islnk() or member.issym():
        kind, link = LINK, _encoded(member.linkname)
        if member.issym():
            link = posixpath.join(posixpath.dirname(name), link)
    return Member(name, kind, member.offset_data, member.size, member.size, link=link)


def _check_tar_end(file: BinaryIO, at: int, end: int, bad: Callable[[str], DataError]) -> None:
    """Check that a tar has its end mark, and nothing behind it."""
    file.seek(at)
    block = file.read(max(0, min(512, end - at)))
    if len(block) < 512:
        raise bad(
            f"cut off at byte {end:,}: its end mark is missing; copy it again, or if nothing is "
            f"missing, append the mark (head -c 1024 /dev/zero >> FILE)"
        )
    if any(block):
        raise bad(f"damaged header at byte {at:,}; copy or pack it again")
    while block := file.read(min(1 << 20, end - file.tell())):
        if block.count(0) != len(block):
            raise bad(
                f"data behind its end mark at byte {at:,}; archives that were joined by cat "
                "must be joined by tar --concatenate"
            )


def zip_members(file: BinaryIO, archive: Archive) -> Iterator[Member]:
    """Yield the members of a zip, from the directory at its end.

    Raises:
        DataError: it is cut off or damaged.
    """

    def bad(what: str) -> DataError:
        return DataError(f"{archive.path}: {what}; copy or pack it again")

    tail_at = max(0, archive.size - 22 - 0xFFFF)
    file.seek(tail_at)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail):
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        raise bad("cut off: no directory at the end of the zip file")
    disk, first, _, count, size, start = struct.unpack("<HHHHII", tail[at + 4 : at + 20])
    end = tail_at + at
    file.seek(max(0, end - 20))
    if (locator := file.read(20)).startswith(b"PK\6\7"):
        (record_at,) = struct.unpack("<Q", locator[8:16])
        file.seek(min(record_at, archive.size))
        record = file.read(56)
        if not record.startswith(b"PK\6\6") or len(record) < 56:
            raise bad("damaged directory")
        disk, first, _, count, size, start = struct.unpack("<IIQQQQ", record[16:])
        end = record_at
    if disk or first:
        raise bad("one part of a zip file in several parts; join them (zip --fix)")
    moved = end - size - start  # by what was put in front of the zip
    if moved < 0:
        raise bad("damaged directory")
    file.seek(start + moved)
    left = size
    for _ in range(count):
        head = file.read(46)
        if len(head) < 46 or not head.startswith(b"PK\1\2"):
            raise bad("damaged directory")
        flags, method, _, crc, stored, whole, *lengths = struct.unpack("<HHIIIIHHH", head[8:34])
        attributes, offset = struct.unpack("<II", head[38:46])
        name, extra, _ = (file.read(length) for length in lengths)
        left -= 46 + sum(lengths)
        name_crc = zlib.crc32(name)
        try:
            whole, stored, offset = _zip64(extra, whole, stored, offset)
        except struct.error:
            raise bad("damaged directory") from None
        offset += moved
        if left < 0 or offset + 30 + len(name) + stored > end - size:
            raise bad(f"damaged directory: {printable(name)} is not within the file")
        if not flags & 0x800:
            name = _zip_name(name, extra)
        if head[5] == 0 and b"/" not in name:  # some programs of Windows write its separator
            name = name.replace(b"\\", b"/")
        mode, kind, link = attributes >> 16, NOT_REGULAR, b""
        if name.endswith(b"/"):
            kind = FOLDER
        elif flags & 1:
            kind = ENCRYPTED
        elif method not in (0, 8):
            kind = UNSUPPORTED
        else:
            kind = ZIP_DEFLATED if method == 8 else ZIP_STORED
            if stat.S_ISLNK(mode):
                place = (0, kind, offset, stored, whole, crc, name_crc)
                link = posixpath.join(posixpath.dirname(name), ArchiveReader([archive])(place))
                kind = LINK
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                kind = NOT_REGULAR
        yield Member(name, kind, offset, stored, whole, crc, name_crc, link)
    if left:
        raise bad("damaged directory")


def _zip64(extra: bytes, *sizes: int) -> list[int]:
    """Return size, stored bytes and offset, of which the extra field has those above 4 GiB."""
    found = list(sizes)
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            at = 4
            for i, value in enumerate(found):
                if value == 0xFFFFFFFF:
                    (found[i],) = struct.unpack_from("<Q", extra[: 4 + length], at)
                    at += 8
        extra = extra[4 + length :]
    return found


def _zip_name(name: bytes, extra: bytes) -> bytes:
    """Return a name that is not marked as UTF-8: as an extra field has it, else as it is.

    Programs of Linux and macOS write UTF-8 all the same, and others one of many code pages.
    """
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 0x7075 and int.from_bytes(extra[5:9], "little") == zlib.crc32(name):
            return extra[9 : 4 + length]
        extra = extra[4 + length :]
    return name


# --- reading ------------------------------------------------------------------------------------


class ArchiveReader:
    """Reads images at their places; workers take it along and open the archives themselves.

    Args:
        archives: the files, as they were when the index was made.
        within: folder in the archive that paths are relative to, with a slash; None: the paths
            begin with the stem of their archive.
    """

    def __init__(self, archives: Sequence[Archive], within: str | None = "") -> None:
        self.archives, self.within = tuple(archives), within
        self._process = -1
        self._open: dict[int, _Handle] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ArchiveReader, (self.archives, self.within)

    def __call__(self, place: Sequence[int]) -> bytes:
        """Return the bytes of an image, by its `PLACE` as a tuple.

        Raises:
            ImageError: it cannot be read: one of the reasons above, "file too large" or "damaged
                member".
            DataError: the archive is another one by now, or the disk does not answer.
        """
        number, kind, offset, stored, size, crc, name_crc = place
        if kind in _REASONS:
            raise ImageError(_REASONS[kind])
        if max(stored, size) > MAX_BYTES:
            raise ImageError("file too large")
        handle = self._handle(number)
        if kind == PLAIN:
            return handle.read(offset, size)
        header = handle.read(offset, 30)
        if not header.startswith(b"PK\3\4"):
            raise ImageError("damaged member")
        name, extra = struct.unpack("<HH", header[26:30])
        behind = handle.read(offset + 30, name + extra + stored)
        if zlib.crc32(behind[:name]) != name_crc:  # the directory's name, or offset, is another's
            raise ImageError("damaged member")
        data = behind[name + extra :]
        if kind == ZIP_DEFLATED:
            inflate = zlib.decompressobj(-15)
            try:
                data = inflate.decompress(data, size + 1)
            except zlib.error:
                raise ImageError("damaged member") from None
        if len(data) != size or zlib.crc32(data) != crc:
            raise ImageError("damaged member")
        return data

    def name(self, archive: int, path: str) -> str:
        """Return what `read_named` takes for an image in the archive of a number."""
        member = path.partition("/")[2] if self.within is None else self.within + path
        return f"{self.archives[archive].path}::{member}"

    def _handle(self, number: int) -> _Handle:
        # Threads need no lock here: one that opens a file twice does no harm.
        if self._process != os.getpid():
            self._process, self._open = os.getpid(), {}  # a forked worker leaves its parent's
        handle = self._open.get(number)
        if handle is None:
            handle = _Handle(self.archives[number])
            if len(self._open) >= _OPEN:
                self._open.pop(next(iter(self._open)), None)
            self._open[number] = handle
        return handle


class _Handle:
    """An open archive, whose descriptor is closed with the last that uses it."""

    def __init__(self, archive: Archive) -> None:
        self.archive, self._descriptor = archive, -1
        path = archive.path
        try:
            self._descriptor = patiently(path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {reason_of(error)}") from error
        info = os.fstat(self._descriptor)
        if (info.st_size, info.st_mtime_ns) != archive[1:]:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(
            f"{self.archive.path}: has changed since this run began; run the same command again"
        )

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes at an offset, all of them."""
        parts, end = [], offset + size
        if end > self.archive.size:
            raise ImageError("damaged member")
        while offset < end:
            part = patiently(
                self.archive.path,
                lambda at=offset: os.pread(self._descriptor, end - at, at),  # type: ignore[misc]
            )
            if not part:
                raise self._changed()
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            with suppress(OSError):  # all was read; nothing can be done about it here
                os.close(self._descriptor)
