"""Read stored judgements again with another template's pattern, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from srlm_cli import records
from srlm_cli.errors import BadRow
from srlm_cli.records import Record
from srlm_cli.stages import Outcome
from srlm_cli.stages.judge import Judgement, count_judgements, judged_row
from srlm_cli.templates import Template


def rescore(rows: Iterable[Record], template: Template) -> Iterator[Outcome]:
    """Yield each record of `srlm judge` with `score` and `scores` as the template reads its `judgements`.

    All other fields are unchanged. A score that was not read from the text (a forced score or an expectation) is
    lost: `score_from` is `text` or null.
    """
    for row in rows:
        row = stored_record(row)
        reasons = row.get("judgement_finish_reasons") or ["stop"] * len(row["judgements"])
        scores = map(template.score, row["judgements"])
        judgements = [
            Judgement(text, score, None if score is None else "text", reason)
            for text, score, reason in zip(row["judgements"], scores, reasons, strict=True)
        ]
        judge = row["judge"] if isinstance(row.get("judge"), dict) else {"model": row.get("judge")}
        again = judged_row(row, judgements, judge.get("model"), template)
        if "judgement_finish_reasons" not in row:
            del again["judgement_finish_reasons"]
        yield Outcome(rows=[{**again, "judge": {**judge, **again["judge"]}}], counts=count_judgements(judgements))


def stored_record(row: Record) -> Record:
    """Return a response record that has its `judgements`; raise BadRow for any other."""
    row = records.response_record(row)
    texts = row.get("judgements")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRow("expected `judgements`, a list of texts as `srlm judge` writes them, to read again")
    reasons = row.get("judgement_finish_reasons") or texts
    if not isinstance(reasons, list) or len(reasons) != len(texts):
        raise BadRow(f"expected {len(texts)} `judgement_finish_reasons`, one a judgement")
    return row
