"""Settings that a mode of a command has no use for: they are set aside, because they are for its other calls.

A setting comes from srlm.toml or from the environment, and a mode is asked for by an option. What is typed on the
command line, and what comes from where the mode comes from, is never set aside: the command can refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from typer import Context

from srlm_cli.options.renamed import Command, section
from srlm_cli.streams.console import say

STRENGTH = {"DEFAULT_MAP": 1, "ENVIRONMENT": 2, "COMMANDLINE": 3}
STRONGEST = max(STRENGTH.values())
Strength = Callable[[str], int]
Unused = Callable[[dict[str, Any], Strength], tuple[str, int, Collection[str]]]


def command_with(unused: Unused) -> type[Command]:
    """Return the class of a command with modes.

    `unused` takes the values of all options by parameter name, and the strength of where a value comes from. It returns
    the name of the mode, its strength, and the parameters that it has no use for.
    """

    class Modal(Command):
        def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
            left = super().parse_args(ctx, args)
            if not ctx.resilient_parsing:
                set_aside(ctx, *unused(ctx.params, lambda name: strength(ctx, name)))
            return left

    return Modal


def strength(ctx: Context, name: str) -> int:
    """Return how strong the source of a value is: 0 is the option's own default, 3 the command line."""
    source = ctx.get_parameter_source(name)
    return STRENGTH.get(source.name, 0) if source else 0


def set_aside(ctx: Context, mode: str, strongest: int, names: Collection[str]) -> None:
    """Give parameters whose setting is weaker than a mode their own default, and name those that had another value."""
    settings = [p for p in ctx.command.params if p.name in names and 0 < strength(ctx, p.name) < strongest]
    without = {option.name for option in settings}
    ctx.default_map = {key: value for key, value in (ctx.default_map or {}).items() if key not in without}
    changed = []
    for option in settings:
        own = option.process_value(ctx, option.get_default(ctx))
        if own != ctx.params[option.name]:
            changed.append(max(option.opts, key=len).lstrip("-"))
        ctx.params[option.name] = own
    if changed and not ctx.params.get("quiet"):
        say(f"srlm {section(ctx)}: settings that {mode} has no use for: {', '.join(changed)}")
