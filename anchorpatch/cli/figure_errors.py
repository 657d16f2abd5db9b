"""``anchorpatch figure errors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from anchorpatch.cli.config import Command
from anchorpatch.cli.figure_options import figure_options, inputs
from anchorpatch.cli.output import print_json, print_table

__all__ = ["errors"]


@click.command(cls=Command)
@click.option(
    "--per-scale", type=click.IntRange(min=1), default=3, help="Errors to show of each branch."
)
@click.option(
    "--scale",
    "scales",
    type=click.Choice(["63", "95", "111"]),
    multiple=True,
    default=("63", "111"),
    help="Branch whose errors to show, several times.",
)
@figure_options("errors", 500)
def errors(
    per_scale: int, scales: tuple[str, ...], out: Path, device: str, as_json: bool, **options: Any
) -> None:
    r"""Draw what misled a branch where another one is right (Figure 4).

    A row shows an image, the branch's patch with the most evidence for the class that it
    predicts and the one for the true class, and the image of the mistaken class that the branch
    is surest about, with its patches. The most confident errors are shown, spread over the
    classes.

    \b
    anchorpatch figure errors --data imagenet --limit 5000
    anchorpatch figure errors --scale 63 --classes typewriter,corn
    """
    from anchorpatch.figures import errors_figure
    from anchorpatch.figures.errors import ErrorsConfig, find_errors
    from anchorpatch.figures.files import save_figure
    from anchorpatch.runtime.progress import reporter

    source, weights, choice = inputs(out=out, **options)
    config = ErrorsConfig(choice, tuple(map(int, scales)), per_scale, device=device)
    result = find_errors(source, weights, config, reporter())
    facts = result.to_json()
    save_figure(errors_figure(result), out, facts)
    if as_json:
        print_json({**facts, "picture": str(out)})
        return
    print_table(
        ["image", "branch", "class", "taken for", "probability", "right by"],
        [
            [
                *(error.path, f"{scale} px", error.true.name, error.mistaken.name),
                *(f"{error.mistaken.probability:.0%}", "/".join(map(str, error.right))),
            ]
            for scale, of_scale in result.errors.items()
            for error in of_scale
        ],
    )
    click.echo(f"{result.caption}\n{out}")
