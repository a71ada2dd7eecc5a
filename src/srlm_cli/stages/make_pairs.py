"""Preference pairs: the highest against the lowest score of a prompt (arXiv 2401.10020, section 2.3, step 3)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from srlm_cli.errors import BadRow
from srlm_cli.records import Row, as_messages, judged_record, ranked_record, responses_of
from srlm_cli.seeds import derive
from srlm_cli.stages import Outcome

PEOPLE = "human"
Parts = Iterable[tuple[Hashable, Iterable[Row]]]


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


def make_pairs(
    judged: Iterable[Row],
    options: PairOptions,
    *,
    is_new: Callable[[int], bool] | None = None,
    gather: Callable[[Parts], Iterable[list[Row]]] | None = None,
) -> Iterator[Outcome]:
    """Yield, for each prompt, its pair row or the reason why there is none: prompts = pairs + drops.

    The responses of a prompt have to stand together, in any order of the prompts; `is_new` remembers the
    prompts before. With `unsorted` they may stand anywhere: `gather` brings the parts of each prompt
    together. Both keep to memory unless they are given. Scores of people and of a judge are on scales of
    their own, so each have a pair of theirs.
    """
    if options.unsorted:
        parts = ((key, map(without_judgements, rows)) for key, rows in groupby(judged, key=group_of))
        groups = ((responses, True) for responses in (gather or in_memory)(parts))
    else:
        groups = consecutive(judged, is_new or never_seen())
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
    scores = [row["score"] for row in scored]
    chosen = drawn(scored, max(scores), max, options.seed)
    rejected = drawn(scored, min(scores), min, options.seed)
    if chosen["score"] == rejected["score"]:
        return None, "tie"
    if chosen["score"] - rejected["score"] < options.min_gap:
        return None, "gap too small"
    if chosen["response"] == rejected["response"]:
        return None, "same text"
    return pair_row(chosen, rejected), ""


def drawn(scored: list[Row], score: float, end: Callable, seed: int) -> Row:
    """Return the response of this score; of several the one whose lot is at that end."""
    equal = [row for row in scored if row["score"] == score]
    return equal[0] if len(equal) == 1 else end(equal, key=lambda row: derive(seed, "pair", row["id"]))


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


def consecutive(judged: Iterable[Row], is_new: Callable[[int], bool]) -> Iterator[tuple[list[Row], bool]]:
    """Yield (responses of a prompt that stand together, is it the last); a prompt that comes back is a bad row."""
    group: list[Row] = []
    for key, responses in groupby(judged, key=group_of):
        if group:
            yield group, False
        if not is_new(hash(key)):
            raise BadRow(
                f"the responses of prompt {key[0]} do not stand together: "
                "sort the rows by prompt_id, or --unsorted gathers them on disk"
            )
        group = list(responses)
    if group:
        yield group, True


def without_judgements(row: Row) -> Row:
    """Return a judged row with no more than its pair can need, to be kept until all rows are read."""
    return {key: row[key] for key in row if key not in NOT_OF_A_PAIR or key in ("response", "score", "score_from")}


# --- in memory -------------------------------------------------------------------------------


def never_seen() -> Callable[[int], bool]:
    """Return a function that tells whether it is called with a number for the first time."""
    seen: set[int] = set()
    return lambda key: len(seen) < (seen.add(key) or len(seen))


def in_memory(parts: Parts) -> Iterator[list[Row]]:
    """Yield the rows of each key, wherever its parts stand, in the order in which the keys first came."""
    groups: dict[Hashable, list[Row]] = {}
    for key, rows in parts:
        groups.setdefault(key, []).extend(rows)
    yield from groups.values()
