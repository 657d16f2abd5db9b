"""The procedural sample set, and the weights that come with the package.

The bundled weights are those of an AnchorNet trained on scenes.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from anchorpatch.errors import WeightsError

__all__ = ["NAME", "demo_weights"]

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
