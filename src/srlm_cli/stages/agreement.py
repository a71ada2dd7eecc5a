"""How far two judges rank the replies to a prompt alike: the weight of a pair (CREAM, arXiv 2410.12735)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations

from srlm_cli.errors import BadRow
from srlm_cli.records import Record


def agreement(responses: Iterable[Record], before: Iterable[Record]) -> float | None:
    """Return the consistency C = (tau + 1) / 2 in [0, 1] of the two rankings of a prompt's replies.

    tau is Kendall's: of all pairs of replies the share that both judges order alike minus the share
    that they order the other way. A pair that both tie is ordered alike, one that only one of them ties
    counts as neither (not in the paper, whose rewards are never equal), so the agreement of a judge with itself is 1.
    `before` are the same replies as the other judge scored them, found by their ids; one of another text
    raises BadRow. None where fewer than two replies are scored by both.
    """
    scores = [(row["score"], other) for row, other in by_both(responses, before) if row["score"] is not None]
    if len(scores) < 2:
        return None
    orders = [(sign(a - b), sign(c - d)) for (a, c), (b, d) in combinations(scores, 2)]
    tau = sum(1 if now == then else now * then for now, then in orders) / len(orders)
    return (tau + 1) / 2


def by_both(responses: Iterable[Record], before: Iterable[Record]) -> Iterator[tuple[Record, float]]:
    """Yield (reply, score of the other judge) of the replies that it scores; raise BadRow for another text."""
    others = {row["id"]: row for row in before}
    for row in responses:
        other = others.get(row["id"])
        if other and other["response"] != row["response"]:
            raise BadRow(
                f"response {row['id']} has another text in the --consistency-with file: expected the same "
                "responses in both files"
            )
        if other and other["score"] is not None:
            yield row, other["score"]


def disagreement(chosen: Record, rejected: Record, before: Iterable[Record]) -> str:
    """Return why another judge does not confirm a pair, or "" if it scores chosen above rejected."""
    scores = [score for _, score in by_both([chosen, rejected], before)]
    if len(scores) < 2:
        return "not scored by both judges"
    return "" if scores[0] > scores[1] else "the judges disagree"


def sign(number: float) -> int:
    """Return 1, 0 or -1."""
    return (number > 0) - (number < 0)


def mean_agreement(rankings: Iterable[tuple[list[Record], list[Record]]]) -> float | None:
    """Return the mean of `agreement` over the prompts where it is known; None where it is known of none."""
    total, count = 0.0, 0
    for responses, before in rankings:
        if (found := agreement(responses, before)) is not None:
            total, count = total + found, count + 1
    return total / count if count else None
