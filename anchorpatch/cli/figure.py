"""``anchorpatch figure``: the figures of the paper, a command each."""

from __future__ import annotations

import click

from anchorpatch.cli.lazy import LazyGroup

__all__ = ["figure"]

#: Command -> its module in this package is ``figure_<command>``.
_FIGURES = ("patches", "errors", "attention", "coverage")


@click.group(cls=LazyGroup, names=_FIGURES, modules="figure_")
def figure() -> None:
    r"""Draw the figures of the paper from images and weights.

    Each writes one picture, by default figures/NAME.png, with a .json beside it, which
    `anchorpatch report` shows, and prints what is to be seen in it.

    \b
    anchorpatch figure patches --data imagenet     Figure 3: patches by chosen scale
    anchorpatch figure errors --data imagenet      Figure 4: what misled a branch
    anchorpatch figure attention --data imagenet   Figure 5: attention and class heatmaps
    anchorpatch figure coverage resnet50           Figure 6: accuracy by covered and masked area
    """
