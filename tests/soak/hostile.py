"""Hostile files: weights, checkpoints, logs, manifests, labels, lists, archives and settings,
damaged byte by byte or value by value. A command that reads one ends in its result, or in one clear
line and an exit status that is not 0; never in a traceback, and never by a signal."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from anchorpatch.demo import bundled_weights
from anchorpatch.shards.manifest import _sealed
from tests.jobs.finetune_runs import VAL
from tests.soak.kills import EXTRACT, make_images
from tests.soak.mutate import mutated
from tests.soak.server import Fault, Trial, run, soak, tree
from tests.soak.training import NETWORK, make_inputs

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e308, float("nan"), float("inf"), 1 << 31, 1 << 63),
    *(10**30, "", "x", "cat", "../../x", "\0", "\ud800", "é" * 300, "1", [], [[]], {}, {"a": 1}),
)

#: Lines that may be put into text files.
LINES = (
    *("", ",", ",,,", "\0", '"', "a" * 100_000, "=", "[", "[extract", "[extract]", "extract = 1"),
    *("[extract]\nworkers = -1", "[extract]\nnone = 1", "[extract]\nlimit = 1e400", "\ufeff", "#"),
    *("[train]\nlr = nan", "[defaults]\ndata = 3", "path,label", "ImageId,PredictionString"),
    *("00.jpg,", "00.jpg,dog", "/dev/zero,cat", "../00.jpg,cat", "data,cat", "nowhere.jpg,cat"),
)


def odd_json(rng: random.Random, value: Any) -> Any:
    """Return a JSON value of which one part, at any depth, is another, is gone or is new."""
    keys = list(value) if isinstance(value, dict) else []
    keys = list(range(len(value))) if isinstance(value, list) else keys
    if not keys or rng.random() < 0.15:
        return rng.choice(ODD)
    changed, key = value.copy(), rng.choice(keys)
    match rng.randrange(6):
        case 0:
            del changed[key]
        case 1 if isinstance(value, dict):
            changed[str(rng.choice(ODD))] = rng.choice(ODD)
        case 1:
            changed.append(value[key])
        case _:
            changed[key] = odd_json(rng, value[key])
    return changed


def odd_text(rng: random.Random, data: bytes) -> bytes:
    """Return a text file with lines that are odd, gone, or exchanged."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(lines) + 1)
        match rng.randrange(3):
            case 0:
                lines.insert(at, rng.choice(LINES).encode(errors="surrogatepass"))
            case 1:
                lines[at : at + 1] = []
            case 2:
                rng.shuffle(lines)
    return b"\n".join(lines)


def odd_manifest(rng: random.Random, data: bytes) -> bytes:
    """Return a manifest with another value, and a checksum that is right."""
    document = json.loads(data)
    document.pop("sha256")
    text = json.dumps(odd_json(rng, document), indent=2).removesuffix("\n}")
    return _sealed(text).encode() if rng.random() < 0.8 else (text + "\n}").encode()


def odd_weights(rng: random.Random, data: bytes) -> bytes:
    """Return weights with another value in the header, the metadata or the tensors."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    match rng.randrange(3):
        case 0:
            about = json.loads(header["__metadata__"]["anchorpatch"])
            text = json.dumps(odd_json(rng, about))
            header["__metadata__"]["anchorpatch"] = text
        case 1:
            header = odd_json(rng, header)
        case 2:
            tensors = safetensors.torch.load(data)
            name = rng.choice(sorted(tensors))
            tensors[name] = odd_tensor(rng, tensors[name])
            return safetensors.torch.save(tensors, header["__metadata__"])
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + rest


def odd_tensor(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    match rng.randrange(5):
        case 0:
            return tensor.to(rng.choice((torch.float64, torch.int64, torch.bool, torch.bfloat16)))
        case 1:
            return tensor.flatten()[:-1].clone()
        case 2:
            return tensor[None].clone()
        case 3:
            return torch.zeros(0)
    return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0)


def odd_checkpoint(rng: random.Random, data: bytes) -> bytes:
    """Return a checkpoint in which one part is another."""

    def odd(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return odd_tensor(rng, value) if rng.random() < 0.8 else rng.choice(ODD)
        if not isinstance(value, (dict, list, tuple)) or not value or rng.random() < 0.1:
            return rng.choice(ODD)
        changed = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        key = rng.choice(list(changed))
        changed[key] = odd(changed[key])
        if rng.random() < 0.2:
            del changed[key]
        return changed if isinstance(value, dict) else type(value)(changed.values())

    file = io.BytesIO()
    torch.save(odd(torch.load(io.BytesIO(data), weights_only=True)), file)
    return file.getvalue()


Damage = Callable[[random.Random, bytes], bytes]


def prepare(material: Path) -> Trial:
    make_images(material / "images")
    (material / "nets.py").write_text(NETWORK)
    shutil.copytree(material / "images" / "folder", material / "data")
    for kind in ("tar", "zip"):
        shutil.copy(material / "images" / kind / f"val.{kind}", material / f"images.{kind}")
    flat = material / "flat" / "val"
    flat.mkdir(parents=True)
    pictures = sorted((material / "data" / "val").rglob("[01]*.jpg"))
    for path in pictures:
        shutil.copy(path, flat)
    (material / "labels.csv").write_text("".join(f"{p.name},{p.parent.name}\n" for p in pictures))
    (material / "list.txt").write_text(
        "".join(f"data/val/{p.parent.name}/{p.name},{p.parent.name}\n" for p in pictures)
    )
    (material / "anchorpatch.toml").write_text(
        '[defaults]\nruns = "runs"\n[extract]\nworkers = 0\nlimit = 2\ncoverage = [0.1, 0.1, 0.1]\n'
        '[finetune]\nlr = 0.1\nweights = "none"\n[shards.verify]\njobs = 1\n'
    )
    shutil.copy(bundled_weights(), material / "weights.safetensors")
    finetune = [
        *make_inputs(material, VAL)["finetune"][:-1],
        "shards",
        "--workers",
        0,
        "--epochs",
        1,
    ]
    run(*finetune, cwd=material).expect(0)
    extract = [*EXTRACT, "--workers", 0, "--limit", 2, "--max-bad", 0.6]
    folder = [*extract, "--data", "data"]
    tuned = [*finetune, "--weights", "tuned.safetensors", "--overwrite"]
    shutil.copy(material / "runs/nets-tiny/best.safetensors", material / "tuned.safetensors")
    run(*extract, "--data", "images.tar", cwd=material).expect(0)
    cache = max((material / "cache").rglob("*"), key=lambda path: path.stat().st_size)
    verify = ["shards", "verify", "shards", "--jobs", 1]
    evaluate = ["evaluate", "nets:tiny", "--no-speed", "--device", "cpu", "--threads", 1]
    #: File, how its values are damaged, and what reads it.
    files: list[tuple[str, Damage | None, list[list[object]]]] = [
        ("weights.safetensors", odd_weights, [[*folder, "--weights", "weights.safetensors"]]),
        ("tuned.safetensors", odd_weights, [tuned]),
        ("runs/nets-tiny/best.safetensors", odd_weights, [evaluate]),
        ("runs/nets-tiny/last.pt", odd_checkpoint, [[*finetune, "--epochs", 2]]),
        ("runs/nets-tiny/log.jsonl", odd_text, [[*finetune, "--epochs", 2]]),
        ("runs/nets-tiny/config.json", odd_text, [[*finetune, "--epochs", 2]]),
        (
            "shards/val/manifest.json",
            odd_manifest,
            [verify, ["shards", "inspect", "shards"], evaluate],
        ),
        ("labels.csv", odd_text, [[*extract, "--data", "flat", "--labels", "labels.csv"]]),
        ("list.txt", odd_text, [[*extract, "--files", "list.txt"]]),
        ("images.tar", None, [[*extract, "--data", "images.tar"]]),
        ("images.zip", None, [[*extract, "--data", "images.zip"]]),
        ("anchorpatch.toml", odd_text, [verify, folder]),
        (str(cache.relative_to(material)), None, [[*extract, "--data", "images.tar"]]),
    ]
    others = [(material / name).read_bytes() for name, _, _ in files]

    def trial(rng: random.Random, folder: Path) -> Counter[str]:
        name, damage, commands = rng.choice(files)
        shutil.copytree(
            material, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out", "images")
        )
        path = folder / name
        before = path.read_bytes()
        if damage is None or rng.random() < 0.3:
            path.write_bytes(mutated(rng, before, others))
        else:
            path.write_bytes(damage(rng, before))
        kind = "cache" if name.startswith("cache") else Path(name).name
        try:
            ended = run(*rng.choice(commands), cwd=folder).expect(0, 1, 2)
        except Fault as fault:
            raise Fault(f"{kind}: {fault}") from fault
        lines = [line for line in ended.stderr.splitlines() if line.startswith("anchorpatch:")]
        if ended.status == 1 and len(lines) > 1:
            raise Fault(f"{kind}: expected one line, found {ended}")
        if kind == "cache" and ended.status == 0:
            found, expected = (tree(f / "out" / "val", but=(".lock",)) for f in (folder, material))
            if found != expected:
                raise Fault(f"other shards by a damaged index: {ended}")
        return Counter({"refused" if ended.status else "of use": 1, f"of {kind}": 1})

    return trial


if __name__ == "__main__":
    soak("hostile", prepare, __doc__)
