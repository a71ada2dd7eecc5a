"""Pick two replies to a prompt as a pair: best and worst as in the paper, and the variants of docs/pairs.md.

`value` is the score that decides: the judge's score minus `alpha` times the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import pstdev

from srlm_cli.records import Record, is_number
from srlm_cli.seeds import derive, share

SHUFFLED = "shuffled_labels"  # of a pair
ROUNDING = 1e-9  # scores are means of K: a third of five has to be within a tier that ends there


@dataclass(frozen=True)
class Choice:
    """How chosen and rejected are picked; the default is the highest against the lowest score.

    `min_gap` is the smallest difference of their values; equal scores never make a pair. `rho` widens best and worst
    to tiers (arXiv 2407.19594, section 2.1): chosen is the shortest reply of the upper tier, rejected the longest of
    the lower tier. `alpha` is the penalty per character (arXiv 2406.09760). Rejected is the worst of `rejected_of`
    replies that are drawn at random (arXiv 2502.16825). A pair whose chosen reply has more than `max_chosen_length`
    characters is dropped, and one whose chosen reply scores less than `min_chosen_score`. `seed` decides between equal
    replies: the papers give no rule, and the order in the file would favour the first reply. With `shuffle_labels` it
    then also decides which of the two is chosen: a control, from whose pairs nothing can be learned. With `tie_break`
    spread, of equally good replies the one whose K scores vary least is chosen, before the seed decides.
    """

    min_gap: float = 0.0
    rho: float = 0.0
    alpha: float = 0.0
    rejected_of: int | None = None
    max_chosen_length: int | None = None
    min_chosen_score: float | None = None
    seed: int = 0
    shuffle_labels: bool = False
    tie_break: str = "seed"

    def value(self, row: Record) -> float:
        """Return the score that decides."""
        return row["score"] - self.alpha * len(row["response"]) if self.alpha else row["score"]

    def values(self, rows: Sequence[Record]) -> list[float]:
        """Return the score that decides, for each row."""
        return [self.value(row) for row in rows] if self.alpha else [row["score"] for row in rows]


def choose(
    chosen_from: Sequence[Record], rejected_from: Sequence[Record], choice: Choice
) -> tuple[tuple[Record, Record] | None, str]:
    """Return ((chosen, rejected), ""), or (None, the reason why there is no pair).

    The candidates are replies with scores to one prompt, at least one for each side; both sides can have the same
    ones. If all scores are equal there is no pair, whatever the lengths are.
    """
    upper = choice.values(chosen_from)
    lower = upper if rejected_from is chosen_from else choice.values(rejected_from)
    best, worst = max(upper), min(lower)
    if best == worst or (choice.alpha and len({row["score"] for row in (*chosen_from, *rejected_from)}) == 1):
        return None, "tie"
    if best < worst:
        return None, "none better than the earlier model's"
    slack = choice.rho * (best - worst) * (1 + ROUNDING) if choice.rho else 0.0  # 0 times inf is NaN
    least, most = best - slack, worst + slack
    chosen = shortest([chosen_from[at] for at, value in enumerate(upper) if value >= least], choice)
    rejected = longest([rejected_from[at] for at, value in enumerate(lower) if value <= most], choice)
    gap = choice.value(chosen) - choice.value(rejected)
    if gap <= 0:
        return None, "tie"
    if gap < choice.min_gap:
        return None, "gap too small"
    if chosen["response"] == rejected["response"]:
        return None, "same text"
    if choice.max_chosen_length is not None and len(chosen["response"]) > choice.max_chosen_length:
        return None, "chosen too long"
    if choice.min_chosen_score is not None and chosen["score"] < choice.min_chosen_score:
        return None, "chosen score too low"
    return (chosen, rejected), ""


def labelled(picked: tuple[Record, Record], choice: Choice) -> tuple[tuple[Record, Record], Record]:
    """Return a pair with its labels as picked, or shuffled, and then the field that says which."""
    if not choice.shuffle_labels:
        return picked, {}
    chosen, rejected = picked
    swapped = share(choice.seed, "label", chosen["id"], rejected["id"]) < 0.5
    return (rejected, chosen) if swapped else picked, {SHUFFLED: "swapped" if swapped else "kept"}


def label_counts(pair: Record | None, choice: Choice) -> dict[str, int]:
    """Count a pair whose labels were swapped, where they are shuffled."""
    return {"labels swapped": int(bool(pair) and pair[SHUFFLED] == "swapped")} if choice.shuffle_labels else {}


def shortest(tier: list[Record], choice: Choice) -> Record:
    """Return the shortest reply of the upper tier; ties are broken by score, then by the seed."""
    return tier[0] if len(tier) == 1 else min(tier, key=lambda row: _order(row, choice, choice.tie_break == "spread"))


def longest(tier: list[Record], choice: Choice) -> Record:
    """Return the longest reply of the lower tier; ties are broken by score, then by the seed."""
    return tier[0] if len(tier) == 1 else max(tier, key=lambda row: _order(row, choice))


def _order(row: Record, choice: Choice, by_spread: bool = False) -> tuple[int, float, float, int]:
    """Return the sort key of a reply in its tier; without `rho` all values are equal and the seed decides."""
    length = len(row["response"]) if choice.rho else 0
    return length, -choice.value(row), spread(row) if by_spread else 0.0, -derive(choice.seed, "pair", row["id"])


def spread(row: Record) -> float:
    """Return the standard deviation of the readable scores of a reply, infinity if there are fewer than two."""
    scores = row.get("scores")
    readable = [score for score in scores if is_number(score)] if isinstance(scores, list) else []
    return pstdev(readable) if len(readable) > 1 else inf


def sampled(rows: Sequence[Record], count: int, seed: int) -> list[Record]:
    """Return `count` replies to a prompt at random, or all of them if there are fewer."""
    return sorted(rows, key=lambda row: derive(seed, "rejected-of", row["prompt_id"], row["id"]))[:count]
