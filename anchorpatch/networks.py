"""Networks for patches, ready with their weights: pretrained sets, our files and other programs'.

Files are read without running code from them: safetensors, ours or another program's, and
torch files of tensors and plain values.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlparse

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from anchorpatch.errors import SettingsError, WeightsError, reason_of
from anchorpatch.models.registry import (
    TIMM,
    build,
    build_on_meta,
    check_name,
    timm_module,
    torchvision_name,
)
from anchorpatch.runtime.checkpoint import (
    WeightsMeta,
    check_tensors,
    load_torch,
    load_weights,
    read_meta,
    reading_safetensors,
    tensor_differences,
)
from anchorpatch.text import few

#: Seconds that a download may be silent: some networks swallow packets.
_TIMEOUT: Final = 30.0

#: The file of a pretrained set of timm in its repository.
_TIMM_FILE: Final = "model.safetensors"

#: What a user can do without a pretrained set; a run that trains may also begin without weights.
_NAME_A_FILE: Final = "name a file of weights"
OR_NONE: Final = "give --weights FILE, or --weights none to begin with random weights"

#: What some programs put around a state dict, and before its names: DistributedDataParallel,
#: torch.compile, and modules of Lightning.
_WRAPPERS: Final = ("state_dict", "model", "model_state_dict")
_PREFIXES: Final = ("module.", "_orig_mod.", "model.")

#: As torchvision's first DenseNets name the layers of a dense layer: "norm.1" for "norm1".
_OLD_DENSENET: Final = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")

#: Classifiers that inception_v3 and googlenet have in training only; they are built without.
_AUXILIARY: Final = ("AuxLogits.", "aux1.", "aux2.")


@dataclass(frozen=True)
class Network:
    """A network that is ready to be trained or evaluated.

    Attributes:
        module: in evaluation mode, on the CPU.
        meta: its name, the classes of its outputs and the normalization of its input.
        source: where the weights came from, for messages.
        trained_on: "whole images", "patches", or "" where nothing says it.
    """

    module: nn.Module
    meta: WeightsMeta
    source: str
    trained_on: str = ""


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
            "anchornet localizes patches and does not classify them: choose another network, such "
            "as resnet50"
        )
    check_name(name)
    if weights == "none":
        meta = WeightsMeta(name, classes or otherwise)
        return Network(build(name, len(meta.classes)).eval(), meta, "random weights")
    if weights == "default":
        found = _pretrained(name, classes or (), message, OR_NONE if replace_head else _NAME_A_FILE)
    else:
        found = _read_file(Path(weights), name)
    if classes is None:
        classes = found.classes or _fitting(name, found, otherwise)
    meta = replace(WeightsMeta(name, tuple(classes)), **found.normalization)
    module = build(name, len(classes)).eval()
    _fill(module, found, meta, message, replace_head=replace_head)
    return Network(module, meta, found.source, found.trained_on)


def load_checkpoint(path: str | os.PathLike[str]) -> Network:
    """Build the network that one of our weights files holds.

    Args:
        path: written by `anchorpatch finetune`: its metadata name the network and its classes.

    Raises:
        WeightsError: the file is missing, damaged, another program's, or of AnchorNet.
    """
    if _kind(Path(path)) in ("torch", "safetensors"):
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
) -> Network:
    """Load the network that is asked about whole images, which the paper does not train further.

    It is the first of RUNS/NETWORK-baseline, ``at_hand`` unless that was fine-tuned on patches,
    the pretrained set if it is for these classes, and, with a warning, the network on patches.

    Args:
        name: as `load_network` takes it.
        classes: names of the outputs, in their order.
        runs: folder of training runs.
        message: called with downloads, and warned of a network that was fine-tuned on patches.
        weights: as `load_network` takes them, in place of this choice.
        at_hand: the network that decides on patches; None for RUNS/NETWORK where it exists.
        option: that names other weights.

    Raises:
        WeightsError: there is none, or a file cannot be used.
    """
    if weights is not None:
        return load_network(name, classes, weights, message)
    baseline = best_weights(runs, name, baseline=True)
    if baseline.is_file():
        return load_network(name, classes, baseline, message)
    if at_hand is not None and at_hand.trained_on != "patches":
        return at_hand
    why = "there are no pretrained weights for these classes"
    config = _pretrained_set(name)
    if config is not None and _outputs(name, config, classes) == classes:
        try:
            return load_network(name, classes, "default", message)
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


# --- where weights come from --------------------------------------------------------------


class _Found(NamedTuple):
    """Weights and what is known about them.

    Attributes:
        tensors: a state dict.
        source: where they came from, for messages.
        classes: names of the outputs; None where nothing says them.
        normalization: mean and std of the input, where something says them.
        trained_on: as in `Network`.
    """

    tensors: Mapping[str, Tensor]
    source: str
    classes: tuple[str, ...] | None = None
    normalization: Mapping[str, Any] = {}
    trained_on: str = ""


def _pretrained_set(name: str) -> Any:
    """Return what torchvision or timm says of a network's default set, or None without one."""
    if name.startswith(TIMM):
        config = timm_module().get_pretrained_cfg(name.removeprefix(TIMM))
        return config if config is not None and config.has_weights else None
    known = torchvision_name(name)
    return getattr(torchvision.models.get_model_weights(known), "DEFAULT", None) if known else None


def find_pretrained(name: str, instead: str) -> Any:
    """Return what torchvision or timm says of a network's pretrained set, without fetching it.

    Raises:
        WeightsError: there is none; ``instead`` says what the user can do.
    """
    found = _pretrained_set(name)
    if found is None:
        raise WeightsError(f"{name} has no pretrained weights: {instead}")
    return found


def _pretrained(
    name: str, classes: tuple[str, ...], message: Callable[[str], None], instead: str
) -> _Found:
    """Return the pretrained set of a network, downloaded into its package's own cache."""
    config = find_pretrained(name, instead)
    outputs = _outputs(name, config, classes)
    if name.startswith(TIMM):
        source = f"{config.hf_hub_id or config.url} (timm)"
        tensors = _from_timm(name, config, instead)
        return _Found(tensors, source, outputs, _normalization(config), "whole images")
    file = _cached(name, config.url, message, instead)
    source = f"{file.name} ({config.name} of torchvision)"
    tensors = _from_torch(file, advice="remove it to have it downloaded again")
    return _Found(tensors, source, outputs, _normalization(config.transforms()), "whole images")


def _outputs(name: str, config: Any, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes of a pretrained set: those wanted, if both are ImageNet's."""
    if name.startswith(TIMM):
        own = tuple(f"output {i}" for i in range(config.num_classes))
    else:
        own = tuple(config.meta["categories"])
    # The folders of ImageNet carry WordNet's numbers, the outputs the words.
    imagenet = (
        len(classes) == len(own) == 1000
        and (classes[0], classes[-1]) == ("n01440764", "n15075141")
        and all(re.fullmatch(r"n\d{8}", name) for name in classes)
        and list(classes) == sorted(classes)
    )
    return classes if imagenet else own


def _normalization(of: Any) -> dict[str, tuple[float, ...]]:
    return {"mean": tuple(map(float, of.mean)), "std": tuple(map(float, of.std))}


def _cached(name: str, url: str, message: Callable[[str], None], instead: str) -> Path:
    """Return the file of a set of torchvision in its cache, where it is put if need be.

    `torch.hub.load_state_dict_from_url` does the same, but tells of a download on stdout.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if file.is_file():
        return file
    message(f"downloading {url} to {file.parent}")
    digest = re.search(r"-([a-f0-9]{8,})\.", file.name)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(file), digest[1] if digest else None, progress=False
        )
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise WeightsError(
            f"{name}: cannot download {url} ({reason_of(error)[:200]}); fetch {file.name} where "
            f"there is a network and put it into {file.parent}, or {instead}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return file


def _from_timm(name: str, config: Any, instead: str) -> dict[str, Tensor]:
    try:
        overlay = {"file": _cached_of_timm(config.hf_hub_id)} if config.hf_hub_id else None
        module = timm_module().create_model(
            name.removeprefix(TIMM), pretrained=True, pretrained_cfg_overlay=overlay
        )
    except Exception as error:  # whatever urllib, huggingface_hub, httpx and others raise
        place = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
        raise WeightsError(
            f"{name}: cannot download {place} ({reason_of(error)[:200]}); fetch {_TIMM_FILE} from "
            f"there where there is a network and name the file, or {instead}"
        ) from error
    return dict(module.state_dict())


def _cached_of_timm(repository: str) -> str:
    """Return the file of a pretrained set in the hub's cache, where it is put if need be."""
    import huggingface_hub

    file = huggingface_hub.try_to_load_from_cache(repository, _TIMM_FILE)
    if isinstance(file, str):
        return file
    # The hub's client tries for a minute and tells of every trial: ask first.
    request = urllib.request.Request(
        huggingface_hub.hf_hub_url(repository, _TIMM_FILE), method="HEAD"
    )
    with suppress(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=_TIMEOUT).close()
    return str(huggingface_hub.hf_hub_download(repository, _TIMM_FILE))


def _read_file(path: Path, name: str) -> _Found:
    """Read a file of weights for the network of that name; its content tells its kind.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, or of another network.
    """
    kind = _kind(path)
    if kind == "missing":
        raise WeightsError(
            f"{path}: expected a weights file, found none; --weights takes default, none or a file"
        )
    if kind == "ours":
        return _of_ours(path, name)
    if kind in ("torch", "other"):
        tensors = _from_torch(path, advice="name another, or copy it again")
    else:
        with reading_safetensors(path):
            tensors = _unwrapped(safetensors.torch.load_file(path))
    # Another program's file names no classes, and its input is normalized as that of timm's set.
    config = timm_module().get_pretrained_cfg(name[len(TIMM) :]) if name.startswith(TIMM) else None
    return _Found(tensors, str(path), normalization=_normalization(config) if config else {})


def _kind(path: Path) -> str:
    """Tell "ours", "safetensors" and "torch" files from "other", "unreadable" and "missing"."""
    try:
        with path.open("rb") as file:
            beginning = file.read(9)
        if beginning[8:9] != b"{":
            return "torch" if beginning[:2] == b"PK" or beginning[:1] == b"\x80" else "other"
        with safetensors.safe_open(path, framework="pt") as content:
            return "ours" if "anchorpatch" in (content.metadata() or {}) else "safetensors"
    except FileNotFoundError:
        return "missing"
    except (OSError, safetensors.SafetensorError):
        return "unreadable"


def _of_ours(path: Path, name: str) -> _Found:
    weights = load_weights(path, None)
    meta, found = weights.meta, weights.meta.architecture
    if found != name and (torchvision_name(found) or found) != torchvision_name(name):
        raise WeightsError(
            f"{path}: expected weights of {name}, found {found}; give a file of its own weights"
        )
    settings = meta.training.get("settings")
    trained_on = ""
    if isinstance(settings, Mapping):
        # `train` has no baselines: it trains on whole images.
        trained_on = "whole images" if settings.get("baseline", True) else "patches"
    return _Found(weights.tensors, str(path), meta.classes, _normalization(meta), trained_on)


def _from_torch(path: Path, advice: str) -> dict[str, Tensor]:
    """Read a state dict from a torch file, without running code from it."""
    what = "safetensors or a torch file of tensors and plain values"
    advice += ", or save its state_dict() alone"
    # The training scripts of timm and of torchvision store their arguments.
    document = load_torch(path, what, advice, harmless=[argparse.Namespace])
    if isinstance(document, Mapping):
        for key in _WRAPPERS:
            if isinstance(document.get(key), Mapping):
                document = document[key]
                break
    tensors = isinstance(document, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in document.items()
    )
    if not tensors or not document:
        raise WeightsError(
            f"{path}: expected a state dict (names and tensors), found "
            f"{'other values' if isinstance(document, Mapping) else type(document).__name__}; "
            "save only the network's state_dict()"
        )
    return _unwrapped(document)


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip what wrappers put before every name, in whatever order they were wrapped."""
    plain = dict(tensors)
    while prefix := next(
        (p for p in _PREFIXES if plain and all(key.startswith(p) for key in plain)), None
    ):
        plain = {key.removeprefix(prefix): value for key, value in plain.items()}
    return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in plain.items()}


# --- filling a network --------------------------------------------------------------------


def _fitting(name: str, found: _Found, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes, if there are as many as outputs of weights that name none.

    Raises:
        WeightsError: there are more or fewer.
    """
    head = _head_keys(build_on_meta(name, 1000), 1000)
    outputs = next((len(found.tensors[key]) for key in head if key in found.tensors), len(classes))
    if outputs != len(classes):
        raise WeightsError(
            f"{found.source}: names no classes for its {outputs:,} outputs: give their names with "
            "--classes FILE, one per line in the order of the outputs"
        )
    return classes


def _head_keys(module: nn.Module, classes: int) -> tuple[str, ...]:
    """Return the names of weight and bias of the layer that gives the logits."""
    head = ""
    for name, layer in module.named_modules():
        linear = isinstance(layer, nn.Linear) and layer.out_features == classes
        conv = isinstance(layer, nn.Conv2d) and layer.out_channels == classes
        if linear or (conv and layer.kernel_size == (1, 1)):
            head = name
    return (f"{head}.weight", f"{head}.bias") if head else ()


def _fill(
    module: nn.Module,
    found: _Found,
    meta: WeightsMeta,
    message: Callable[[str], None],
    *,
    replace_head: bool,
) -> None:
    """Load weights, but for a head of other classes; raise WeightsError where they do not fit."""
    # The module's own state stands below: it has the versions that some modules ask for, the
    # new head, and the counters that old files lack.
    check_tensors(found.source, found.tensors)
    state, head = module.state_dict(), _head_keys(module, len(meta.classes))
    tensors = {
        key: value
        for key, value in found.tensors.items()
        if key in state or not key.startswith(_AUXILIARY)
    }
    wrong = {
        key: difference
        for key, difference in tensor_differences(state, tensors).items()
        if key in tensors or not key.endswith("num_batches_tracked")
    }
    if any(
        key not in head
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
    if wrong or (found.classes is not None and found.classes != meta.classes):
        sizes = [f"{len(tensors[key]):,}" for key in head if key in tensors] or ["no classes"]
        theirs = sizes[0]
        if found.classes is not None:
            theirs = f"{len(found.classes):,} ({few(found.classes)})"
        if not replace_head:
            raise WeightsError(
                f"{found.source}: expected outputs for the {ours} classes {few(meta.classes)}, "
                f"found {theirs}; fine-tune them on these classes: anchorpatch finetune "
                f"{meta.architecture} --weights ..."
            )
        message(
            f"{found.source}: replacing its head for {theirs} with a new one for {ours} "
            f"({few(meta.classes)})"
        )
        tensors = {key: value for key, value in tensors.items() if key not in head}
    elif found.classes is None:
        message(
            f"{found.source}: names no classes; its {ours} outputs are assumed to be the classes "
            f"in order ({few(meta.classes)})"
        )
    state.update(tensors)
    module.load_state_dict(state)
