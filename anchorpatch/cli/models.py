"""``anchorpatch models``."""

from __future__ import annotations

import click

from anchorpatch.cli.config import Command
from anchorpatch.cli.options import json_option
from anchorpatch.cli.output import print_json, print_table


@click.command(cls=Command)
@click.option("--classes", type=click.IntRange(min=1), default=1000, help="Number of classes.")
@click.option("--size", type=click.IntRange(min=111), default=224, help="Side of the image in px.")
@json_option
def models(classes: int, size: int, as_json: bool) -> None:
    """List the networks with their parameters, GMACs and receptive fields.

    All figures are computed from the networks. GMACs count convolutions and matrix products of
    one image. AnchorNet appears as trained, with the full class maps F, and as `extract` runs
    it, which builds the map of one class only.
    """
    from anchorpatch.models.anchornet import AnchorNet
    from anchorpatch.models.complexity import anchornet_receptive_fields, macs, parameters

    net = AnchorNet(classes)
    heads = sum(parameters(b.get_submodule("attention_classifier")) for b in net.branches)
    fields = anchornet_receptive_fields(net)
    rows = [
        {
            "network": "anchornet",
            "parameters": parameters(net),
            "gmacs": macs(net, size, net.full) / 1e9,
            "receptive_fields": list(fields),
        },
        {
            "network": "anchornet (localising)",
            "parameters": parameters(net) - heads,
            "gmacs": macs(net, size, net.localize) / 1e9,
            "receptive_fields": list(fields),
        },
    ]
    if as_json:
        print_json({"classes": classes, "size": size, "networks": rows})
        return
    print_table(
        ["network", "parameters", "GMACs", "receptive fields"],
        [
            [
                str(row["network"]),
                f"{row['parameters']:,}",
                f"{row['gmacs']:.4f}",
                ", ".join(str(field) for field in fields),
            ]
            for row in rows
        ],
    )
