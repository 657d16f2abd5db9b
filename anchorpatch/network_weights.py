"""Where the weights of networks for patches come from: pretrained sets and files.

Files are read without running code from them: safetensors, ours or another program's, and
torch files of tensors and plain values.
"""

from __future__ import annotations

import argparse
import http.client
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlparse

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from anchorpatch.errors import WeightsError, reason_of
from anchorpatch.models.registry import TIMM, timm_module, torchvision_name
from anchorpatch.runtime.checkpoint import (
    Weights,
    load_torch,
    load_weights,
    reading_safetensors,
)

#: Seconds that a download may be silent.
_TIMEOUT: Final = 30.0

#: The file of a pretrained set of timm in its repository.
_TIMM_FILE: Final = "model.safetensors"

#: What a user can do without a pretrained set; a run that trains may also begin without weights.
NAME_A_FILE: Final = "name a file of weights"
OR_NONE: Final = "give --weights FILE, or --weights none to begin with random weights"

#: What some programs put around a state dict, and before its names: DistributedDataParallel,
#: torch.compile, and modules of Lightning.
_WRAPPERS: Final = ("state_dict", "model", "model_state_dict")
_PREFIXES: Final = ("module.", "_orig_mod.", "model.")

#: Classes that a checkpoint may hold beside tensors, as they run nothing: the training scripts of
#: timm and of torchvision store their arguments.
_HARMLESS: Final[list[Any]] = [argparse.Namespace]

#: As torchvision's first DenseNets name the layers of a dense layer: "norm.1" for "norm1".
_OLD_DENSENET: Final = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")


class Found(NamedTuple):
    """Weights and what is known about them.

    Attributes:
        tensors: a state dict.
        source: where they came from, for messages.
        classes: names of the outputs; None where nothing says them.
        mean: that the network's input is normalised with; None where nothing says it.
        std: the same.
        trained_on: "whole images", "patches", or "" where nothing says it.
    """

    tensors: dict[str, Tensor]
    source: str
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    trained_on: str = ""


def has_pretrained(name: str, classes: tuple[str, ...]) -> bool:
    """Tell whether a network has a pretrained set whose outputs are these classes."""
    found = _pretrained_set(name)
    if found is None:
        return False
    if name.startswith(TIMM):
        return bool(found.num_classes == 1000 and _is_imagenet(classes))
    return _is_imagenet(classes) or classes == tuple(found.meta["categories"])


def _pretrained_set(name: str) -> Any:
    """Return what torchvision or timm says of a network's default set, or None without one."""
    if name.startswith(TIMM):
        config = timm_module().get_pretrained_cfg(name.removeprefix(TIMM))
        return config if config is not None and config.has_weights else None
    known = torchvision_name(name)
    return getattr(torchvision.models.get_model_weights(known), "DEFAULT", None) if known else None


def find_pretrained(name: str, instead: str = NAME_A_FILE) -> Any:
    """Return what torchvision or timm says of a network's pretrained set, without fetching it.

    Args:
        name: of a network of torchvision or "timm:NAME".
        instead: what the user can do without the set.

    Raises:
        WeightsError: there is none.
    """
    found = _pretrained_set(name)
    if found is None:
        raise WeightsError(f"{name} has no pretrained set: {instead}")
    return found


def pretrained(
    name: str,
    classes: tuple[str, ...],
    message: Callable[[str], None],
    instead: str = NAME_A_FILE,
) -> Found:
    """Return the pretrained set of a network, downloaded into its package's own cache.

    Args:
        name: of a network of torchvision or "timm:NAME".
        classes: that the network is wanted for: the folders of ImageNet are known by their names.
        message: called with downloads.
        instead: what the user can do without the set.

    Raises:
        WeightsError: there is no such set, or it cannot be downloaded.
    """
    weights = find_pretrained(name, instead)
    if name.startswith(TIMM):
        return _pretrained_of_timm(name, weights, classes, instead)
    file = _cached(name, weights.url, message, instead)
    transform = weights.transforms()
    return Found(
        tensors=_from_torch(file, advice="remove it to have it downloaded again"),
        source=f"{file.name} ({weights.name} of torchvision)",
        # The folders of ImageNet carry WordNet's numbers, the outputs the words.
        classes=classes if _is_imagenet(classes) else tuple(weights.meta["categories"]),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        trained_on="whole images",
    )


def _cached(name: str, url: str, message: Callable[[str], None], instead: str) -> Path:
    """Return the file of a set of torchvision in its cache, where it is put if need be."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if file.is_file():
        return file
    message(f"downloading {url} to {file.parent}")
    digest = re.search(r"-([a-f0-9]{8,})\.", file.name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _time_limit():
            torch.hub.download_url_to_file(
                url, str(file), digest[1] if digest else None, progress=False
            )
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise WeightsError(
            f"{name}: cannot download {url} ({reason_of(error)[:200]}); fetch {file.name} where "
            f"there is a network and put it into {file.parent}, or {instead}"
        ) from error
    return file


@contextmanager
def _time_limit() -> Iterator[None]:
    """Let no download wait for ever for a network that swallows packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _pretrained_of_timm(name: str, config: Any, classes: tuple[str, ...], instead: str) -> Found:
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
    imagenet = config.num_classes == 1000 and _is_imagenet(classes)
    return Found(
        tensors=dict(module.state_dict()),
        source=f"{config.hf_hub_id or config.url} (timm)",
        classes=classes if imagenet else tuple(f"output {i}" for i in range(config.num_classes)),
        mean=tuple(config.mean),
        std=tuple(config.std),
        trained_on="whole images",
    )


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


def _is_imagenet(classes: tuple[str, ...]) -> bool:
    """Tell whether these are the folders of ImageNet's 1,000 classes."""
    return (
        len(classes) == 1000
        and (classes[0], classes[-1]) == ("n01440764", "n15075141")
        and all(re.fullmatch(r"n\d{8}", name) for name in classes)
        and list(classes) == sorted(classes)
    )


def read_file(path: Path, name: str) -> Found:
    """Read a file of weights; its content tells its kind, not its name.

    Args:
        path: safetensors, ours or another program's, or a torch file of a state dict.
        name: the network that they are for.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, or of another network.
    """
    try:
        with open(path, "rb") as file:
            beginning = file.read(9)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path}: expected a weights file, found none; --weights takes default, none or a file"
        ) from error
    except OSError as error:
        raise WeightsError(
            f"{path}: expected a readable weights file, found: {reason_of(error)}"
        ) from error
    if beginning[8:9] != b"{":
        tensors = _from_torch(path, advice="name another, or copy it again")
        return _of_others(tensors, path, name)
    with reading_safetensors(path):
        with safetensors.safe_open(path, framework="pt") as content:
            ours = "anchorpatch" in (content.metadata() or {})
        if not ours:
            return _of_others(_unwrapped(safetensors.torch.load_file(path)), path, name)
    weights = load_weights(path, None)
    found = weights.meta.architecture
    if found != name and (torchvision_name(found) or found) != torchvision_name(name):
        raise WeightsError(f"{path}: expected weights of {name}, found {found}; name its own file")
    return of_checkpoint(weights)


def of_another_program(path: Path) -> bool:
    """Tell whether a file holds tensors without our metadata: a torch file, or safetensors."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(9)
        if beginning[8:9] != b"{":
            return beginning[:2] == b"PK" or beginning[:1] == b"\x80"
        with safetensors.safe_open(path, framework="pt") as content:
            return "anchorpatch" not in (content.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def _of_others(tensors: dict[str, Tensor], path: Path, name: str) -> Found:
    """Return what another program's file holds: no classes, and the usual normalisation."""
    config = timm_module().get_pretrained_cfg(name[len(TIMM) :]) if name.startswith(TIMM) else None
    if config is None:
        return Found(tensors, str(path))
    return Found(tensors, str(path), mean=tuple(config.mean), std=tuple(config.std))


def of_checkpoint(weights: Weights) -> Found:
    """Return what one of our files holds, by its own word."""
    meta = weights.meta
    settings = meta.training.get("settings")
    trained_on = ""
    if isinstance(settings, Mapping):
        # `train` has no baselines: it trains on whole images.
        trained_on = "whole images" if settings.get("baseline", True) else "patches"
    return Found(weights.tensors, str(weights.path), meta.classes, meta.mean, meta.std, trained_on)


def _from_torch(path: Path, advice: str) -> dict[str, Tensor]:
    """Read a state dict from a torch file, without running code from it."""
    what = "safetensors or a torch file of tensors and plain values"
    advice += ", or save its state_dict() alone"
    document = load_torch(path, what, advice, harmless=_HARMLESS)
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
            "save the network's state_dict() alone"
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
