"""Networks for patches, ready with their weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from anchorpatch.errors import SettingsError, WeightsError
from anchorpatch.models.complexity import refusal
from anchorpatch.models.registry import build, build_on_meta, check_name, run_name
from anchorpatch.network_weights import (
    NAME_A_FILE,
    OR_NONE,
    Found,
    has_pretrained,
    of_another_program,
    of_checkpoint,
    pretrained,
    read_file,
)
from anchorpatch.runtime.checkpoint import WeightsMeta, check_tensors, load_weights
from anchorpatch.settings import SCALES
from anchorpatch.text import few

#: Classifiers that inception_v3 and googlenet have in training only; they are built without.
_AUXILIARY: Final = ("AuxLogits.", "aux1.", "aux2.")


@dataclass(frozen=True)
class Network:
    """A network that is ready to be trained or evaluated.

    Attributes:
        module: in evaluation mode, on the CPU.
        meta: its name, the classes of its outputs and the normalisation of its input.
        source: where the weights came from, for messages.
        trained_on: "whole images", "patches", or "" where nothing says it.
    """

    module: nn.Module
    meta: WeightsMeta
    source: str
    trained_on: str = ""

    @property
    def asked(self) -> str:
        """Where the weights came from and what they were trained on, in words."""
        return asked_text(self.source, self.trained_on)


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


def _silent(_: str) -> None:
    pass


def load_network(
    name: str,
    classes: tuple[str, ...] | None,
    weights: str | os.PathLike[str] = "default",
    message: Callable[[str], None] = _silent,
    *,
    otherwise: tuple[str, ...] = (),
    replace_head: bool = False,
) -> Network:
    """Build a network and fill it with weights.

    Args:
        name: as `anchorpatch.models.registry.build` takes it.
        classes: names of the outputs, in their order; None for those that the weights name.
        weights: "default" for the pretrained set of torchvision or timm (downloaded once),
            "none" for random weights, or a file: our safetensors, another program's, or a torch
            file of a state dict. A file that names no classes is taken to have the right ones
            when their number is right.
        message: called with what takes long, and with what users may not expect.
        otherwise: classes for weights that name none, if their number is right.
        replace_head: give the network a new last layer where the weights are for other classes;
            otherwise that is an error.

    Raises:
        SettingsError: no such network, or AnchorNet, which is none for patches.
        WeightsError: the weights cannot be had, read or used.
        MissingDependency: the network is timm's, which is not installed.
    """
    if name == "anchornet":
        raise SettingsError(
            "anchornet localizes patches and does not classify them: name another network, such "
            "as resnet50"
        )
    check_name(name)
    if weights == "none":
        meta = WeightsMeta(name, classes or otherwise)
        return Network(build(name, len(meta.classes)).eval(), meta, "random weights")
    if weights == "default":
        instead = OR_NONE if replace_head else NAME_A_FILE
        found = pretrained(name, classes or (), message, instead)
    else:
        found = read_file(Path(weights), name)
    if classes is None:
        classes = found.classes or _fitting(name, found, otherwise)
    meta = WeightsMeta(name, tuple(classes))
    module = build(name, len(classes)).eval()
    _fill(module, found, meta, message, replace_head=replace_head)
    return Network(module, _with_normalization(meta, found), found.source, found.trained_on)


def _fitting(name: str, found: Found, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes, if there are as many as outputs of weights that name none.

    Raises:
        WeightsError: there are more or fewer.
    """
    head = _head_keys(build_on_meta(name, 1000), 1000)
    outputs = next((len(found.tensors[key]) for key in head if key in found.tensors), len(classes))
    if outputs != len(classes):
        raise WeightsError(
            f"{found.source}: names no classes for its {outputs:,} outputs: name them with "
            "--classes FILE, one per line in the order of the outputs"
        )
    return classes


def load_checkpoint(path: str | os.PathLike[str]) -> Network:
    """Build the network that one of our weights files holds.

    Args:
        path: written by `anchorpatch finetune`: its metadata name the network and its classes.

    Raises:
        WeightsError: the file is missing, damaged, another program's, or of AnchorNet.
    """
    if of_another_program(Path(path)):
        raise WeightsError(
            f"{path}: written by another program, and does not say which network it is of: "
            f"give --network NAME --weights {path}"
        )
    weights = load_weights(path, None)
    name = weights.meta.architecture
    if name == "anchornet":
        raise WeightsError(
            f"{path}: expected a network for patches, found weights of anchornet; name a file "
            "that `anchorpatch finetune` wrote"
        )
    module = build(name, len(weights.meta.classes)).eval()
    found = of_checkpoint(weights)
    _fill(module, found, weights.meta, _silent, replace_head=False)
    return Network(module, weights.meta, found.source, found.trained_on)


def load_for_whole_images(
    name: str,
    classes: tuple[str, ...],
    runs: Path,
    message: Callable[[str], None] = _silent,
    *,
    at_hand: Network | None = None,
    option: str = "--whole-weights",
) -> Network:
    """Load the network that is asked about whole images, which the paper does not train further.

    It is the first of RUNS/NETWORK-baseline, ``at_hand`` unless that was fine-tuned on patches,
    the pretrained set if it is for these classes, and, with a warning, the network on patches.

    Args:
        name: as `load_network` takes it.
        classes: names of the outputs, in their order.
        runs: folder of training runs.
        message: called with downloads, and warned of a network that was fine-tuned on patches.
        at_hand: the network that decides on patches; None for RUNS/NETWORK where it exists.
        option: that names other weights.

    Raises:
        WeightsError: there is none, or a file cannot be used.
    """
    baseline = best_weights(run_folder(runs, name, baseline=True))
    if baseline.is_file():
        return load_network(name, classes, baseline, message)
    if at_hand is not None and at_hand.trained_on != "patches":
        return at_hand
    why = "there is no pretrained set for these classes"
    if has_pretrained(name, classes):
        try:
            return load_network(name, classes, "default", message)
        except WeightsError as error:
            why = str(error).partition("; ")[0]
    tuned = best_weights(run_folder(runs, name))
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
    name: str, classes: tuple[str, ...], path: Path, message: Callable[[str], None] = _silent
) -> Network:
    """Load a network from the place of those on patches, which it is unless it says otherwise."""
    found = load_network(name, classes, path, message)
    return replace(found, trained_on=found.trained_on or "patches")


def best_weights(folder: Path) -> Path:
    """Return the weights of a run's best epoch."""
    return folder / "best.safetensors"


def check_sides(name: str, module: nn.Module, sides: Sequence[int] = SCALES) -> None:
    """Do nothing where a network takes images of all these sides.

    Args:
        name: of the network.
        module: the network; it is run without computing anything, where it can.
        sides: in pixels.

    Raises:
        SettingsError: it cannot take a side.
    """
    reasons = {side: reason for side in sides if (reason := refusal(module, side)) is not None}
    if reasons:
        listed = ", ".join(map(str, reasons))
        raise SettingsError(
            f"{name} cannot take images of {listed} px ({next(iter(reasons.values()))}): choose a "
            "network without a fixed or larger size of input, such as resnet50"
        )


def _with_normalization(meta: WeightsMeta, found: Found) -> WeightsMeta:
    changes: dict[str, Any] = {
        key: tuple(float(x) for x in value)
        for key, value in (("mean", found.mean), ("std", found.std))
        if value is not None
    }
    return replace(meta, **changes)


def _fill(
    module: nn.Module,
    found: Found,
    meta: WeightsMeta,
    message: Callable[[str], None],
    *,
    replace_head: bool,
) -> None:
    """Load weights, but for a head of other classes.

    Raises:
        WeightsError: they do not fit.
    """
    # The module's own state stands below: it has the versions that some modules ask for, the
    # new head, and the counters that old files lack.
    check_tensors(found.source, found.tensors)
    state = module.state_dict()
    tensors = {key: value for key, value in found.tensors.items() if _belongs(key, state)}
    wrong = [
        key
        for key in sorted(state.keys() | tensors.keys())
        if _shape(state, key) != _shape(tensors, key)
        and not (key.endswith("num_batches_tracked") and key not in tensors)
    ]
    head = _head_keys(module, len(meta.classes))
    if wrong and not all(_differs_in_classes(state, tensors, key, head) for key in wrong):
        _refuse_keys(found, meta, state, tensors, wrong)
    if wrong or (found.classes is not None and found.classes != meta.classes):
        _refuse_head_unless(replace_head, found, meta, tensors, head)
        message(
            f"{found.source}: replacing its head for {_classes_text(found, tensors, head)} with a "
            f"new one for {len(meta.classes):,} ({few(meta.classes)})"
        )
        tensors = {key: value for key, value in tensors.items() if key not in head}
    elif found.classes is None:
        message(
            f"{found.source}: names no classes; its {len(meta.classes):,} outputs are taken for "
            f"the classes in their order ({few(meta.classes)})"
        )
    state.update(tensors)
    module.load_state_dict(state)


def _belongs(key: str, state: Mapping[str, Tensor]) -> bool:
    return key in state or not key.startswith(_AUXILIARY)


def _shape(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(tensors[key].shape) if key in tensors else None


def _head_keys(module: nn.Module, classes: int) -> tuple[str, ...]:
    """Return the names of weight and bias of the layer that gives the logits."""
    head = ""
    for name, layer in module.named_modules():
        linear = isinstance(layer, nn.Linear) and layer.out_features == classes
        conv = isinstance(layer, nn.Conv2d) and layer.out_channels == classes
        if linear or (conv and layer.kernel_size == (1, 1)):
            head = name
    return (f"{head}.weight", f"{head}.bias") if head else ()


def _differs_in_classes(
    state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], key: str, head: tuple[str, ...]
) -> bool:
    if key not in head or key not in state:
        return False
    found = _shape(tensors, key)
    return found is None or found[1:] == tuple(state[key].shape[1:])


def _refuse_keys(
    found: Found,
    meta: WeightsMeta,
    state: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    wrong: Sequence[str],
) -> None:
    def described(shape: tuple[int, ...] | None) -> str:
        return "nothing" if shape is None else " x ".join(map(str, shape)) or "a number"

    few = "; ".join(
        f"{key}: expected {described(_shape(state, key))}, found {described(_shape(tensors, key))}"
        for key in wrong[:3]
    )
    more = f"; and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
    raise WeightsError(
        f"{found.source}: expected weights of {meta.architecture}, found other tensors ({few}"
        f"{more}); name a file of this network"
    )


def _refuse_head_unless(
    replace_head: bool,
    found: Found,
    meta: WeightsMeta,
    tensors: Mapping[str, Tensor],
    head: tuple[str, ...],
) -> None:
    if not replace_head:
        raise WeightsError(
            f"{found.source}: expected outputs for the {len(meta.classes):,} classes "
            f"{few(meta.classes)}, found {_classes_text(found, tensors, head)}; fine-tune them "
            f"on these classes: anchorpatch finetune {meta.architecture} --weights ..."
        )


def _classes_text(found: Found, tensors: Mapping[str, Tensor], head: tuple[str, ...]) -> str:
    if found.classes is not None:
        return f"{len(found.classes):,} ({few(found.classes)})"
    sizes = [len(tensors[key]) for key in head if key in tensors]
    return f"{sizes[0]:,}" if sizes else "no classes"


def run_folder(
    runs: Path, network: str, *, scale: int | None = None, baseline: bool = False
) -> Path:
    """Return the folder of a network's run.

    Example:
        >>> run_folder(Path("runs"), "resnet50", scale=63).name
        'resnet50-63'
    """
    suffix = "-baseline" if baseline else f"-{scale}" if scale is not None else ""
    return runs / (run_name(network) + suffix)
