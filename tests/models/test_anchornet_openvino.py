from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anchorpatch.errors import SettingsError
from anchorpatch.models import anchornet_openvino
from anchorpatch.models.anchornet import AnchorNet, Features
from anchorpatch.models.anchornet_openvino import OpenVinoFeatures
from anchorpatch.runtime.device import check_precision
from tests.models.random_norms import randomize_norms

pytest.importorskip("openvino", reason="needs OpenVINO")

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


def test_openvino_reports_to_nobody(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "from anchorpatch.models.anchornet_openvino import openvino_core\n"
        "openvino_core()\n"
        "assert not [m for m in sys.modules if m.startswith('openvino_telemetry.')]\n"
    )
    env = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_signals_are_handled_when_networks_are_gone() -> None:
    code = (
        "import signal\n"
        "from tests.models.test_anchornet_openvino import MEAN, STD, OpenVinoFeatures, network\n"
        "first, second = (OpenVinoFeatures(network(), MEAN, STD) for _ in range(2))\n"
        "del first\n"
        "del second\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "signal.raise_signal(signal.SIGUSR1)\n"
    )
    env = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "handled\n"), result.stderr


def test_threads_may_begin_together() -> None:
    # OpenVINO's tables are filled once a process, so that each try needs a new one.
    code = """
import os, signal, sys, threading, time
import numpy, openvino
from openvino import opset13 as ops
from anchorpatch.models.anchornet_openvino import openvino_core

def begin():
    sys.setswitchinterval(1e-6)
    pixels = ops.parameter([1], numpy.uint8)
    model = openvino.Model([ops.convert(pixels, "f32")], [pixels])
    model = openvino_core().compile_model(model, "CPU")
    barrier = threading.Barrier(4)
    def infer():
        request = model.create_infer_request()
        barrier.wait()
        request.infer([numpy.zeros(1, numpy.uint8)], share_inputs=True, share_outputs=True)
    threads = [threading.Thread(target=infer) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

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
"""
    env = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_openvino_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Exception from src/core.cpp:117:\n  no such\n  primitive\n")

    monkeypatch.setattr(anchornet_openvino, "_graph", fail)
    with pytest.raises(SettingsError) as caught:
        OpenVinoFeatures(network(), MEAN, STD)
    assert str(caught.value).endswith("no such primitive; use --engine torch")
    assert "\n" not in str(caught.value)
