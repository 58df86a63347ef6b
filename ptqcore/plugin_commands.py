"""Commands that plugins bring: `ptq NAME …`, imported when one of them is called and not before."""

from functools import cached_property
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ptqcore.errors import PluginError
from ptqcore.plugin import Plugin, Registry, discover, resolve


class PluginCommands(TyperGroup):
    """The core's own commands, and one more for each plugin that brings commands.

    The core's come first: a plugin cannot take the name of one.
    """

    @cached_property
    def registry(self) -> Registry:
        """The installed plugins, looked for when a name is asked for that is not the core's."""
        return discover()

    def list_commands(self, ctx: Any) -> list[str]:
        """Names for the help."""
        brought = [
            entry.name for entry in self.registry.installed if entry.plugin and entry.plugin.commands
        ]
        return [*self.commands, *(name for name in brought if name not in self.commands)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A line for the help: a plugin's commands are not imported for it."""
        if cmd_name in self.commands or cmd_name not in self.list_commands(ctx):
            return super().get_command(ctx, cmd_name)
        return TyperCommand(cmd_name, help=f"Commands of the plugin {cmd_name}.")

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command to run."""
        name = args[0]
        if name in self.commands or name not in [entry.name for entry in self.registry.installed]:
            return super().resolve_command(ctx, args)
        return name, load_commands(self.registry.plugin(name)), args[1:]


def load_commands(plugin: Plugin) -> TyperGroup:
    """Import the commands of a plugin.

    Raises:
        PluginError: if it brings none, or they cannot be imported or are no typer app.
    """
    if plugin.commands is None:
        raise PluginError(
            f"plugin {plugin.name!r} brings no commands: use it with ptq quantize --plugin {plugin.name}"
        )
    app = resolve(plugin.commands, plugin.name)
    if not isinstance(app, typer.Typer):
        raise PluginError(
            f"plugin {plugin.name!r} names {plugin.commands} as its commands, "
            f"which is a {type(app).__name__}, not a typer.Typer"
        )
    return typer.main.get_group(app)
