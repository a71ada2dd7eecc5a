"""What `make-pairs` has to know of all its rows before it makes the first pair: its input is read twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from math import isfinite
from typing import TypeVar

from srlm_cli.errors import BadRow, DataError, OptionError
from srlm_cli.options.common import StreamOptions
from srlm_cli.records import Record
from srlm_cli.stages import make_pairs as stage
from srlm_cli.stages.agreement import mean_agreement
from srlm_cli.streams.console import say
from srlm_cli.streams.reader import Reader, shown

AUTO = "auto"
T = TypeVar("T")
Check = Callable[[Record], Record | list[Record]]
Candidates = Iterator[tuple[Sequence[Record], Sequence[Record]]]


def look_through(stream: StreamOptions, check: Check, look: Callable[[Iterable[Record]], T], option: str) -> T:
    """Return the result of `look` over all valid rows; raise OptionError for an input that can be read only once.

    Bad rows are skipped here: the second pass stops at them, or counts them.
    """
    if stream.in_ == "-" or (os.path.exists(stream.in_) and not os.path.isfile(stream.in_)):
        raise OptionError(f"{option} reads its input twice, which {shown(stream.in_)} cannot", "--in FILE")
    rows = Reader([stream.in_], check, on_error="skip", limit=stream.limit, traced=False)
    try:
        return look(rows)
    except BadRow as error:
        raise DataError(f"{rows.at}: {error}") from None


def given_alpha(text: str, rho: float) -> float:
    """Return a price of a character as given, 0 for `auto`; raise OptionError for another word."""
    if text == AUTO and rho:
        raise OptionError("--length-penalty auto and --rho both control the length", "use one of them")
    try:
        alpha = 0.0 if text == AUTO else float(text)
    except ValueError:
        alpha = -1.0
    if not isfinite(alpha) or alpha < 0:
        raise OptionError(f"--length-penalty {text} is not a valid penalty", "a number from 0 up, or auto")
    return alpha


def balanced(stream: StreamOptions, check: Check, candidates: Callable[[Iterable[Record]], Candidates]) -> float:
    """Return the alpha at which chosen and rejected are of one length on average, and say so."""
    from srlm_cli.stages.length_penalty import balanced_alpha

    found = look_through(stream, check, lambda rows: balanced_alpha(candidates(rows)), "--length-penalty auto")
    if found.gap is not None and not stream.quiet:
        say(f"srlm make-pairs: alpha {found.alpha:.6g}: the mean gap in length is {found.gap:+.1f} characters")
    return found.alpha


def groups(rows: Iterable[Record], options: stage.PairOptions) -> Iterator[tuple[list[Record], bool]]:
    """Return the groups of a first reading, gathered as in the second one."""
    from srlm_cli.streams import spill

    return stage.groups(rows, options.unsorted, spill.Seen().add, spill.group_by_key)


def reply_candidates(options: stage.PairOptions) -> Callable[[Iterable[Record]], Candidates]:
    """Return what gives the replies that each pair of judged rows is picked from."""

    def candidates(rows: Iterable[Record]) -> Candidates:
        for group, _ in groups(rows, options):
            chosen_from, rejected_from = stage.candidates(group, options)
            if chosen_from and rejected_from:
                yield chosen_from, rejected_from

    return candidates


def agreed(stream: StreamOptions, options: stage.PairOptions) -> float:
    """Return the mean agreement of two judges over all prompts, 1 without any; raise DataError if they share none."""

    def look(rows: Iterable[Record]) -> float | None:
        found = groups(rows, options)
        if (first := next(found, None)) is None:
            return 1.0
        return mean_agreement((group, options.before(stage.group_of(group[0]))) for group, _ in chain([first], found))

    found = look_through(stream, stage.scored_record, look, "--agreement mean")
    if found is None:
        hint = "a response is found by its `id`"
        raise DataError(
            f"no prompt of {stream.in_} has two responses that the --consistency-with file scores too", hint
        )
    return found
