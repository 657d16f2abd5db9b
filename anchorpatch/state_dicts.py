"""State dicts and what is known of them: pretrained sets, our files and other programs'.

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
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlparse

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from anchorpatch.classes import imagenet_ids, imagenet_names
from anchorpatch.errors import WeightsError, reason_of
from anchorpatch.models.registry import TIMM, timm_module, torchvision_name
from anchorpatch.runtime.checkpoint import (
    INTERPOLATIONS,
    load_torch,
    load_weights,
    reading_safetensors,
)

#: Seconds that a download may be silent: some networks swallow packets.
_TIMEOUT: Final = 30.0

#: The file of a pretrained set of timm in its repository.
_TIMM_FILE: Final = "model.safetensors"

#: What some programs put around a state dict, and before its names: DistributedDataParallel,
#: torch.compile, and modules of Lightning.
_WRAPPERS: Final = ("state_dict", "model", "model_state_dict")
_PREFIXES: Final = ("module.", "_orig_mod.", "model.")

#: As torchvision's first DenseNets name the layers of a dense layer: "norm.1" for "norm1".
_OLD_DENSENET: Final = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")


class Preprocessing(NamedTuple):
    """How a network's input is made where its weights were trained.

    Attributes:
        mean: of the channels, pixels in [0, 1].
        std: of the channels, pixels in [0, 1].
        interpolation: as timm and torchvision call it, such as "bicubic".
        size: side of the input in pixels.
        crop_pct: side of the center crop by the short side of the resized image.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    size: int
    crop_pct: float

    @property
    def recorded(self) -> dict[str, Any]:
        """What `WeightsMeta` records of it. Patches have sizes of their own."""
        return {name: getattr(self, name) for name in ("mean", "std", "interpolation")}


class StateDict(NamedTuple):
    """Weights and what is known about them.

    Attributes:
        tensors: by name.
        source: where they came from, for messages.
        classes: names of the outputs; None where nothing says them.
        preprocessing: mean, std and interpolation of the input, where something says them.
        trained_on: "whole images", "patches", or "" where nothing says it.
        ours: a file that `anchorpatch train` or `finetune` wrote.
        holdout: share of the training images that such a run kept out of training; None where
            nothing says it.
    """

    tensors: Mapping[str, Tensor]
    source: str
    classes: tuple[str, ...] | None = None
    preprocessing: Mapping[str, Any] = {}
    trained_on: str = ""
    ours: bool = False
    holdout: float | None = None


def pretrained_set(name: str) -> Any:
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
    found = pretrained_set(name)
    if found is None:
        raise WeightsError(f"{name} has no pretrained weights: {instead}")
    return found


def pretrained_classes(name: str) -> tuple[str, ...] | None:
    """Return the names of a pretrained set's outputs, or None where there is none.

    ImageNet's are WordNet ids.

    Example:
        >>> pretrained_classes("resnet18")[0], pretrained_classes("hcgnet_b")
        ('n01440764', None)
    """
    config = pretrained_set(name)
    if config is None:
        return None
    if not name.startswith(TIMM):
        own = tuple(config.meta["categories"])
        return imagenet_ids() if own == tuple(imagenet_names().values()) else own
    if config.num_classes == len(imagenet_ids()):
        return imagenet_ids()
    data: Any = import_module("timm.data")
    if (subset := data.infer_imagenet_subset(config)) is not None:  # by the number of classes
        return tuple(data.ImageNetInfo(subset).label_names())
    return tuple(f"output {i}" for i in range(config.num_classes))


def preprocessing_of(name: str) -> Preprocessing | None:
    """Return what the input of a network's pretrained set is like, or None without one.

    Example:
        >>> preprocessing_of("resnet18").mean, preprocessing_of("hcgnet_b")
        ((0.485, 0.456, 0.406), None)
    """
    if name.startswith(TIMM):
        config = timm_module().get_pretrained_cfg(name.removeprefix(TIMM))
        if config is None:
            return None
        size, share = config.input_size[-1], config.crop_pct
    else:
        found = pretrained_set(name)
        if found is None:
            return None
        config = found.transforms()
        size, share = config.crop_size[0], config.crop_size[0] / config.resize_size[0]
    mean, std = (tuple(map(float, values)) for values in (config.mean, config.std))
    how = getattr(config.interpolation, "value", config.interpolation)
    # timm says "random" where training drew one of two.
    return Preprocessing(mean, std, how if how in INTERPOLATIONS else "bilinear", size, share)


def _recorded(name: str) -> dict[str, Any]:
    found = preprocessing_of(name)
    return found.recorded if found else {}


def read_pretrained(name: str, message: Callable[[str], None], instead: str) -> StateDict:
    """Return the pretrained set of a network, downloaded into its package's own cache.

    Args:
        name: of a network of torchvision or timm.
        message: called with downloads.
        instead: what the user can do without.

    Raises:
        WeightsError: there is none, or it cannot be had.
    """
    config = find_pretrained(name, instead)
    if name.startswith(TIMM):
        source = f"{config.hf_hub_id or config.url} (timm)"
        tensors = _from_timm(name, config, instead)
    else:
        file = _cached(name, config.url, message, instead)
        source = f"{file.name} ({config.name} of torchvision)"
        tensors = _from_torch(file, advice="remove it to have it downloaded again")
    known = pretrained_classes(name), _recorded(name)
    return StateDict(tensors, source, *known, trained_on="whole images")


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


def read_file(path: Path, name: str) -> StateDict:
    """Read a file of weights for the network of that name; its content tells its kind.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, or of another network.
    """
    kind = kind_of(path)
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
    # Another program's file names no classes, and its input is made as that of the pretrained set.
    return StateDict(tensors, str(path), preprocessing=_recorded(name))


def kind_of(path: Path) -> str:
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


def _of_ours(path: Path, name: str) -> StateDict:
    weights = load_weights(path, None)
    meta, found = weights.meta, weights.meta.architecture
    if found != name and (torchvision_name(found) or found) != torchvision_name(name):
        raise WeightsError(
            f"{path}: expected weights of {name}, found {found}; give a file of its own weights"
        )
    settings = meta.training.get("settings")
    trained_on, holdout = "", None
    if isinstance(settings, Mapping):
        holdout = float(settings.get("holdout", 0.0))
        # `train` has no baselines: it trains on whole images.
        trained_on = "whole images" if settings.get("baseline", True) else "patches"
    return StateDict(
        weights.tensors,
        str(path),
        meta.classes,
        {name: getattr(meta, name) for name in ("mean", "std", "interpolation")},
        trained_on,
        ours=True,
        holdout=holdout,
    )


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
