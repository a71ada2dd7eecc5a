"""Desirable and undesirable replies, one by one, without pairs (KTO, arXiv 2402.01306)."""

from __future__ import annotations

from dataclasses import dataclass

from srlm_cli.errors import BadRow, OptionError
from srlm_cli.records import Record, completion_record, is_reply, judged_record, response_record, was_cut_off

NO_REPLY = "without a reply"
CUT_OFF = "cut off at the limit of tokens"
NO_SCORE = "without a score"
BETWEEN = "with a score between --undesirable-score and --desirable-score"


@dataclass(frozen=True)
class LabelOptions:
    """The scores that make a label: at least `desirable`, or at most `undesirable`; None where rows have labels."""

    desirable: float | None = None
    undesirable: float | None = None

    def __post_init__(self) -> None:
        if self.desirable is not None and self.undesirable is not None and self.desirable <= self.undesirable:
            raise OptionError(
                f"--undesirable-score {self.undesirable:g} is not below --desirable-score {self.desirable:g}"
            )


def labelled_record(row: Record, options: LabelOptions) -> Record:
    """Return a record `{id, prompt, completion, label}`: true for a desirable reply, false for an undesirable one.

    The row is a judged record, whose score decides, or has a `label` of its own (TRL's unpaired preferences). A reply
    that is not trained on has the label null and the reason as `no_label`: no text, cut off at its limit, no score, a
    score in between. Raises OptionError for a score without both scores of `options`.
    """
    label, sampled = row.get("label"), "response" in row
    if not isinstance(label, bool) and not (sampled and "score" in row):
        raise BadRow(f"expected `label`, true or false, or `response` and `score`, got {row.get('label', 'none')!r}")
    if not sampled:
        record = completion_record(row)
    else:
        record = response_record(row) if isinstance(label, bool) else judged_record(row)
    if sampled and not is_reply(record):
        label, reason = None, NO_REPLY
    elif was_cut_off(record):
        label, reason = None, CUT_OFF
    elif isinstance(label, bool):
        reason = ""
    else:
        label, reason = label_of(record["score"], options)
    rest = {name: value for name, value in record.items() if name not in ("response", "score", "label")}
    completion = {"completion": record["response"]} if sampled else {}
    return {**rest, **completion, "label": label, **({"no_label": reason} if reason else {})}


def label_of(score: float | None, options: LabelOptions) -> tuple[bool | None, str]:
    """Return the label of a score and "", or None and the reason."""
    if options.desirable is None or options.undesirable is None:
        raise OptionError(
            "rows with a score need --desirable-score and --undesirable-score",
            "such as --desirable-score 4 --undesirable-score 3 for scores from 0 to 5",
        )
    if score is None:
        return None, NO_SCORE
    if score >= options.desirable:
        return True, ""
    return (False, "") if score <= options.undesirable else (None, BETWEEN)
