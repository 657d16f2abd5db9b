"""The localizer as one graph for other programs: ONNX, or an exported program of PyTorch.

The graph is traced from the code that `anchorpatch extract` runs, with the weights and the settings
of LSP inside. It takes uint8 pixels and returns the fields of
`anchorpatch.jobs.localizer.Localized`, for any number of images.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import anchorpatch
from anchorpatch.errors import MissingDependency, SettingsError, StorageError
from anchorpatch.jobs.localizer import Localized, Localizer
from anchorpatch.runtime.checkpoint import WeightsMeta, load_weights
from anchorpatch.settings import SCALES, STRIDE, LspSettings
from anchorpatch.storage import write_atomically

#: Name of the metadata in a graph, one JSON document.
KEY: Final = "anchorpatch"

#: Of the operators; ONNX Runtime has it from version 1.14 on.
_OPSET: Final = 18


@dataclass(frozen=True)
class Graph:
    """A graph that was written.

    Attributes:
        path: of the file.
        bytes: its size.
        sha256: of the file's bytes, in hexadecimal.
        about: the metadata that the file holds.
    """

    path: Path
    bytes: int
    sha256: str
    about: dict[str, Any]


class _Stage(nn.Module):
    """Calls the localizer as a module, which exporters ask for."""

    def __init__(self, localizer: Localizer) -> None:
        super().__init__()
        # Channels-last weights, which suit the CPU here, need not suit where the graph will run.
        self.net = localizer.net.to(memory_format=torch.contiguous_format)
        self._localizer = localizer

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self._localizer.localize(pixels)


def export(
    weights: Path,
    out: Path,
    lsp: LspSettings,
    *,
    preset: str | None = None,
    overwrite: bool = False,
) -> Graph:
    """Write AnchorNet, decision and Algorithm 1 as one graph in float32.

    Args:
        weights: file of AnchorNet's weights.
        out: file to write; its ending says the format, ``.onnx`` or ``.pt2``.
        lsp: K, T and P of Algorithm 1.
        preset: name of the preset that they are from, for the metadata.
        overwrite: replace ``out`` where it exists.

    Raises:
        SettingsError: ``out`` has another ending.
        MissingDependency: the exporter of ONNX is not installed.
        WeightsError: the weights cannot be read, or are another network's.
        NonFiniteError: the network produces NaN or infinity.
        StorageError: ``out`` exists, or the disk refuses.
    """
    written = {".onnx": onnx_bytes, ".pt2": _pt2_bytes}.get(out.suffix.lower())
    if written is None:
        raise SettingsError(f"--out: expected a name that ends with .onnx or .pt2, got {out}")
    if written is onnx_bytes:
        _onnxscript()  # or say so at once
    if out.exists() and not overwrite:
        raise StorageError(f"{out} exists: choose another --out, or replace it with --overwrite")
    loaded = load_weights(weights)
    with Localizer(loaded, lsp, torch.device("cpu"), "torch") as localizer:
        pixels = torch.zeros(2, localizer.side, localizer.side, 3, dtype=torch.uint8)
        localizer.submit(pixels).result()  # a graph cannot complain of NaN
        program = traced(_Stage(localizer), pixels)
    about = _about(loaded.meta, loaded.sha256, lsp, preset)
    content = written(program, json.dumps(about, ensure_ascii=False), ("pixels",))
    write_atomically(out, lambda file: file.write(content), len(content))
    return Graph(out, len(content), hashlib.sha256(content).hexdigest(), about)


def _about(meta: WeightsMeta, sha256: str, lsp: LspSettings, preset: str | None) -> dict[str, Any]:
    """Return what a graph says about itself."""
    return {
        "format": 1,
        "version": anchorpatch.__version__,
        "weights_sha256": sha256,
        "classes": meta.classes,
        "scales": SCALES,
        "stride": STRIDE,
        "settings": {"preset": preset, **asdict(lsp)},
        "transform": {
            "crop_mode": meta.crop_mode,
            "img_size": meta.crop,
            "crop_pct": meta.crop_pct,
            "resize": meta.cropping.resize,
            "interpolation": "bilinear",
            "background": meta.background,
            "mean": meta.mean,  # these two are applied in the graph
            "std": meta.std,
        },
    }


def traced(module: nn.Module, *inputs: Tensor) -> ExportedProgram:
    """Return a module's program for a batch of any size.

    Args:
        module: whose inputs and outputs all have the batch as their first dimension.
        inputs: an example, of more than one image.
    """
    batch = Dim("batch")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = tuple({0: batch} for _ in inputs)
        module.eval().requires_grad_(False)  # or outputs of the program would require it
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _pt2_bytes(program: ExportedProgram, about: str, inputs: tuple[str, ...]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, file, extra_files={KEY: about})
    return file.getvalue()


def onnx_bytes(program: ExportedProgram, about: str, inputs: tuple[str, ...]) -> bytes:
    """Return a program as an ONNX model.

    Args:
        program: from `traced`, with the outputs of `Localized`.
        about: JSON for the metadata `KEY`.
        inputs: names of its inputs.

    Raises:
        MissingDependency: the exporter is not installed.
    """
    ops = _onnxscript()

    def divide(x: Any, y: Any, rounding_mode: Any = None) -> Any:
        return ops.Div(x, y)  # which cuts integers off; the exporter would divide in float32

    table: dict[Any, Callable[..., Any]] = {torch.ops.aten.div.Tensor_mode: divide}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            input_names=inputs,
            output_names=Localized._fields,
            custom_translation_table=table,
        )
    assert converted is not None
    model = converted.model_proto
    model.producer_name, model.producer_version = "anchorpatch", anchorpatch.__version__
    model.metadata_props.add(key=KEY, value=about)
    graph = model.graph
    del graph.value_info[:]
    for node in graph.node:  # of which line of code it comes, with paths of this machine
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _onnxscript() -> Any:
    """Return the operators of ONNX, to write graphs with.

    Raises:
        MissingDependency: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        from onnxscript import opset18
    except ImportError as error:
        raise MissingDependency(
            "--out FILE.onnx needs the packages onnx and onnxscript, which are not installed: run "
            "pip install 'anchorpatch[onnx]', or use --out FILE.pt2"
        ) from error
    return opset18
