"""Rules that a program can check in a reply: built-in checks by name, and your own functions.

A rule is written `NAME`, `NAME:ARGS`, or `NAME=FIELD` for arguments from a field of the row; `not-` before a name
inverts the check. All checks but `passes`, which runs code, are deterministic: a reply always gets the same result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from srlm_cli.errors import BadRow, OptionError
from srlm_cli.records import Record, is_number, is_reply
from srlm_cli.rules.checks import CHECKS, CODE, PLAIN, BadRule, Check, TooSlow

__all__ = ["BadRule", "Rule", "RuleSet", "check_reply", "names", "read_rule", "rules_of_row"]

SPEC = re.compile(r"(?P<not>not-)?(?P<name>[a-z][a-z-]*)(?:(?P<sign>[:=])(?P<rest>.*))?", re.DOTALL)
OWN = "own:"  # before the name of your own function


@dataclass(frozen=True)
class Rule:
    """A rule: its text, its name without arguments, and its check for a row.

    `bind` takes the row and returns the check of a reply: true, false, or the share of the rule that was kept. It
    raises BadRow if the row lacks the field of the arguments.
    """

    spec: str
    name: str
    bind: Callable[[Record], Callable[[str], bool | float]]


@dataclass(frozen=True)
class RuleSet:
    """The rules for all rows, which come before those in the field `rules` of a row; `run_code` allows `passes`."""

    for_all: tuple[Rule, ...] = ()
    run_code: bool = False

    def of(self, row: Record) -> tuple[Rule, ...]:
        """Return all rules for a row; raise BadRow if one of its own is wrong."""
        return self.for_all + rules_of_row(row, self.run_code)


def names() -> list[str]:
    """Return the names of the built-in rules."""
    return sorted(CHECKS)


@lru_cache(maxsize=4096)
def read_rule(spec: str, run_code: bool = False) -> Rule:
    """Return the built-in rule that a text names; raise BadRule if there is none, or if its arguments are wrong.

    Raises OptionError for a rule that runs the code of replies, unless `run_code` allows it: a record can name it.
    """
    found = SPEC.fullmatch(spec.strip())
    name = found["name"] if found else ""
    if name not in CHECKS:
        raise BadRule(f"no rule {spec!r}; the rules are {', '.join(names())}; not- before a name inverts it")
    if name in CODE and not run_code:
        raise OptionError(f"the rule `{name}` runs the code of replies", "--run-code allows it; see docs/rules.md")
    inverse = bool(found["not"])
    shown = ("not-" if inverse else "") + name
    if found["sign"] == "=":
        if name in PLAIN:
            raise BadRule(f"rule {name} takes no arguments, got {spec!r}")
        return Rule(spec, shown, of_field(name, found["rest"], inverse))
    check = inverted(made(name, found["rest"]), inverse)
    return Rule(spec, shown, lambda row: check)


@lru_cache(maxsize=4096)
def made(name: str, args: str | None) -> Check:
    """Return the check of a rule with these arguments; raise BadRule if they are wrong."""
    return CHECKS[name](args)


def of_field(name: str, place: str, inverse: bool) -> Callable[[Record], Check]:
    """Return what binds a rule to the field at a dotted `place` of a row; `~T` at its end stays with the arguments."""
    path, sign, tolerance = place.partition("~")
    if not path:
        raise BadRule(f"expected the name of a field after {name}=")

    def bind(row: Record) -> Check:
        value: Any = row
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if name in CODE and isinstance(value, list) and all(isinstance(one, str) for one in value):
            value = "\n".join(value)  # as in MBPP
        if not (isinstance(value, str) or is_number(value)):
            raise BadRow(f"rule {name}={place} needs `{path}`, a text or a number, got {value!r}")
        try:
            return inverted(made(name, f"{value}{sign}{tolerance}"), inverse)
        except BadRule as error:
            raise BadRow(f"`{path}`: {error}") from None

    return bind


def inverted(check: Check, inverse: bool) -> Check:
    """Return a check, or its opposite."""
    return (lambda text: not check(text)) if inverse else check


def rules_of_row(row: Record, run_code: bool = False) -> tuple[Rule, ...]:
    """Return the rules in the field `rules` of a row; raise BadRow if one is wrong.

    `rules` is a list of texts, or the results of an earlier check, an object by the text of each rule. Results of
    your own functions name no rule that can be read again.
    """
    given = row.get("rules")
    if given is None:
        return ()
    if isinstance(given, dict):
        given = asked_in(given)
    if not isinstance(given, list) or not all(isinstance(spec, str) for spec in given):
        raise BadRow(f"expected `rules`, a list of texts such as 'words:..30', got {given!r}")
    try:
        return tuple(read_rule(spec, run_code) for spec in given)
    except BadRule as error:
        raise BadRow(f"`rules`: {error}") from None


def asked_in(results: Record) -> list[str]:
    """Return the rules of which an object has the results, as a row lists them before a check."""
    return [spec for spec in results if not spec.startswith(OWN)]


def check_reply(row: Record, rules: tuple[Rule, ...]) -> dict[str, bool | float]:
    """Return the result of each rule for the reply of a response record, by the text of the rule.

    A reply without text, or one that no model wrote (see `records.is_reply`), keeps no rule. Raises BadRow if a check
    takes too long, or if the row lacks a field.
    """
    text = row["response"].strip() if is_reply(row) else ""
    results: dict[str, bool | float] = {}
    for rule in rules:
        check = rule.bind(row)
        try:
            results[rule.spec] = check(text) if text else False
        except TooSlow as error:
            raise BadRow(f"rule {rule.spec!r}: {error}") from None
    return results
