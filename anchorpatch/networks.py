"""Networks for patches, ready with their weights: from a name or a file, for wanted classes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from anchorpatch.classes import AS_NAMED, ClassNames, Matching, imagenet_ids, match_classes
from anchorpatch.errors import SettingsError, WeightsError
from anchorpatch.models.registry import build, build_on_meta, check_name, is_own
from anchorpatch.runtime.checkpoint import (
    WeightsMeta,
    check_tensors,
    read_meta,
    tensor_differences,
)
from anchorpatch.state_dicts import (
    StateDict,
    kind_of,
    pretrained_classes,
    pretrained_set,
    read_file,
    read_pretrained,
)
from anchorpatch.text import counted, few

#: What a user can do without a pretrained set; a run that trains may also begin without weights.
_NAME_A_FILE: Final = "name a file of weights"
OR_NONE: Final = "give --weights FILE, or --weights none to begin with random weights"

#: Classifiers that inception_v3 and googlenet have in training only; they are built without.
_AUXILIARY: Final = ("AuxLogits.", "aux1.", "aux2.")

#: Classes that an error lists.
_LISTED: Final = 20


@dataclass(frozen=True)
class Network:
    """A network that is ready to be trained or evaluated.

    Attributes:
        module: in evaluation mode, on the CPU.
        meta: its name, the classes of its outputs and the normalization of its input.
        source: where the weights came from, for messages.
        trained_on: "whole images", "patches", or "" where nothing says it.
        note: how the outputs of the weights were matched with other classes, a sentence; "" where
            they are those of the weights.
        holdout: as of `anchorpatch.state_dicts.StateDict`.
    """

    module: nn.Module
    meta: WeightsMeta
    source: str
    trained_on: str = ""
    note: str = ""
    holdout: float | None = None


class Normalization:
    """Turns pixels into what a network reads.

    Args:
        meta: of the network: mean and standard deviation of its input.
        device: where it computes.
    """

    def __init__(self, meta: WeightsMeta, device: torch.device) -> None:
        self.device = device
        self._mean = torch.tensor(meta.mean, device=device)
        self._std = torch.tensor(meta.std, device=device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalize a batch, without waiting for what a GPU is doing.

        Args:
            pixels: uint8 (n, H, W, 3), or the same as float32 in [0, 1]; on any device.

        Returns:
            float32 (n, 3, H, W), channels last in memory.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            pixels = pixels.float() / 255
        return ((pixels - self._mean) / self._std).permute(0, 3, 1, 2)


def asked_text(source: str, trained_on: str) -> str:
    """Return which network was asked, in words.

    Example:
        >>> asked_text("best.safetensors", "patches"), asked_text("own.pth", "")
        ('best.safetensors (fine-tuned on patches)', 'own.pth')
    """
    how = {"whole images": " (trained on whole images)", "patches": " (fine-tuned on patches)"}
    return source + how.get(trained_on, "")


def load_network(
    name: str,
    classes: tuple[str, ...] | None,
    weights: str | os.PathLike[str] = "default",
    message: Callable[[str], None] = lambda text: None,
    *,
    otherwise: tuple[str, ...] = (),
    replace_head: bool = False,
    matching: Matching = AS_NAMED,
) -> Network:
    """Build a network and fill it with weights.

    Where the weights are for further classes, or for the same in another order, the network gets
    the rows of their last layer that the wanted classes have.

    Args:
        name: as `anchorpatch.models.registry.build` takes it.
        classes: names of the wanted outputs, in their order; None for those of the weights.
        weights: "default" for the pretrained set of torchvision or timm (downloaded once),
            "none" for random weights, or a file: our safetensors, another program's, or a torch
            file of a state dict. A file that names no classes is taken to have the wanted ones
            where their number is right, else ImageNet's where the pretrained set of this network
            has them and the number is right.
        message: called with what takes long, and with what users may not expect.
        otherwise: classes for weights that name none, if their number is right.
        replace_head: give the network new rows of the last layer for classes that the weights
            lack; otherwise, and with a class map, that is an error.
        matching: names of the outputs, and what becomes of those that are not wanted.

    Raises:
        SettingsError: no such network, or AnchorNet, which is none for patches.
        WeightsError: the weights cannot be had, read or used, or lack classes.
        MissingDependency: the network is timm's, which is not installed.
    """
    if name == "anchornet":
        raise SettingsError(
            "anchornet localizes patches and does not classify them: choose another network, such "
            "as resnet50"
        )
    check_name(name)
    if weights == "none":
        meta = WeightsMeta(name, classes or otherwise)
        return Network(build(name, len(meta.classes)).eval(), meta, "random weights")
    if weights == "default":
        found = read_pretrained(name, message, OR_NONE if replace_head else _NAME_A_FILE)
    else:
        found = read_file(Path(weights), name)
    found = _with_classes(name, found, classes, otherwise, matching, message)
    wanted = tuple(classes or found.classes or otherwise)
    rows: list[int | None] | None = None
    note = ""
    if found.classes is not None and found.classes != wanted:
        rows = match_classes(wanted, found.classes)
        missing = [c for c, row in zip(wanted, rows, strict=True) if row is None]
        if missing and (not replace_head or matching.class_map is not None):
            raise WeightsError(_lacking(name, found, wanted, missing, matching))
        left = sorted(set(range(len(found.classes))).difference(rows))
        if matching.all_classes:
            rows += left
            wanted += tuple(found.classes[row] for row in left)
        note = _note(found, wanted, rows, missing, left, matching)
    meta = replace(WeightsMeta(name, wanted), **found.preprocessing)
    module = build(name, len(wanted)).eval()
    _fill(module, found, meta, message, rows=rows, replace_head=replace_head)
    if note:
        message(note)
    return Network(module, meta, found.source, found.trained_on, note, found.holdout)


def load_checkpoint(path: str | os.PathLike[str]) -> Network:
    """Build the network that one of our weights files holds.

    Args:
        path: written by `anchorpatch finetune`: its metadata name the network and its classes.

    Raises:
        WeightsError: the file is missing, damaged, another program's, or of AnchorNet.
    """
    if kind_of(Path(path)) in ("torch", "safetensors"):
        raise WeightsError(
            f"{path}: written by another program, and does not say which network it belongs to: "
            f"give --network NAME --weights {path}"
        )
    name = read_meta(path).architecture
    if name == "anchornet":
        raise WeightsError(
            f"{path}: expected a network for patches, found weights of anchornet; name a file "
            "that `anchorpatch finetune` wrote"
        )
    if is_own(name):
        raise WeightsError(
            f"{path}: weights of {name}, code that is not run because a file names it: name it "
            f"yourself with --network {name} --weights {path}"
        )
    return load_network(name, None, path)


def load_for_whole_images(
    name: str,
    classes: tuple[str, ...],
    runs: Path,
    message: Callable[[str], None] = lambda text: None,
    weights: str | os.PathLike[str] | None = None,
    *,
    at_hand: Network | None = None,
    option: str = "--whole-weights",
    matching: Matching = AS_NAMED,
) -> Network:
    """Load the network that is asked about whole images, which the paper does not train further.

    It is the first of RUNS/NETWORK-baseline, ``at_hand`` unless that was fine-tuned on patches,
    the pretrained set if it has these classes, and, with a warning, the network on patches.

    Args:
        name: as `load_network` takes it.
        classes: names of the outputs, in their order.
        runs: folder of training runs.
        message: called with downloads, and warned of a network that was fine-tuned on patches.
        weights: as `load_network` takes them, in place of this choice.
        at_hand: the network that decides on patches; None for RUNS/NETWORK where it exists.
        option: that names other weights.
        matching: of ``weights`` and of the pretrained set.

    Raises:
        WeightsError: there is none, or a file cannot be used.
    """
    if weights is not None:
        return load_network(name, classes, weights, message, matching=matching)
    baseline = best_weights(runs, name, baseline=True)
    if baseline.is_file():
        return load_network(name, classes, baseline, message)
    if at_hand is not None and at_hand.trained_on != "patches":
        return at_hand
    why = "there are no pretrained weights for these classes"
    outputs = None if pretrained_set(name) is None else matching.class_map
    outputs = outputs or pretrained_classes(name)
    if outputs is not None and None not in match_classes(classes, outputs):
        try:
            return load_network(name, classes, "default", message, matching=matching)
        except WeightsError as error:
            why = str(error).partition("; ")[0]
    tuned = best_weights(runs, name)
    if at_hand is None and tuned.is_file():
        at_hand = load_tuned(name, classes, tuned, message)
    advice = f"run `anchorpatch finetune {name} --baseline`, or name weights with {option} FILE"
    if at_hand is None:
        raise WeightsError(f"{baseline} does not exist, and {why}: {advice}")
    if at_hand.trained_on == "patches":
        message(
            f"warning: {at_hand.source} was fine-tuned on patches and understates the accuracy on "
            f"whole images; {baseline} does not exist, and {why}: {advice}"
        )
    return at_hand


def load_tuned(
    name: str, classes: tuple[str, ...], path: Path, message: Callable[[str], None]
) -> Network:
    """Load a network from the place of those on patches, which it is unless it says otherwise."""
    found = load_network(name, classes, path, message)
    return replace(found, trained_on=found.trained_on or "patches")


def run_folder(
    runs: Path, network: str, *, scale: int | None = None, baseline: bool = False
) -> Path:
    """Return the folder of a network's run.

    Example:
        >>> run_folder(Path("runs"), "timm:resnet50.a1_in1k", scale=63).name
        'timm-resnet50.a1_in1k-63'
    """
    suffix = "-baseline" if baseline else f"-{scale}" if scale is not None else ""
    return runs / (re.sub(r"[^\w.-]", "-", network) + suffix)


def best_weights(
    runs: Path, network: str, *, scale: int | None = None, baseline: bool = False
) -> Path:
    """Return the weights of the best epoch of a network's run."""
    return run_folder(runs, network, scale=scale, baseline=baseline) / "best.safetensors"


# --- outputs and classes ------------------------------------------------------------------


def _with_classes(
    name: str,
    found: StateDict,
    classes: tuple[str, ...] | None,
    otherwise: tuple[str, ...],
    matching: Matching,
    message: Callable[[str], None],
) -> StateDict:
    """Return weights with the names of their outputs, where a map or the network says them.

    Raises:
        WeightsError: the map has more or fewer names than the weights have outputs, or nothing
            says the classes that are wanted.
    """
    if found.classes is not None and matching.class_map is None:
        return found
    keys = _class_tensors(name)[0]
    count = next((len(found.tensors[key]) for key in keys if key in found.tensors), None)
    if matching.class_map is not None:
        if count is not None and count != len(matching.class_map):
            raise WeightsError(
                f"{matching.source}: expected a name for each of the {counted(count, 'output')} of "
                f"{found.source}, one per line in their order, found {len(matching.class_map):,}"
            )
        return found._replace(classes=matching.class_map)
    if count is None or count == len(classes or otherwise):
        return found
    known = (
        classes is None
        or not set(classes).isdisjoint(imagenet_ids())
        or None not in match_classes(classes, imagenet_ids())
    )
    if known and count == len(imagenet_ids()) and pretrained_classes(name) == imagenet_ids():
        message(
            f"{found.source}: names no classes; its {count:,} outputs are assumed to be "
            "ImageNet's in their order (--class-map FILE names others)"
        )
        return found._replace(classes=imagenet_ids())
    if classes is None:
        raise WeightsError(
            f"{found.source}: names no classes for its {counted(count, 'output')}: give their "
            "names with --class-map FILE, one per line in the order of the outputs"
        )
    return found


def _lacking(
    name: str,
    found: StateDict,
    wanted: Sequence[str],
    missing: Sequence[str],
    matching: Matching,
) -> str:
    """Say which classes the weights lack."""
    assert found.classes is not None
    shown = few([ClassNames().shown(of) for of in missing], _LISTED)
    by = f" by {matching.source}" if matching.class_map else ""
    others = "" if matching.class_map else ", name their outputs with --class-map FILE"
    return (
        f"{found.source}: expected outputs for the {len(wanted):,} classes {few(wanted)}, found "
        f"{len(found.classes):,}{by} ({few(found.classes)}), which lack {len(missing):,} of them: "
        f"{shown}; fine-tune them on these classes (anchorpatch finetune {name} --weights ...)"
        f"{others}"
    )


def _note(
    found: StateDict,
    wanted: Sequence[str],
    rows: Sequence[int | None],
    missing: Sequence[str],
    left: Sequence[int],
    matching: Matching,
) -> str:
    """Say how outputs became classes."""
    assert found.classes is not None
    if len(missing) == len(wanted):
        return (
            f"{found.source}: replacing its head for {len(found.classes):,} "
            f"({few(found.classes)}) with a new one for {len(wanted):,} ({few(wanted)})"
        )
    kept = sum(row is not None for row in rows)
    of = f"{found.source}: {kept:,} of its {counted(len(found.classes), 'output')}"
    by = f" by {matching.source}" if matching.class_map else ""
    if missing:
        new = few([ClassNames().shown(name) for name in missing], _LISTED)
        return f"{of} are kept; {len(missing):,} of the classes are new to it: {new}"
    if not left:
        return f"{of} are the classes{by}, in another order or with other names"
    if matching.all_classes:
        return (
            f"{found.source}: its outputs for the {len(wanted) - len(left):,} classes{by} compete "
            f"with its {len(left):,} others, which are wrong for every image"
        )
    return f"{of} are the classes{by}; the logits of the others are left out"


# --- filling a network --------------------------------------------------------------------


@lru_cache
def _class_tensors(name: str) -> tuple[tuple[str, ...], bool]:
    """Return the tensors of a network that have a row for each class, and whether no other has.

    Those are usually weight and bias of the layer that gives the logits.
    """
    few_classes, more = (build_on_meta(name, n).state_dict() for n in (2, 3))
    changed = [key for key, value in more.items() if value.shape != few_classes[key].shape]
    rows = [key for key in changed if more[key].shape[1:] == few_classes[key].shape[1:]]
    return tuple(rows), rows == changed


def _fill(
    module: nn.Module,
    found: StateDict,
    meta: WeightsMeta,
    message: Callable[[str], None],
    *,
    rows: Sequence[int | None] | None,
    replace_head: bool,
) -> None:
    """Load weights, the rows of classes where ``rows`` says; see `load_network`.

    Raises:
        WeightsError: the weights do not fit.
    """
    # The module's own state stands below: it has the versions that some modules ask for, the
    # new head, and the counters that old files lack.
    check_tensors(found.source, found.tensors)
    state = module.state_dict()
    tensors = {
        key: value
        for key, value in found.tensors.items()
        if key in state or not key.startswith(_AUXILIARY)
    }
    if rows is not None:
        head, all_of_them = _class_tensors(meta.architecture)
        if not all_of_them:
            raise WeightsError(
                f"{found.source}: expected outputs for the classes {few(meta.classes)} in their "
                f"order, found {few(found.classes or ())}; the outputs of {meta.architecture} "
                "cannot be taken apart: train it on these classes"
            )
        kept = [(k, row) for k, row in enumerate(rows) if row is not None]
        for key in head:
            old, new = tensors.get(key), state[key].clone()
            if old is None or old.shape != (len(found.classes or ()), *new.shape[1:]):
                continue  # another network's, which is said below
            if kept:
                places, picked = zip(*kept, strict=True)
                new[list(places)] = old[list(picked)].to(new.dtype)
            tensors[key] = new
    wrong = {
        key: difference
        for key, difference in tensor_differences(state, tensors).items()
        if key in tensors or not key.endswith("num_batches_tracked")
    }
    if any(
        key not in _class_tensors(meta.architecture)[0]
        or key not in state
        or tensors.get(key, state[key]).shape[1:] != state[key].shape[1:]
        for key in wrong
    ):
        first = "; ".join(f"{key}: {text}" for key, text in list(wrong.items())[:3])
        more = f"; and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
        raise WeightsError(
            f"{found.source}: expected weights of {meta.architecture}, found other tensors "
            f"({first}{more}); give a file for this network"
        )
    ours = f"{len(meta.classes):,}"
    if wrong:
        sizes = [f"{len(tensors[key]):,}" for key in wrong if key in tensors]
        theirs = sizes[0] if sizes else "no classes"
        if not replace_head:
            raise WeightsError(
                f"{found.source}: expected outputs for the {ours} classes {few(meta.classes)}, "
                f"found {theirs}; name them with --class-map FILE, or fine-tune them on these "
                f"classes: anchorpatch finetune {meta.architecture} --weights ..."
            )
        message(
            f"{found.source}: replacing its head for {theirs} with a new one for {ours} "
            f"({few(meta.classes)})"
        )
        head = _class_tensors(meta.architecture)[0]
        tensors = {key: value for key, value in tensors.items() if key not in head}
    elif found.classes is None:
        message(
            f"{found.source}: names no classes; its {ours} outputs are assumed to be the classes "
            f"in order ({few(meta.classes)})"
        )
    state.update(tensors)
    module.load_state_dict(state)
