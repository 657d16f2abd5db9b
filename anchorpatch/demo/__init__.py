"""The procedural sample set, and which weights of AnchorNet an option means."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from anchorpatch.errors import WeightsError

__all__ = ["BUNDLED", "bundled_weights", "find_weights"]

#: Files of the bundled weights, in this package, by what options call them: AnchorNets trained on
#: the drawn scenes, and on photographs of ten classes of ImageNet.
BUNDLED: Final = {"demo": "anchornet-scenes.safetensors", "photos": "anchornet-photos.safetensors"}


def bundled_weights(name: str = "demo") -> Path:
    """Return the path of bundled weights.

    Raises:
        WeightsError: the installation lacks them.
    """
    # The package is never run from a zip archive (torch cannot be), so a resource is a file.
    path = Path(str(resources.files("anchorpatch.demo").joinpath(BUNDLED[name])))
    if not path.is_file():
        raise WeightsError(
            f"{path}: expected the bundled weights {name}, found no file: install anchorpatch "
            "again, or train AnchorNet and name the file with --weights"
        )
    return path


def find_weights(weights: str | None, runs: Path, option: str = "--weights") -> Path:
    """Return the file of AnchorNet's weights that an option means.

    Args:
        weights: a file, a name in `BUNDLED`, or None where the option is not given.
        runs: folder of training runs.
        option: its name.

    Raises:
        WeightsError: the option is not given and there is no trained network.
    """
    if weights in BUNDLED:
        return bundled_weights(weights)
    if weights is not None:
        return Path(weights)
    trained = runs / "anchornet" / "best.safetensors"
    if not trained.is_file():
        raise WeightsError(
            f"{trained} does not exist: train AnchorNet with `anchorpatch train`, pass a weights "
            f"file with {option}, or use bundled ones: {option} photos knows ten classes of "
            f"photographs, {option} demo the drawn scenes"
        )
    return trained
