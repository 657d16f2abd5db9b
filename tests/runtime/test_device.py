from __future__ import annotations

import platform
import resource

import joblib
import numpy as np
import pytest
import torch

from anchorpatch.errors import SettingsError
from anchorpatch.runtime.device import (
    check_precision,
    computing_on,
    cpu_count,
    exact_float32,
    resolve_device,
    to_device,
    use_files,
    use_threads,
)


def test_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert cpu_count() >= 1


def test_without_a_gpu_auto_is_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(SettingsError, match=r"--device cuda: .*use --device cpu, or auto"):
        resolve_device("cuda")


def test_ranks_take_their_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == torch.device("cuda", 1)
    assert current == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SettingsError, match="local rank 2 has no GPU: 2 found"):
        resolve_device("cuda")


def test_bfloat16_is_refused_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    check_precision("float32", cpu)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    check_precision("bfloat16", cpu)
    with monkeypatch.context() as hidden:
        hidden.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
        with pytest.raises(SettingsError, match="which this CPU lacks; use --precision float32"):
            check_precision("bfloat16", cpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(SettingsError, match="which this CPU lacks"):
        check_precision("bfloat16", cpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(SettingsError, match="which this GPU lacks"):
        check_precision("bfloat16", torch.device("cuda"))


def precisions() -> list[object]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):
        kinds = [cudnn.conv.fp32_precision, matmul.fp32_precision]
    else:
        kinds = ["tf32" if b.allow_tf32 else "ieee" for b in (cudnn, matmul)]
    return [*kinds, cudnn.deterministic, cudnn.benchmark]


def test_exact_float32_lasts_for_its_block() -> None:
    before = precisions()
    with exact_float32():
        assert precisions() == ["ieee", "ieee", True, False]
        with exact_float32():
            pass
        assert precisions() == ["ieee", "ieee", True, False]
    assert precisions() == before
    with pytest.raises(ZeroDivisionError), exact_float32():
        1 / 0  # noqa: B018
    assert precisions() == before


def test_to_device_takes_arrays_and_tensors() -> None:
    array = np.arange(3, dtype=np.float32)
    for given in (array, torch.from_numpy(array)):
        assert to_device(given, torch.device("cpu")).tolist() == [0, 1, 2]


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: 16)
    for ranks, cores in (("1", 16), ("8", 2), ("32", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert cpu_count() == cores


def test_threads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(joblib, "cpu_count", lambda: 3)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        use_threads(None)
        assert torch.get_num_threads() == before
        use_threads(2)
        assert computing_on(torch.device("cpu")) == "computing on 2 CPU threads (--threads)"
        monkeypatch.delenv("OMP_NUM_THREADS")
        use_threads(None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_more_files_may_be_open_but_never_fewer() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        use_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, before[1])
        use_files(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
