"""Scorers: one number per reply, such as that of a reward model, without a judgement in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from srlm_cli.engines.base import Scorer
from srlm_cli.records import Record, is_reply
from srlm_cli.stages import Outcome
from srlm_cli.stages.judge import Judgement, count_judgements, judged_row

READ_TOGETHER = 64
TOO_LONG = "prompt-too-long"


def judge_by_scores(responses: Iterable[Record], scorer: Scorer, judge: Record) -> Iterator[Outcome]:
    """Yield response records with the score of a scorer: one judgement without a text. `judge` is that field of a row.

    A response that no model wrote (see `records.is_reply`) is not scored. One that is too long for the model has
    `score: null`, as with a judgement that could not be written.
    """
    rows = iter(responses)
    while group := list(islice(rows, READ_TOGETHER)):
        found = iter(scorer.score([row for row in group if is_reply(row)]))
        for row in group:
            if not is_reply(row):
                yield Outcome(rows=[judged_row(row, [], judge)], counts=count_judgements([]) | {"no reply": 1})
                continue
            scored = next(found)
            if scored.bad:
                yield Outcome(bad=scored.bad)
                continue
            known = scored.score is not None
            judgement = Judgement("", scored.score, scorer.kind if known else None, "stop" if known else TOO_LONG)
            made = judged_row(row, [judgement], judge)
            yield Outcome(rows=[made], counts=count_judgements([judgement]), tokens_in=scored.tokens)
