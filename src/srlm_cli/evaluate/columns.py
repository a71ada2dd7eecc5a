"""Tables for a terminal: the first column to the left, figures to the right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from srlm_cli.records import Record


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of cells as texts whose columns have the same width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return ["  ".join(cells).rstrip() for cells in padded]


def printable(text: str) -> str:
    """Return a text without control characters, which could move the cursor of a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def percent(rate: float | None) -> str:
    """Return a share as per cent with one decimal, `-` if there is none."""
    return "-" if rate is None else f"{100 * rate:.1f}%"


def with_interval(row: Record | None, write: Callable[[float], str], unit: str = "") -> str:
    """Return a metric as `VALUE [LOW, HIGH]`, without brackets if it has no interval, `-` if it has no value."""
    if row is None or row["value"] is None:
        return "-"
    value = f"{write(row['value'])}{unit}"
    return value if row["ci_low"] is None else f"{value} [{write(row['ci_low'])}, {write(row['ci_high'])}]"
