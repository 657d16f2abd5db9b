from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.program import run_program

# Tests run side by side, one a core; threads of theirs would only get in each other's way.
# Set before anything loads torch, and for the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Indexes of archives are kept here, and not where the user's are.
_CACHE = tempfile.TemporaryDirectory(prefix="anchorpatch-cache-")
os.environ["ANCHORPATCH_CACHE"] = _CACHE.name

# A shell starts its background jobs with Ctrl-C ignored, and so would the programs be that tests
# start in order to interrupt them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Run the real program in an empty folder, without the caller's settings."""
    return partial(run_program, cwd=tmp_path)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained AnchorNet for the two classes of `image_folder`.

    Batch normalization has seen some photos and the classifiers are not too small, so that
    images differ in class, branch and activations.
    """
    import torch

    from anchorpatch.models.anchornet import AnchorNet
    from anchorpatch.runtime.checkpoint import WeightsMeta, save_weights

    torch.manual_seed(0)
    net = AnchorNet(2)
    for branch in net.branches:
        torch.nn.init.normal_(branch.classifier.weight, std=0.1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # takes the statistics of the photos as they are
    photos = [np.asarray(draw_photo(seed, (224, 224))) for seed in range(16)]
    inputs = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2) / 255 * 4 - 2
    with torch.no_grad():
        net(inputs)
    path = tmp_path_factory.mktemp("weights") / "anchornet.safetensors"
    save_weights(path, net.state_dict(), WeightsMeta("anchornet", ("cat", "dog")))
    return path


def draw_photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth colored field with some noise, which compresses like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += rng.integers(-9, 10, pixels.shape, dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA/val/{cat,dog} with 20 JPEG files each, of several sizes."""
    data = tmp_path_factory.mktemp("data")
    for label, name in enumerate(("cat", "dog")):
        (data / "val" / name).mkdir(parents=True)
        for i in range(20):
            photo = draw_photo(100 * label + i, (300 + 10 * i, 260 + 7 * label))
            photo.save(data / "val" / name / f"{i:02d}.JPEG", quality=90)
    return data


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photographs."""
    folder = os.environ.get("ANCHORPATCH_TEST_PHOTOS")
    if not folder:
        pytest.skip("needs real photographs in $ANCHORPATCH_TEST_PHOTOS")
    return Path(folder)
