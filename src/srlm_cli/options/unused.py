"""Settings that a mode of a command has no use for: they are set aside, because they are for its other calls.

A setting comes from srlm.toml or from the environment, and a mode is asked for by an option. What is typed on the
command line, and what comes from where the mode comes from, is never set aside: the command can refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from typer import Context

from srlm_cli.errors import OptionError
from srlm_cli.options.renamed import Command, section
from srlm_cli.streams.console import say

STRENGTH = {"DEFAULT_MAP": 1, "ENVIRONMENT": 2, "COMMANDLINE": 3}
STRONGEST = max(STRENGTH.values())
Strength = Callable[[str], int]
Unused = Callable[[dict[str, Any], Strength], tuple[str, int, Collection[str]]]
Needs = Callable[[dict[str, Any]], Mapping[str, str]]


def command_with(unused: Unused | None = None, needs: Needs | None = None) -> type[Command]:
    """Return the class of a command with options that other options make useless, or useful.

    `unused` takes the values of all options by parameter name, and the strength of where a value comes from. It returns
    the name of the mode, its strength, and the parameters that it has no use for. `needs` takes the values, and returns
    the parameters that have no effect without another option, with that option.
    """

    class Modal(Command):
        def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
            left = super().parse_args(ctx, args)
            if ctx.resilient_parsing:
                return left
            if unused:
                set_aside(ctx, *unused(ctx.params, lambda name: strength(ctx, name)))
            if needs and (lacking := needs(ctx.params)):
                refuse_typed(ctx, lacking)
                set_aside(ctx, "this call", STRONGEST, lacking)
            return left

    return Modal


def refuse_typed(ctx: Context, lacking: Mapping[str, str]) -> None:
    """Raise OptionError for an option on the command line that lacks the option without which it has no effect."""
    for option in ctx.command.params:
        typed = strength(ctx, option.name) == STRONGEST and ctx.params[option.name] != option.default
        if typed and option.name in lacking:
            raise OptionError(f"{long_name(option)} has no effect here", f"it needs {lacking[option.name]}")


def long_name(option: Any) -> str:
    """Return the longest name of an option."""
    return max(option.opts, key=len)


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
            changed.append(long_name(option).lstrip("-"))
        ctx.params[option.name] = own
    if changed and not ctx.params.get("quiet"):
        places = {1: ctx.params.get("config") or "srlm.toml", 2: "the environment"}
        where = " and ".join(places[found] for found in sorted({strength(ctx, p.name) for p in settings}))
        why = f"are ignored, because {mode} does not use them"
        say(f"srlm {section(ctx)}: settings in {where} {why}: {', '.join(changed)}")
