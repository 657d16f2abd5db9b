from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from anchorpatch.errors import StorageError, WeightsError
from anchorpatch.runtime import checkpoint
from anchorpatch.runtime.checkpoint import (
    WeightsMeta,
    load_into,
    load_state,
    load_weights,
    read_meta,
    save_state,
    save_weights,
)

TENSORS = {"weight": torch.arange(6.0).view(3, 2), "bias": torch.ones(3)}
META = WeightsMeta("anchornet", ("äpfel", "b", "c"), se=False, training={"epochs": 3})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "w.safetensors"
    save_weights(path, TENSORS, META)
    return path


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


def test_weights_come_back(file: Path):
    weights = load_weights(file)
    assert weights.meta == META
    assert weights.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(weights.tensors[k], v) for k, v in TENSORS.items())


def test_metadata_are_read_without_the_tensors(file: Path, tmp_path: Path):
    assert read_meta(file) == META
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = tmp_path / "header"
    header.write_bytes(file.read_bytes()[: 8 + length])
    assert read_meta(header) == META
    header.write_bytes(file.read_bytes()[: 8 + length // 2])
    with pytest.raises(WeightsError, match="cut off in its header"):
        read_meta(header)
    for size in (0, 3):
        header.write_bytes(b"abc"[:size])
        with pytest.raises(WeightsError, match="found another kind of file"):
            read_meta(header)
    with pytest.raises(WeightsError, match="No such file"):
        read_meta(tmp_path / "none")


def test_same_content_gives_the_same_bytes(file: Path, tmp_path: Path):
    reordered = dict(reversed(TENSORS.items()))
    digest = save_weights(tmp_path / "again", reordered, META)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    assert load_weights(file).sha256 == digest


def test_weights_in_channels_last_memory_come_back(tmp_path: Path):
    tensor = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    save_weights(tmp_path / "w", {"x": tensor}, META)
    assert torch.equal(load_weights(tmp_path / "w").tensors["x"], tensor)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "another kind of file (0 bytes)"),
        (b"these are no weights at all", "another kind of file (27 bytes)"),
        (pickle.dumps({"weight": 1}), "a torch or pickle file, which was not opened"),
        (safetensors.torch.save(TENSORS), "found none: the weights were written by another"),
        (safetensors.torch.save(TENSORS, {"anchorpatch": "[]"}), "metadata that cannot be read"),
        (safetensors.torch.save(TENSORS, {"anchorpatch": '{"format": 9}'}), "found format 9"),
        (b"\x02\0\0\0\0\0\0\0[]", "another kind of file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, found: str):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    assert str(caught.value).startswith(f"{path}: expected")
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(file: Path):
    content = file.read_bytes()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        with pytest.raises(WeightsError, match="expected"):
            load_weights(file)


def test_truncation_names_both_sizes(file: Path):
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(WeightsError, match=f"{len(content)} bytes, found {len(content) - 1} bytes"):
        load_weights(file)


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(WeightsError, match="found none"):
        load_weights(tmp_path / "none")
    with pytest.raises(WeightsError, match="Is a directory"):
        load_weights(tmp_path)


def test_another_architecture_is_refused_unless_any_will_do(tmp_path: Path):
    save_weights(tmp_path / "w", TENSORS, WeightsMeta("resnet50", ("a",)))
    with pytest.raises(WeightsError, match="weights of anchornet, found resnet50"):
        load_weights(tmp_path / "w")
    assert load_weights(tmp_path / "w", None).meta.architecture == "resnet50"


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path):
    # 0x80 opens a pickle, and the header of a safetensors file where its length ends so.
    for filling in range(400):
        meta = WeightsMeta("anchornet", ("x" * filling,))
        save_weights(tmp_path / "w", TENSORS, meta)
        if (tmp_path / "w").read_bytes()[:1] == b"\x80":
            break
    else:
        pytest.fail("no header of such a length was made")
    assert load_weights(tmp_path / "w").meta == meta


def test_load_into_names_what_does_not_fit(file: Path):
    module = nn.Linear(2, 3)
    load_into(module, load_weights(file))
    assert torch.equal(module.weight, TENSORS["weight"])
    with pytest.raises(WeightsError, match="expected shape 4 for bias, found shape 3"):
        load_into(nn.Linear(2, 4), load_weights(file))
    with pytest.raises(WeightsError, match="expected nothing for bias, found shape 3"):
        load_into(nn.Linear(2, 3, bias=False), load_weights(file))


def test_state_comes_back(tmp_path: Path):
    state = {"a": torch.ones(2), "nested": {"b": [1, 2.5, "text", None]}}
    save_state(tmp_path / "s", "train", state)
    loaded = load_state(tmp_path / "s", "train")
    assert torch.equal(loaded.pop("a"), state.pop("a"))
    assert loaded == state


@pytest.mark.parametrize("way", ["pickle", "torch", "inside"])
def test_state_never_runs_code(tmp_path: Path, way: str):
    trace, path = tmp_path / "trace", tmp_path / "last.pt"
    if way == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trace)))
    elif way == "torch":
        torch.save(Bomb(trace), path)
    else:
        torch.save({"anchorpatch": 1, "kind": "train", "state": {"x": Bomb(trace)}}, path)
    with pytest.raises(WeightsError, match="which was not run") as caught:
        load_state(path, "train")
    assert str(path) in str(caught.value)
    assert not trace.exists()
    with pytest.raises(WeightsError, match=r"pickle file|expected safetensors"):
        load_weights(path)
    assert not trace.exists()


def test_damaged_state_is_refused(tmp_path: Path):
    path = tmp_path / "s"
    save_state(path, "train", {"a": torch.ones(100)})
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(WeightsError, match="expected training state"):
            load_state(path, "train")


def test_state_of_other_kinds_is_refused(tmp_path: Path):
    path = tmp_path / "s"
    with pytest.raises(WeightsError, match="found no file"):
        load_state(path, "train")
    torch.save({"model": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match="found another file"):
        load_state(path, "train")
    save_state(path, "finetune", {})
    with pytest.raises(WeightsError, match="state of train, found finetune"):
        load_state(path, "train")


def test_a_full_disk_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch):
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save_weights(file, {"weight": torch.zeros(9)}, META)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
