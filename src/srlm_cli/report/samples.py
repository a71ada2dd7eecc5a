"""Random pairs and matches to show: two replies side by side, with their judgements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from srlm_cli import records
from srlm_cli.evaluate.health import listed
from srlm_cli.records import Record
from srlm_cli.report.collect import Round, Run, picked_rows, rows_of, text_of
from srlm_cli.seeds import derive
from srlm_cli.stages.make_pairs import PEOPLE


@dataclass
class Side:
    """One of two replies, with its label, its score and the judgements of it."""

    label: str
    text: str
    score: float | None = None
    cut_off: bool = False
    judgements: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Sample:
    """A prompt with two replies, and the verdict between them."""

    id: str
    prompt: str
    sides: tuple[Side, Side]
    verdict: str


def sample_pairs(found: Round, count: int, seed: int) -> list[Sample]:
    """Return `count` preference pairs of a round with the K judgements of both replies."""
    rows = rows_of(found.folder / "pairs.jsonl", records.pair_record) if found.pairs else []
    pairs = drawn(rows, count, seed, "pairs")
    ids = {pair[f"{side}_id"] for pair in pairs for side in ("chosen", "rejected") if f"{side}_id" in pair}
    judged = picked_rows(found.folder / "judged.jsonl", ids, records.judged_record)
    return [pair_sample(pair, judged) for pair in pairs]


def pair_sample(pair: Record, judged: dict[str, Record]) -> Sample:
    """Return a preference pair as a sample."""
    sides = []
    for label in ("chosen", "rejected"):
        row = judged.get(pair.get(f"{label}_id"), {})
        if row.get("response", "") != text_of(pair[label]):  # a reply of an earlier model with the same id
            row = {}
        sides.append(
            Side(
                label,
                text_of(pair[label]),
                pair.get(f"score_{label}", row.get("score")),
                row.get("finish_reason") == "length",
                judgements_of(row),
            )
        )
    verdict = "scored by people" if pair.get("score_from") == PEOPLE else ""
    return Sample(pair["id"], records.as_text(pair["prompt"]), (sides[0], sides[1]), verdict)


def judgements_of(row: Record) -> list[dict[str, Any]]:
    """Return the K judgements of a judged row, each with its `text`, `score`, `source` and `finish_reason`."""
    texts = listed(row, "judgements")
    fields = {"score": "scores", "source": "score_from", "finish_reason": "judgement_finish_reasons"}
    columns = {name: [*listed(row, key), *[None] * len(texts)] for name, key in fields.items()}
    return [{"text": text, **{name: values[k] for name, values in columns.items()}} for k, text in enumerate(texts)]


def sample_matches(run: Run, found: Round, count: int, seed: int) -> list[Sample]:
    """Return `count` matches of a round's model against the previous model, with both verdicts."""
    rows = drawn(rows_of(found.folder / "eval-matches.jsonl"), count, seed, "matches")
    return [match_sample(run, row) for row in rows]


def match_sample(run: Run, match: Record) -> Sample:
    """Return a match as a sample."""
    names = [run.model(match.get(f"model_{side}")) for side in ("a", "b")]
    sides = [Side(name, match[f"response_{side}"]) for name, side in zip(names, ("a", "b"), strict=True)]
    winner = {"A": f"{names[0]} wins", "B": f"{names[1]} wins"}.get(match["winner"], "tie")
    shown_first = [names, names[::-1]]
    said = [
        f"{order[0]} shown first: {chosen_of(verdict, order)}"
        for order, verdict in zip(shown_first, match.get("verdicts", []), strict=False)
    ]
    return Sample(match["id"], records.as_text(match["prompt"]), (sides[0], sides[1]), "; ".join([winner, *said]))


def chosen_of(verdict: str | None, order: list[str]) -> str:
    """Return the model that a verdict prefers; A is the reply that was shown first."""
    return {"A": f"{order[0]} better", "B": f"{order[1]} better", "tie": "tie"}.get(verdict or "", "unreadable")


def drawn(rows: list[Record], count: int, seed: int, kind: str) -> list[Record]:
    """Return `count` random rows in file order; whether a row is drawn depends only on its id."""
    chosen = sorted(range(len(rows)), key=lambda at: derive(seed, "report", kind, rows[at]["id"]))[:count]
    return [rows[at] for at in sorted(chosen)]
