"""Elo ratings of the judgements of one reply, corrected for position bias (arXiv 2407.19594, section 2.2)."""

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
    """The weight of a win for the judgement shown `first` and for the one shown `second`; their sum is 1."""

    first: float = 0.5
    second: float = 0.5


def position_weights(rows: Iterable[Record]) -> PositionWeights:
    """Return the weights from all battles: a win in one position has the share of wins in the other as its weight.

    first = wins of the second / all wins, second = wins of the first / all wins. So the wins of a meta-judge that
    always picks the first one have no weight. Without a win both weights are equal.
    """
    first = second = 0
    for row in rows:
        for battle in row["battles"]:
            first += battle["verdicts"].count("A")
            second += battle["verdicts"].count("B")
    total = first + second
    return PositionWeights(second / total, first / total) if total else PositionWeights()


def battle_matrix(row: Record, weights: PositionWeights) -> ndarray:
    """Return (K, K): the weighted wins of the row's judgement over the column's; ties are not counted."""
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
    """Return the rating of each judgement of a row, None for those that were not compared.

    The ratings e maximise the sum of B[m, n] log(1 / (1 + exp(e_n - e_m))), where B is the battle matrix. `PRIOR` wins
    are added in both directions between every two, as in `bradley_terry`, so that a judgement that won everything has
    a finite rating. 400 points are odds of 10:1; the mean is 0.
    """
    import numpy as np

    playing = [k for k, target in enumerate(row["targets"]) if target is not None]
    wins = battle_matrix(row, weights)[np.ix_(playing, playing)]
    rated = ELO * strengths(wins + PRIOR * (1 - np.eye(len(playing)))) if len(playing) > 1 else [0.0] * len(playing)
    found: list[float | None] = [None] * len(row["targets"])
    for k, rating in zip(playing, rated, strict=True):
        found[k] = round(float(rating), 3) + 0.0  # ratings that differ only in the last bits are equal
    return found
