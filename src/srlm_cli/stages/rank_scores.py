"""Integer scores from the ranks or scores of people: the targets of hindsight EFT records.

A judge learns integer scores; people give ranks, or scores on another scale. A value between 3 and 4 is rounded up or
down at random, in proportion, so that the mean over many records is right. One random number is used for a whole
prompt, so replies can become equal, but their order is never reversed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from srlm_cli.errors import BadRow, OptionError
from srlm_cli.records import Record, human_values, is_number


@dataclass(frozen=True)
class RankScores:
    """The integer scores `low` to `high` of a judge's template, and how ranks or human scores are mapped to them.

    Ranks are `balanced` by their position in the prompt: the better of two replies gets a score in the upper half.
    So all scores are equally frequent over all records. Human scores are balanced by their position in `all_scores`
    (sorted, of the whole data). With `linear`, a pair of human scores, the mapping is linear: the first becomes
    `low`, the second `high`.
    """

    low: int
    high: int
    all_scores: Sequence[float] | None = None
    linear: tuple[float, float] | None = None

    def of(self, ranked: Record, uniform: float) -> list[int | None]:
        """Return a score for each reply of a ranked row; `uniform` in [0, 1) decides between neighbours.

        If people ranked all replies equally, each score is None.
        """
        replies = ranked["responses"]
        if not all(is_number(reply.get("score")) for reply in replies):
            values = human_values(ranked)
            if len(set(values)) < 2:
                return [None for _ in replies]
            return [self._by_place(value, sorted(values), uniform) for value in values]
        if self.linear:
            return [self._in_proportion(reply["score"], *self.linear, uniform) for reply in replies]
        if self.all_scores is None:
            raise OptionError(
                "balanced human scores are read twice, which stdin cannot", "--in FILE, or --scale linear"
            )
        return [self._by_place(reply["score"], self.all_scores, uniform) for reply in replies]

    def _by_place(self, value: float, sorted_values: Sequence[float], uniform: float) -> int:
        """Return the score at the quantile of a value among the values; equal values share an interval of it."""
        before, upto = bisect_left(sorted_values, value), bisect_right(sorted_values, value)
        share = (before + uniform * (upto - before)) / len(sorted_values)
        return min(self.high, self.low + floor(share * (self.high - self.low + 1)))

    def _in_proportion(self, value: float, low: float, high: float, uniform: float) -> int:
        if not low <= value <= high:
            raise BadRow(f"the human score {value} is not within {low} to {high}: --score-low, --score-high")
        return min(self.high, self.low + floor((value - low) / (high - low) * (self.high - self.low) + uniform))
