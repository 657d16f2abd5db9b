"""Files of weights and of training state, neither of which can run code when it is read.

Weights are safetensors with one JSON document of metadata; training state is a torch file read
with ``weights_only=True``. Both are written beside their place, flushed and renamed, so that a
file under its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

import anchorpatch
from anchorpatch.errors import WeightsError, reason_of
from anchorpatch.storage import write_atomically

__all__ = [
    "Weights",
    "WeightsMeta",
    "load_into",
    "load_state",
    "load_weights",
    "read_meta",
    "save_state",
    "save_weights",
    "versions",
]

_KEY: Final = "anchorpatch"
_FORMAT: Final = 1


def versions() -> dict[str, str]:
    """Return the versions of the software that decides on a result."""
    return {
        "anchorpatch": anchorpatch.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }


@dataclass(frozen=True)
class WeightsMeta:
    """What a weights file says about itself.

    Attributes:
        architecture: name of the network, such as "anchornet".
        classes: folder names, in the order of the outputs.
        se: AnchorNet was built with squeeze-and-excitation.
        weighted_mean: AnchorNet was built with S times H * W.
        resize: length of the short side before cropping, in pixels.
        crop: side of the centre crop, in pixels.
        mean: of the three channels, pixels in [0, 1].
        std: of the three channels, pixels in [0, 1].
        training: how the weights came about and how good they are, for people: JSON values.
        versions: of the software that wrote the file.
    """

    architecture: str
    classes: tuple[str, ...]
    se: bool = True
    weighted_mean: bool = True
    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    training: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)


@dataclass(frozen=True)
class Weights:
    """A weights file in memory.

    Attributes:
        path: where it came from.
        tensors: the network's state.
        meta: what the file says about itself.
        sha256: of the file's bytes, in hexadecimal.
    """

    path: Path
    tensors: dict[str, Tensor]
    meta: WeightsMeta
    sha256: str


def save_weights(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: WeightsMeta
) -> str:
    """Write weights and metadata; the same content gives the same bytes.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        StorageError: the disk refused.
    """
    document = json.dumps({"format": _FORMAT, **asdict(meta)}, sort_keys=True, ensure_ascii=False)
    # One key: safetensors writes several in no fixed order.
    content = safetensors.torch.save(
        {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)},
        metadata={_KEY: document},
    )
    write_atomically(Path(path), lambda file: file.write(content))
    return hashlib.sha256(content).hexdigest()


def load_weights(path: str | os.PathLike[str], architecture: str | None = "anchornet") -> Weights:
    """Read and check a weights file.

    Args:
        path: a file from `save_weights`.
        architecture: what the file must hold; None takes any.

    Raises:
        WeightsError: the file is missing, truncated, of another kind or another network's.
    """
    path = Path(path)
    content = _read(path)
    header = _header(path, content)
    meta = _meta(path, header)
    if architecture is not None and meta.architecture != architecture:
        raise WeightsError(
            f"{path}: expected weights of {architecture}, found {meta.architecture}; "
            "name a file of the right network"
        )
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"{path}: expected {_described_size(header, content)}, found {len(content)} bytes: "
            "the file is damaged or was cut off; copy it again or train again"
        ) from error
    return Weights(path, tensors, meta, hashlib.sha256(content).hexdigest())


def read_meta(path: str | os.PathLike[str]) -> WeightsMeta:
    """Read what a weights file says about itself; its tensors are not read.

    Raises:
        WeightsError: the file is missing, damaged or of another kind.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(8)
            content += file.read(min(int.from_bytes(content, "little"), path.stat().st_size))
    except OSError as error:
        raise WeightsError(
            f"{path}: expected a readable weights file, found: {reason_of(error)}"
        ) from error
    return _meta(path, _header(path, content))


def load_into(module: nn.Module, weights: Weights) -> None:
    """Fill a network with weights, all of them.

    Raises:
        WeightsError: the file's tensors are not those of the network.
    """
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise WeightsError(
                f"{weights.path}: expected {_described(expected.get(name))} for {name}, found "
                f"{_described(found.get(name))}; the file belongs to a network built otherwise "
                "(other classes or options)"
            )
    module.load_state_dict(weights.tensors)


def save_state(path: str | os.PathLike[str], kind: str, state: Mapping[str, Any]) -> None:
    """Write training state: tensors, numbers, text, and lists and dicts of them.

    Args:
        path: of the file.
        kind: what the state belongs to; `load_state` asks for the same.
        state: the content.

    Raises:
        StorageError: the disk refused.
    """
    document = {_KEY: _FORMAT, "kind": kind, "state": dict(state)}
    write_atomically(Path(path), lambda file: torch.save(document, file))


def load_state(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read training state without running code from the file.

    Raises:
        WeightsError: the file is missing, damaged, or not state of this kind.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: expected training state, found no file")
    advice = "remove it to start again, or restore it from a copy"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old formats; they are refused below
            document = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: expected training state written by anchorpatch, found a pickle of other "
            f"objects, which was not run; {advice}"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, ValueError, ... by damage
        raise WeightsError(
            f"{path}: expected training state, found a damaged or cut-off file of "
            f"{path.stat().st_size} bytes; {advice}"
        ) from error
    if not isinstance(document, dict) or document.get(_KEY) != _FORMAT:
        raise WeightsError(
            f"{path}: expected training state of format {_FORMAT}, found another file; {advice}"
        )
    if document["kind"] != kind:
        raise WeightsError(
            f"{path}: expected training state of {kind}, found {document['kind']}; "
            "choose another run folder"
        )
    state: dict[str, Any] = document["state"]
    return state


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: expected a weights file, found none") from error
    except OSError as error:
        raise WeightsError(
            f"{path}: expected a readable weights file, found: {reason_of(error)}"
        ) from error


def _header(path: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON header of a safetensors file."""
    # The length of a safetensors header may look like either mark; its "{" cannot be mistaken.
    if content[8:9] != b"{" and (content[:2] == b"PK" or content[:1] == b"\x80"):
        raise WeightsError(
            f"{path}: expected safetensors, found a torch or pickle file, which was not opened as "
            "it can hold code; convert it with safetensors.torch.save_file"
        )
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError as error:
        cut = content[8:9] == b"{" and 8 + length > len(content)
        found = (
            "a file cut off in its header"
            if cut
            else f"another kind of file ({len(content)} bytes)"
        )
        raise WeightsError(
            f"{path}: expected safetensors, found {found}; "
            "name a file that `anchorpatch train` wrote"
        ) from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: expected safetensors, found another kind of file")
    return header


def _meta(path: Path, header: Mapping[str, Any]) -> WeightsMeta:
    metadata = header.get("__metadata__")
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if text is None:
        raise WeightsError(
            f"{path}: expected anchorpatch metadata (classes, preprocessing), found none: "
            "the weights were written by another program"
        )
    try:
        document = json.loads(text)
        version = document.pop("format")
        if version != _FORMAT:
            raise WeightsError(
                f"{path}: expected metadata of format {_FORMAT}, found format {version}; "
                "update anchorpatch"
            )
        for name in ("classes", "mean", "std"):
            document[name] = tuple(document[name])
        return WeightsMeta(**document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path}: expected anchorpatch metadata, found metadata that cannot be read ({error})"
        ) from error


def _described_size(header: Mapping[str, Any], content: bytes) -> str:
    ends = [
        entry["data_offsets"][1]
        for entry in header.values()
        if isinstance(entry, dict) and "data_offsets" in entry
    ]
    return f"{8 + int.from_bytes(content[:8], 'little') + max(ends, default=0)} bytes"


def _described(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "nothing"
    return "a number" if not shape else "shape " + " x ".join(map(str, shape))
