from __future__ import annotations

import argparse
import os
import pickle
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from anchorpatch.classes import Matching, imagenet_ids
from anchorpatch.errors import MissingDependency, SettingsError, WeightsError
from anchorpatch.models.registry import build
from anchorpatch.networks import (
    Network,
    _class_tensors,
    load_checkpoint,
    load_for_whole_images,
    load_network,
    run_folder,
)
from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights
from anchorpatch.state_dicts import read_file

#: A small network whose head is a linear layer, and one whose head is a convolution.
LINEAR, CONV = "shufflenet_v2_x0_5", "squeezenet1_1"
THREE, FOUR = ("ape", "bee", "cat"), ("ape", "bee", "cat", "dog")
IMAGENET = imagenet_ids()


def state_of(name: str, classes: int, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(build(name, classes).state_dict())


def load(
    name: str, classes: tuple[str, ...] | None, weights: str | Path, **options: Any
) -> tuple[Network, list[str]]:
    messages: list[str] = []
    return load_network(name, classes, weights, messages.append, **options), messages


def error_of(name: str, classes: tuple[str, ...], weights: str | Path, **options: Any) -> str:
    with pytest.raises(WeightsError) as raised:
        load_network(name, classes, weights, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def assert_same(module: nn.Module, state: dict[str, Tensor], without: str = "-") -> None:
    own = module.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert own[key].equal(value) != key.startswith(without), key


def test_random_weights() -> None:
    torch.manual_seed(0)
    network, messages = load(LINEAR, THREE, "none")
    assert_same(network.module, state_of(LINEAR, 3))
    assert not network.module.training
    assert (network.meta.architecture, network.meta.classes) == (LINEAR, THREE)
    assert (network.source, messages) == ("random weights", [])


def test_our_own_files_come_back_whole(tmp_path: Path) -> None:
    state = state_of(LINEAR, 3)
    meta = WeightsMeta(LINEAR, THREE, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    path = tmp_path / "best.safetensors"
    save_weights(path, state, meta)
    for network in (load(LINEAR, THREE, path)[0], load_checkpoint(path)):
        assert_same(network.module, state)
        assert (network.meta.mean, network.meta.std) == (meta.mean, meta.std)
        assert network.meta.classes == THREE
        assert network.source == str(path)


@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_rows_of_the_classes(tmp_path: Path, name: str) -> None:
    state = state_of(name, 3, seed=1)
    weight, bias = _class_tensors(name)[0]
    path = tmp_path / "best.safetensors"
    save_weights(path, state, WeightsMeta(name, THREE))
    for wanted, rows in ((("cat", "ape"), [2, 0]), (("bee", "cat", "ape"), [1, 2, 0])):
        network, messages = load(name, wanted, path)
        assert network.meta.classes == wanted
        own = network.module.state_dict()
        assert own[weight].equal(state[weight][rows])
        assert own[bias].equal(state[bias][rows])
        assert all(own[key].equal(state[key]) for key in state if key not in (weight, bias))
        assert messages == [network.note]
    network, messages = load(name, ("cat", "ape"), path)
    assert messages == [
        f"{path}: 2 of its 3 outputs are the classes; the logits of the others are left out"
    ]
    network, messages = load(name, ("cat", "ape"), path, matching=Matching(all_classes=True))
    assert network.meta.classes == ("cat", "ape", "bee")
    assert network.module.state_dict()[bias].equal(state[bias][[2, 0, 1]])
    assert "its outputs for the 2 classes compete with its 1 others" in messages[0]


@pytest.mark.parametrize(("other", "kept"), [(("ape", "bee", "cow"), 2), (FOUR, 3)])
def test_classes_that_weights_lack(tmp_path: Path, other: tuple[str, ...], kept: int) -> None:
    state = state_of(LINEAR, 3, seed=1)
    path = tmp_path / "best.safetensors"
    save_weights(path, state, WeightsMeta(LINEAR, THREE))
    error = error_of(LINEAR, other, path)
    assert f"found 3 (ape, bee, cat), which lack 1 of them: {other[-1]}; fine-tune" in error
    network, messages = load(LINEAR, other, path, replace_head=True)
    assert network.meta.classes == other
    own = network.module.state_dict()
    assert own["fc.weight"][:kept].equal(state["fc.weight"][:kept])
    assert own["fc.bias"][:kept].equal(state["fc.bias"][:kept])
    assert all(own[k].equal(value) for k, value in state.items() if not k.startswith("fc."))
    assert messages == [
        f"{path}: {kept} of its 3 outputs are kept; 1 of the classes are new to it: {other[-1]}"
    ]
    none = ("x", "y", "z")
    network, messages = load(LINEAR, none, path, replace_head=True)
    assert not network.module.fc.weight.equal(state["fc.weight"])
    assert messages == [
        f"{path}: replacing its head for 3 (ape, bee, cat) with a new one for 3 (x, y, z)"
    ]


def test_class_maps(tmp_path: Path) -> None:
    state = state_of(LINEAR, 3, seed=1)
    path, own = tmp_path / "other.pth", tmp_path / "best.safetensors"
    torch.save(state, path)
    save_weights(own, state, WeightsMeta(LINEAR, ("0", "1", "2")))
    (tmp_path / "map.txt").write_text("cat\nape\n\nbee\n")
    matching = Matching.read(tmp_path / "map.txt")
    for file in (path, own):  # a map also renames what our files name
        network, messages = load(LINEAR, ("bee", "cat"), file, matching=matching)
        assert network.module.fc.weight.equal(state["fc.weight"][[2, 0]])
        assert f"2 of its 3 outputs are the classes by {tmp_path / 'map.txt'}" in messages[0]
        assert load(LINEAR, None, file, matching=matching)[0].meta.classes == ("cat", "ape", "bee")
        # Also where new rows could be made: who names the outputs wants these classes.
        for replace_head in (False, True):
            options = {"matching": matching, "replace_head": replace_head}
            error = error_of(LINEAR, ("cat", "dog"), file, **options)
            assert "which lack 1 of them: dog; " in error
    (tmp_path / "map.txt").write_text("cat\nape\n")
    message = error_of(LINEAR, THREE, path, matching=Matching.read(tmp_path / "map.txt"))
    assert "map.txt: expected a name for each of the 3 outputs of" in message
    assert message.endswith("one per line in their order, found 2")


def test_files_that_are_taken_for_imagenets(tmp_path: Path) -> None:
    state = state_of(LINEAR, 1000, seed=1)
    path = tmp_path / "other.pth"
    torch.save(state, path)
    ten = (IMAGENET[217], IMAGENET[0])
    network, messages = load(LINEAR, ten, path)
    assert network.module.fc.weight.equal(state["fc.weight"][[217, 0]])
    assert "its 1,000 outputs are assumed to be ImageNet's in their order" in messages[0]
    assert load(LINEAR, None, path)[0].meta.classes == IMAGENET
    assert "lack 1 of them: dog;" in error_of(LINEAR, ("n02102040", "dog"), path)
    # Folders may be called by ImageNet's words.
    words = ("English_springer", "tench")
    network, _ = load(LINEAR, words, path)
    assert network.meta.classes == words
    assert network.module.fc.weight.equal(state["fc.weight"][[217, 0]])
    # A network that nobody published for ImageNet.
    other = tmp_path / "bagnet.pth"
    torch.save(state_of("bagnet33", 1000), other)
    error = error_of("bagnet33", ten, other)
    assert "expected outputs for the 2 classes n02102040, n01440764, found 1,000; name" in error


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, state_of(LINEAR, 3), WeightsMeta(LINEAR, THREE))
    assert f"expected weights of {CONV}, found {LINEAR}" in error_of(CONV, THREE, path)
    # The same network by two names.
    save_weights(path, state_of(LINEAR, 3), WeightsMeta("resnext50_32x4d", THREE))
    assert read_file(path, "resnext50").classes == THREE
    save_weights(path, {}, WeightsMeta("anchornet", THREE))
    with pytest.raises(WeightsError, match="expected a network for patches, found weights of"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", [LINEAR, CONV])
@pytest.mark.parametrize(
    "wrapped",
    ["plain", "state_dict", "model", "module.", "safetensors", "timm", "torchvision", "lightning"],
)
def test_files_of_other_programs(tmp_path: Path, name: str, wrapped: str) -> None:
    state = state_of(name, 3, seed=2)
    stored: dict[str, object] = dict(state)
    path = tmp_path / "weights"
    if wrapped == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        if wrapped in ("state_dict", "model"):
            stored = {wrapped: stored, "epoch": 3}
        elif wrapped == "module.":
            stored = {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}}
        elif wrapped == "timm":  # as its train.py saves
            args = argparse.Namespace(model=name, lr=0.1, mean=None, aa=("rand", 9))
            stored = {"epoch": 3, "arch": name, "state_dict": stored, "args": args, "metric": 0.5}
        elif wrapped == "torchvision":  # as its references save
            stored = {"model": stored, "epoch": 3, "args": argparse.Namespace(lr=0.1, amp=False)}
        elif wrapped == "lightning":  # a module that is compiled, and compiled again as a whole
            stored = {f"_orig_mod.model._orig_mod.{k}": v for k, v in state.items()}
            stored = {"state_dict": stored, "pytorch-lightning_version": "2.4.0", "loops": {}}
        torch.save(stored, path)
    network, messages = load(name, THREE, path)
    assert_same(network.module, state)
    assert network.source == str(path)
    assert "3 outputs are assumed to be the classes in order (ape, bee, cat)" in messages[0]
    assert "expected outputs for the 4 classes ape, bee, cat and 1 more, found 3" in error_of(
        name, FOUR, path
    )
    network, messages = load(name, FOUR, path, replace_head=True)
    head = "fc" if name == LINEAR else "classifier.1"
    changed = {k for k, v in network.module.state_dict().items() if v.shape != state[k].shape}
    assert changed == {f"{head}.weight", f"{head}.bias"}
    assert messages == [
        f"{path}: replacing its head for 3 with a new one for 4 (ape, bee, cat and 1 more)"
    ]


def test_what_a_file_holds_beside_tensors_is_named(tmp_path: Path) -> None:
    stored = {"state_dict": state_of(LINEAR, 3), "args": argparse.Namespace(out=Path("runs"))}
    torch.save(stored, tmp_path / "a.pth")
    assert "found an object of pathlib" in error_of(LINEAR, THREE, tmp_path / "a.pth")


def test_tensors_that_no_network_takes(tmp_path: Path) -> None:
    state = state_of(LINEAR, 3)
    for other in (state["fc.bias"].to(torch.complex64), state["fc.bias"].to_sparse()):
        torch.save({**state, "fc.bias": other}, tmp_path / "a.pth")
        message = error_of(LINEAR, THREE, tmp_path / "a.pth")
        assert "expected dense tensors of real numbers, found torch." in message
    safetensors.torch.save_file({}, tmp_path / "empty")
    assert "found other tensors" in error_of(LINEAR, THREE, tmp_path / "empty")


def test_files_without_a_head_or_counters(tmp_path: Path) -> None:
    state = state_of(LINEAR, 3, seed=3)
    path = tmp_path / "backbone.pth"
    kept = {k: v for k, v in state.items() if not k.startswith("fc.")}
    torch.save({k: v for k, v in kept.items() if not k.endswith("num_batches_tracked")}, path)
    network, messages = load(LINEAR, THREE, path, replace_head=True)
    assert_same(network.module, state, without="fc.")
    assert "replacing its head for no classes with" in messages[0]
    assert "found no classes" in error_of(LINEAR, THREE, path)


def test_other_keys_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(state_of(CONV, 3), path)
    message = error_of(LINEAR, THREE, path, replace_head=True)
    assert "found other tensors (classifier.1.bias: expected nothing, found 3; " in message
    assert message.endswith("more); give a file for this network")
    state = state_of(LINEAR, 3)
    state["conv1.0.weight"] = torch.zeros(24, 1, 3, 3)
    torch.save(state, path)
    assert "(conv1.0.weight: expected 24 x 3 x 3 x 3, found 24 x 1 x 3 x 3)" in error_of(
        LINEAR, THREE, path, replace_head=True
    )


def test_old_names_of_densenet(tmp_path: Path) -> None:
    path = tmp_path / "densenet.pth"
    one = torch.ones(1)
    torch.save(
        {"features.denseblock1.denselayer2.norm.1.weight": one, "features.norm0.bias": one}, path
    )
    found = read_file(path, "densenet121").tensors
    assert set(found) == {"features.denseblock1.denselayer2.norm1.weight", "features.norm0.bias"}


def test_auxiliary_classifiers_are_left_out(tmp_path: Path) -> None:
    state = state_of("googlenet", 3)
    path = tmp_path / "googlenet.pth"
    torch.save({**state, "aux1.fc2.weight": torch.zeros(1000, 1024)}, path)
    assert_same(load("googlenet", THREE, path)[0].module, state)


def test_networks_that_ask_for_the_version_of_their_state(tmp_path: Path) -> None:
    state = state_of("mnasnet0_5", 3)
    path = tmp_path / "mnasnet.safetensors"
    save_weights(path, state, WeightsMeta("mnasnet0_5", THREE))
    assert_same(load_checkpoint(path).module, state)


class Crafted:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["CRAFTED"],)


def test_a_crafted_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRAFTED", str(tmp_path / "run"))
    for i, save in enumerate(
        (
            lambda file: torch.save({"state_dict": Crafted()}, file),
            lambda file: torch.save({"w": Crafted()}, file, _use_new_zipfile_serialization=False),
            lambda file: pickle.dump(Crafted(), file),
        )
    ):
        path = tmp_path / f"{i}.pth"
        with open(path, "wb") as file:
            save(file)
        message = error_of(LINEAR, THREE, path)
        # torch's reader knows no newer pickles than its own, and names nothing in them.
        what = "pickle of other objects" if i == 2 else f"an object of {os.mkdir.__module__}.mkdir"
        assert f"{what}, which was not run" in message
        assert str(path) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"state_dict": {"a": 1}}, "expected a state dict (names and tensors), found other values"),
        ([torch.zeros(1)], "found list"),
        ({}, "found other values"),
    ],
)
def test_torch_files_that_are_no_state_dict(tmp_path: Path, document: object, message: str) -> None:
    torch.save(document, tmp_path / "a.pth")
    assert message in error_of(LINEAR, THREE, tmp_path / "a.pth")


def test_damaged_missing_and_other_files(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "cut"
    torch.save(state_of(CONV, 3), whole)
    path.write_bytes(whole.read_bytes()[:100_000])
    assert "damaged" in error_of(CONV, THREE, path)
    safetensors.torch.save_file(state_of(CONV, 3), whole)
    path.write_bytes(whole.read_bytes()[:100_000])
    assert "damaged, truncated or different file of 100,000 bytes" in error_of(CONV, THREE, path)
    path.write_bytes(b"")
    assert "file of 0 bytes" in error_of(CONV, THREE, path)
    assert "--weights takes default, none or a file" in error_of(CONV, THREE, tmp_path / "no")
    assert "Is a directory" in error_of(CONV, THREE, tmp_path)
    assert "File name too long" in error_of(CONV, THREE, tmp_path / ("x" * 300))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's cache in an empty folder, and no network."""

    def blocked(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.delenv("TORCH_HUB", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", blocked)
    return tmp_path / "hub" / "checkpoints"


def test_pretrained_sets_in_the_cache_need_no_network(cache: Path) -> None:
    file = "shufflenetv2_x0.5-f707e7126e.pth"
    message = error_of(LINEAR, THREE, "default")
    assert f"cannot download https://download.pytorch.org/models/{file}" in message
    assert "no route to host" in message
    assert f"put it into {cache}, or name a file of weights" in message
    state = state_of(LINEAR, 1000, seed=4)
    torch.save(state, cache / file)
    network, messages = load(LINEAR, IMAGENET, "default")
    assert_same(network.module, state)
    assert network.source == f"{file} (IMAGENET1K_V1 of torchvision)"
    assert network.meta.mean == (0.485, 0.456, 0.406)
    assert messages == []
    for classes in (THREE, tuple(f"class {i}" for i in range(1000))):
        assert "found 1,000 (n01440764, n01443537, n01484850 and 997 more), which lack" in error_of(
            LINEAR, classes, "default"
        )
        network, messages = load(LINEAR, classes, "default", replace_head=True)
        assert len(messages) == 1
        assert len(network.module.fc.weight) == len(classes)
        assert network.module.conv5[0].weight.equal(state["conv5.0.weight"])
    (cache / file).write_bytes(b"PK")
    assert "remove it to have it downloaded again" in error_of(LINEAR, THREE, "default")


def test_a_download_goes_into_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(LINEAR, 1000)

    def download(url: str, file: str, digest: str | None, progress: bool) -> None:
        assert (url.rsplit("/", 1)[1], digest) == (Path(file).name, "f707e7126e")
        torch.save(state, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    network, messages = load(LINEAR, IMAGENET, "default")
    assert_same(network.module, state)
    assert messages[0].startswith("downloading https://download.pytorch.org/models/shufflenet")


def test_whole_images_are_asked_of_no_network_on_patches(cache: Path, tmp_path: Path) -> None:
    def asked(classes: tuple[str, ...], at_hand: Network | None = None) -> tuple[str, str]:
        lines.clear()
        found = load_for_whole_images(LINEAR, classes, tmp_path, lines.append, at_hand=at_hand)
        return found.source, found.trained_on

    def save(run: str, classes: tuple[str, ...], **settings: object) -> str:
        path = tmp_path / run / "best.safetensors"
        training = {"settings": settings} if settings else {}
        meta = WeightsMeta(LINEAR, classes, training=training)
        save_weights(path, state_of(LINEAR, len(classes)), meta)
        return str(path)

    lines: list[str] = []
    with pytest.raises(WeightsError, match=r"-baseline/best.safetensors does not exist, and there"):
        asked(THREE)
    tuned = save(LINEAR, THREE, baseline=False)
    assert asked(THREE) == (tuned, "patches")
    assert lines[-1].startswith(f"warning: {tuned} was fine-tuned on patches")
    # Another file may be on whole images, or another program's.
    for training, trained_on in (({"baseline": True}, "whole images"), ({}, "")):
        given = save("given", THREE, **training)
        network = load_network(LINEAR, THREE, given)
        assert asked(THREE, network) == (given, trained_on)
        assert lines == []
    tuned = save(LINEAR, IMAGENET)
    assert asked(IMAGENET) == (tuned, "patches")
    assert "no route to host" in lines[-1]
    file = cache / "shufflenetv2_x0.5-f707e7126e.pth"
    torch.save(state_of(LINEAR, 1000), file)
    found = f"{file.name} (IMAGENET1K_V1 of torchvision)"
    assert asked(IMAGENET) == (found, "whole images")
    assert asked(IMAGENET, load_network(LINEAR, IMAGENET, tuned)) == (tuned, "")
    tuned = save(LINEAR, IMAGENET, baseline=False)
    network = load_network(LINEAR, IMAGENET, tuned)
    assert asked(IMAGENET, network) == (found, "whole images")
    baseline = save(f"{LINEAR}-baseline", IMAGENET, baseline=True)
    assert asked(IMAGENET, network) == (baseline, "whole images")
    assert lines == []


def test_networks_without_a_pretrained_set() -> None:
    message = "hcgnet_b has no pretrained weights: give --weights FILE, or --weights none"
    assert error_of("hcgnet_b", THREE, "default", replace_head=True).startswith(message)
    # Only a run that trains begins with random weights.
    message = "hcgnet_b has no pretrained weights: name a file of weights"
    assert error_of("hcgnet_b", THREE, "default") == message


def test_pretrained_sets_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    import huggingface_hub

    def blocked(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    name = "timm:test_resnet"
    monkeypatch.setattr("urllib.request.urlopen", blocked)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    message = error_of(name, THREE, "default")
    assert "no route to host" in message
    assert "fetch model.safetensors from there" in message
    state = state_of(name, 1000)
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, file)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(file))
    network, messages = load(name, IMAGENET, "default")
    assert_same(network.module, state)
    assert messages == []
    half = (0.5, 0.5, 0.5)  # as timm says of this network
    assert (network.meta.mean, network.meta.std, network.meta.interpolation) == (
        *(half, half),
        "bilinear",
    )
    path = tmp_path / "own.safetensors"
    save_weights(path, network.module.state_dict(), network.meta)
    assert load_checkpoint(path).meta == network.meta
    network, messages = load(name, THREE, file, replace_head=True)
    assert network.meta.mean == half
    assert network.module.conv1[0].weight.equal(state["conv1.0.weight"])
    assert "replacing its head for 1,000 with" in messages[0]


def test_names_are_checked_before_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="did you mean 'resnet50'"):
        load_network("resnet5O", THREE, "missing file")
    with pytest.raises(SettingsError, match="anchornet localizes patches"):
        load_network("anchornet", THREE)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match="timm"):
        load_network("timm:resnet18", THREE)


def test_folders_of_runs() -> None:
    runs = Path("runs")
    assert run_folder(runs, "resnet50") == runs / "resnet50"
    assert run_folder(runs, "timm:x", scale=63) == runs / "timm-x-63"
    assert run_folder(runs, "timm:hf-hub:a/b.c") == runs / "timm-hf-hub-a-b.c"
    assert run_folder(runs, "resnet50", baseline=True) == runs / "resnet50-baseline"
