"""Variables of options: `SRLM_<COMMAND>_<OPTION>` comes before one of all commands, such as `SRLM_SEED`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

from typer import Context


def prefer_own(options: Iterable[Any]) -> None:
    """Let the options of a command that have a shared variable read the command's own one first."""
    for option in options:
        if getattr(option, "envvar", None):
            option.resolve_envvar_value = partial(_value, option)


def variable_of(option: Any, ctx: Context) -> str:
    """Return the environment variable that an option has its value from: the first that is set of those it reads."""
    shared = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
    return next(name for name in (_own(option, ctx), *shared) if os.environ.get(name))


def _value(option: Any, ctx: Context) -> str | None:
    return os.environ.get(_own(option, ctx)) or type(option).resolve_envvar_value(option, ctx)


def _own(option: Any, ctx: Context) -> str:
    return f"{ctx.auto_envvar_prefix}_{option.name.upper()}"
