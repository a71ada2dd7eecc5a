"""Ranked prompts in two parts: one to train a judge on, one to measure it on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from srlm_cli.records import Record, prompt_key
from srlm_cli.seeds import share
from srlm_cli.stages import Outcome


def held_out(row: Record, eval_share: float, seed: int) -> bool:
    """Return whether a prompt is held out to measure the judge; depends only on its text and the seed.

    So it is in the same part in every file, and in every order of its rows.
    """
    return share(seed, "split", prompt_key(row["prompt"])) < eval_share


def eval_part(ranked: Iterable[Record], eval_share: float, seed: int) -> Iterator[Outcome]:
    """Yield the ranked rows that are held out, as they are."""
    for row in ranked:
        out = held_out(row, eval_share, seed)
        yield Outcome(rows=[row] if out else [], dropped={} if out else {"prompts for training": 1})


def train_part(
    ranked: Iterable[Record], make: Callable[[Iterable[Record]], Iterator[Outcome]], eval_share: float, seed: int
) -> Iterator[Outcome]:
    """Yield what `make` yields for the ranked rows that are not held out; those that are count as dropped."""
    before: deque[int] = deque()
    passed = 0

    def ours() -> Iterator[Record]:
        nonlocal passed
        for row in ranked:
            if held_out(row, eval_share, seed):
                passed += 1
            else:
                before.append(passed)
                passed = 0
                yield row

    def counted(outcome: Outcome, out: int) -> Outcome:
        dropped = {**outcome.dropped, "prompts: held out for eval": out} if out else outcome.dropped
        return replace(outcome, read=outcome.read + out, dropped=dropped)

    for outcome in make(ours()):
        out = before.popleft()
        if outcome.bad and out:  # those before it are not bad
            yield counted(Outcome(read=0), out)
            out = 0
        yield counted(outcome, out)
    if passed:
        yield counted(Outcome(read=0), passed)
