"""The responses to a prompt together: against each other, or each until the best and the worst are settled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from srlm_cli.commands.judge.asked import Asked
from srlm_cli.commands.judge.asking import opened, run_asking
from srlm_cli.options.judging import closing
from srlm_cli.records import Record
from srlm_cli.runner.stage import Resumed
from srlm_cli.stages import Outcome
from srlm_cli.streams.spill import Seen
from srlm_cli.templates import Template


def run(asked: Asked, form: Template) -> None:
    """Judge the rows prompt by prompt."""
    rows, model, options, ruled = opened(asked, form)
    direct, first = asked.judging.direct, asked.draws.low if asked.draws else 0

    def make(rows: Iterable[Record], done: Resumed) -> Iterator[Outcome]:
        is_new = Seen().add
        for row in done.rows():
            is_new(hash(row["prompt_id"]))
        return closing(ruled(asked.kind.judge(rows, model, options, direct, is_new, first)), options.evidence)

    counted = "verdicts" if asked.kind.by == "pairwise" else "judgements"
    run_asking(asked, rows, model, asked.identity(options, rows), make, counted)
