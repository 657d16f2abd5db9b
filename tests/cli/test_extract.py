from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anchorpatch import storage
from anchorpatch.errors import DataError
from anchorpatch.images.decode import decode
from anchorpatch.settings import CropSettings
from anchorpatch.shards import ShardReader
from tests.conftest import Program
from tests.oddities import encoded, make_oddities, picture
from tests.program import run_program, start_program
from tests.shards_oracle import check_folder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """Half of those images: DATA/val/{cat,dog} with 10 JPEG files each."""
    data = tmp_path_factory.mktemp("half")
    for name in ("cat", "dog"):
        (data / "val" / name).mkdir(parents=True)
        for path in sorted((image_folder / "val" / name).iterdir())[:10]:
            os.link(path, data / "val" / name / path.name)
    return data


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a shard folder; the manifest without what no run decides."""
    return {
        p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix in (".h5", ".json")
    }


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, image_folder: Path, weights: Path
) -> dict[str, bytes]:
    """The files of an uninterrupted run without workers."""
    out = tmp_path_factory.mktemp("reference")
    arguments = [*common(image_folder, weights), "--out", out, "--workers", 0]
    run_program(*arguments, cwd=out).check_returncode()
    assert check_folder(out / "val")[0] == 20
    return contents(out / "val")


def common(image_folder: Path, weights: Path) -> list[object]:
    options = ["--shard-size", 3, "--batch-size", 4, "--store-images"]
    return ["extract", "--data", image_folder, "--weights", weights, *options]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_batches_do_not_change_the_bytes(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path,
    reference: dict[str, bytes], workers: int,
) -> None:  # fmt: skip
    batch = {1: 5, 2: 64}[workers]
    arguments = [*common(image_folder, weights), "--workers", workers, "--batch-size", batch]
    result = program(*arguments, env={"OMP_NUM_THREADS": str(workers)}, fresh=workers == 2)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "shards/val") == reference


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("torch", "float32"), ("torch", "bfloat16"), ("openvino", "bfloat16")],
)
def test_this_holds_for_each_engine_and_precision(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path,
    engine: str, precision: str,
) -> None:  # fmt: skip
    arguments = [*common(image_folder, weights), "--engine", engine, "--precision", precision]
    arguments += ["--limit", 8]
    for threads, batch in ((1, 5), (2, 64)):
        more = ["--threads", threads, "--batch-size", batch, "--out", tmp_path / str(threads)]
        result = program(*arguments, *more, "--workers", 0)
        if "instructions" in result.stderr or "pip install openvino" in result.stderr:
            pytest.skip(result.stderr)
        assert result.returncode == 0, result.stderr
    found = contents(tmp_path / "1/val")
    assert found == contents(tmp_path / "2/val")
    settings = ShardReader(tmp_path / "1/val").settings
    assert (settings.engine, settings.precision) == (engine, precision)
    other = {"torch": "openvino", "openvino": "torch"}[engine]
    refused = program(*arguments, *more, "--engine", other)
    assert f"--engine was {engine}, now {other}" in refused.stderr
    again = program(*common(image_folder, weights), *more, "--limit", 8, "--precision", precision)
    assert again.returncode == 0, again.stderr  # auto goes on, with torch if that began


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_killed_and_run_again_gives_the_same_bytes(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path,
    reference: dict[str, bytes], workers: int,
) -> None:  # fmt: skip
    arguments = [*common(image_folder, weights), "--out", tmp_path, "--workers", workers]
    rng = random.Random(workers)
    for _ in range(2):
        process = start_program(*arguments, cwd=tmp_path)
        # Wait until it has begun to write, then a random moment more.
        deadline = time.monotonic() + 60
        done = len(list(tmp_path.glob("val/*.h5*")))
        while len(list(tmp_path.glob("val/*.h5*"))) == done and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = program(*arguments)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "val") == reference


def test_torchrun_gives_the_same_bytes_and_one_report(
    tmp_path: Path, image_folder: Path, weights: Path, reference: dict[str, bytes]
) -> None:
    arguments = ["-m", "anchorpatch", *common(image_folder, weights), "--out", tmp_path, "--json"]
    result = subprocess.run(
        [*TORCHRUN, *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "val") == reference
    report = json.loads(result.stdout)
    assert (report["images"], report["shards"], report["complete"]) == (20, 7, True)


def test_tasks_do_their_parts(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, reference: dict[str, bytes]
) -> None:
    arguments = common(image_folder, weights)
    first = json.loads(program(*arguments, "--task", "0/3", "--json").stdout)
    assert (first["shards"], first["total_shards"], first["split_shards"]) == (3, 3, 7)
    assert (first["complete"], first["pending"]) == (False, 4)
    second = program(*arguments, "--task", "1/3")
    assert "extract: part 1 of 3 (--task 1/3)" in second.stderr
    *_, pending, waits, advice = second.stdout.splitlines()
    assert re.fullmatch(
        r"time spent waiting for decoding [\d.]+%, network [\d.]+%, writing [\d.]+%", waits
    )
    assert advice.startswith("limited by ")
    assert pending == (
        "2 of 7 shards of the split are pending: other jobs or tasks will write them, or run the "
        "same command without --task"
    )
    # A job of an array does what nobody has done, whatever its index.
    third = program(*arguments, env={"SLURM_ARRAY_TASK_ID": "12"})
    assert "extract: sharing the work with other jobs (SLURM array task 12)\n" in third.stderr
    assert "6 images in " in third.stdout
    assert "pending" not in third.stdout
    assert contents(tmp_path / "shards/val") == reference


def test_jobs_of_any_array_share_the_shards(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, reference: dict[str, bytes]
) -> None:
    def job(index: int) -> subprocess.CompletedProcess[str]:
        # As SLURM sets them for --array=3,12.
        array = {"ID": index, "MIN": 3, "MAX": 12, "STEP": 1, "COUNT": 2}
        return program(
            *common(image_folder, weights),
            env={f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()},
        )

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(job, (3, 12)))
    assert [result.returncode for result in results] == [0, 0], results
    assert contents(tmp_path / "shards/val") == reference
    # Each shard was made once.
    made = [re.findall(r"^(\d+) images in .* s: ", r.stdout, re.MULTILINE) for r in results]
    assert sum(int(images) for found in made for images in found) == 20
    assert not list(tmp_path.glob("shards/val/val-*.lock"))


def test_a_changed_list_remakes_what_has_changed(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, reference: dict[str, bytes]
) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    for i in range(3, 10):
        (data / f"val/dog/{i:02d}.JPEG").unlink()
    arguments = common(data, weights)
    assert program(*arguments).returncode == 0
    before = contents(tmp_path / "shards/val")
    shutil.copytree(image_folder, data, dirs_exist_ok=True)
    added = "images were 13, now 20 (first in val-00004.h5: dog/03.JPEG added)"
    limited = "images were 13, now 15 (first in val-00001.h5: cat/"
    for more in ([], ["--dry-run"], ["--limit", 15]):
        refused = program(*arguments, *more)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert (limited if "--limit" in more else added) in refused.stderr
        assert "Choose another --out, or --overwrite" in refused.stderr
        assert refused.stderr.count("\n") == 1
    dry = program(*arguments, "--overwrite", "--dry-run", "--json")
    assert json.loads(dry.stdout)["pending"] == 3
    assert contents(tmp_path / "shards/val") == before
    result = program(*arguments, "--overwrite")
    assert "8 images in " in result.stdout
    assert contents(tmp_path / "shards/val") == reference


def test_the_command_that_verify_names_repairs(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, reference: dict[str, bytes]
) -> None:
    folder = tmp_path / "my shards" / "val"
    folder.mkdir(parents=True)
    for name, data in reference.items():
        (folder / name).write_bytes(data)
    flipped = bytearray(reference["val-00002.h5"])
    flipped[len(flipped) // 2] ^= 1
    (folder / "val-00002.h5").write_bytes(flipped)
    (folder / "val-00005.h5").unlink()
    trained = tmp_path / "runs" / "anchornet" / "best.safetensors"
    trained.parent.mkdir(parents=True)
    shutil.copy(weights, trained)
    env = {"ANCHORPATCH_DATA": str(image_folder)}
    verified = program("shards", "verify", "my shards", env=env)
    assert verified.returncode == 1
    summary, advice, _ = verified.stdout.splitlines()[-3:]
    assert summary == "my shards/val: 7 shards, 2 bad"
    assert advice.startswith("to rewrite them: anchorpatch extract --repair --data ")
    command = shlex.split(advice.partition(": anchorpatch ")[2])
    assert {"--store-images", "--shard-size", "3", "--preset", "evaluate"} <= set(command)
    # Its size is right, so nothing else finds it out.
    assert "3 images in " in program(*command[:1], *command[2:], env=env).stdout
    assert contents(folder) != reference
    result = program(*command, env=env)
    assert result.returncode == 0, result.stderr
    assert "repair: 1 of 7 shards are damaged" in result.stderr
    assert "3 images in " in result.stdout
    assert contents(folder) == reference
    assert "repair: 0 of 7 shards are damaged" in program(*command, env=env).stderr


def test_skipped_images_are_read_again_on_demand(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    folder = tmp_path / "data" / "val" / "cat"
    folder.mkdir(parents=True)
    for i in range(5):
        with Image.open(image_folder / f"val/cat/{i:02d}.JPEG") as photo:
            photo.save(folder / f"{i}.png")
    arguments = ["extract", "--weights", weights, "--shard-size", 2, "--max-bad", "90%"]
    assert program(*arguments, "--out", "undisturbed").returncode == 0
    whole = {name: (folder / name).read_bytes() for name in ("0.png", "1.png", "4.png")}
    for name, data in whole.items():
        (folder / name).write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    result = program(*arguments)
    assert "skipped: 3" in result.stdout, result.stderr
    for name in ("0.png", "1.png"):
        (folder / name).write_bytes(whole[name])
    assert "nothing to do" in program(*arguments).stdout
    dry = program(*arguments, "--retry-skipped", "--dry-run", "--json")
    assert json.loads(dry.stdout)["pending"] == 1
    result = program(*arguments, "--retry-skipped")
    assert "retry-skipped: 2 of 3 images have changed, in 1 shard\n" in result.stderr
    assert "2 images in " in result.stdout
    assert "skipped: 1" in result.stdout
    (folder / "4.png").write_bytes(whole["4.png"])
    assert program(*arguments, "--retry-skipped").returncode == 0
    assert contents(tmp_path / "shards/val") == contents(tmp_path / "undisturbed/val")


def test_interrupts_end_with_their_status_and_leave_whole_shards(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, reference: dict[str, bytes]
) -> None:
    arguments = [*common(image_folder, weights), "--out", tmp_path, "--workers", 2]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        shutil.rmtree(tmp_path / "val", ignore_errors=True)
        process = start_program(*arguments, cwd=tmp_path)
        while not list(tmp_path.glob("val/*.h5*")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        done = process.wait(timeout=60)
        errors = done.stderr
        assert done.returncode == status
        assert errors.splitlines()[-1].endswith("run the same command again")
        assert "Traceback" not in errors
        assert not list(tmp_path.glob("val/*.tmp"))
    assert program(*arguments).returncode == 0
    assert contents(tmp_path / "val") == reference


def test_nothing_left_to_do_changes_nothing(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    arguments = [*common(image_folder, weights), "--limit", 12]
    assert program(*arguments).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "shards/val").iterdir()}
    again = program(*arguments)
    assert "nothing to do" in again.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "shards/val").iterdir()}


def test_a_limit_is_spread_over_the_classes(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    arguments = [*common(image_folder, weights), "--limit", 5, "--shard-size", 2]
    assert program(*arguments).returncode == 0
    names = [name.decode() for name in ShardReader(tmp_path / "shards/val").path.tolist()]
    assert names == [f"{n}.JPEG" for n in ("cat/00", "cat/04", "cat/08", "dog/02", "dog/06")]
    # The shards are those of a folder that holds only these images.
    for name in names:
        copy = tmp_path / "few" / "val" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / "val" / name, copy)
    few = [*common(tmp_path / "few", weights), "--shard-size", 2, "--out", tmp_path / "few"]
    assert program(*few).returncode == 0
    made = [tmp_path / folder / "val" / "val-00002.h5" for folder in ("shards", "few")]
    assert made[0].read_bytes() == made[1].read_bytes()
    one = program(*common(image_folder, weights), "--limit", 1, "--out", tmp_path / "one")
    assert "1 of 2 classes has no image among the 1 image taken: dog" in one.stderr


def test_other_inputs_are_refused_until_overwrite(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    arguments = ["extract", "--weights", weights, "--shard-size", 5, "--limit", 13]
    assert program(*arguments).returncode == 0
    before = contents(tmp_path / "shards/val")

    def refused(*more: object, message: str) -> None:
        result = program(*arguments, *more)
        assert (result.returncode, result.stdout) == (1, "")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert "--overwrite" in result.stderr
        assert contents(tmp_path / "shards/val") == before

    refused(
        "--iou-threshold", 0.8, "--codec", "image",
        message="--iou-threshold was 0.3, now 0.8; --codec was raw, now image",
    )  # fmt: skip
    other = tmp_path / "other.safetensors"
    _other_weights(other)
    refused("--weights", other, message="weights")
    (data / "val/cat/00.JPEG").rename(data / "val/cat/00b.JPEG")
    refused(message="cat/00b.JPEG")
    (data / "val/cat/00b.JPEG").rename(data / "val/cat/00.JPEG")
    with open(data / "val/cat/06.JPEG", "ab") as file:
        file.write(b"junk")
    refused(message="images were 13, now 13")
    assert program(*arguments, "--overwrite", "--preset", "figure").returncode == 0
    assert contents(tmp_path / "shards/val") != before


def _other_weights(path: Path) -> None:
    import torch

    from anchorpatch.models.anchornet import AnchorNet
    from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights

    torch.manual_seed(1)
    save_weights(path, AnchorNet(2).state_dict(), WeightsMeta("anchornet", ("cat", "dog")))


def test_dry_run_writes_nothing_and_foretells_the_bytes(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    arguments = ["extract", "--data", image_folder, "--weights", weights, "--json"]
    estimated = json.loads(program(*arguments, "--dry-run").stdout)
    assert not (tmp_path / "shards").exists()
    assert (estimated["images"], estimated["shards"], estimated["pending"]) == (20, 1, 1)
    written = json.loads(program(*arguments).stdout)
    # All 20 images were in the sample.
    assert abs(estimated["bytes"] - written["bytes"]) < 2000
    done = program(*arguments[:-1], "--dry-run").stdout
    assert "would write 0 of 1 shard " in done


@pytest.mark.parametrize("codec", ["raw", "jpeg", "image"])
def test_summary_counts_what_is_in_the_shards(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, codec: str
) -> None:
    from anchorpatch.shards.reader import ShardReader

    arguments = ["extract", "--data", image_folder, "--weights", weights, "--codec", codec]
    report = json.loads(program(*arguments, "--preset", "finetune", "--json").stdout)
    reader = ShardReader(tmp_path / "shards/val")
    assert report["images"] == len(reader) == 20
    for scale, row in report["scales"].items():
        chosen = reader.scale == int(scale)
        assert row["images"] == chosen.sum()
        assert row["patches"] == reader.counts[chosen].sum() == reader.patch_count(int(scale))
    assert report["top1"] == (reader.label == reader.predicted).mean()
    files = (tmp_path / "shards/val").glob("*.h5")
    assert report["bytes"] == sum(p.stat().st_size for p in files)


def test_bad_and_odd_files(program: Program, tmp_path: Path, weights: Path) -> None:
    folder = tmp_path / "data/val/cat"
    folder.mkdir(parents=True)
    expected = make_oddities(folder)
    assert len(expected) >= 30
    arguments = ["extract", "--weights", weights, "--max-bad", "60%"]
    result = program(*arguments, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    manifest = json.loads((tmp_path / "shards/val/manifest.json").read_text())
    skipped = {
        Path(path).name: reason for entry in manifest["shards"] for path, reason in entry["skipped"]
    }
    assert skipped == {name: reason for name, reason in expected.items() if reason is not None}
    from anchorpatch.shards.reader import ShardReader

    found = {Path(os.fsdecode(path)).name for path in ShardReader(tmp_path / "shards/val").path}
    assert found == {name for name, reason in expected.items() if reason is None}
    assert program("shards", "verify", tmp_path / "shards").returncode == 0

    strict = program(*arguments[:-2], "--out", "strict")
    assert (strict.returncode, strict.stdout) == (1, "")
    assert "images cannot be read, more than --max-bad 1.00%: " in strict.stderr
    assert not list((tmp_path / "strict/val").glob("*.h5*"))


def test_damage_transparency_and_what_is_passed_over(
    program: Program, tmp_path: Path, weights: Path
) -> None:
    from anchorpatch.runtime.checkpoint import load_weights, save_weights
    from anchorpatch.shards.reader import ShardReader

    folder = tmp_path / "data/val/cat"
    folder.mkdir(parents=True)
    jpeg = encoded(picture(), "JPEG")
    start = jpeg.index(b"\xff\xda") + 200
    (folder / "0.jpg").write_bytes(jpeg[:start] + jpeg[start + 40 :])
    (folder / "1.jfif").write_bytes(jpeg)
    Image.new("RGBA", (300, 200)).save(folder / "2.png")  # transparent all over
    for name in ("a.txt", "b.txt", "c.svg"):
        (folder / name).write_text("no image")
    (tmp_path / "data/val/dog").mkdir()
    trained = load_weights(weights)
    squash = dataclasses.replace(trained.meta, crop_mode="squash", background="#0000ff")
    save_weights(tmp_path / "squash.safetensors", trained.tensors, squash)

    arguments = ["extract", "--store-images", "--json", "--max-bad", "50%", "--weights"]
    refused = program(*arguments, weights)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "accept them with --allow-empty" in refused.stderr
    arguments = [*arguments[:1], "--allow-empty", *arguments[1:]]
    found = program(*arguments, weights)
    report = json.loads(found.stdout)
    assert (report["images"], report["damaged"]) == (3, 1)
    assert report["ignored"] == {".txt": 2, ".svg": 1}
    assert "data/val: 3 files passed over (2 .txt, 1 .svg); images are .jpg" in found.stderr
    manifest = json.loads((tmp_path / "shards/val/manifest.json").read_text())
    assert manifest["shards"][0]["damaged"] == ["cat/0.jpg"]
    reader = ShardReader(tmp_path / "shards/val")
    assert reader.classes == ("cat", "dog")
    assert (reader.image(2) == 255).all()
    np.testing.assert_array_equal(reader.image(1), decode(jpeg).pixels)

    other = program(*arguments, tmp_path / "squash.safetensors")
    assert "--crop-mode was center, now squash" in other.stderr
    assert "--background was #ffffff, now #0000ff" in other.stderr
    again = [*arguments, tmp_path / "squash.safetensors", "--damaged", "skip", "--overwrite"]
    report = json.loads(program(*again).stdout)
    assert (report["images"], report["skipped"], report["damaged"]) == (2, {"damaged": 1}, 0)
    reader = ShardReader(tmp_path / "shards/val")
    assert reader.settings.crop == CropSettings("squash", "#0000ff", "skip")
    assert (reader.image(1) == (0, 0, 255)).all()
    np.testing.assert_array_equal(reader.image(0), decode(jpeg, CropSettings("squash")).pixels)
    wrong = program(*again, "--background", "transparent")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "--background: expected an opaque color" in wrong.stderr


def test_crops_other_than_those_of_the_weights(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    """Options override the weights with a warning; shards follow, and so do merge and show."""
    from anchorpatch.runtime.checkpoint import load_weights, save_weights
    from anchorpatch.shards.reader import ShardReader

    arguments = ["extract", "--data", image_folder, "--limit", 6, "--max-patches", 2]
    arguments += ["--codec", "image", "--workers", 0, "--shard-size", 3]
    small = CropSettings("border", "#102030", img_size=112)
    trained = load_weights(weights)
    save_weights(tmp_path / "small.safetensors", trained.tensors, trained.meta.cropped(small))
    options = ["--img-size", 112, "--crop-mode", "border", "--background", "#102030"]
    for out, given in (("own", [tmp_path / "small.safetensors"]), ("asked", [weights, *options])):
        result = program(*arguments, "--out", out, "--weights", *given)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("but the weights were trained for center, short") == (
            out == "asked"
        )
        assert program("shards", "verify", f"{out}/val").returncode == 0
    readers = [ShardReader(tmp_path / out / "val") for out in ("own", "asked")]
    for reader in readers:
        assert reader.settings.crop == small
        for i, path in enumerate(reader.path.tolist()):
            data = (image_folder / "val" / path.decode()).read_bytes()
            np.testing.assert_array_equal(reader.image(i), decode(data, small).pixels)
    for scale in (63, 95, 111):
        rows = range(readers[0].patch_count(scale))
        np.testing.assert_array_equal(*(r.patches(scale, rows) for r in readers))
        assert readers[0].source_box(scale, rows).shape == (len(rows), 4)
    printed = program("shards", "inspect", "asked/val").stdout
    assert "crops: border, long side 112 px" in printed

    other = program(*arguments, "--out", "other", "--weights", weights, *options[2:])
    assert other.returncode == 0, other.stderr
    assert "the crops are border, long side 224 px, but the weights" in other.stderr
    merged = program("shards", "merge", "asked", "other", "--out", "merged")
    assert (merged.returncode, merged.stderr.count("\n")) == (1, 1)
    assert "--img-size was 112, now 224" in merged.stderr
    again = program(*arguments, "--out", "asked", "--weights", weights)
    assert again.returncode == 1
    assert "--crop-mode was border, now center" in again.stderr
    assert program(*arguments, "--weights", weights, "--img-size", 110).returncode == 2
    wrong = program(*arguments, "--weights", weights, "--crop-pct", 1.5)
    assert "--crop-pct: expected a number from 0.1 to 1, got 1.5" in wrong.stderr

    show = ["shards", "show", "asked/val", 0, "--original", "--out", "patches.png", "--data"]
    result = program(*show, image_folder)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "patches.png") as drawn:
        assert min(drawn.size) > 400
    (tmp_path / "others/val").mkdir(parents=True)
    result = program(*show, tmp_path / "others")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "expected the image that the shards were made from, found: missing" in result.stderr


def test_a_disk_that_falters_loses_no_image(
    tmp_path: Path, image_folder: Path, weights: Path, reference: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from anchorpatch.jobs.extract import run
    from anchorpatch.jobs.extract_plan import ExtractConfig

    config = ExtractConfig(
        image_folder, "val", weights, tmp_path, shard_size=3, batch_size=4, workers=0,
        device="cpu", store_images=True,
    )  # fmt: skip
    opened, failures, lasting = os.open, [], True

    def fail(path: str, *arguments: int, **options: int) -> int:
        if os.fsdecode(path).endswith("cat/09.JPEG") and (lasting or not failures):
            failures.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(storage, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(DataError, match=r"cat/09\.JPEG: cannot be read: Input/output error"):
        run(config)
    lasting, failures = False, []
    assert run(config).facts.skipped == {}
    assert len(failures) == 1
    assert contents(tmp_path / "val") == reference


def test_a_full_disk_ends_in_one_line_and_a_run_that_goes_on(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path, reference: dict[str, bytes]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    arguments = [*common(image_folder, weights), "--out", disk]
    try:
        result = program(*arguments)
        assert (result.returncode, result.stdout) == (1, "")
        # A busy machine has time for progress, which is no part of the error.
        lines = [x for x in result.stderr.splitlines() if not x.startswith("extract val: ")]
        assert len(lines) == 1
        assert "No space left on device" in lines[0]
        assert "free space and run the same command again" in lines[0]
        assert not list((disk / "val").glob("*.tmp"))
        assert len(list((disk / "val").glob("*.h5"))) >= 1
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert program(*arguments).returncode == 0
        assert program("shards", "verify", disk).returncode == 0
        assert contents(disk / "val") == reference
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", disk], check=True)


def test_bad_weights_and_networks_are_one_line(
    program: Program, tmp_path: Path, image_folder: Path, weights: Path
) -> None:
    import torch

    from anchorpatch.models.anchornet import AnchorNet
    from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights

    net = AnchorNet(2)
    net.branches[1].classifier.bias.data[:] = float("nan")
    broken = tmp_path / "broken.safetensors"
    save_weights(broken, net.state_dict(), WeightsMeta("anchornet", ("cat", "dog")))
    pickled = tmp_path / "pickled.pth"
    torch.save(net.state_dict(), pickled)
    for file, message in (
        (tmp_path / "none.safetensors", "found none"),
        (pickled, "expected safetensors"),
        (broken, "cat/00.JPEG: AnchorNet produced NaN or infinity"),
    ):
        result = program("extract", "--data", image_folder, "--weights", file)
        assert (result.returncode, result.stdout) == (1, "")
        assert message in result.stderr.splitlines()[-1]
        assert len([x for x in result.stderr.splitlines() if x.startswith("anchorpatch: ")]) == 1
    assert not list(tmp_path.glob("shards/val/*.h5*"))
    missing = program("extract", "--data", image_folder)
    assert missing.returncode == 1
    assert "`anchorpatch train`" in missing.stderr
    assert "--weights demo" in missing.stderr


@pytest.mark.photos
@pytest.mark.parametrize("preset", ["figure", "finetune", "evaluate", "dense"])
def test_photographs_give_patches_equal_to_their_crops(
    program: Program, tmp_path: Path, photos: Path, weights: Path, preset: str
) -> None:
    arguments = ["extract", "--data", photos / "imagenet-photos", "--weights", weights]
    result = program(*arguments, "--preset", preset, "--store-images", "--limit", 24)
    assert result.returncode == 0, result.stderr
    assert check_folder(tmp_path / "shards/val")[0] == 24
    assert program("shards", "verify", tmp_path / "shards").returncode == 0
