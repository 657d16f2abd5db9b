"""Compare exports with plain loops: ``python -m tests.benchmarks.bench_export [SHARDS]``.

The patches are of SHARDS (by default of random pixels, written to a temporary folder). Exports and
loops take turns, the best round of each counts, and a ratio above 1 says that the export is
faster. A loop is what one writes by hand: an image after another from the reader, Pillow's
encoder at the same level, files under their final names.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from anchorpatch.jobs.export import ExportConfig, export_splits
from anchorpatch.shards import ShardReader
from tests.benchmarks.bench_reader import make_split


def each(reader: ShardReader) -> Iterator[tuple[int, int, Any, dict[str, Any]]]:
    """Yield number, rank, pixels and facts of each patch."""
    for i in range(len(reader)):
        found = reader.image_patches(i)
        first = int(reader.first[i])
        boxes = reader.source_box(found.scale, range(first, first + len(found.pixels)))
        for rank, pixels in enumerate(found.pixels):
            facts = {
                "path": reader.path[i].decode(),
                "label": int(reader.label[i]),
                "predicted": reader.network_classes[reader.predicted[i]],
                "scale": found.scale,
                "rank": rank,
                "corner": found.corners[rank].tolist(),
                "score": float(found.scores[rank]),
                "box": boxes[rank].tolist(),
            }
            yield i, rank, pixels, facts


def encode(pixels: Any, picture: str) -> bytes:
    """Return a picture file as the export makes it."""
    buffer = io.BytesIO()
    if picture == "png":
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=2)
    return buffer.getvalue()


def loop_folder(reader: ShardReader, out: Path, picture: str) -> None:
    """Write a file for each patch."""
    for i in range(len(reader)):
        found, path = reader.image_patches(i), reader.path[i].decode()
        folder = out / reader.classes[reader.label[i]]
        folder.mkdir(parents=True, exist_ok=True)
        for rank, pixels in enumerate(found.pixels):
            name = f"{Path(path).stem}__{found.scale}_{rank:02d}.{picture}"
            (folder / name).write_bytes(encode(pixels, picture))


def loop_webdataset(reader: ShardReader, out: Path, picture: str) -> None:
    """Write one tar file."""
    out.mkdir(parents=True)
    with tarfile.open(out / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, rank, pixels, facts in each(reader):
            for suffix, data in (
                ("cls", str(facts["label"]).encode()),
                ("json", json.dumps(facts).encode()),
                (picture, encode(pixels, picture)),
            ):
                info = tarfile.TarInfo(f"{i:08d}_{rank:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def loop_csv(reader: ShardReader, out: Path, picture: str) -> None:
    """Write one table."""
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        for _, _, _, facts in each(reader):
            writer.writerow([*facts.values()])


def main() -> None:
    """Print patches/s of exports and loops."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    loops: dict[str, Callable[[ShardReader, Path, str], None]] = {
        "folder": loop_folder,
        "webdataset": loop_webdataset,
        "csv": loop_csv,
    }
    ways = [("folder", "png"), ("folder", "jpg"), ("webdataset", "png"), ("webdataset", "jpg")]
    ways.append(("csv", "png"))
    with tempfile.TemporaryDirectory() as name:
        if args.shards is None:
            make_split(Path(name, "val"), "raw", 192, 64)
        reader = ShardReader(args.shards or Path(name, "val"))
        patches = int(reader.counts.sum())
        print(f"{'':16} {'export':>9} {'loop':>9}  patches/s, and the ratio")
        for to, picture in ways:
            out = Path(name, "out.csv" if to == "csv" else "out")
            runs: dict[str, Callable[[], object]] = {
                "export": lambda: export_splits([reader], out, ExportConfig(to, picture)),  # noqa: B023
                "loop": lambda: loops[to](reader, out, picture),  # noqa: B023
            }
            best = dict.fromkeys(runs, float("inf"))
            for _ in range(args.rounds):
                for way, run in runs.items():
                    began = time.perf_counter()
                    run()
                    best[way] = min(best[way], time.perf_counter() - began)
                    out.unlink() if out.is_file() else shutil.rmtree(out)
            rates = {way: patches / seconds for way, seconds in best.items()}
            print(
                f"{to:10} {picture:5} {rates['export']:9,.0f} {rates['loop']:9,.0f} "
                f"{rates['export'] / rates['loop']:6.2f}"
            )


if __name__ == "__main__":
    main()
