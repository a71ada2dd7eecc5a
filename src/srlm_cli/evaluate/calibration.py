"""What people thought of replies to which a judge gave similar scores: its calibration, in bins of the score."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

from srlm_cli.records import Record
from srlm_cli.stats.bootstrap import finite, measured, total

if TYPE_CHECKING:
    import numpy as np

BINS = 10


class Judged(Protocol):
    """The replies to one prompt: what people thought of each, larger is better, and the judge's score or None."""

    human: list[float]
    scores: list[float | None]


def metrics(prompts: Iterable[Judged], seed: int = 0) -> list[Record]:
    """Return `calibration` for each bin of the judge's score, lowest first; iterates over `prompts` several times.

    A bin has about as many replies as another, and equal scores are in one bin. The value is the mean of people's
    scores (`people` is `score`), or where people gave ranks, which are 0 and less in `human`, the mean place (`place`):
    the share of the other replies to the prompt that people rank lower, with ties as halves. `score` is the judge's
    mean score in the bin, `score_low` and `score_high` are its ends. Replies without a score are left out.
    """
    people = "place" if all(h <= 0 for one in prompts for h in one.human) else "score"
    of_people = places if people == "place" else scores
    known = array("d", (score for one in prompts for score, _ in pairs(one, of_people)))
    if not known:
        return []
    import numpy as np

    found = np.frombuffer(known)
    tops = tops_of(found)
    bins = np.searchsorted(tops, found)
    ends = tops.tolist()

    def binned(one: Judged) -> list[list[float]]:
        values: list[list[float]] = [[] for _ in ends]
        for score, value in pairs(one, of_people):
            values[bisect_left(ends, score)].append(value)
        return values

    rows = measured("reward", map(binned, prompts), {str(at): itemgetter(at) for at in range(len(ends))}, seed)
    for number, row in enumerate(rows):
        some = found[bins == number]
        row |= {"metric": "calibration", "bin": number + 1, "people": people}
        row |= {
            "score": finite(total(some) / len(some)),
            "score_low": float(some.min()),
            "score_high": float(some.max()),
        }
    return rows


def pairs(one: Judged, of_people: Callable[[list[float]], list[float | None]]) -> Iterator[tuple[float, float]]:
    """Yield the judge's score and people's value of each reply that has both."""
    for score, value in zip(one.scores, of_people(one.human), strict=True):
        if score is not None and value is not None:
            yield score, value


def scores(human: list[float]) -> list[float | None]:
    """Return people's scores as they are."""
    return list(human)


def places(human: list[float]) -> list[float | None]:
    """Return for each reply the share of the others that people rank lower, a tie as a half; None of the only reply."""
    others = len(human) - 1
    if not others:
        return [None]
    return [(sum(h > one for one in human) + (human.count(h) - 1) / 2) / others for h in human]


def tops_of(found: np.ndarray) -> np.ndarray:
    """Return the highest score of each bin of scores (n,): of each different score, or of about equal parts."""
    import numpy as np

    different = np.unique(found)
    if len(different) <= BINS:
        return different
    return np.unique(np.quantile(found, np.arange(1, BINS + 1) / BINS, method="inverted_cdf"))
