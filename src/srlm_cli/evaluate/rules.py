"""How many rules replies keep: the check of a model that no judge has a part in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from srlm_cli.errors import LimitExceeded
from srlm_cli.records import Record
from srlm_cli.rules import Rule, check_reply
from srlm_cli.stats.bootstrap import measured

KEPT = "rules_kept"


@dataclass(frozen=True)
class Kept:
    """The replies to one prompt: name and result of each rule, whether each reply keeps all, and its characters."""

    names: list[str]
    results: list[float]
    whole: list[float]
    lengths: list[int]


def kept_of(row: Record, rules: tuple[Rule, ...]) -> Kept:
    """Return the results of a response record; raise BadRow if a rule cannot be checked."""
    results = check_reply(row, rules)
    names = {rule.spec: rule.name for rule in rules}
    values = [float(value) for value in results.values()]
    whole = [float(min(values) == 1)] if values else []
    return Kept([names[spec] for spec in results], values, whole, [len(row["response"] or "")])


def rule_metrics(
    prompts: Iterable[Kept], names: Iterable[str], models: set[str | None] | None = None, seed: int = 0
) -> list[Record]:
    """Return `rules_kept` for each rule (`rule`) and for all, `all_rules_kept`, and the mean `length` of replies.

    The intervals are a bootstrap over prompts with `seed`. `models` are the writers of the replies; a single one is
    named in each row.
    """
    by_rule = {name: partial(results_of, name=name) for name in sorted(names)}
    total = {KEPT: lambda one: one.results, "all_rules_kept": lambda one: one.whole, "length": lambda one: one.lengths}
    keys = [*(("rule", name) for name in by_rule), *(("", name) for name in total)]
    functions = [*by_rule.values(), *total.values()]
    rows = measured("rules", prompts, dict(zip(map(str, keys), functions, strict=True)), seed)
    model = {"model": next(iter(models))} if models and len(models) == 1 and None not in models else {}
    return [
        {**row, "metric": KEPT if part else name, **({"rule": name} if part else {}), **model}
        for row, (part, name) in zip(rows, keys, strict=True)
    ]


def results_of(one: Kept, name: str) -> list[float]:
    """Return the results of one rule."""
    return [value for rule, value in zip(one.names, one.results, strict=True) if rule == name]


def total_kept(rows: Iterable[Record]) -> Record | None:
    """Return the metric of all rules together, None where there is none."""
    return next((row for row in rows if row["metric"] == KEPT and "rule" not in row), None)


def fell(rows: list[Record], before: Record, max_fall: float) -> LimitExceeded | None:
    """Return an error if the share of rules kept is lower than before by more than `max_fall`."""
    now, earlier = total_kept(rows)["value"], before["value"]
    if now is None or earlier is None or earlier - now <= max_fall:
        return None
    return LimitExceeded(
        f"{now:.1%} of the rules are kept, {earlier:.1%} in the previous round: it fell by more than "
        f"--max-fall {max_fall}",
        "the model of the previous round is the better one; a larger --max-fall continues",
    )
