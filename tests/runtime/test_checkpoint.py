from __future__ import annotations

import errno
import json
import os
import pickle
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    for size in (0, 3, 8 + length // 2, 8 + length):
        header.write_bytes(file.read_bytes()[:size])
        with pytest.raises(WeightsError, match=f"truncated or different file of {size:,} bytes"):
            read_meta(header)
    with pytest.raises(WeightsError, match="found none"):
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
        (b"", "different file of 0 bytes (header too small)"),
        (b"these are no weights at all", "different file of 27 bytes (header too large)"),
        (pickle.dumps({"weight": 1}), "it can hold code; name a file that `anchorpatch train`"),
        (safetensors.torch.save(TENSORS), "found none: the weights were written by another"),
        (safetensors.torch.save(TENSORS, {"anchorpatch": "[]"}), "found format None"),
        (safetensors.torch.save(TENSORS, {"anchorpatch": '{"format": 9}'}), "found format 9"),
        (b"\x02\0\0\0\0\0\0\0[]", "different file of 10 bytes (invalid JSON in header"),
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


def test_truncation_is_named(file: Path):
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    found = rf"{len(content) - 1} bytes \(incomplete metadata, file not fully covered\)"
    with pytest.raises(WeightsError, match=found):
        load_weights(file)


def with_header(file: Path, header: bytes | dict[str, object]) -> None:
    """Give a weights file another header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])


def header_of(file: Path) -> dict[str, dict]:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize("offsets", [None, [0], ["a", "b"], [0, 12], [-1, 11], [4, 0], {}, 12])
def test_other_offsets_are_named(file: Path, offsets: object):
    header = header_of(file)
    header["weight"]["data_offsets"] = offsets
    with_header(file, header)
    with pytest.raises(WeightsError, match="found a damaged, truncated or different file of"):
        load_weights(file)


@pytest.mark.parametrize("nested", [b'{"a":' * 1000 + b"1" + b"}" * 1000, b"[" * 100_000])
def test_a_header_nested_deeply_is_named(file: Path, nested: bytes):
    for header in (nested, b'{"__metadata__":' + nested + b"}"):
        with_header(file, header)
        with pytest.raises(WeightsError, match="found a damaged, truncated or different file of"):
            load_weights(file)


def test_types_that_torch_has_not_are_named(file: Path):
    with_header(file, {"a": {"dtype": "F4", "shape": [72], "data_offsets": [0, 36]}})
    with pytest.raises(WeightsError, match=r"metadata|different file of \d+ bytes \(F4\)"):
        load_weights(file)


def with_document(file: Path, document: object) -> None:
    """Give a weights file other metadata; a string is taken as it is."""
    text = document if isinstance(document, str) else json.dumps(document)
    file.write_bytes(safetensors.torch.save(TENSORS, {"anchorpatch": text}))


DOCUMENT = {"format": 1, **asdict(META)}


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        (
            "crop_mode",
            "stretch",
            "--crop-mode: expected one of center, squash, border, got 'stretch'",
        ),
        ("crop_mode", ["center"], "crop_mode: expected text"),
        ("background", "no color", "--background: expected an opaque color"),
        ("mean", [0.5], "mean: expected 3 values, each a finite number, found [0.5]"),
        ("mean", [0.5] * 4, "mean: expected 3 values"),
        ("mean", ["a", "b", "c"], "mean: expected 3 values"),
        ("mean", "abc", "mean: expected 3 values"),
        ("mean", [0, True, 0], "mean: expected 3 values"),
        ("mean", [0, 1e400, 0], "mean: expected 3 values, each a finite number"),
        ("mean", [0, 10**400, 0], "mean: expected 3 values, each a finite number"),
        ("std", [1, 0, 1], "std: expected 3 numbers above 0"),
        ("std", [1, -1, 1], "std: expected 3 numbers above 0"),
        ("std", None, "std: expected 3 values"),
        ("classes", [1, 2], "classes: expected a list, each text, found [1, 2]"),
        ("classes", [["a"], ["b"]], "classes: expected a list, each text"),
        ("classes", "abc", "classes: expected a list, each text"),
        ("classes", {"a": 1}, "classes: expected a list, each text"),
        ("classes", [], "classes: expected at least one, and each once"),
        ("classes", ["a", "a"], "classes: expected at least one, and each once"),
        ("classes", ["a", ""], "without control characters"),
        (
            "classes",
            ["a\n"],
            "control characters or halves of surrogate pairs, found 'a\\n'",
        ),
        ("classes", ["a\0"], "without control characters"),
        ("classes", ["\ud800"], "without control characters"),
        ("architecture", "\ud800", "without control characters"),
        ("architecture", 3, "architecture: expected text, found 3"),
        ("se", "no", "se: expected true or false, found 'no'"),
        ("se", 0, "se: expected true or false, found 0"),
        ("weighted_mean", None, "weighted_mean: expected true or false, found None"),
        ("resize", 256.5, "resize: expected an integer, found 256.5"),
        ("resize", True, "resize: expected an integer, found True"),
        ("crop", 0, "crop: expected 1 to 65,535 px, found 0"),
        ("crop", 10**9, "crop: expected 1 to 65,535 px, found 1,000,000,000"),
        ("training", [], "training: expected a JSON object, found []"),
        ("versions", {"a": 1}, "versions['a']: expected text, found 1"),
        ("color\n", 1, "expected no field 'color\\n'"),
        ("format", 2, "expected metadata of format 1, found format 2"),
        ("format", "x" * 99, "found format 'xxxxx"),
    ],
)
def test_metadata_that_cannot_be_used(file: Path, name: str, value: object, found: str):
    with_document(file, {**DOCUMENT, name: value})
    for read in (load_weights, read_meta):
        with pytest.raises(WeightsError) as caught:
            read(file)
        assert found in str(caught.value)
        assert str(caught.value).startswith(f"{file}: expected ")
        assert len(str(caught.value).splitlines()) == 1
        str(caught.value).encode()


def test_metadata_without_what_has_a_default(file: Path):
    with_document(file, {"format": 1, "architecture": "anchornet", "classes": ["a"]})
    assert read_meta(file).std == META.std
    with_document(file, {"format": 1, "classes": ["a"]})
    with pytest.raises(WeightsError, match="missing 1 required positional argument: 'arch"):
        read_meta(file)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "null", "1", "NaN"])
def test_metadata_that_are_no_object(file: Path, text: str):
    with_document(file, text)
    with pytest.raises(WeightsError, match=r"expected (anchorpatch )?metadata"):
        load_weights(file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_the_metadata_are_they_fit_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    file = tmp_path_factory.mktemp("any") / "w"
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(DOCUMENT)), JSON, min_size=1))
    with_document(file, {**DOCUMENT, **changes})
    with suppress(WeightsError):
        meta = load_weights(file, None).meta
        assert type(meta.se) is type(meta.weighted_mean) is bool
        assert np.array([meta.mean, meta.std]).shape == (2, 3)
        assert np.isfinite([meta.mean, meta.std]).all()
        assert "".join([meta.architecture, *meta.classes]).encode()
        save_weights(file, TENSORS, meta)
        assert read_meta(file) == meta


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_the_bytes_are_they_are_weights_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    file = tmp_path_factory.mktemp("any") / "w"
    save_weights(file, TENSORS, META)
    content = bytearray(file.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with suppress(WeightsError):
        load_into(nn.Linear(2, 3), load_weights(file, None))


def test_complex_numbers_are_refused(tmp_path: Path):
    save_weights(tmp_path / "w", {"weight": torch.zeros(3, 2, dtype=torch.complex64)}, META)
    with pytest.raises(WeightsError, match=r"real numbers, found torch.complex64 in .* weight"):
        load_into(nn.Linear(2, 3, bias=False), load_weights(tmp_path / "w"))


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
    for filling in range(1, 400):
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
    with pytest.raises(WeightsError, match="bias: expected 4, found 3"):
        load_into(nn.Linear(2, 4), load_weights(file))
    with pytest.raises(WeightsError, match="bias: expected nothing, found 3"):
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
