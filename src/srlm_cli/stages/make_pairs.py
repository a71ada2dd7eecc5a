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
    reply_message,
    responses_of,
    was_cut_off,
)
from srlm_cli.stages import Outcome
from srlm_cli.stages.agreement import agreement, disagreement
from srlm_cli.stages.pair_choice import SHUFFLED, Choice, choose, label_counts, labelled, sampled
from srlm_cli.stages.seen import never_seen

PEOPLE = "human"
Group = tuple[str, bool]  # a prompt's id, and whether people scored it
Find = Callable[[Group], list[Record]]
Parts = Iterable[tuple[Hashable, Iterable[Record]]]
IsNew = Callable[[int], bool]
GroupByKey = Callable[[Parts], Iterable[list[Record]]]


@dataclass(frozen=True)
class PairOptions(Choice):
    """How a pair is picked (see `Choice`), and other files that it depends on.

    `unsorted` groups the responses by prompt first. `earlier` finds the replies of an earlier model, from which the
    rejected one is picked (arXiv 2508.06026), `later` those of a later model, for the chosen one. `before` finds the
    same responses with the scores of another judge; the pair then has `agreement`, of the prompt or `mean_agreement`,
    and `label_smoothing`, 1 minus the agreement (arXiv 2410.12735). With `agreed_only` it has none of them, and is
    dropped unless that judge, too, scores chosen above rejected (arXiv 2502.08922). `cut_off` is what happens to
    responses that were cut off at their limit: `keep`, `rejected-only` or `drop`.
    """

    unsorted: bool = False
    earlier: Find | None = None
    later: Find | None = None
    before: Find | None = None
    mean_agreement: float | None = None
    agreed_only: bool = False
    cut_off: str = "keep"


def scored_record(row: Record) -> Record | list[Record]:
    """Return a judged record, or the responses of a ranked record with the scores of people.

    Such a `score` is the human score or the negated rank, with `score_from: human`. A record of `srlm judge` is
    returned unchanged, which is fast. The score of a response that no model wrote (see `records.is_reply`) is null.
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
    """Yield one outcome per prompt: its pair, or the reason why there is none (prompts = pairs + drops).

    The responses of a prompt must be consecutive; `is_new` remembers earlier prompts. With `unsorted` they can be
    anywhere; `group_by_key` groups them. The default of both works in memory. People and a judge use different
    scales, so a prompt that both scored has one pair from each.
    """
    for responses, at_end in groups(judged, options.unsorted, is_new, group_by_key):
        refuse_two_prompts(responses)
        refuse_two_replies(responses)
        pair, reason = pair_of(responses, options)
        yield Outcome(
            rows=[pair] if pair else [],
            read=len(responses),
            dropped={reason: 1} if reason else {},
            counts={
                "prompts": 1,
                "unscored": [row["score"] for row in responses].count(None),
                **cut(responses, options),
                **label_counts(pair, options),
            },
            at_end=at_end,
        )


def pair_of(responses: list[Record], options: PairOptions) -> tuple[Record | None, str]:
    """Return the pair of one prompt, or None and the reason.

    A response whose score is null (the judge could not be read) is never ranked.
    """
    chosen_from, rejected_from = candidates(responses, options)
    if options.earlier and not rejected_from:
        return None, "no scored response of the earlier model"
    if options.later and not chosen_from:
        return None, "no scored response of the later model"
    one_side = options.earlier or options.later
    if not (chosen_from and rejected_from) or (not one_side and len(paired(responses, options)) < 2):
        return None, "no scored response" if one_side else "fewer than two scored responses"
    picked, reason = choose(chosen_from, rejected_from, options)
    if not picked:
        return None, reason
    weight = weight_of(responses, options)
    if weight is None:
        return None, "not ranked by both judges"
    if options.agreed_only and (reason := disagreement(*picked, options.before(group_of(responses[0])))):
        return None, reason
    picked, label = labelled(picked, options)
    pair = pair_row(*picked)
    pair.update(of_choice(*picked, options), **weight, **label)
    return pair, ""


def candidates(responses: list[Record], options: PairOptions) -> tuple[list[Record], list[Record]]:
    """Return the candidates for chosen and those for rejected: replies with a score."""
    rejected_from = paired(responses, options)
    chosen_from = rejected_from
    if options.later:
        later = options.later(group_of(responses[0]))
        refuse_two_prompts([*responses[:1], *later])
        chosen_from = paired(later, options)
    if options.cut_off == "rejected-only":
        chosen_from = [row for row in chosen_from if not was_cut_off(row)]
    if options.earlier:
        earlier = options.earlier(group_of(responses[0]))
        refuse_two_prompts([*responses[:1], *earlier])
        rejected_from = paired(earlier, options)
    if options.rejected_of:
        rejected_from = sampled(rejected_from, options.rejected_of, options.seed)
    return chosen_from, rejected_from


def paired(responses: list[Record], options: PairOptions) -> list[Record]:
    """Return the responses that may be in a pair: those that have a score and, with `cut_off` drop, an end."""
    found = [row for row in responses if row["score"] is not None]
    return [row for row in found if not was_cut_off(row)] if options.cut_off == "drop" else found


def cut(responses: list[Record], options: PairOptions) -> dict[str, int]:
    """Return how many responses were cut off, where that decides something."""
    return {} if options.cut_off == "keep" else {"cut off": sum(map(was_cut_off, responses))}


def weight_of(responses: list[Record], options: PairOptions) -> Record | None:
    """Return `agreement` and `label_smoothing` of a pair: {} if not requested, None if unknown."""
    if not options.before or options.agreed_only:
        return {}
    found = options.mean_agreement
    if found is None:
        found = agreement(responses, options.before(group_of(responses[0])))
    return None if found is None else {"agreement": found, "label_smoothing": 1 - found}


def of_choice(chosen: Record, rejected: Record, options: PairOptions) -> Record:
    """Return the fields of a pair that depend on the options: `length_alpha`, the two models."""
    found = {"length_alpha": options.alpha} if options.alpha else {}
    if options.earlier or options.later:
        found |= {"model_chosen": chosen.get("model"), "model_rejected": rejected.get("model")}
    return found


def pair_row(chosen: Record, rejected: Record) -> Record:
    """Return a record that TRL's DPOTrainer can read, with the ids, scores and shared fields of its two responses."""
    shared = {key: value for key, value in chosen.items() if key not in NOT_SHARED and rejected.get(key) == value}
    return {
        "prompt_id": chosen["prompt_id"],
        "prompt": as_messages(chosen["prompt"]),
        **shared,
        "id": chosen["prompt_id"],
        "chosen": [reply_message(chosen)],
        "rejected": [reply_message(rejected)],
        "score_chosen": chosen["score"],
        "score_rejected": rejected["score"],
        "chosen_id": chosen["id"],
        "rejected_id": rejected["id"],
        **({"score_from": PEOPLE} if by_people(chosen) else {}),
    }


# Fields of a response or of its judgements; any other field with the same value in both responses is copied.
NOT_OF_A_PAIR = {
    "k", "response", "thought", "finish_reason", "human",
    "score", "scores", "score_from", "judgements", "judgement_finish_reasons", "judge_thoughts",
    "score_judge", "score_rules", "comparisons", "places",
    "agreement", "label_smoothing", "length_alpha", "model_chosen", "model_rejected", SHUFFLED,  # of pairs made before
}  # fmt: skip
OF_A_REPLY = {"response", "thought", "finish_reason", "score", "scores", "score_from"}
NOT_SHARED = NOT_OF_A_PAIR | {"id", "prompt_id", "prompt"}


def by_people(row: Record) -> bool:
    """Return whether the score of a response is from people."""
    return row.get("score_from") == PEOPLE


def group_of(row: Record) -> Group:
    """Return the group of a response: its prompt, and whether people scored it."""
    return row["prompt_id"], by_people(row)


def groups(
    judged: Iterable[Record], unsorted: bool, is_new: IsNew | None = None, group_by_key: GroupByKey | None = None
) -> Iterator[tuple[list[Record], bool]]:
    """Yield (responses of a prompt, whether this is final only at the end of the input)."""
    if not unsorted:
        return consecutive(judged, is_new or never_seen())
    parts = ((key, map(without_judgements, rows)) for key, rows in groupby(judged, key=group_of))
    return ((responses, True) for responses in (group_by_key or in_memory)(parts))


def consecutive(judged: Iterable[Record], is_new: IsNew) -> Iterator[tuple[list[Record], bool]]:
    """Yield (consecutive responses of a prompt, whether it is the last); a prompt that comes back is a bad row."""
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
    """Return a judged record without the fields that no pair needs, to save space until all are read."""
    return {key: row[key] for key in row if key not in NOT_OF_A_PAIR or key in OF_A_REPLY}


def in_memory(parts: Parts) -> Iterator[list[Record]]:
    """Yield the rows of each key, in the order in which the keys first appeared."""
    groups: dict[Hashable, list[Record]] = {}
    for key, rows in parts:
        groups.setdefault(key, []).extend(rows)
    yield from groups.values()
