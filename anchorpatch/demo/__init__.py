"""The procedural sample set, and which weights of AnchorNet an option means.

The bundled ones are those of an AnchorNet trained on scenes.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from anchorpatch.errors import WeightsError

__all__ = ["NAME", "demo_weights", "find_weights"]

#: File name of the bundled weights, in this package.
NAME: Final = "anchornet-scenes.safetensors"


def demo_weights() -> Path:
    """Return the path of the bundled weights.

    Raises:
        WeightsError: the installation lacks them.
    """
    # The package is never run from a zip archive (torch cannot be), so a resource is a file.
    path = Path(str(resources.files("anchorpatch.demo").joinpath(NAME)))
    if not path.is_file():
        raise WeightsError(
            f"{path}: expected the bundled weights, found no file: install anchorpatch again, or "
            "train on scenes and name the file with --weights"
        )
    return path


def find_weights(weights: str | None, runs: Path, option: str = "--weights") -> Path:
    """Return the file of AnchorNet's weights that an option means.

    Args:
        weights: a file, "demo", or None where the option is not given.
        runs: folder of training runs.
        option: its name.

    Raises:
        WeightsError: the option is not given and there is no trained network.
    """
    if weights == "demo":
        return demo_weights()
    if weights is not None:
        return Path(weights)
    trained = runs / "anchornet" / "best.safetensors"
    if not trained.is_file():
        raise WeightsError(
            f"{trained} does not exist: train AnchorNet with `anchorpatch train`, pass a weights "
            f"file with {option}, or use the bundled demo weights with {option} demo"
        )
    return trained
