"""Files of weights and of training state, neither of which can run code when it is read.

Weights are safetensors with one JSON document of metadata; training state is a torch file read
with ``weights_only=True``. Both are written beside their place, flushed and renamed, so that a
file under its final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import platform
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

import anchorpatch
from anchorpatch.errors import SettingsError, WeightsError, reason_of
from anchorpatch.settings import CropSettings
from anchorpatch.storage import from_json, write_atomically

_KEY: Final = "anchorpatch"
_FORMAT: Final = 1

#: How images may have been resized, by timm's names.
INTERPOLATIONS: Final = ("nearest", "bilinear", "bicubic", "lanczos")


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
        resize: length in pixels to which images are resized before cropping; it follows from the
            next three, but that older weights of mode ``squash`` say 256 where it was 224.
        crop: side of the crop, in pixels.
        crop_mode: how images become crops, see `anchorpatch.settings.CropSettings`.
        crop_pct: share of the resized side that the crop keeps; None for that of the mode.
        background: color behind transparent pixels that the network was trained with.
        mean: of the three channels, pixels in [0, 1].
        std: of the three channels, above 0, pixels in [0, 1].
        interpolation: that images were resized by where the weights come from, by timm's name.
        training: how the weights came about and how good they are, as JSON values.
        versions: of the software that wrote the file.

    Raises:
        SettingsError: a value outside its range, or a class that no file of text can name.
    """

    architecture: str
    classes: tuple[str, ...]
    se: bool = True
    weighted_mean: bool = True
    resize: int = 256
    crop: int = 224
    crop_mode: str = "center"
    crop_pct: float | None = None
    background: str = "#ffffff"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    training: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        # Names are written as UTF-8, into lines of tables, and into strings that end at a NUL.
        for name in (self.architecture, *self.classes):
            if not name or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
                raise SettingsError(
                    "expected names of classes without control characters or halves of surrogate "
                    f"pairs, found {name!r}"
                )
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise SettingsError(f"{what}: expected 3 finite numbers, found {values}")
        if min(self.std) <= 0:
            raise SettingsError(f"std: expected 3 numbers above 0, found {self.std}")
        if self.interpolation not in INTERPOLATIONS:
            raise SettingsError(
                f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, found "
                f"{self.interpolation!r}"
            )
        for what, side in (("resize", self.resize), ("crop", self.crop)):
            if not 1 <= side <= 65_535:
                raise SettingsError(f"{what}: expected 1 to 65,535 px, found {side:,}")
        colors = CropSettings(self.crop_mode, self.background, crop_pct=self.crop_pct)
        object.__setattr__(self, "background", colors.background)
        object.__setattr__(self, "crop_pct", colors.crop_pct)
        if self.architecture == "anchornet":
            _ = self.cropping  # of which its largest patch must be a part

    @property
    def cropping(self) -> CropSettings:
        """How images become crops.

        Raises:
            SettingsError: the crop is smaller than the largest patch.
        """
        return CropSettings(
            self.crop_mode, self.background, img_size=self.crop, crop_pct=self.crop_pct
        )

    def cropped(self, crop: CropSettings) -> WeightsMeta:
        """Return the same with other crops."""
        return replace(
            self,
            resize=crop.resize,
            crop=crop.img_size,
            crop_mode=crop.mode,
            crop_pct=crop.crop_pct,
            background=crop.background,
        )


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
    content = {"format": _FORMAT, **asdict(meta)}
    if meta.crop_pct is None:
        del content["crop_pct"]  # as in files from before it
    document = json.dumps(content, sort_keys=True, ensure_ascii=False)
    # One key: safetensors writes several in no fixed order.
    file_bytes = safetensors.torch.save(
        {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)},
        metadata={_KEY: document},
    )
    write_atomically(Path(path), lambda file: file.write(file_bytes))
    return hashlib.sha256(file_bytes).hexdigest()


def load_weights(path: str | os.PathLike[str], architecture: str | None = "anchornet") -> Weights:
    """Read and check a weights file.

    Args:
        path: a file from `save_weights`.
        architecture: what the file must hold; None takes any.

    Raises:
        WeightsError: the file is missing, truncated, of another kind or another network's.
    """
    path = Path(path)
    meta = read_meta(path)
    if architecture is not None and meta.architecture != architecture:
        raise WeightsError(
            f"{path}: expected weights of {architecture}, found {meta.architecture}; "
            "name a file of the right network"
        )
    with reading_safetensors(path):
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
    return Weights(path, tensors, meta, hashlib.sha256(content).hexdigest())


def read_meta(path: str | os.PathLike[str]) -> WeightsMeta:
    """Read what a weights file says about itself; its tensors are not read.

    Raises:
        WeightsError: the file is missing, damaged or of another kind.
    """
    path = Path(path)
    with reading_safetensors(path), safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if _KEY not in metadata:
        raise WeightsError(
            f"{path}: expected anchorpatch metadata (classes, preprocessing), found none: "
            "the weights were written by another program; name a file that `anchorpatch train` or "
            "`finetune` wrote"
        )
    try:
        document = json.loads(metadata[_KEY])
        version = document.pop("format", None) if isinstance(document, dict) else None
        if version != _FORMAT:
            raise WeightsError(
                f"{path}: expected metadata of format {_FORMAT}, found format {version!r:.40}; "
                "update anchorpatch"
            )
        meta = from_json(WeightsMeta, document)
        if not meta.classes or len(set(meta.classes)) < len(meta.classes):
            raise ValueError("classes: expected at least one, and each once")
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{path}: expected anchorpatch metadata, found metadata that cannot be used "
            f"({reason_of(error)}); name a file that `anchorpatch train` or `finetune` wrote"
        ) from error
    return meta


@contextmanager
def reading_safetensors(path: Path) -> Iterator[None]:
    """Say in one line what safetensors finds wrong with a file, and that a pickle is none.

    Raises:
        WeightsError: the file is missing, damaged or of another kind.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(9)
        # The length of a safetensors header may look like either mark; its "{" cannot be mistaken.
        if beginning[8:] != b"{" and (beginning[:2] == b"PK" or beginning[:1] == b"\x80"):
            raise WeightsError(
                f"{path}: expected safetensors, found a torch or pickle file, which was not opened "
                "as it can hold code; name a file that `anchorpatch train` or `finetune` wrote"
            )
        yield
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: expected a weights file, found none") from error
    except (OSError, RuntimeError) as error:  # the latter by torch, which maps the file
        raise WeightsError(
            f"{path}: expected a readable weights file, found: {reason_of(error)}"
        ) from error
    # A KeyError: a type of numbers that torch has not.
    except (safetensors.SafetensorError, KeyError) as error:
        reason = reason_of(error).removeprefix("Error while deserializing header: ")
        raise WeightsError(
            f"{path}: expected safetensors, found a damaged, truncated or different file of "
            f"{path.stat().st_size:,} bytes ({reason}); copy it again, or name another"
        ) from error


def check_tensors(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError unless all tensors are dense and of real numbers, as in networks."""
    for name, value in tensors.items():
        if value.is_complex() or value.is_quantized or value.layout is not torch.strided:
            raise WeightsError(
                f"{source}: expected dense tensors of real numbers, found {value.dtype} in "
                f"{value.layout} for {name}; save it in another way"
            )


def tensor_differences(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> dict[str, str]:
    """Say of each tensor that two states do not share in one shape what was expected, and found.

    Example:
        >>> tensor_differences({"a": torch.zeros(2, 3)}, {"a": torch.zeros(3), "b": torch.ones(())})
        {'a': 'expected 2 x 3, found 3', 'b': 'expected nothing, found a number'}
    """
    shapes: list[dict[str, str]] = [
        {name: " x ".join(map(str, value.shape)) or "a number" for name, value in state.items()}
        for state in (expected, found)
    ]
    differences = {}
    for name in sorted(expected.keys() | found.keys()):
        wanted, there = (state.get(name, "nothing") for state in shapes)
        if wanted != there:
            differences[name] = f"expected {wanted}, found {there}"
    return differences


def load_into(module: nn.Module, weights: Weights) -> None:
    """Fill a network with weights, all of them.

    Raises:
        WeightsError: the file's tensors are not those of the network.
    """
    check_tensors(str(weights.path), weights.tensors)
    for name, difference in tensor_differences(module.state_dict(), weights.tensors).items():
        raise WeightsError(
            f"{weights.path}: {name}: {difference}; the file belongs to a network built "
            "differently (other classes or options)"
        )
    module.load_state_dict(weights.tensors)


def load_torch(path: Path, what: str, advice: str, *, harmless: Sequence[Any] = ()) -> Any:
    """Read a torch file without running code from it.

    Args:
        path: of the file.
        what: it is expected to be, for messages.
        advice: what to do about another file.
        harmless: classes that it may hold beside tensors and plain values.

    Raises:
        WeightsError: the file is damaged, or holds objects of other classes.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(harmless)):
            warnings.simplefilter("ignore")  # torch warns of old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, ValueError, ... by damage
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not isinstance(error, pickle.UnpicklingError):
            found = f"a damaged, truncated or different file of {path.stat().st_size} bytes"
        elif named:
            found = f"an object of {named[1]}, which was not run"
        else:
            found = "a damaged file or a pickle of other objects, which was not run"
        raise WeightsError(f"{path}: expected {what}, found {found}; {advice}") from error


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

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(document, file)
        except RuntimeError as error:
            # After a refused write torch closes its archive, whose complaint hides the disk's.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(Path(path), write)


def load_state(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read training state without running code from the file.

    Raises:
        WeightsError: the file is missing, damaged, or not state of this kind.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: expected training state, found no file")
    advice = "remove it to start again, or restore it from a copy"
    document = load_torch(path, "training state", advice)
    state = document.get("state") if isinstance(document, dict) else None
    if not isinstance(state, dict) or document.get(_KEY) != _FORMAT:
        raise WeightsError(
            f"{path}: expected training state of format {_FORMAT}, found another file; {advice}"
        )
    if document.get("kind") != kind:
        raise WeightsError(
            f"{path}: expected training state of {kind}, found {document.get('kind')}; "
            "choose another run folder"
        )
    return state
