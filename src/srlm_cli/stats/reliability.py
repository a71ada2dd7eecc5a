"""How far raters agree: Krippendorff's alpha, weighted kappa and shares of agreement, from running sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from srlm_cli.records import Record

Scores = Sequence[float | None]


@dataclass(slots=True)
class Pair:
    """The sums of two raters over the replies that both scored, and over pairs of such replies to one prompt."""

    n: int = 0
    same: int = 0
    first: float = 0.0
    second: float = 0.0
    squares: float = 0.0
    apart: float = 0.0
    ordered: int = 0
    same_order: int = 0

    def add(self, known: list[tuple[float, float]]) -> None:
        """Add the scores of the replies to one prompt."""
        for a, b in known:
            self.first += a
            self.second += b
            self.squares += a * a + b * b
            self.apart += (a - b) * (a - b)
            self.same += a == b
        self.n += len(known)
        for (a, b), (c, d) in combinations(known, 2):
            self.ordered += 1
            self.same_order += (a > c) - (a < c) == (b > d) - (b < d)

    def kappa(self) -> float | None:
        """Return Cohen's kappa with quadratic weights; None if both raters give one and the same score only.

        A disagreement weighs the square of the distance between the scores themselves. So the range of the scale
        cancels out, and labels that nobody used keep their place on it. Cohen, 1968.
        """
        if not self.n:
            return None
        expected = self.squares / self.n - 2 * (self.first / self.n) * (self.second / self.n)
        return 1 - self.apart / self.n / expected if expected > 1e-12 else None


class Reliability:
    """The agreement of a fixed number of raters, in memory that does not grow with the number of replies.

    Every score is taken relative to the first one, so that large scores lose no digits in the sums.
    """

    def __init__(self, raters: int) -> None:
        self.pairs = {two: Pair() for two in combinations(range(raters), 2)}
        self.zero: float | None = None
        self.units = self.values = 0
        self.total = self.squares = self.within = 0.0

    def add(self, replies: Iterable[Scores]) -> None:
        """Add the replies to one prompt: for each the score of each rater, None where there is none."""
        replies = [self._moved(scores) for scores in replies]
        for scores in replies:
            known = [score for score in scores if score is not None] if None in scores else scores
            if (count := len(known)) > 1:
                total, squares = sum(known), sum([score * score for score in known])
                self.units += 1
                self.values += count
                self.total += total
                self.squares += squares
                self.within += 2 * (count * squares - total * total) / (count - 1)
        for (a, b), pair in self.pairs.items():
            pair.add([(one[a], one[b]) for one in replies if one[a] is not None and one[b] is not None])

    def alpha(self) -> float | None:
        """Return Krippendorff's alpha for interval data; None if fewer than two different scores can be compared.

        1 is full agreement, 0 what chance gives. Replies with one score only do not count. Krippendorff, 2004.
        """
        n = self.values
        between = 2 * (n * self.squares - self.total * self.total) / (n * (n - 1)) if n else 0.0
        return 1 - self.within / n / between if between > 1e-12 else None

    def of_pairs(self) -> list[Record]:
        """Return for each two raters `{raters, kappa, same_score, n, same_order, n_order}`.

        `same_score` is the share of n replies with equal scores; `same_order` the share of n_order pairs of replies
        to one prompt that both raters order alike, or both tie.
        """
        return [
            {
                "raters": list(two),
                "kappa": pair.kappa(),
                "same_score": pair.same / pair.n if pair.n else None,
                "n": pair.n,
                "same_order": pair.same_order / pair.ordered if pair.ordered else None,
                "n_order": pair.ordered,
            }
            for two, pair in self.pairs.items()
        ]

    def _moved(self, scores: Scores) -> Scores:
        if self.zero is None:
            self.zero = next((score for score in scores if score is not None), None)
        zero = self.zero
        return scores if not zero else [None if score is None else score - zero for score in scores]
