"""Rules beside the judge: what a program can check in a reply, and the score that both make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean

from srlm_cli.errors import BadRow
from srlm_cli.records import Record, is_reply
from srlm_cli.rules import RuleSet, check_reply
from srlm_cli.stages import Outcome
from srlm_cli.stages.judge import Judgement, count_judgements, judged_row
from srlm_cli.templates import Template

JUDGE = "echo:rules"  # the judge that is the rules alone


@dataclass(frozen=True)
class RuleOptions:
    """The rules, and how they make the score.

    `combine` is `gate` (the judge's score if all rules are kept, else the lowest), `mean` or `min` of the judge's score
    and that of the rules. The score of the rules is the share that is kept, on the scale of the `template`.
    """

    rules: RuleSet
    template: Template
    combine: str = "gate"

    def score(self, results: dict[str, bool | float]) -> float:
        """Return the score of the rules: the share that is kept, on the scale of the template."""
        low, high = self.template.low, self.template.high
        return low + (high - low) * fmean(results.values())

    def combined(self, judged: float | None, results: dict[str, bool | float]) -> float | None:
        """Return the score that judge and rules make; null without a score of the judge."""
        if judged is None:
            return None
        by_rules = self.score(results)
        if self.combine == "gate":
            return judged if all(value == 1 for value in results.values()) else float(self.template.low)
        return fmean((judged, by_rules)) if self.combine == "mean" else min(judged, by_rules)


def with_rules(judged: Iterable[Outcome], options: RuleOptions) -> Iterator[Outcome]:
    """Yield the outcomes of a judge with the rules in each row.

    `score` is that of judge and rules together, `score_judge` that of the judge, `score_rules` that of the rules, and
    `rules` has the result of each rule. A row without rules keeps the judge's score.
    """
    for outcome in judged:
        try:
            rows = [(row, check_reply(row, options.rules.of(row))) for row in outcome.rows]
        except BadRow as error:
            yield from (Outcome(bad=str(error), at_end=outcome.at_end) for _ in outcome.rows)
            continue
        outcome.rows = [ruled(row, results, options) if results else row for row, results in rows]
        outcome.counts = {**outcome.counts, **counts([results for _, results in rows])}
        yield outcome


def ruled(row: Record, results: dict[str, bool | float], options: RuleOptions) -> Record:
    """Return a judged record with the results of its rules, and with the score that both make."""
    return {
        **row,
        "score": options.combined(row["score"], results),
        "score_judge": row["score"],
        "score_rules": options.score(results),
        "rules": results,
        "judge": {**row["judge"], "combine": options.combine},
    }


def judge_by_rules(rows: Iterable[Record], options: RuleOptions) -> Iterator[Outcome]:
    """Yield response records judged by their rules alone: one judgement, `Score: k`, for any number of judgements.

    A row without rules is a bad row. A response that no model wrote has `score: null`, as with other judges.
    """
    judge = {"model": JUDGE, "template": options.template.name, "template_hash": options.template.hash}
    for row in rows:
        try:
            results = check_reply(row, options.rules.of(row))
        except BadRow as error:
            yield Outcome(bad=str(error))
            continue
        if not results:
            yield Outcome(bad="no rules for this row: expected the field `rules`, or --rule NAME")
            continue
        score = options.score(results)
        judgements = [Judgement(written(score), score, "rules", "stop")] if is_reply(row) else []
        yield Outcome(
            rows=[{**judged_row(row, judgements, judge), "score_rules": score, "rules": results}],
            counts=count_judgements(judgements) | counts([results]) | ({} if judgements else {"no reply": 1}),
        )


def written(score: float) -> str:
    """Return a score as a judgement."""
    return f"Score: {score:.9f}".rstrip("0").rstrip(".")


def counts(results: list[dict[str, bool | float]]) -> dict[str, int]:
    """Count the rules that were checked, and those that were kept as a whole."""
    values = [value for one in results for value in one.values()]
    return {"rules": len(values), "rules kept": sum(value == 1 for value in values)}
