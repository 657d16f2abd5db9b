"""``anchorpatch figure``: the figures of the paper, a command each."""

from __future__ import annotations

import importlib

import click

from anchorpatch.cli.config import with_layout

__all__ = ["figure"]

#: Command -> its module in this package is ``figure_<command>``.
_FIGURES = ("patches", "coverage")


class _Figures(click.Group):
    """A group that imports a figure's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_FIGURES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _FIGURES:
            return None
        module = importlib.import_module(f"anchorpatch.cli.figure_{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        self.commands.setdefault(cmd_name, command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        self.commands.update(
            {name: click.Command(name) for name in _FIGURES if name not in self.commands}
        )
        return super().resolve_command(ctx, args)


_HELP = r"""Draw the figures of the paper from images and weights.

Each writes one picture, by default figures/NAME.png, which `anchorpatch report` shows, and
prints what is to be seen in it.

\b
anchorpatch figure patches --data imagenet      Figure 3: patches by chosen scale
"""


@click.group(cls=_Figures, help=with_layout(_HELP))
def figure() -> None:
    """Group the figures."""
