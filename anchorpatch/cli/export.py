"""``anchorpatch export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anchorpatch.cli import options as opt
from anchorpatch.cli.output import bytes_text, print_json
from anchorpatch.demo import find_weights
from anchorpatch.settings import LspSettings
from anchorpatch.storage import to_json
from anchorpatch.text import counted


@click.command(cls=opt.Command)
@opt.weights
@opt.runs
@click.option(
    "--out", type=opt.PATH, required=True, help="File to write, such as anchornet.onnx or .pt2."
)
@opt.lsp("evaluate")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@opt.as_json
def export(
    weights: str | None, runs: Path, out: Path, lsp: LspSettings, as_json: bool, **options: Any
) -> None:
    """Export AnchorNet with LSP as one ONNX or PyTorch graph.

    \b
    anchorpatch export --out anchornet.onnx
    anchorpatch export --weights demo --preset figure --out anchornet.pt2

    The graph runs without anchorpatch; as ONNX, in ONNX Runtime and other programs, without torch.
    It takes the crops of N images, uint8 RGB `pixels` (N, 224, 224, 3), or of the side that the
    weights record, and returns what `extract` stores: branch_class and branch_prob (N, 3),
    predicted, scale and counts (N,), corners (N, K, 2) as (y, x) in the crop, and scores (N, K),
    with zeros after the patches of an image. Normalization, K, T and P are part of it. The
    metadata `anchorpatch`, a JSON document, has the classes, these settings, the transform from an
    image to its crop, and the checksum of the weights. A .pt2 file is loaded by torch.export.load.

    `anchorpatch shards export` writes patches, not the network.
    """
    from anchorpatch.jobs.graph import export as export_graph

    graph = export_graph(find_weights(weights, runs), out, lsp, **options)
    if as_json:
        print_json(to_json(graph))
        return
    side = graph.about["transform"]["img_size"]
    click.echo(
        f"{out}: {counted(len(graph.about['classes']), 'class')}, pixels (N, {side}, {side}, 3), "
        f"{lsp}; {bytes_text(graph.bytes)}"
    )
