"""Exports, read back by the libraries that they are for, and what an interruption leaves."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anchorpatch import storage
from anchorpatch.classes import ClassNames
from anchorpatch.errors import (
    CorruptShard,
    DataError,
    ManifestMismatch,
    MissingDependency,
    SettingsError,
    ShardBusy,
    ShardError,
    StorageError,
)
from anchorpatch.jobs import export as jobs_export
from anchorpatch.jobs.export import ExportConfig, Exported, export_splits
from anchorpatch.jobs.patch_files import class_folders, picture_names
from anchorpatch.shards import ShardReader
from tests.program import PROCESSES
from tests.shards.samples import CLASSES, make_split


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardReader]:
    """The same 21 images, by codec."""
    found = {}
    for codec in ("raw", "jpeg", "image"):
        folder = tmp_path_factory.mktemp(codec) / "val"
        make_split(folder, codec=codec)
        found[codec] = ShardReader(folder)
    return found


def run(reader: ShardReader, out: Path, to: str, **changes: Any) -> Exported:
    (found,) = export_splits([reader], out, ExportConfig(to, **changes))
    return found


def expected_rows(reader: ShardReader) -> list[dict[str, Any]]:
    """What is to be said of each patch, image by image."""
    found = []
    for i in range(len(reader)):
        patches, first = reader.image_patches(i), int(reader.first[i])
        boxes = reader.source_box(patches.scale, range(first, first + len(patches.pixels)))
        for rank in range(len(patches.pixels)):
            (y, x), (x0, y0, x1, y1) = patches.corners[rank].tolist(), boxes[rank].tolist()
            label, predicted = int(reader.label[i]), int(reader.predicted[i])
            found.append(
                dict(image=i, split="val", path=reader.path[i].decode(), label=label)
                | {"class": reader.classes[label], "predicted": reader.network_classes[predicted]}
                | dict(scale=patches.scale, rank=rank, y=y, x=x, score=patches.scores[rank])
                | dict(x0=x0, y0=y0, x1=x1, y1=y1, pixels=patches.pixels[rank])
            )
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


# --- read back ---------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "image"])
def test_imagefolder_reads_the_pixels_and_labels_of_the_shards(
    readers: dict[str, ShardReader], tmp_path: Path, codec: str
) -> None:
    from torchvision.datasets import ImageFolder

    reader = readers[codec]
    found = run(reader, tmp_path, "folder")
    expected = expected_rows(reader)
    folder = ImageFolder(str(tmp_path))
    assert tuple(folder.classes) == reader.classes
    assert len(folder) == len(expected) == found.patches == found.files
    assert found.images == len(reader)
    assert found.bytes == sum(os.path.getsize(path) for path, _ in folder.samples)
    read = {
        path: (np.asarray(image), label)
        for (path, _), (image, label) in zip(folder.samples, folder, strict=True)
    }
    for row in expected:
        # The labels of these shards are not their paths' folders, as with a labels file.
        stem = row["path"].removesuffix(".jpg")
        path = tmp_path / row["class"] / f"{stem}__{row['scale']}_{row['rank']:02d}.png"
        pixels, label = read.pop(str(path))
        assert label == row["label"]
        assert np.array_equal(pixels, row["pixels"])
    assert not read


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("picture", ["png", "jpg"])
def test_webdataset_reads_the_pixels_and_facts_of_the_shards(
    readers: dict[str, ShardReader], tmp_path: Path, picture: str
) -> None:
    webdataset = pytest.importorskip("webdataset")
    reader = readers["raw"]
    found = run(reader, tmp_path, "webdataset", picture=picture, maxcount=10)
    tars = sorted(map(str, tmp_path.glob("val-*.tar")))
    assert len(tars) == found.files > 3
    dataset = webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    expected = expected_rows(reader)
    keys = [sample["__key__"] for sample in samples]
    assert keys == sorted(set(keys))
    assert len(samples) == len(expected) == found.patches
    images_of: dict[str, list[int]] = {}
    for sample, row in zip(samples, expected, strict=True):
        images_of.setdefault(sample["__url__"], []).append(row["image"])
        assert sample["__key__"] == f"{row['image']:08d}_{row['rank']:03d}"
        assert sample["cls"] == row["label"]
        if picture == "png":
            assert np.array_equal(sample["png"], row["pixels"])
        facts = sample["json"]
        assert facts["corner"] == [row["y"], row["x"]]
        assert facts["box"] == [row["x0"], row["y0"], row["x1"], row["y1"]]
        assert np.float32(facts["score"]) == row["score"]
        for name in ("split", "path", "label", "class", "predicted", "scale", "rank"):
            assert facts[name] == row[name]
    # An image's patches stay together, and no file holds more than it may.
    assert all(len(images) <= 10 for images in images_of.values())
    several = [image for images in images_of.values() for image in set(images)]
    assert len(several) == len(set(several))


def test_maxsize_begins_the_next_tar_as_webdataset_does(
    readers: dict[str, ShardReader], tmp_path: Path
) -> None:
    run(readers["raw"], tmp_path, "webdataset", maxsize=60_000)
    for path in sorted(tmp_path.glob("*.tar"))[:-1]:
        with tarfile.open(path) as tar:
            of_images: dict[str, int] = {}
            for member in tar:
                image = member.name.partition("_")[0]
                of_images[image] = of_images.get(image, 0) + member.size
        sizes = list(of_images.values())
        assert sum(sizes) >= 60_000 > sum(sizes[:-1])


@pytest.mark.parametrize("to", ["csv", "parquet"])
def test_tables_say_what_the_shards_say(
    readers: dict[str, ShardReader], tmp_path: Path, to: str
) -> None:
    out = tmp_path / f"patches.{to}"
    if to == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    found = run(readers["raw"], out, to)
    expected = expected_rows(readers["raw"])
    if to == "csv":
        with out.open(newline="", encoding="utf-8") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        for row in rows:
            assert row.pop("name") == row.pop("predicted_name") == ""
    else:
        rows = parquet.read_table(out).to_pylist()
        for row in rows:
            assert row.pop("name") is row.pop("predicted_name") is None
    assert len(rows) == len(expected) == found.patches
    for row, wanted in zip(rows, expected, strict=True):
        assert wanted.keys() - row.keys() == {"image", "pixels"}
        for name, value in row.items():
            assert type(wanted[name])(value) == wanted[name]


def test_several_splits_are_one_table_and_folders_of_their_own(
    readers: dict[str, ShardReader], tmp_path: Path
) -> None:
    make_split(tmp_path / "train", shards=1, last=3)
    both = [ShardReader(tmp_path / "train"), readers["raw"]]
    (table,) = export_splits(both, tmp_path / "out.csv", ExportConfig("csv"))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert table.images == 24
    assert {row["split"] for row in rows[: -int(both[1].counts.sum())]} == {"train"}
    folders = export_splits(both, tmp_path / "out", ExportConfig("folder"))
    assert [found.out for found in folders] == [tmp_path / "out/train", tmp_path / "out/val"]
    assert [found.images for found in folders] == [3, 21]


def test_stored_jpeg_is_copied(readers: dict[str, ShardReader], tmp_path: Path) -> None:
    reader = readers["jpeg"]
    run(reader, tmp_path / "jpg", "folder", picture="jpg")
    run(reader, tmp_path / "png", "folder")
    stored = set()
    for scale in (63, 95, 111):
        rows = range(reader.patch_count(scale))
        files = reader.jpegs(scale, rows)
        for data, pixels in zip(files, reader.patches(scale, rows), strict=True):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
        stored.update(files)
    written = [path.read_bytes() for path in sorted((tmp_path / "jpg").rglob("*.jpg"))]
    assert set(written) == stored
    assert len(written) == len(list((tmp_path / "png").rglob("*.png"))) == reader.counts.sum()
    with pytest.raises(SettingsError, match="stored as JPEG of quality 95 and copied"):
        run(reader, tmp_path / "q", "folder", picture="jpg", quality=80)
    with pytest.raises(ShardError, match="expected codec jpeg, found raw"):
        readers["raw"].jpegs(63, [0])


def test_a_cut_off_jpeg_is_not_copied(tmp_path: Path) -> None:
    manifest, _ = make_split(tmp_path / "val", shards=1, codec="jpeg")
    reader = ShardReader(tmp_path / "val")
    data = reader.jpegs(63, [0])[0]
    shard = manifest.shard_path(0)
    whole = shard.read_bytes()
    assert whole.count(data) == 1
    shard.write_bytes(whole.replace(data, data[:-2] + b"\0\0"))
    with pytest.raises(CorruptShard, match=r"val-00000.h5: patches/63/blob: patch 0: .*cut off"):
        run(ShardReader(tmp_path / "val"), tmp_path / "out", "folder", picture="jpg")
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_limit_and_scale_take_the_images_that_they_name(
    readers: dict[str, ShardReader], tmp_path: Path
) -> None:
    reader = readers["raw"]
    found = run(reader, tmp_path / "a.csv", "csv", limit=7, scales=(95,))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    taken = [i for i in range(0, 21, 3) if reader.scale[i] == 95]
    assert 0 < found.images == len(taken)
    assert list(dict.fromkeys(row["path"] for row in rows)) == [
        reader.path[i].decode() for i in taken
    ]


def test_names_of_classes(readers: dict[str, ShardReader], tmp_path: Path) -> None:
    names = ClassNames({"cat": "Felis catus", "elk": "Alces alces"})
    run(readers["raw"], tmp_path / "a.csv", "csv", class_names=names)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert {row["name"] for row in rows if row["class"] == "cat"} == {"Felis catus"}
    assert {row["name"] for row in rows if row["class"] == "dog"} == {""}
    assert {r["predicted_name"] for r in rows if r["predicted"] == "elk"} == {"Alces alces"}
    run(readers["raw"], tmp_path / "tars", "webdataset")
    with pytest.raises(ManifestMismatch, match="--class-names gives other names"):
        run(readers["raw"], tmp_path / "tars", "webdataset", class_names=names)


# --- names of files ----------------------------------------------------------------------


def named(classes: tuple[str, ...], images: list[tuple[str, int]]) -> list[str]:
    images = sorted(images, key=lambda image: image[0].encode())
    reader: Any = SimpleNamespace(
        classes=classes,
        path=np.array([path.encode() for path, _ in images]),
        label=np.array([label for _, label in images]),
    )
    return [name.decode() for name in picture_names(reader).tolist()]


def test_names_are_paths_below_the_class_without_extension_where_that_tells_them_apart() -> None:
    images = [("a/1.jpg", 0), ("a/x/1.jpg", 0), ("b/1.jpg", 1), ("b/1.png", 1), ("b/2.x.jpg", 1)]
    assert named(("a", "b"), images) == ["1", "x/1", "1.jpg", "1.png", "2.x"]
    # "1.jpg" is the whole name of one image, and what the extension leaves of another.
    images = [("a/1.jpg", 0), ("a/1.jpg.png", 0), ("a/1.png", 0)]
    assert named(("a",), images) == ["1.jpg", "1.jpg.png", "1.png"]


def test_names_of_lists_stay_inside_the_folder() -> None:
    images = [("/data/x/1.jpg", 0), ("/data/y/1.jpg", 0), ("/data/../z.jpg", 0)]
    assert named(("a",), images) == ["%2E%2E/z", "x/1", "y/1"]
    assert named(("x", "y"), [("/data/x/1.jpg", 0), ("/data/y/1.jpg", 1)]) == ["1", "1"]
    assert named(("a",), [("../../1.jpg", 0), (".//2.jpg", 0)]) == ["%2E%2E/%2E%2E/1", "%2E/%/2"]
    assert class_folders(["..", "a/b", "5%"]) == ["%2E%2E", "a%2Fb", "5%25"]


PARTS = st.sampled_from(["a", "b", "a.jpg", "a.png", "a.jpg.png", ".", "..", "", ".a", "a__63_0"])


@given(
    st.sets(
        st.tuples(st.booleans(), st.lists(PARTS, min_size=1, max_size=3)).map(
            lambda pair: "/" * pair[0] + "/".join([*pair[1], "f"]) + ".jpg"
        )
        | st.sampled_from(["a/f.png", "f.png", "a/f", "f.jpg.png"]),
        min_size=1,
        max_size=12,
    ),
    st.data(),
)
def test_no_two_images_of_a_class_share_a_name(paths: set[str], data: st.DataObject) -> None:
    images = sorted(paths, key=str.encode)
    labels = [data.draw(st.integers(0, 1)) for _ in images]
    names = named(("a", "b"), list(zip(images, labels, strict=True)))
    assert len({*zip(labels, names, strict=True)}) == len(images)
    for name in names:
        inside = os.path.normpath(os.path.join("/out/class", name))
        assert inside == f"/out/class/{name}"


def test_empty_classes_keep_their_number_and_are_told_of(
    readers: dict[str, ShardReader], tmp_path: Path
) -> None:
    from torchvision.datasets import ImageFolder

    reader = readers["raw"]
    found = run(reader, tmp_path, "folder", limit=1)
    label = int(reader.label[0])
    absent = [name for i, name in enumerate(CLASSES) if i != label]
    (note,) = found.notes
    assert note == (
        f"the folders of 3 classes are empty ({', '.join(absent)}): ImageFolder needs "
        "allow_empty=True"
    )
    folder = ImageFolder(str(tmp_path), allow_empty=True)
    assert set(folder.targets) == {label}


# --- interruptions and other folders ----------------------------------------------------


def _dies_at(call: int, shards: Path, out: Path, config: ExportConfig, part: int) -> None:
    """Export, and end as by SIGKILL in place of the n-th renaming of a file."""
    jobs_export._PART = part
    os.sync = lambda: None
    replace, calls = os.replace, 0

    def counting(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.replace = counting  # type: ignore[assignment]
    export_splits([ShardReader(shards)], out, config)


@pytest.mark.parametrize(
    ("to", "changes", "moments"),
    [
        ("folder", {}, (1, 2, 30, 55)),
        ("webdataset", {"maxcount": 8}, (1, 3, 8)),
        ("csv", {}, (1,)),
    ],
)
def test_killed_at_several_moments_and_run_again(
    readers: dict[str, ShardReader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    changes: dict[str, Any],
    moments: tuple[int, ...],
) -> None:
    monkeypatch.setattr(jobs_export, "_PART", 4)
    monkeypatch.setattr(os, "sync", lambda: None)
    reader, config = readers["raw"], ExportConfig(to, **changes)
    ending = ".csv" if to == "csv" else ""
    whole = tmp_path / "whole" / f"out{ending}"
    export_splits([reader], whole, config)
    wanted = files_of(whole.parent)
    for moment in moments:
        out = tmp_path / str(moment) / f"out{ending}"
        args = (moment, reader.folder, out, config, 4)
        process = PROCESSES.Process(target=_dies_at, args=args)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        # What has its name is whole.
        for name, data in files_of(out.parent).items():
            if name in wanted and not name.endswith("export.json"):
                assert data == wanted[name]
        again = export_splits([reader], out, config)
        assert files_of(out.parent) == wanted
        assert again[0].patches == reader.counts.sum()


def test_a_finished_export_restores_what_is_gone(
    readers: dict[str, ShardReader], tmp_path: Path
) -> None:
    for to, changes in (("folder", {}), ("webdataset", {"maxcount": 8})):
        out = tmp_path / to
        first = run(readers["raw"], out, to, **changes)
        wanted = files_of(out)
        gone = sorted(path for path in out.rglob("*") if path.suffix in (".png", ".tar"))[1]
        times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if path != gone}
        gone.unlink()
        assert run(readers["raw"], out, to, **changes) == first
        assert files_of(out) == wanted
        assert times == {path: path.stat().st_mtime_ns for path in times}


def test_only_an_empty_or_a_matching_folder_is_written_to(
    readers: dict[str, ShardReader], tmp_path: Path
) -> None:
    reader = readers["raw"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ShardError, match=r"mine: expected an empty folder.*found thesis.tex"):
        run(reader, tmp_path / "mine", "folder")
    assert files_of(tmp_path / "mine") == {"thesis.tex": b"x"}
    run(reader, tmp_path / "out", "folder", limit=2)
    wanted = files_of(tmp_path / "out")
    for changes, said in (
        ({"limit": 3}, "--limit was 2, now 3"),
        ({"limit": 2, "picture": "jpg"}, "--format was png, now jpg"),
        ({"limit": 2, "scales": (63,)}, r"--scale was \[63, 95, 111\], now \[63\]"),
    ):
        with pytest.raises(ManifestMismatch, match=said):
            run(reader, tmp_path / "out", "folder", **changes)
    with pytest.raises(ManifestMismatch, match="the shards have changed"):
        run(readers["image"], tmp_path / "out", "folder", limit=2)
    with pytest.raises(ManifestMismatch, match="--to was folder, now webdataset"):
        run(reader, tmp_path / "out", "webdataset", limit=2)
    assert files_of(tmp_path / "out") == wanted
    for text in ("{}", "[", '{"format": 2, "inputs": {}, "parts": []}'):
        (tmp_path / "out" / "export.json").write_text(text)
        with pytest.raises(ShardError, match=r"export.json: expected the record of an export"):
            run(reader, tmp_path / "out", "folder", limit=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file: cannot write"):
        run(reader, tmp_path / "file", "folder")


def test_only_a_table_of_ours_is_replaced(readers: dict[str, ShardReader], tmp_path: Path) -> None:
    reader = readers["raw"]
    (tmp_path / "mine.csv").write_text("path,label\n")
    with pytest.raises(ShardError, match=r"mine.csv: expected no file, or a table that this"):
        run(reader, tmp_path / "mine.csv", "csv")
    assert (tmp_path / "mine.csv").read_text() == "path,label\n"
    run(reader, tmp_path / "a.csv", "csv", limit=2)
    run(reader, tmp_path / "a.csv", "csv")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + reader.counts.sum()
    with pytest.raises(SettingsError, match=r"expected a file that ends with .csv, found .txt"):
        run(reader, tmp_path / "a.txt", "csv")


def test_parquet_needs_pyarrow(
    readers: dict[str, ShardReader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"pip install 'anchorpatch\[export\]', or"):
        run(readers["raw"], tmp_path / "a.parquet", "parquet")


def test_one_export_at_a_time(readers: dict[str, ShardReader], tmp_path: Path) -> None:
    for to, lock in (("folder", "out/.export.lock"), ("csv", ".out.csv.lock")):
        (tmp_path / "out").mkdir(exist_ok=True)
        out = tmp_path / ("out" if to == "folder" else "out.csv")
        with (
            storage.lock_file(tmp_path / lock, ShardBusy("")),
            pytest.raises(ShardBusy, match="another process is exporting to it"),
        ):
            run(readers["raw"], out, to)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"to": "zip"}, "--to: expected one of folder, webdataset, csv, parquet"),
        ({"picture": "bmp"}, "--format: expected png or jpg"),
        ({"quality": 80}, "--quality is of JPEG files"),
        ({"quality": 0, "picture": "jpg"}, "--quality: expected 1 to 100"),
        ({"scales": (64,)}, "--scale: expected some of"),
        ({"maxcount": 0}, "--maxcount: expected at least 1"),
    ],
)
def test_settings_that_no_export_can_use(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ExportConfig(**{"to": "folder", **changes})


def test_a_list_of_names_for_other_classes(readers: dict[str, ShardReader], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected names of classes such as cat"):
        run(readers["raw"], tmp_path / "a.csv", "csv", class_names=ClassNames({"yak": "Bos"}))
    assert not list(tmp_path.iterdir())


def test_the_record_tells_the_parts(readers: dict[str, ShardReader], tmp_path: Path) -> None:
    found = run(readers["raw"], tmp_path, "webdataset", maxcount=20)
    record = json.loads((tmp_path / "export.json").read_text())
    assert [part["name"] for part in record["parts"]] == sorted(
        p.name for p in tmp_path.glob("*.tar")
    )
    assert sum(part["images"] for part in record["parts"]) == found.images == 21
    assert sum(part["samples"] for part in record["parts"]) == found.patches
    assert all(
        (tmp_path / part["name"]).stat().st_size == part["bytes"] for part in record["parts"]
    )
