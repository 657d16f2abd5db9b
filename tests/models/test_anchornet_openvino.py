from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anchorpatch.errors import SettingsError
from anchorpatch.models import anchornet_openvino
from anchorpatch.models.anchornet import AnchorNet, Features
from anchorpatch.models.anchornet_openvino import OpenVinoFeatures, openvino_core
from anchorpatch.runtime.device import check_precision
from tests.models.random_norms import randomize_norms
from tests.program import Started, run_alone

pytestmark = pytest.mark.skipif(not find_spec("openvino"), reason="needs OpenVINO")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: Largest error over largest value: what is measured, times ten.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}


def network(**options: bool) -> AnchorNet:
    torch.manual_seed(0)
    net = AnchorNet(4, **options)
    randomize_norms(net)
    return net.fuse().to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (7, 224, 224, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=TOLERANCE)
def precision(request: pytest.FixtureRequest) -> str:
    try:
        check_precision(request.param, torch.device("cpu"))
    except SettingsError as error:
        pytest.skip(str(error))
    return str(request.param)


def tensors(features: Features) -> list[Tensor]:
    return [tensor for part in features for tensor in part]


@pytest.mark.parametrize("options", [{}, {"se": False}, {"weighted_mean": False}], ids=str)
def test_equals_torch(pixels: Tensor, precision: str, options: dict[str, bool]) -> None:
    net = network(**options)
    found = OpenVinoFeatures(net, MEAN, STD, precision=precision)(pixels)
    inputs = ((pixels / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = net.features(inputs)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float32
        scale = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[precision] * scale)


def test_an_image_depends_on_nothing_around_it(pixels: Tensor, precision: str) -> None:
    net = network()
    expected = tensors(OpenVinoFeatures(net, MEAN, STD, precision=precision)(pixels))
    engine = OpenVinoFeatures(net, MEAN, STD, precision=precision, streams=3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = OpenVinoFeatures(net, MEAN, STD, precision=precision)
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda i: engine(pixels[i : i + 1]), [*range(7)] * 3))
    for i, part in enumerate(parts):
        assert all(map(torch.equal, tensors(part), (t[i % 7 : i % 7 + 1] for t in expected)))
    turned = tensors(three(pixels.flip(0)))
    assert all(map(torch.equal, turned, (t.flip(0) for t in expected)))


def report_to_nobody() -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("network")

    socket.getaddrinfo = socket.socket.connect = refuse
    assert "openvino" not in sys.modules
    openvino_core()
    assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]


def test_openvino_reports_to_nobody(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    result = Started(report_to_nobody, cwd=tmp_path, env={"HOME": str(home)}).wait()
    assert (result.returncode, result.stderr) == (0, "")
    assert list(home.iterdir()) == []


def handle_a_signal() -> None:
    first, second = (OpenVinoFeatures(network(), MEAN, STD) for _ in range(2))
    del first
    del second
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
    signal.raise_signal(signal.SIGUSR1)


def test_signals_are_handled_when_networks_are_gone() -> None:
    assert run_alone(handle_a_signal) == 3


def begin_together() -> None:
    """Let threads begin in several processes: OpenVINO's tables are filled once in each."""
    sys.modules.setdefault("openvino_telemetry", None)  # as `openvino_core` does
    from openvino import Model
    from openvino import opset13 as ops

    def begin() -> None:
        sys.setswitchinterval(1e-6)
        pixels = ops.parameter([1], np.uint8)
        model = Model([ops.convert(pixels, "f32")], [pixels])
        compiled = openvino_core().compile_model(model, "CPU")
        barrier = threading.Barrier(4)

        def infer() -> None:
            request = compiled.create_infer_request()
            barrier.wait()
            request.infer([np.zeros(1, np.uint8)], share_inputs=True, share_outputs=True)

        threads = [threading.Thread(target=infer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for _ in range(4):
        if not (child := os.fork()):
            begin()
            os._exit(0)
        end = time.monotonic() + 30
        while not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.01)
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                sys.exit("hung")


def test_threads_may_begin_together() -> None:
    assert run_alone(begin_together) == 0


def test_what_openvino_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Exception from src/core.cpp:117:\n  no such\n  primitive\n")

    monkeypatch.setattr(anchornet_openvino, "_graph", fail)
    with pytest.raises(SettingsError) as caught:
        OpenVinoFeatures(network(), MEAN, STD)
    assert str(caught.value).endswith("no such primitive; use --engine torch")
    assert "\n" not in str(caught.value)
