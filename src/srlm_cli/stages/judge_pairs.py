"""Preference pairs for the judge: the best against the worst judgement of a reply (arXiv 2407.19594, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from srlm_cli.records import KWARGS, Record, reply_message
from srlm_cli.stages import Outcome
from srlm_cli.stages.pair_choice import Choice, choose, label_counts, labelled, sampled

Rate = Callable[[Record], list[float | None]]


def judge_pairs(rows: Iterable[Record], rate: Rate, choice: Choice) -> Iterator[Outcome]:
    """Yield, for each reply, the pair of its judgements or the reason why there is none: replies = pairs + drops.

    `rate` returns a rating for each judgement, or None. Judgements are picked by rating as replies are by score. The
    prompt of a pair is the judge's prompt, as in EFT records.
    """
    for row in rows:
        pair, reason = judge_pair(row, rate, choice)
        counts = {"replies": 1, **label_counts(pair, choice)}
        yield Outcome(rows=[pair] if pair else [], dropped={reason: 1} if reason else {}, counts=counts)


def judge_pair(row: Record, rate: Rate, choice: Choice) -> tuple[Record | None, str]:
    """Return the pair of one reply's judgements, or None and the reason."""
    rated = rated_judgements(row, rate)
    if len(rated) < 2:
        return None, "fewer than two readable judgements"
    picked, reason = choose(*candidates(rated, choice), choice)
    if not picked:
        return None, reason
    picked, label = labelled(picked, choice)
    return {**judge_pair_row(row, *picked, choice), **label}, ""


def rated_judgements(row: Record, rate: Rate) -> list[Record]:
    """Return the judgements of a reply as candidates for `choose`: `score` is the rating, `response` the text."""
    thoughts = row.get("judge_thoughts") or [None] * len(row["targets"])
    return [
        {"id": f"{row['id']}/j{k}", "prompt_id": row["id"], "score": rating, "response": target, "thought": thought}
        for k, (rating, target, thought) in enumerate(zip(rate(row), row["targets"], thoughts, strict=True))
        if rating is not None and target is not None
    ]


def candidates(rated: list[Record], choice: Choice) -> tuple[list[Record], list[Record]]:
    """Return the candidates for chosen and those for rejected."""
    return rated, sampled(rated, choice.rejected_of, choice.seed) if choice.rejected_of else rated


def all_candidates(rows: Iterable[Record], rate: Rate, choice: Choice) -> Iterator[tuple[list[Record], list[Record]]]:
    """Yield the `candidates` of each reply that has two judgements to pair."""
    for row in rows:
        if len(rated := rated_judgements(row, rate)) > 1:
            yield candidates(rated, choice)


def judge_pair_row(row: Record, chosen: Record, rejected: Record, choice: Choice) -> Record:
    """Return a pair row as `make_pairs` writes it, of two judgements."""
    about = {key: row[key] for key in ("prompt_key", "judge", "meta_judge") if key in row}
    judge = row["judge"] if isinstance(row.get("judge"), dict) else {}
    about |= {KWARGS: judge[KWARGS]} if judge.get(KWARGS) else {}
    return {
        **about,
        **({"length_alpha": choice.alpha} if choice.alpha else {}),
        "id": row["id"],
        "prompt": row["judge_prompt"],
        "chosen": [reply_message(chosen)],
        "rejected": [reply_message(rejected)],
        "prompt_id": row["prompt_id"],
        "score_chosen": chosen["score"],
        "score_rejected": rejected["score"],
        "chosen_id": chosen["id"],
        "rejected_id": rejected["id"],
    }
