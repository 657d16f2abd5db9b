from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from anchorpatch.errors import AnchorpatchError, CorruptShard, ShardError
from anchorpatch.settings import CODECS, SCALES
from anchorpatch.shards import PatchDataset, ShardReader
from anchorpatch.shards.manifest import Manifest
from anchorpatch.shards.verify import ShardProblem, decode_patch, verify_folder
from tests.shards.samples import adopt, edit_manifest, make_split


@pytest.mark.parametrize("codec", CODECS)
def test_whole_shards_have_no_problems(tmp_path: Path, codec: str) -> None:
    make_split(tmp_path / "val", codec=codec, store_images=True)
    assert verify_folder(tmp_path / "val", jobs=1) == []


def test_over_processes_as_in_one(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val")
    flip(manifest.shard_path(1), 5000)
    assert verify_folder(tmp_path / "val", jobs=2) == verify_folder(tmp_path / "val", jobs=1)
    assert [p.shard for p in verify_folder(tmp_path / "val", jobs=2)] == ["val-00001.h5"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_any_flipped_byte_is_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=2, per_shard=2, last=2)
    path = manifest.shard_path(1)
    size = path.stat().st_size
    rng = np.random.default_rng(0)
    for at in [*range(0, 48), *rng.integers(0, size, 60).tolist(), size - 1]:
        flip(path, at)
        (problem,) = verify_folder(tmp_path / "val", jobs=1)
        assert problem.shard == "val-00001.h5"
        assert "the file has changed" in problem.problem
        flip(path, at)
    assert verify_folder(tmp_path / "val", jobs=1) == []


def test_any_flipped_bit_of_the_manifest_is_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=1, per_shard=1, last=1)
    path = manifest.folder / "manifest.json"
    whole = path.read_bytes()
    for at in (*range(0, len(whole), 3), *range(len(whole) - 90, len(whole))):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        (problem,) = verify_folder(manifest.folder, jobs=1)
        assert problem.shard == "manifest.json"
        assert "\n" not in problem.problem
    for at in range(1, len(whole), 29):
        path.write_bytes(whole[:at])
        assert [p.shard for p in verify_folder(manifest.folder, jobs=1)] == ["manifest.json"], at
    path.write_bytes(whole)
    assert verify_folder(manifest.folder, jobs=1) == []


def test_missing_cut_and_foreign_files_are_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=4)
    manifest.shard_path(0).unlink()
    data = manifest.shard_path(1).read_bytes()
    manifest.shard_path(1).write_bytes(data[:-10])
    (manifest.folder / "val-00009.h5").write_bytes(b"x")
    (manifest.folder / "val-00003.h5.tmp").write_bytes(b"left by a killed run")
    edit_manifest(manifest.folder, lambda data: data["shards"].pop(2))
    assert verify_folder(manifest.folder, jobs=1) == [
        ShardProblem("val-00000.h5", "missing: run the same extract again"),
        ShardProblem(
            "val-00001.h5",
            f"expected {len(data):,} bytes, found {len(data) - 10:,}: run the same extract again",
        ),
        ShardProblem(
            "val-00002.h5",
            "has no entry in manifest.json: if it comes from another folder, join the folders with "
            "`anchorpatch shards merge`, else run the same extract again",
        ),
        ShardProblem("val-00009.h5", "has no entry in manifest.json"),
    ]


def test_a_split_without_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json: not found"):
        verify_folder(tmp_path)


def test_attributes_of_other_shards_are_named(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=1, last=8)
    other, _ = make_split(tmp_path / "other" / "val", shards=1, last=8, iou_threshold=0.8)
    manifest.shard_path(0).write_bytes(other.shard_path(0).read_bytes())
    adopt(manifest)
    assert verify_folder(manifest.folder, jobs=1) == [
        ShardProblem("val-00000.h5", "its settings are not those of manifest.json")
    ]


# --- what shards say, under bytes of the manifest ------------------------------------------------


Change = Callable[[h5py.File], object]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """A split of one shard with eight images, for each codec."""
    root = tmp_path_factory.mktemp("whole")
    return {c: make_split(root / c / "val", shards=1, last=8, codec=c)[0] for c in CODECS}


def changed(manifest: Manifest, folder: Path, change: Change) -> Manifest:
    """Copy a split, change its shard, and enter the shard into the manifest as it is now."""
    shutil.copytree(manifest.folder, folder)
    copy = Manifest(folder, manifest.header, manifest.files_count, manifest.files_sha256)
    with h5py.File(copy.shard_path(0), "r+") as file:
        change(file)
    return adopt(copy)


def read_all(folder: Path) -> None:
    """Read all that a reader gives."""
    reader = ShardReader(folder)
    for i in range(len(reader)):
        reader.image_patches(i)
        if reader.has_images:
            reader.image(i)
    for scale in SCALES:
        assert len(PatchDataset(reader, scale).labels) == reader.patch_count(scale)
    names = [reader.classes[label] for label in reader.label]
    assert len(names) == len([reader.network_classes[row] for row in reader.predicted])


def complaint(manifest: Manifest) -> str | None:
    """Return what is wrong; the reader and verify must agree, and raise nothing else."""
    problems = verify_folder(manifest.folder, jobs=1)
    if not problems:
        read_all(manifest.folder)
        return None
    with pytest.raises(AnchorpatchError) as raised:
        read_all(manifest.folder)
    message = str(raised.value)
    assert "\n" not in message
    assert any(problem.problem in message for problem in problems), (message, problems)
    return message


CHANGES = [
    ("images/label", 0, 4, "images/label: expected 0 to 3, found others"),
    ("images/label", 0, -1, "images/label: expected 0 to 3, found others"),
    ("images/label", 0, 2**31 - 1, "images/label: expected 0 to 3, found others"),
    ("images/predicted", 0, 5, "images/predicted: expected 0 to 4, found others"),
    ("images/branch_class", (1, 2), 5, "images/branch_class: expected 0 to 4, found others"),
    ("images/scale", 0, 77, "images/scale: expected (63, 95, 111), found others"),
    ("images/branch_prob", (0, 0), 1.5, "images/branch_prob: expected 0 to 1, found others"),
    ("images/branch_prob", (0, 0), np.nan, "images/branch_prob: expected 0 to 1, found others"),
    ("images/size", (0, 1), 0, "images/size: expected at least 1 px, found others"),
    ("images/path", 0, b"zebra", "images/path: expected each once, in order, found others"),
    ("images/first", 3, 9, "images/first, images/count: expected to divide"),
    ("images/first", 3, -1, "images/first, images/count: expected to divide"),
    ("images/count", 3, 0, "images/first, images/count: expected to divide"),
    ("images/count", slice(None), 2**31 - 1, "images/first, images/count: expected to divide"),
    ("patches/63/image", 0, 7, "patches/63/image: expected the image whose slice it is"),
    ("patches/63/image", 0, -1, "patches/63/image: expected the image whose slice it is"),
    ("patches/63/corner", (0, 0), -1, "patches/63/corner: expected 0 to 161, found others"),
    ("patches/63/corner", (0, 1), 162, "patches/63/corner: expected 0 to 161, found others"),
    ("patches/95/corner", (0, 1), 130, "patches/95/corner: expected 0 to 129, found others"),
    ("patches/63/score", 0, np.nan, "patches/63/score: expected numbers, found NaN"),
    ("patches/63/score", 0, np.inf, "patches/63/score: expected numbers, found NaN"),
    ("patches/63/score", 0, -99.0, "patches/63/score: expected to fall within each image"),
]


@pytest.mark.parametrize(("name", "at", "value", "message"), CHANGES)
def test_values_that_do_not_fit(
    splits: dict[str, Manifest], tmp_path: Path, name: str, at: object, value: object, message: str
) -> None:
    def change(file: h5py.File) -> None:
        where = at
        if value == -99.0:  # the first patch of an image that has a weaker one
            image = file["patches/63/image"][:]
            where = int(np.flatnonzero(image[1:] == image[:-1])[0])
        file[name][where] = value

    assert message in str(complaint(changed(splits["image"], tmp_path / "val", change)))


def replaced(name: str, make: Callable[[h5py.File, np.ndarray], object]) -> Change:
    """Remove a dataset and make another of its name."""

    def change(file: h5py.File) -> None:
        values = file[name][:]
        del file[name]
        made = make(file, values)
        if made is not None:
            file[name] = made

    return change


def in_other_file(file: h5py.File, values: np.ndarray) -> Path:
    path = Path(file.filename).with_name("other.h5.tmp")  # verify takes no notice of it
    with h5py.File(path, "w") as other:
        other["it"] = values
    return path


def external(name: str) -> Change:
    def make(file: h5py.File, values: np.ndarray) -> None:
        raw = Path(file.filename).with_name("raw.h5.tmp")
        raw.write_bytes(values.tobytes())
        place = [(str(raw), 0, values.nbytes)]
        file.create_dataset(name, values.shape, values.dtype, external=place)

    return replaced(name, make)


def virtual(name: str) -> Change:
    def make(file: h5py.File, values: np.ndarray) -> None:
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[:] = h5py.VirtualSource(in_other_file(file, values), "it", values.shape)
        file.create_virtual_dataset(name, layout)

    return replaced(name, make)


def compact(name: str) -> Change:
    def make(file: h5py.File, values: np.ndarray) -> None:
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_layout(h5py.h5d.COMPACT)
        kind, space = h5py.h5t.py_create(values.dtype), h5py.h5s.create_simple(values.shape)
        h5py.h5d.create(file.id, name.encode(), kind, space, created)
        file[name][:] = values

    return replaced(name, make)


def chunked(name: str, rows: int | None = None, **options: object) -> Change:
    def make(file: h5py.File, values: np.ndarray) -> None:
        shape = (rows or len(values), *values.shape[1:])
        found = file.create_dataset(name, shape, values.dtype, chunks=True, **options)
        if rows is None:
            found[:] = values

    return replaced(name, make)


def unwritten(file: h5py.File) -> None:
    shape = file["patches/63/pixels"].shape
    del file["patches/63/pixels"]
    file.create_dataset("patches/63/pixels", shape, "u1")


PIXELS, LABEL = "patches/63/pixels", "images/label"
STRUCTURES = {
    "external link": (
        replaced(PIXELS, lambda f, v: h5py.ExternalLink(in_other_file(f, v), "it")),
        "pixels: expected data of this file, found a soft or external link",
    ),
    "soft link": (replaced(PIXELS, lambda f, v: h5py.SoftLink("/patches/95/pixels")), "soft or"),
    "link that leads nowhere": (replaced(LABEL, lambda f, v: h5py.SoftLink("/nowhere")), "soft or"),
    "link to a group": (lambda f: f.move("patches", "p") or link(f, "patches", "p"), "soft or"),
    "virtual": (virtual(PIXELS), "virtual or external dataset"),
    "virtual table": (virtual(LABEL), "virtual or external dataset"),
    "external storage": (external(PIXELS), "virtual or external dataset"),
    "external table": (external(LABEL), "virtual or external dataset"),
    "chunked": (chunked(PIXELS), "expected one contiguous piece of this file, found a chunked"),
    "compressed": (chunked(LABEL, compression="gzip"), "found a chunked"),
    "compact": (compact(LABEL), "found a chunked, compact"),
    "2^42 rows": (chunked(LABEL, 1 << 42), "expected 8 rows as format 1 has them, found int32 (43"),
    "2^42 paths": (chunked("skipped/path", 1 << 42), "expected one contiguous piece"),
    "never written": (unwritten, "patches/63/pixels is not in the file"),
    "references": (
        replaced(LABEL, lambda f, v: np.array([f["images"].ref] * 8, h5py.ref_dtype)),
        "expected 8 rows as format 1 has them, found object (8,)",
    ),
    "another type": (replaced(LABEL, lambda f, v: v.astype("i8")), "found int64 (8,)"),
    "other bytes": (replaced(LABEL, lambda f, v: v.astype(">i4")), "found >i4 (8,)"),
    "another shape": (replaced(LABEL, lambda f, v: v[:, None]), "found int32 (8, 1)"),
    "a number": (replaced(LABEL, lambda f, v: np.int32(1)), "found int32 ()"),
    "nothing": (replaced(LABEL, lambda f, v: h5py.Empty("i4")), "found int32 None"),
    "strings of any length": (replaced("images/path", lambda f, v: v.astype(object)), "object"),
    "a group": (replaced(LABEL, lambda f, v: f.create_group("other")), "found a group"),
    "a dataset for a group": (
        lambda f: f.move("patches", "p") or f.create_dataset("patches", data=1),
        "patches/63: expected in a group, found in a dataset",
    ),
    "missing": (replaced(LABEL, lambda f, v: None), "expected a shard, cannot be read: "),
}


def link(file: h5py.File, name: str, target: str) -> None:
    file[name] = h5py.SoftLink(target)


@pytest.mark.parametrize("case", STRUCTURES)
def test_datasets_that_are_not_stored_as_in_a_shard(
    splits: dict[str, Manifest], tmp_path: Path, case: str
) -> None:
    change, message = STRUCTURES[case]
    assert message in str(complaint(changed(splits["raw"], tmp_path / "val", change)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: v.astype("f8"), "patches/63/offset: expected"),
        (lambda v: v[:-1], "patches/63/offset: expected"),
        (lambda v: v - 1, "patches/63/offset: expected to rise from 0 to"),
        (lambda v: v[::-1].copy(), "patches/63/offset: expected to rise from 0 to"),
        (lambda v: np.r_[v[:-1], v[-1] + 1], "patches/63/offset: expected to rise from 0 to"),
        (lambda v: np.r_[v[:1], 1 << 62, v[2:]], "patches/63/offset: expected to rise from 0 to"),
        (lambda v: np.r_[v[:1], v[0], v[2:]], "patches/63/blob: patch 0: expected a JPEG file"),
    ],
)
def test_offsets_that_do_not_fit(
    splits: dict[str, Manifest], tmp_path: Path, make: Callable, message: str
) -> None:
    change = replaced("patches/63/offset", lambda f, v: make(v))
    assert message in str(complaint(changed(splits["jpeg"], tmp_path / "val", change)))


def jpeg(mode: str, size: tuple[int, int], **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def other_format(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (63, 63)).save(buffer, kind)
    return buffer.getvalue()


HUGE = jpeg("L", (8, 8)).replace(b"\x00\x08\x00\x08\x01", b"\xff\xff\xff\xff\x01")
STORED = {
    "one pixel": (jpeg("RGB", (1, 1)), "RGB of 1 x 1 px"),
    "too large": (jpeg("RGB", (500, 400)), "RGB of 500 x 400 px"),
    "another side": (jpeg("RGB", (63, 64)), "RGB of 63 x 64 px"),
    "gray": (jpeg("L", (63, 63)), "L of 63 x 63 px"),
    "inks": (jpeg("CMYK", (63, 63)), "CMYK of 63 x 63 px"),
    "a bomb": (HUGE, "L of 65535 x 65535 px"),
    "empty": (b"", "0 bytes"),
    "cut off": (jpeg("RGB", (63, 63))[:-30], "truncated"),
    "cut off in its header": (jpeg("RGB", (63, 63))[:100], "bytes that are not a JPEG file"),
    "PNG": (other_format("PNG"), "not a JPEG file"),
}


@pytest.mark.parametrize("case", STORED)
def test_jpeg_patches_that_are_none(splits: dict[str, Manifest], tmp_path: Path, case: str) -> None:
    data, message = STORED[case]

    def change(file: h5py.File) -> None:
        group = file["patches/63"]
        offset, blob = group["offset"][:], group["blob"][:].tobytes()
        row = 2
        blob = blob[: offset[row]] + data + blob[offset[row + 1] :]
        offset[row + 1 :] += offset[row] + len(data) - offset[row + 1]
        group["offset"][:] = offset
        del group["blob"]
        group["blob"] = np.frombuffer(blob, np.uint8)

    found = str(complaint(changed(splits["jpeg"], tmp_path / "val", change)))
    assert "patches/63/blob: patch 2: expected a JPEG file, RGB of 63 x 63 px, found" in found
    assert message in found


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_no_jpeg_raises_anything_else(data: st.DataObject) -> None:
    content = bytearray(jpeg("RGB", (63, 63), quality=20))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=5)):
        content[at] = data.draw(st.integers(0, 255))
    with suppress(CorruptShard):
        assert decode_patch(bytes(content), 63).shape == (63, 63, 3)


EXTREME = st.sampled_from([0, 1, -1, 127, -128, 2**15, 2**31 - 1, -(2**31), 2**42, np.nan, np.inf])
VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.binary(max_size=9).map(np.bytes_),
    st.text('aé{["0', max_size=5),
    st.sampled_from(
        [np.zeros((2, 3)), np.zeros(0, "S3"), h5py.Empty("S5"), np.array([b"a", b"b"])]
    ),
)


@given(st.data())
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_a_shard_holds_the_reader_and_verify_agree(
    splits: dict[str, Manifest], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any change of one attribute or dataset is an error of ours or harmless, for both alike."""
    codec = data.draw(st.sampled_from(CODECS))

    def change(file: h5py.File) -> None:
        attributes, datasets = sorted(file.attrs), []
        file.visititems(lambda n, what: datasets.append(n) if hasattr(what, "dtype") else None)
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(attributes))
            del file.attrs[name]
            if data.draw(st.booleans()):
                file.attrs[name] = data.draw(VALUES)
            return
        name = data.draw(st.sampled_from(datasets))
        values = file[name][()]
        how = data.draw(st.sampled_from(["value", "type", "rows", "chunked", "gone", "link"]))
        if how == "value" and values.size and values.dtype.kind in "iuf":
            at = data.draw(st.integers(0, values.size - 1))
            with np.errstate(all="ignore"):
                values.reshape(-1)[at] = np.float64(data.draw(EXTREME)).astype(values.dtype)
            file[name][()] = values
            return
        del file[name]
        if how == "type":
            kinds = st.sampled_from(["i1", "u4", "i8", ">i4", "f4", "f8", "S2", "?"])
            with np.errstate(all="ignore"):
                file[name] = np.resize(np.arange(4), values.shape).astype(data.draw(kinds))
        elif how == "rows":
            file[name] = np.resize(values, (data.draw(st.integers(0, 20)), *values.shape[1:]))
        elif how == "chunked" and values.size:
            file.create_dataset(name, data=values, chunks=True)
        elif how == "link":
            file[name] = h5py.SoftLink(f"/{data.draw(st.sampled_from(datasets))}")

    complaint(changed(splits[codec], tmp_path_factory.mktemp("changed") / "val", change))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
) | st.sampled_from([2**31, 2**63, 10**400, 1e308, "../val-00000.h5", "val-00007.h5"])


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_whatever_a_manifest_says_it_fits_or_is_refused(
    splits: dict[str, Manifest], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("manifest") / "val"
    shutil.copytree(splits["image"].folder, folder)
    document = json.loads((folder / "manifest.json").read_text())
    part = document
    while True:
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(part[key], (dict, list)) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    if data.draw(st.booleans()):
        del part[key]
    else:
        part[key] = data.draw(JSON)
    (folder / "manifest.json").write_text(json.dumps(document))
    with suppress(AnchorpatchError):
        problems = verify_folder(folder, jobs=1)
        if not problems:
            read_all(folder)
    with suppress(AnchorpatchError):
        read_all(folder)
