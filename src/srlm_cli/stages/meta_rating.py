"""Elo ratings of the judgements of one reply, position bias weighed out (arXiv 2407.19594, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from srlm_cli.records import Record
from srlm_cli.stats.bradley_terry import ELO, PRIOR, strengths

if TYPE_CHECKING:
    from numpy import ndarray


@dataclass(frozen=True)
class PositionWeights:
    """What a win counts for the judgement shown `first` and for the one shown `second`; together 1."""

    first: float = 0.5
    second: float = 0.5


def position_weights(rows: Iterable[Record]) -> PositionWeights:
    """Return the weights over all battles: a win in a position counts by the share of wins in the other one.

    first = wins of the second / all wins, second = wins of the first / all wins. So a meta-judge that
    always takes the first one says nothing. Without a win they are equal.
    """
    first = second = 0
    for row in rows:
        for battle in row["battles"]:
            first += battle["verdicts"].count("A")
            second += battle["verdicts"].count("B")
    total = first + second
    return PositionWeights(second / total, first / total) if total else PositionWeights()


def battle_matrix(row: Record, weights: PositionWeights) -> ndarray:
    """Return (K, K): the weighted wins of the line's judgement over the column's; ties count nothing."""
    import numpy as np

    wins = np.zeros((len(row["targets"]), len(row["targets"])))
    for battle in row["battles"]:
        shown = (battle["a"], battle["b"]), (battle["b"], battle["a"])
        for (first, second), verdict in zip(shown, battle["verdicts"], strict=True):
            if verdict == "A":
                wins[first, second] += weights.first
            elif verdict == "B":
                wins[second, first] += weights.second
    return wins


def meta_scores(row: Record, weights: PositionWeights) -> list[float | None]:
    """Return the rating of each judgement of a row, None for those that took no part.

    It maximises sum of B[m, n] log(1 / (1 + exp(e_n - e_m))) with B the battle matrix, and with `PRIOR`
    wins added each way between every two, as in `bradley_terry`, so that one that won everything is
    rated too. 400 points are odds of 10:1, the mean is 0.
    """
    import numpy as np

    playing = [k for k, target in enumerate(row["targets"]) if target is not None]
    wins = battle_matrix(row, weights)[np.ix_(playing, playing)]
    rated = ELO * strengths(wins + PRIOR * (1 - np.eye(len(playing)))) if len(playing) > 1 else [0.0] * len(playing)
    found: list[float | None] = [None] * len(row["targets"])
    for k, rating in zip(playing, rated, strict=True):
        found[k] = round(float(rating), 3) + 0.0  # equal ratings are a tie, whatever their last bits are
    return found
