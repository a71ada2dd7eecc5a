"""docs/commands.md is made from the commands' own help; `--write` makes it anew, a test checks it."""

from __future__ import annotations

import sys
from pathlib import Path

from srlm_cli.cli import COMMANDS, CONTEXT, command

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
INTRO = """# The commands

The help of every command, as `srlm COMMAND --help` prints it. This page is made by `make docs`.
"""


def render() -> str:
    """Return the whole page."""
    parts = [INTRO]
    for name in COMMANDS:
        group = command(name)
        for title, one in {f"{name} {sub}": sub for sub in getattr(group, "commands", {})}.items() or [(name, None)]:
            made = group.commands[one] if one else group
            context = made.context_class(made, info_name=f"srlm {title}", terminal_width=100, **inherited())
            parts.append(f"## srlm {title}\n\n```text\n{made.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


def inherited() -> dict:
    return {key: value for key, value in CONTEXT.items() if key in ("help_option_names", "token_normalize_func")}


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(render(), encoding="utf-8")
    else:
        print(render())
