"""The stages of the loop: pure functions over an iterator, without files, argv or a clock.

A stage yields one `Outcome` for each input it is done with, in input order, so whoever runs it can
count (rows in = rows out + drops) and can stop and go on at any outcome.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from srlm_cli.records import Record


@dataclass
class Outcome:
    """What became of the next `read` input rows: the rows they made, and how many were dropped and why.

    The rows may be lines already, where another process has made them.
    `counts` are further figures for the summary (`unparsed`, `judgements`); tokens are those that
    an engine read and wrote for it. `bad` says why the input, one row, turned out to be a bad row. `at_end`
    says that it is final only because the input has ended: it does not count when the input was cut short by a bad row.
    """

    rows: list[Record | bytes] = field(default_factory=list)
    read: int = 1
    dropped: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tokens_in: int = 0
    tokens_out: int = 0
    bad: str = ""
    at_end: bool = False


def counts_of_ends(finish_reasons: Iterable[str]) -> dict[str, int]:
    """Return how many texts were cut off, and how many never came, by the reason."""
    named = (reason.replace("-", " ").replace("_", " ") for reason in finish_reasons if reason != "stop")
    return Counter("cut off" if name == "length" else name for name in named)
