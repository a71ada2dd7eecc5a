"""Read stored judgements again with another template's pattern, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from srlm_cli import records
from srlm_cli.errors import BadRow
from srlm_cli.records import Record
from srlm_cli.stages import Outcome
from srlm_cli.stages.judge import count_judgements, judged_row, read_judgement
from srlm_cli.templates import Template
from srlm_cli.thoughts import Thought


def rescore(rows: Iterable[Record], template: Template) -> Iterator[Outcome]:
    """Yield each record of `srlm judge` with `score` and `scores` as the template reads its `judgements`.

    All other fields are unchanged. A score that was not read from the text (a forced score or an expectation) is
    lost: `score_from` is `text` or null.
    """
    for row in rows:
        row = stored_record(row)
        reasons = row.get("judgement_finish_reasons") or ["stop"] * len(row["judgements"])
        thoughts = [said and Thought(said, "") for said in row.get("judge_thoughts") or [None] * len(reasons)]
        judgements = [
            replace(read_judgement(text, reason, template, thought), text=text)
            for text, reason, thought in zip(row["judgements"], reasons, thoughts, strict=True)
        ]
        judge = row["judge"] if isinstance(row.get("judge"), dict) else {"model": row.get("judge")}
        if judge.get("by"):
            yield Outcome(bad=f"judged with --by {judge['by']}: its judgements are not about this response alone")
            continue
        judge = {key: value for key, value in judge.items() if key != "combine"}
        by = {"template": template.name, "template_hash": template.hash}
        again = judged_row(row, judgements, {"model": judge.get("model"), **judge, **by}, criteria=template.criteria)
        if "judgement_finish_reasons" not in row:
            del again["judgement_finish_reasons"]
        yield Outcome(rows=[again], counts=count_judgements(judgements))


def stored_record(row: Record) -> Record:
    """Return a response record that has its `judgements`; raise BadRow for any other."""
    row = records.response_record(row)
    texts = row.get("judgements")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRow("expected `judgements`, a list of texts as `srlm judge` writes them, to read again")
    reasons = row.get("judgement_finish_reasons") or texts
    if not isinstance(reasons, list) or len(reasons) != len(texts):
        raise BadRow(f"expected {len(texts)} `judgement_finish_reasons`, one a judgement")
    thoughts = row.get("judge_thoughts") or [None] * len(texts)
    right = isinstance(thoughts, list) and all(said is None or isinstance(said, str) for said in thoughts)
    if not right or len(thoughts) != len(texts):
        raise BadRow(f"expected {len(texts)} `judge_thoughts`, a text or null a judgement")
    return row
