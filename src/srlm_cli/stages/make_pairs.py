"""Preference pairs: the highest against the lowest score of a prompt (arXiv 2401.10020, section 2.3, step 3)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from srlm_cli.errors import BadRow
from srlm_cli.records import (
    Record,
    as_messages,
    is_judged_reply,
    is_reply,
    judged_record,
    ranked_record,
    refuse_two_prompts,
    refuse_two_replies,
    responses_of,
)
from srlm_cli.stages import Outcome
from srlm_cli.stages.agreement import agreement
from srlm_cli.stages.pair_choice import Choice, choose, sampled
from srlm_cli.stages.seen import never_seen

PEOPLE = "human"
Group = tuple[str, bool]  # a prompt's id, and whether people scored it
Find = Callable[[Group], list[Record]]
Parts = Iterable[tuple[Hashable, Iterable[Record]]]
IsNew = Callable[[int], bool]
GroupByKey = Callable[[Parts], Iterable[list[Record]]]


@dataclass(frozen=True)
class PairOptions(Choice):
    """How a pair is picked (see `Choice`), and what stands beside the rows.

    `unsorted` gathers the responses of a prompt. `earlier` finds a prompt's replies by an earlier
    model, which the rejected one is picked from (arXiv 2508.06026). `before` finds the same responses as
    another judge scored them; the row then has their `agreement`, that of the prompt, or
    `mean_agreement` where it is given, and `label_smoothing`, 1 minus it (arXiv 2410.12735).
    """

    unsorted: bool = False
    earlier: Find | None = None
    before: Find | None = None
    mean_agreement: float | None = None


def scored_record(row: Record) -> Record | list[Record]:
    """Return a judged row, or the responses of a ranked row, scored by what people thought of them.

    Their `score` is the human score, or minus the rank, and `score_from` is `human`. A row of `srlm judge`
    is returned as it stands: there are many. A response that no model wrote (see `records.is_reply`) has no score,
    whoever gave it one.
    """
    if is_judged_reply(row):
        return row
    if "responses" in row and "response" not in row:
        rows = responses_of(ranked_record(row))
        return [{**row, "score": row["human"] if is_reply(row) else None, "score_from": PEOPLE} for row in rows]
    row = judged_record(row)
    return row if is_reply(row) else {**row, "score": None}


def make_pairs(
    judged: Iterable[Record],
    options: PairOptions,
    *,
    is_new: IsNew | None = None,
    group_by_key: GroupByKey | None = None,
) -> Iterator[Outcome]:
    """Yield, for each prompt, its pair row or the reason why there is none: prompts = pairs + drops.

    The responses of a prompt have to stand together, in any order of the prompts; `is_new` remembers the
    prompts before. With `unsorted` they may stand anywhere: `group_by_key` brings the parts of each prompt
    together. Both keep to memory unless they are given. Scores of people and of a judge are on scales of
    their own, so each have a pair of theirs.
    """
    for responses, at_end in groups(judged, options.unsorted, is_new, group_by_key):
        refuse_two_prompts(responses)
        refuse_two_replies(responses)
        pair, reason = pair_of(responses, options)
        yield Outcome(
            rows=[pair] if pair else [],
            read=len(responses),
            dropped={reason: 1} if reason else {},
            counts={"prompts": 1, "unscored": [row["score"] for row in responses].count(None)},
            at_end=at_end,
        )


def pair_of(responses: list[Record], options: PairOptions) -> tuple[Record | None, str]:
    """Return the pair of one prompt, or None and the reason.

    A response whose score is null (the judge could not be read) is never ranked.
    """
    chosen_from, rejected_from = candidates(responses, options)
    if options.earlier and not rejected_from:
        return None, "no scored response of the earlier model"
    if len(chosen_from) < (1 if options.earlier else 2):
        return None, "fewer than two scored responses" if not options.earlier else "no scored response"
    picked, reason = choose(chosen_from, rejected_from, options)
    if not picked:
        return None, reason
    weight = weight_of(responses, options)
    if weight is None:
        return None, "not ranked by both judges"
    pair = pair_row(*picked)
    pair.update(of_choice(*picked, options), **weight)
    return pair, ""


def candidates(responses: list[Record], options: PairOptions) -> tuple[list[Record], list[Record]]:
    """Return the scored replies that chosen is picked from, and those that rejected is picked from."""
    chosen_from = scored(responses)
    rejected_from = chosen_from
    if options.earlier:
        earlier = options.earlier(group_of(responses[0]))
        refuse_two_prompts([*responses[:1], *earlier])
        rejected_from = scored(earlier)
    if options.rejected_of:
        rejected_from = sampled(rejected_from, options.rejected_of, options.seed)
    return chosen_from, rejected_from


def scored(responses: list[Record]) -> list[Record]:
    """Return the responses that have a score."""
    return [row for row in responses if row["score"] is not None]


def weight_of(responses: list[Record], options: PairOptions) -> Record | None:
    """Return `agreement` and `label_smoothing` of a pair, nothing where none is asked for, None where unknown."""
    if not options.before:
        return {}
    found = options.mean_agreement
    if found is None:
        found = agreement(responses, options.before(group_of(responses[0])))
    return None if found is None else {"agreement": found, "label_smoothing": 1 - found}


def of_choice(chosen: Record, rejected: Record, options: PairOptions) -> Record:
    """Return what a pair owes to a variant: the price of a character, the two models."""
    found = {"length_alpha": options.alpha} if options.alpha else {}
    if options.earlier:
        found |= {"model_chosen": chosen.get("model"), "model_rejected": rejected.get("model")}
    return found


def pair_row(chosen: Record, rejected: Record) -> Record:
    """Return a row that TRL's DPOTrainer takes as it is, with where it came from beside it."""
    shared = {key: value for key, value in chosen.items() if key not in NOT_SHARED and rejected.get(key) == value}
    return {
        "prompt_id": chosen["prompt_id"],
        "prompt": as_messages(chosen["prompt"]),
        **shared,
        "id": chosen["prompt_id"],
        "chosen": [{"role": "assistant", "content": chosen["response"]}],
        "rejected": [{"role": "assistant", "content": rejected["response"]}],
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
    "agreement", "label_smoothing", "length_alpha", "model_chosen", "model_rejected",  # of pairs made before
}  # fmt: skip
NOT_SHARED = NOT_OF_A_PAIR | {"id", "prompt_id", "prompt"}


def by_people(row: Record) -> bool:
    """Tell whether a response's score is what people thought of it."""
    return row.get("score_from") == PEOPLE


def group_of(row: Record) -> Group:
    """Return what responses have in common that can be compared: their prompt and who scored them."""
    return row["prompt_id"], row.get("score_from") == PEOPLE


def groups(
    judged: Iterable[Record], unsorted: bool, is_new: IsNew | None = None, group_by_key: GroupByKey | None = None
) -> Iterator[tuple[list[Record], bool]]:
    """Yield (the responses of a prompt, is it final only at the end of the input)."""
    if not unsorted:
        return consecutive(judged, is_new or never_seen())
    parts = ((key, map(without_judgements, rows)) for key, rows in groupby(judged, key=group_of))
    return ((responses, True) for responses in (group_by_key or in_memory)(parts))


def consecutive(judged: Iterable[Record], is_new: IsNew) -> Iterator[tuple[list[Record], bool]]:
    """Yield (responses of a prompt that stand together, is it the last); a prompt that comes back is a bad row."""
    group: list[Record] = []
    for key, responses in groupby(judged, key=group_of):
        if group:
            yield group, False
        if not is_new(hash(key)):
            raise BadRow(
                f"the responses of prompt {key[0]} are not grouped: "
                "sort the rows by prompt_id, or --unsorted groups them on disk"
            )
        group = list(responses)
    if group:
        yield group, True


def without_judgements(row: Record) -> Record:
    """Return a judged row with no more than its pair can need, to be kept until all rows are read."""
    return {key: row[key] for key in row if key not in NOT_OF_A_PAIR or key in ("response", "score", "score_from")}


def in_memory(parts: Parts) -> Iterator[list[Record]]:
    """Yield the rows of each key, wherever its parts stand, in the order in which the keys first came."""
    groups: dict[Hashable, list[Record]] = {}
    for key, rows in parts:
        groups.setdefault(key, []).extend(rows)
    yield from groups.values()
