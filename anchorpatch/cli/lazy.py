"""Groups of commands whose modules are imported when a command is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import click

from anchorpatch.cli.config import with_layout

__all__ = ["LazyGroup"]


class LazyGroup(click.Group):
    """A group of commands that each have a module of this package.

    Args:
        names: of the commands, in the order of use.
        modules: what stands before a command's name in the name of its module.
    """

    def __init__(self, *args: Any, names: Sequence[str], modules: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names, self.modules = tuple(names), modules
        self.help = with_layout(self.help)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of use, not of the alphabet."""
        return list(self.names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return what has its name there."""
        if cmd_name not in self.names:
            return None
        module = importlib.import_module(f"anchorpatch.cli.{self.modules}{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        self.commands.setdefault(cmd_name, command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the commands that a mistyped one may have meant."""
        self.commands.update(
            {name: click.Command(name) for name in self.names if name not in self.commands}
        )
        return super().resolve_command(ctx, args)
