"""Preference pairs: the highest against the lowest score of a prompt (arXiv 2401.10020, section 2.3, step 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from srlm_cli.errors import BadRow
from srlm_cli.records import Row, as_messages, judged_record, ranked_record, responses_of
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome

PEOPLE = "human"


@dataclass(frozen=True)
class PairOptions:
    """`min_gap` is the least difference of scores that makes a pair; equal scores never do.

    `seed` decides among responses of equal score, where the paper names no rule: by their place
    would favour whichever came first.
    """

    min_gap: float = 0.0
    unsorted: bool = False
    seed: int = 0


def scored_record(row: Row) -> Row | list[Row]:
    """Return a judged row, or the responses of a ranked row, scored by what people thought of them.

    Their `score` is the human score, or minus the rank, and `score_from` is `human`.
    """
    if "responses" in row and "response" not in row:
        return [{**row, "score": row["human"], "score_from": PEOPLE} for row in responses_of(ranked_record(row))]
    return judged_record(row)


def make_pairs(judged: Iterable[Row], options: PairOptions) -> Iterator[Outcome]:
    """Yield, for each prompt, its pair row or the reason why there is none: prompts = pairs + drops.

    The responses of a prompt have to stand together; `unsorted` gathers them first, in memory. Scores
    of people and of a judge are on scales of their own, so each have a pair of theirs.
    """
    groups = gathered(judged) if options.unsorted else consecutive(judged)
    for responses, at_end in groups:
        pair, reason = pair_of(responses, options)
        yield Outcome(
            rows=[pair] if pair else [],
            read=len(responses),
            dropped={reason: 1} if reason else {},
            counts={"prompts": 1, "unscored": sum(row["score"] is None for row in responses)},
            at_end=at_end,
        )


def pair_of(responses: list[Row], options: PairOptions) -> tuple[Row | None, str]:
    """Return the pair of one prompt, or None and the reason.

    A response whose score is null (the judge could not be read) is never ranked.
    """
    scored = [row for row in responses if row["score"] is not None]
    if len(scored) < 2:
        return None, "fewer than two scored responses"
    lot = {row["id"]: derive(options.seed, "pair", row["id"]) for row in scored}
    chosen = max(scored, key=lambda row: (row["score"], lot[row["id"]]))
    rejected = min(scored, key=lambda row: (row["score"], lot[row["id"]]))
    if chosen["score"] == rejected["score"]:
        return None, "tie"
    if chosen["score"] - rejected["score"] < options.min_gap:
        return None, "gap too small"
    if chosen["response"] == rejected["response"]:
        return None, "same text"
    return pair_row(chosen, rejected), ""


def pair_row(chosen: Row, rejected: Row) -> Row:
    """Return a row that TRL's DPOTrainer takes as it is, with where it came from beside it."""
    shared = {key: value for key, value in chosen.items() if rejected.get(key) == value and key not in NOT_OF_A_PAIR}
    return {
        **shared,
        "id": chosen["prompt_id"],
        "prompt": as_messages(chosen["prompt"]),
        "chosen": [{"role": "assistant", "content": chosen["response"]}],
        "rejected": [{"role": "assistant", "content": rejected["response"]}],
        "prompt_id": chosen["prompt_id"],
        "score_chosen": chosen["score"],
        "score_rejected": rejected["score"],
        "chosen_id": chosen["id"],
        "rejected_id": rejected["id"],
        **({"score_from": PEOPLE} if by_people(chosen) else {}),
    }


# What a response or its judgements are made of; anything else that both responses share belongs to the prompt.
NOT_OF_A_PAIR = {
    "k", "response", "finish_reason", "human",
    "score", "scores", "score_from", "judgements", "judgement_finish_reasons",
}  # fmt: skip


def by_people(row: Row) -> bool:
    """Tell whether a response's score is what people thought of it."""
    return row.get("score_from") == PEOPLE


def group_of(row: Row) -> tuple[str, bool]:
    """Return what responses have in common that can be compared: their prompt and who scored them."""
    return row["prompt_id"], by_people(row)


def consecutive(judged: Iterable[Row]) -> Iterator[tuple[list[Row], bool]]:
    """Yield (responses of a prompt that stand together, is it the last); a prompt that comes back is a bad row."""
    seen: set[int] = set()
    group: list[Row] = []
    for key, responses in groupby(judged, key=group_of):
        if group:
            yield group, False
        if hash(key) in seen:
            raise BadRow(
                f"the responses of prompt {key[0]} do not stand together: "
                "sort the rows by prompt_id, or --unsorted gathers them in memory"
            )
        seen.add(hash(key))
        group = list(responses)
    if group:
        yield group, True


def gathered(judged: Iterable[Row]) -> Iterator[tuple[list[Row], bool]]:
    """Yield the responses of each prompt, wherever they stand, in the order of the prompts."""
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in judged:
        groups.setdefault(group_of(row), []).append(row)
    for responses in groups.values():
        yield responses, True
