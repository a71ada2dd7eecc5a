"""Kinds of judging compared on the same ranked replies: agreement with people, order bias, cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from srlm_cli.evaluate.columns import aligned, percent, printable, with_interval
from srlm_cli.evaluate.reward import BEST, Replies, Where, agreement, replies_of, reward_metrics
from srlm_cli.records import ENDS, FULL_SCORE, Record, is_reply
from srlm_cli.stats.bootstrap import measured

TASK = "judges"


@dataclass(frozen=True)
class OfKind(Replies):
    """The replies to one prompt as one kind of judging judged them, and what that cost.

    `judgements` has the number for each reply, `without_score` a reason for each reply whose score is null.
    `first_wins` says for each comparison that the judge decided whether the reply shown first was better. `tokens_in`
    and `tokens_out` have one number, for all replies.
    """

    judgements: list[int] = field(default_factory=list)
    without_score: list[str] = field(default_factory=list)
    first_wins: list[bool] = field(default_factory=list)
    tokens_in: list[int] = field(default_factory=list)
    tokens_out: list[int] = field(default_factory=list)


def of_kind(group: Sequence[Record], seed: int) -> OfKind:
    """Return the rows of one prompt and one kind (`stages.judge_kinds`) as numbers."""
    own = replies_of(list(group), seed, BEST)
    return OfKind(
        **{name: getattr(own, name) for name in Replies.__dataclass_fields__},
        judgements=[len(row["judgements"]) for row in group],
        without_score=[why_not(row) for row in group if row["score"] is None],
        first_wins=[*first_of_two(group), *first_of_group(group)],
        tokens_in=[group[0]["tokens_in"]],
        tokens_out=[group[0]["tokens_out"]],
    )


def why_not(row: Record) -> str:
    """Return why a judged reply has no score."""
    if not is_reply(row):
        return "no reply"
    if not row["judgements"]:
        return "only reply"
    reasons = [reason for reason in row["judgement_finish_reasons"] if reason not in ENDS]
    if reasons:
        return Counter(reasons).most_common(1)[0][0].replace("-", " ").replace("_", " ")
    low = any(mass is not None for mass in row.get("score_mass", ()))
    return "low score mass" if low else "unreadable"


def first_of_two(group: Iterable[Record]) -> Iterator[bool]:
    """Yield for each verdict of `pairwise` with a winner whether it is the reply that was shown first."""
    for row in group:
        for game, score in zip(row.get("comparisons", ()), row["scores"], strict=False):
            if game["shown_first"] and score is not None and score != FULL_SCORE / 2:
                yield score > FULL_SCORE / 2


def first_of_group(group: Sequence[Record]) -> Iterator[bool]:
    """Yield for each two replies to which an answer of `group` gives different scores whether the earlier has more."""
    shown = [row for row in group if row.get("places")]
    for one, other in combinations(shown, 2):
        for places in zip(one["places"], other["places"], one["scores"], other["scores"], strict=True):
            at, at_other, score, score_other = places
            if None not in (score, score_other) and score != score_other:
                yield (at < at_other) == (score > score_other)


def judges_metrics(kinds: Mapping[str, Iterable[OfKind]], about: Mapping[str, Record], seed: int = 0) -> list[Record]:
    """Return one row per kind: its `pairwise_accuracy`, as in `evaluate.reward`, and beside it ties, order bias, cost.

    All kinds have the same prompts in the same order. `difference` is the accuracy minus that of the first kind, with
    its interval over the same draws of prompts. `about` has further fields of each row.
    """
    rows = []
    first = next(iter(kinds.values()))
    for name, prompts in kinds.items():
        several = Where(prompts, lambda one: len(one.human) > 1)
        found = {row["metric"]: row for row in reward_metrics(several, seed)}
        row = {**found["pairwise_accuracy"], "task": TASK, "kind": name, **about[name]}
        row["difference"] = None if prompts is first else less_first(prompts, first, seed)
        row["tie_rate"] = found["tie_rate"]["value"]
        row["first_position"] = first_position(prompts, seed)
        rows.append(row | totals(prompts))
    return rows


def less_first(prompts: Iterable[OfKind], first: Iterable[OfKind], seed: int) -> Record:
    """Return the accuracy of one kind minus that of another, pair by pair, with its interval."""

    def by_pair(both: tuple[OfKind, OfKind]) -> list[int]:
        mine, other = (agreement(one.human, one.scores) for one in both)
        return [a - b for a, b in zip(mine, other, strict=True)]

    return figure(measured(TASK, zip(prompts, first, strict=True), {"difference": by_pair}, seed))


def first_position(prompts: Iterable[OfKind], seed: int) -> Record | None:
    """Return the share of the decided comparisons that the reply shown first won, None without such comparisons."""
    found = figure(measured(TASK, prompts, {"first_position": lambda one: one.first_wins}, seed))
    return found if found["n"] else None


def figure(rows: list[Record]) -> Record:
    """Return the numbers of the only metric."""
    [row] = rows
    return {name: row[name] for name in ("value", "n", "ci_low", "ci_high")}


def totals(prompts: Iterable[OfKind]) -> Record:
    """Return the replies, those without a score by reason, the judgements and the tokens."""
    sums: Counter[str] = Counter()
    without: Counter[str] = Counter()
    for one in prompts:
        sums["num_responses"] += len(one.human)
        sums["num_judgements"] += sum(one.judgements)
        sums["tokens_in"] += sum(one.tokens_in)
        sums["tokens_out"] += sum(one.tokens_out)
        without.update(one.without_score)
    names = ("num_responses", "num_judgements", "tokens_in", "tokens_out")
    return {**{name: sums[name] for name in names}, "without_score": dict(without.most_common())}


# --- the table -------------------------------------------------------------------------------


def table(rows: Sequence[Record], seconds: Mapping[str, float | None]) -> list[str]:
    """Return a table of the kinds as lines; `seconds` are those per reply, None if they were not measured."""
    first = printable(rows[0]["kind"])
    head = ["", "accuracy [95%]", f"minus {first}", "ties", "first shown wins"]
    head += ["judgements", "tokens in", "tokens out", "seconds", "no score"]
    lines = [head]
    for row in rows:
        lines.append(
            [
                printable(row["kind"]),
                with_interval(row, in_percent, "%"),
                with_interval(row["difference"], lambda share: f"{100 * share:+.1f}"),
                percent(row["tie_rate"]),
                with_interval(row["first_position"], in_percent, "%"),
                *(each(row[name], row) for name in ("num_judgements", "tokens_in", "tokens_out")),
                "-" if seconds[row["kind"]] is None else f"{seconds[row['kind']]:.3g}",
                reasons(row["without_score"]),
            ]
        )
    title = "accuracy: pairs ordered as people did (a tie is a miss); judgements, tokens and seconds are per reply"
    return [title, *aligned(lines)]


def in_percent(share: float) -> str:
    """Return a share in per cent, without the sign."""
    return f"{100 * share:.1f}"


def each(total: int, row: Mapping[str, Any]) -> str:
    """Return a total per reply."""
    return f"{total / row['num_responses']:.1f}" if row["num_responses"] else "-"


def reasons(without: Mapping[str, int]) -> str:
    """Return how many replies have no score, with the reasons."""
    named = ", ".join(f"{count} {reason}" for reason, count in without.items())
    return printable(named) or "0"
