"""Whether a judge prefers the replies of its own model to replies of others that people find equally good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from posixpath import normpath
from typing import Protocol

from srlm_cli.records import Record
from srlm_cli.stats.bootstrap import measured


class Written(Protocol):
    """The replies to one prompt; `own` is whether the judge's model wrote a reply, None if that is not known."""

    human: list[float]
    scores: list[float | None]
    own: list[bool | None]


def is_own(row: Record, judge: str | None) -> bool | None:
    """Return whether the judge is the model that wrote the reply of a record, None if one of them is not named."""
    writer = row.get("model")
    if not judge or not writer or not isinstance(writer, str):
        return None
    return normpath(writer) == normpath(judge)  # M1/model is ./M1/model/


def metrics(prompts: Iterable[Written], seed: int = 0) -> list[Record]:
    """Return `self_preference`, nothing if no two replies can be compared.

    Of each two replies to one prompt, one by the judge's model and one by another, to which people gave the same value:
    how often the judge gives the own one the higher score, with ties as halves. One half means no preference. Pairs
    with a null score are left out.
    """
    rows = measured("reward", prompts, {"self_preference": lambda one: list(wins(one))}, seed)
    return [row for row in rows if row["n"]]


def wins(one: Written) -> Iterator[float]:
    """Yield for each such pair 1 if the judge prefers its own reply, 0 if the other, a half for a tie."""
    known = [reply for reply in zip(one.own, one.human, one.scores, strict=False) if reply[2] is not None]
    own, others = ([reply for reply in known if reply[0] is mine] for mine in (True, False))
    for (_, human, score), (_, human_other, score_other) in product(own, others):
        if human == human_other:
            yield ((score > score_other) - (score < score_other) + 1) / 2
