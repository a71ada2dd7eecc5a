"""Prompts with several answers that are right: the score of the Ties subset of RewardBench 2 (arXiv 2506.01937).

The replies to a prompt that people rank first are right. Two prompts belong together: `ref:ID`, which has one right
reply, and `tied:ID`, which has several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf, tanh
from typing import TYPE_CHECKING, NamedTuple, Protocol

from srlm_cli.records import Record
from srlm_cli.stats.bootstrap import of_sums

if TYPE_CHECKING:
    import numpy as np

FIELD = "ties"  # of a row
# The parts of the score: accuracy on the prompts with several right replies and with one, the share of IDs where right
# replies differ less from each other than from wrong ones, the same for both prompts, and how much less.
WEIGHTS = (0.3, 0.3, 0.2, 0.2, 0.01)


class Prompt(Protocol):
    """The replies to one prompt, one value per reply."""

    human: list[float]
    scores: list[float | None]
    ties: list[str | None]


class Margins(NamedTuple):
    """The gap between the worst right and the best wrong reply, and the spread of the right ones."""

    gap: float
    spread: float


def metrics(prompts: Iterable[Prompt], seed: int = 0) -> Iterator[Record]:
    """Yield the metric `ties_score` if rows have names; `n` counts IDs, from which the bootstrap draws."""
    import numpy as np

    found: dict[str, dict[str, Margins]] = {}
    for one in prompts:
        kind, _, name = (one.ties[0] or "").partition(":") if one.ties else ("", "", "")
        if kind in ("ref", "tied") and len(set(one.human)) > 1:
            found.setdefault(name, {})[kind] = margins(one.human, one.scores)
    if not found:
        return
    columns = np.array([parts(two.get("tied"), two.get("ref")) for two in found.values()], dtype=float)

    def score(sums: np.ndarray) -> np.ndarray:
        shares = np.nan_to_num(sums[..., ::2] / sums[..., 1::2])
        return shares @ np.array(WEIGHTS)

    yield of_sums("reward", "ties_score", columns, score, len(found), seed)


def margins(human: list[float], scores: list[float | None]) -> Margins:
    """Return the margins of a prompt; one with a null score has the worst."""
    if any(score is None for score in scores):
        return Margins(-inf, inf)
    right = [score for h, score in zip(human, scores, strict=True) if h == max(human)]
    wrong = [score for h, score in zip(human, scores, strict=True) if h < max(human)]
    return Margins(min(right) - max(wrong), max(right) - min(right))


def parts(tied: Margins | None, ref: Margins | None) -> list[float]:
    """Return the value and the count of each part for one ID, flat, in the order of WEIGHTS."""
    found = [[one.gap > 0, 1] if one else [0, 0] for one in (tied, ref)]
    if not (tied and ref):
        return [number for part in [*found, *[[0, 0]] * 3] for number in part]
    least = min(tied.gap, ref.gap)
    return [
        number
        for part in [*found, [tied.gap > tied.spread, 1], [least > tied.spread, 1], [ahead(least, tied.spread), 1]]
        for number in part
    ]


def ahead(gap: float, spread: float) -> float:
    """Return tanh(gap / spread - 1), its limit where the spread is 0 or the gap is infinite, and 0 for 0 / 0."""
    if spread == 0 or gap == -inf:
        return float((gap > 0) - (gap < 0))
    return tanh(gap / spread - 1)
