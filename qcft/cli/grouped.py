"""`qcft --help`: the commands in groups, as plain text."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

RUN, LOOK, COMPARE, USE, KEEP = "Run", "Look", "Compare", "Use", "Maintain"
GROUPS = (RUN, LOOK, COMPARE, USE, KEEP)
LONGEST = 200  # characters of a command's first sentence


class Grouped(TyperGroup):
    """Lists the commands by group (Typer's `rich_help_panel`), in the order in which they were registered."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group: every command with its first sentence."""
        for group in GROUPS:
            with formatter.section(group):
                formatter.write_dl(
                    [
                        (name, one.get_short_help_str(LONGEST))
                        for name, one in self.commands.items()
                        if getattr(one, "rich_help_panel", None) == group
                    ]
                )
