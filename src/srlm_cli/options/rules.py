"""Options for rules that a program checks in a reply."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from typer import Option

from srlm_cli.errors import OptionError
from srlm_cli.records import Record
from srlm_cli.rules import BadRule, RuleSet, read_rule
from srlm_cli.stages.rules import RuleOptions
from srlm_cli.streams.reader import file_hash
from srlm_cli.templates import Template

Check = Callable[[Record], Record | list[Record]]
Combine = Literal["gate", "mean", "min"]


@dataclass(frozen=True)
class RuleSource:
    """Which rules all rows have."""

    rule: Annotated[
        list[str] | None,
        Option(
            "--rule", metavar="NAME[:ARGS]", help="Rule to check in each response, such as words:..30 (repeatable)."
        ),
    ] = None
    rule_file: Annotated[
        list[str] | None,
        Option(
            "--rule-file", metavar="FILE.py:FUNCTION", help="Function that checks a response as a rule (repeatable)."
        ),
    ] = None
    run_code: Annotated[
        bool, Option("--run-code", help="Let the rule `passes` run the Python code of responses on this machine.")
    ] = False

    def rules(self) -> RuleSet:
        """Return the rules; raise OptionError for one that does not exist or that has wrong arguments."""
        try:
            found = tuple(read_rule(spec, self.run_code) for spec in self.rule or ())
        except BadRule as error:
            raise OptionError(f"--rule: {error}") from None
        if self.rule_file:
            from srlm_cli.rules.own import own_rule

            found += tuple(map(own_rule, self.rule_file))
        return RuleSet(found, self.run_code)

    def identity(self) -> dict[str, Any]:
        """Return what of the rules decides the rows."""
        files = {place: file_hash(place.rpartition(":")[0]) for place in self.rule_file or ()}
        return {"rule": self.rule or [], "rule_file": files}


@dataclass(frozen=True)
class RulesOfJudge(RuleSource):
    """The rules beside a judge, and how both make the score."""

    combine: Annotated[
        Combine | None,
        Option(
            "--combine",
            show_default="gate, with --rule or --rule-file",
            help="How rules and judge make the score: gate (lowest score if a rule is broken), mean or min.",
        ),
    ] = None

    @property
    def given(self) -> bool:
        """Whether rules are asked for."""
        return bool(self.rule or self.rule_file or self.combine)

    def options(self, template: Template, *, alone: bool = False) -> RuleOptions | None:
        """Return the rules to check, None where none are asked for; `alone` without a judge."""
        if alone and self.combine:
            raise OptionError("--model rules has no other judge to combine with", "leave out --combine")
        if not (alone or self.given):
            return None
        return RuleOptions(self.rules(), template, self.combine or "gate")

    def identity(self) -> dict[str, Any]:
        """Return what of the rules decides the rows."""
        return {**super().identity(), "combine": self.combine}


def with_rules_checked(check: Check, rules: RuleSet | None) -> Check:
    """Return a check of rows that also refuses rows whose rules are wrong; with None no rules are asked for."""
    if rules is None:
        return check

    def checked(row: Record) -> Record | list[Record]:
        found = check(row)
        for one in found if isinstance(found, list) else [found]:
            for rule in rules.of(one):
                rule.bind(one)
        return found

    return checked
