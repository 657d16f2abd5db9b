"""A pretended GPU: tensors on "cuda" have shapes, types and devices, and compute nothing.

What touches the device runs on torch's fake tensors, so a tensor on the wrong device raises as
on a GPU; everything else computes as ever. `FakeGpu` notes what would make the host wait for the
GPU, what would be launched, and which convolutions and matrix products would round to TF32.
That numbers or speed are right, only a GPU can say.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import anchorpatch

try:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
except ImportError:  # a private module
    FakeTensorMode = None  # type: ignore[assignment,misc]

__all__ = ["FakeGpu", "why_not"]

_PACKAGE = Path(anchorpatch.__file__).parent

aten = torch.ops.aten

#: Results that the host cannot go on without.
_READS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.bincount.default: "bincount",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten._unique2.default: "unique",
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_COPIES = {aten._to_copy.default, aten.copy_.default}
_CONVOLUTIONS = {aten.convolution.default, aten.cudnn_convolution.default}
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


def why_not() -> str | None:
    """Return why there can be no fake GPU here, or None."""
    if torch.cuda.is_available():
        return "there is a real GPU, whose driver this would stand in front of"
    if FakeTensorMode is None:
        return "this torch has no fake tensors"
    try:
        with FakeTensorMode():
            torch.empty(1, device="cuda").add(1)
    except Exception as error:
        return f"this torch has no fake tensors of CUDA: {error}"
    return None


class FakeGpu(TorchDispatchMode):
    """Pretends ``gpus`` CUDA devices within a ``with`` block.

    Attributes:
        waits: what the host waited for, and the line of anchorpatch that asked.
        launches: operators that would run on a GPU, by name.
        rounded: convolutions and matrix products of float32 that would be rounded to TF32.
        current: number of the current device.
        recorded: number of the device of each event that was recorded.
        blocking: whether each of the events lets the waiting thread sleep.
    """

    def __init__(self, gpus: int = 2) -> None:
        super().__init__()
        self.gpus = gpus
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.current = 0
        self.recorded: list[int] = []
        self.blocking: list[bool] = []
        self._pinned: dict[int, Any] = {}  # address -> storage, which keeps the address taken
        self._patches, self._depth = ExitStack(), 0
        self.forget()

    def forget(self) -> None:
        """Begin new lists."""
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.rounded: Counter[str] = Counter()

    # --- what stands in for the driver --------------------------------------------------------

    def __enter__(self) -> FakeGpu:
        super().__enter__()
        self._depth += 1
        if self._depth > 1:  # from within `__torch_dispatch__`
            return self
        enter = self._patches.enter_context
        enter(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # autocast, for one, misses the GPU
        make = torch.tensor

        def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
            """Make it on the host, copy it and wait, as torch.tensor does for a GPU."""
            made: Tensor = make(data, **options)
            return made if device is None else made.to(device)

        enter(mock.patch.object(torch, "tensor", tensor))
        enter(mock.patch.object(torch.autograd, "backward", self._backward))
        enter(mock.patch.object(nn.Module, "_apply", _apply))
        enter(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: self._pin(tensor)))
        enter(mock.patch.object(FakeTensor, "numpy", _zeros, create=True))
        enter(mock.patch.object(FakeTensor, "tolist", lambda t: _zeros(t).tolist(), create=True))
        enter(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        for name, value in {
            "is_bf16_supported": lambda *_, **__: True,
            "device_count": lambda: self.gpus,
            "current_device": lambda: self.current,
            "set_device": self._set_device,
            "current_stream": self._stream,
            "Event": self._event,
            "device": lambda *_: nullcontext(),
            "Stream": self._stream,
            "stream": lambda *_: nullcontext(),
            "CUDAGraph": mock.Mock,
            "graph": lambda *_, **__: nullcontext(),
            "synchronize": lambda *_: None,
            "max_memory_allocated": lambda *_: 0,
            "_lazy_init": lambda: None,
        }.items():
            enter(mock.patch.object(torch.cuda, name, value))
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if not self._depth:
            self._patches.close()

    def _set_device(self, device: torch.device | int) -> None:
        self.current = (
            torch.device("cuda", device).index if isinstance(device, int) else (device.index or 0)
        )

    def _stream(self, device: torch.device | None = None) -> Any:
        return mock.Mock(number=self.current if device is None else device.index)

    def _event(self, *, blocking: bool = False) -> Any:
        def record(stream: Any = None) -> None:
            self.recorded.append(self._stream().number if stream is None else stream.number)
            self.blocking.append(blocking)

        return mock.Mock(record=record)

    def _pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        storage = copy.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return copy

    def _backward(self, loss: Tensor) -> None:
        """Give each parameter some gradient: the engine wants a driver."""
        assert not torch.is_autocast_enabled("cuda"), "backward belongs outside autocast"
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                node.variable.grad = torch.empty_like(node.variable)
            waiting += [before for before, _ in node.next_functions]

    # --- what is noted ------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        asked = any(isinstance(x, torch.device) and x.type == "cuda" for x in flat)
        if not asked and not any(isinstance(t, FakeTensor) for t in tensors):
            return func(*args, **kwargs)
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        whole = torch.is_inference_mode_enabled() and func.namespace == "aten"
        if whole and func.has_kernel_for_dispatch_key(composite):
            with self:  # such operators come whole in inference mode
                return func.decompose(*args, **kwargs)
        on_gpu = any(t.device.type == "cuda" for t in tensors)
        if on_gpu and func in _READS:
            self._waited(_READS[func])
        masks = (torch.bool, torch.uint8)
        if on_gpu and func in _INDEXING and any(i.dtype in masks for i in args[1] if i is not None):
            self._waited("boolean index")
        out = self._result(func, args, kwargs)
        results = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        kinds = {t.device.type for t in (*tensors, *results)}
        if func in _COPIES and kinds == {"cpu", "cuda"}:
            self._copied(func, args, kwargs)
        if "cuda" in kinds and func.namespace == "aten":
            name = func._schema.name.removeprefix("aten::")
            self.launches[name] += 1
            if func in _CONVOLUTIONS | _PRODUCTS and _may_round(func, results[0]):
                self.rounded[f"{name} {_line()}"] += 1
        return out

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator; what depends on values gets one that could be."""
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        with self.fake:
            if func is aten.bincount.default:
                return torch.zeros(kwargs["minlength"], dtype=torch.int64, device=args[0].device)
            if func is aten.nonzero.default:
                return torch.zeros(1, args[0].ndim, dtype=torch.int64, device=args[0].device)
            return func(*args, **kwargs)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> None:
        to, source = (args[0], args[1]) if func is aten.copy_.default else (None, args[0])
        non_blocking = kwargs.get("non_blocking", to is not None and len(args) > 2 and args[2])
        if source.device.type == "cuda":
            if not non_blocking:
                self._waited("device -> host")
        elif not non_blocking:
            self._waited("host -> device")
        elif (
            isinstance(source, FakeTensor)
            or source.untyped_storage().data_ptr() not in self._pinned
        ):
            self._waited("host -> device from pageable memory")

    def _waited(self, why: str) -> None:
        self.waits[f"{why} {_line()}"] += 1


def _may_round(func: Any, result: Tensor) -> bool:
    if result.dtype != torch.float32:
        return False
    backend = torch.backends.cudnn if func in _CONVOLUTIONS else torch.backends.cuda.matmul
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9
        of_conv = func in _CONVOLUTIONS
        return (backend.conv if of_conv else backend).fp32_precision == "tf32"  # type: ignore
    return bool(backend.allow_tf32)


def _line() -> str:
    """Return the innermost line of anchorpatch that is running."""
    for frame in reversed(traceback.extract_stack()):
        # Not by a folder's name: a checkout, and what is installed in it, may have it too.
        if (path := Path(frame.filename)).is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE)}:{frame.lineno}"
    return "elsewhere"


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """As nn.Module's, which would swap the fake tensors of a parameter in place."""
    for child in self.children():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = nn.Parameter(fn(parameter), parameter.requires_grad)
            self._parameters[name] = moved
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _zeros(tensor: Tensor) -> Any:
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
