"""Which numbers an option takes: finite ones, and whole ones that fit in 32 bits, in every command."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

from typer import BadParameter, Context

LARGEST = 2**32 - 1  # the largest seed that NumPy takes, and so a training
DRAWS = 2**16  # of one row: their seeds are made together
NUMBERS = (int, float, list[int], list[float])


def bound(options: Iterable[Any]) -> None:
    """Let the options of a command that are numbers refuse those that nothing below could take."""
    for option in options:
        if option.type_descriptor.annotation in NUMBERS and option.callback is None:
            option.callback = in_range


def in_range(context: Context, option: Any, value: Any) -> Any:
    """Return the value of an option; raise BadParameter if it has an infinite number, NaN or too large a whole one."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, float) and not isfinite(number):
            raise BadParameter(f"{number} is not a finite number", ctx=context, param=option)
        if isinstance(number, int) and abs(number) > LARGEST:
            least = -LARGEST if option.min is None else option.min
            raise BadParameter(f"must be from {least} to {LARGEST}", ctx=context, param=option)
    return value
