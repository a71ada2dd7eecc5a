"""The stages of the loop: pure functions over an iterator, without files, argv or a clock.

A stage yields one `Outcome` for each finished input, in input order. So the caller can count
(rows in = rows out + drops), and can stop and resume after any outcome.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from srlm_cli.records import Record
from srlm_cli.thoughts import Thought


@dataclass
class Outcome:
    """The result of the next `read` input rows: output rows, and the number of dropped rows by reason.

    Rows that another process made are lines (bytes). `counts` has more figures for the summary (`unparsed`,
    `judgements`). `tokens_in` and `tokens_out` are the tokens that the engine read and wrote. `bad` is the reason why
    the one input row is a bad row. `at_end` marks a result that is final only because the input has ended; it does not
    count if a bad row ended the input.
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
    """Return the number of texts that were cut off, and of those that the engine did not write, by reason."""
    named = (reason.replace("-", " ").replace("_", " ") for reason in finish_reasons if reason != "stop")
    return Counter("cut off" if name == "length" else name for name in named)


def closed_thoughts(thoughts: Iterable[Thought | None]) -> dict[str, int]:
    """Return how many thoughts were closed for the model at their limit, nothing where none was."""
    count = sum(thought.at_limit for thought in thoughts if thought)
    return {"thoughts closed at --max-thinking-tokens": count} if count else {}
