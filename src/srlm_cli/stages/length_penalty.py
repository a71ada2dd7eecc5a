"""Find the penalty per character at which chosen replies are as long as rejected ones, on average."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from srlm_cli.records import Record

PRECISION = 1e-9  # of alpha; a reply of a million characters moves by a thousandth of a point


@dataclass(frozen=True)
class Balance:
    """A penalty per character, and the mean of length(chosen) - length(rejected) with it, None without a pair."""

    alpha: float
    gap: float | None


class Side:
    """Scores and lengths of the candidates for one side of a pair: 16 bytes per reply."""

    def __init__(self) -> None:
        self.scores, self.lengths, self.starts = array("d"), array("q"), array("q")

    def add(self, rows: Sequence[Record]) -> None:
        """Take the replies to one more prompt."""
        self.starts.append(len(self.scores))
        self.scores.extend(row["score"] for row in rows)
        self.lengths.extend(len(row["response"]) for row in rows)

    def best_lengths(self, alpha: float, sign: int):
        """Return (prompts,): the length of the highest (1) or lowest (-1) value; of equal ones their mean."""
        import numpy as np

        scores, lengths, starts = (np.asarray(numbers) for numbers in (self.scores, self.lengths, self.starts))
        values = sign * (scores - alpha * lengths)
        best = np.maximum.reduceat(values, starts)
        at_best = values == np.repeat(best, np.diff(starts, append=len(values)))
        return np.add.reduceat(at_best * lengths, starts) / np.add.reduceat(at_best, starts)


def balanced_alpha(prompts: Iterable[tuple[Sequence[Record], Sequence[Record]]]) -> Balance:
    """Return the alpha >= 0 at which the mean gap in length is nearest zero (arXiv 2406.09760).

    `prompts` are (replies to choose from, replies to reject from), all scored. The pair of a prompt is
    the highest against the lowest score - alpha * length; prompts whose scores are all equal have no
    part. The gap never rises with alpha, so the zero is found by halving; where no alpha gives exactly
    zero, it is the one beside the step over zero that is nearer to it. Where chosen replies are not
    longer to begin with, alpha is 0.
    """
    above, below = Side(), Side()
    for chosen_from, rejected_from in prompts:
        if len({row["score"] for row in (*chosen_from, *rejected_from)}) > 1:
            above.add(chosen_from)
            below.add(rejected_from)
    if not above.starts:
        return Balance(0.0, None)

    def gap(alpha: float) -> float:
        return float((above.best_lengths(alpha, 1) - below.best_lengths(alpha, -1)).mean())

    if (first := gap(0.0)) <= 0:
        return Balance(0.0, first)
    scores = [*above.scores, *below.scores]
    low, high = 0.0, max(scores) - min(scores) + 1  # at this price a character more outweighs any score
    if gap(high) > 0:  # only where the rejected are others: shorter ones, all of them
        return Balance(high, gap(high))
    while high - low > PRECISION and low < (middle := (low + high) / 2) < high:  # large ones lie further apart
        low, high = (middle, high) if gap(middle) > 0 else (low, middle)
    nearest = min((high, low), key=lambda alpha: abs(gap(alpha)))
    return Balance(nearest, gap(nearest))
