"""Rules that are your own functions, from a Python file: `my_rules.py:function`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from srlm_cli.errors import BadRow, OptionError
from srlm_cli.records import Record, is_number
from srlm_cli.rules import OWN, Rule


def own_rule(place: str) -> Rule:
    """Return the rule of a function in a file; raise OptionError if it cannot be loaded.

    The function takes a response record, a dictionary with `prompt` and `response`, and returns true, false, or a
    number from 0 to 1. It is not called for a reply without text.
    """
    path, _, name = place.rpartition(":")
    if not path or not name:
        raise OptionError(f"--rule-file {place} does not name a function", "my_rules.py:function")
    function = getattr(loaded(path), name, None)
    if not callable(function):
        raise OptionError(f"--rule-file {place}: {path} has no function {name}")
    spec = f"{OWN}{Path(path).stem}.{name}"
    return Rule(spec, spec, lambda row: lambda _: called(function, row, place))


def loaded(path: str) -> Any:
    """Return the module of a Python file."""
    if not Path(path).is_file():
        raise OptionError(f"--rule-file: there is no file {path}", "my_rules.py:function")
    spec = spec_from_file_location(f"srlm_rules_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise OptionError(f"--rule-file {path}: not a Python file", "its name has to end in .py")
    module = module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the user's code: any error can come out
        raise OptionError(f"--rule-file {path}: {type(error).__name__}: {error}") from None
    return module


def called(function: Callable[[Record], Any], row: Record, place: str) -> bool | float:
    """Return what the function says of a row; raise BadRow if it fails, or says something else."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = function(dict(row))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as above
        raise BadRow(f"--rule-file {place}: {type(error).__name__}: {error}") from None
    if not (isinstance(found, bool) or (is_number(found) and 0 <= found <= 1)):
        raise BadRow(f"--rule-file {place} has to return true, false, or a number from 0 to 1, got {found!r}")
    return found
