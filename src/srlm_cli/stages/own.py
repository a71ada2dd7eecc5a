"""A model's own replies as ranked records: the replies to one prompt, graded by rules or by people.

A judge that has seen only other texts can be at chance on the replies that it has to judge in the loop: it must learn
from the faults of the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from srlm_cli.errors import BadRow
from srlm_cli.records import Record, is_number, is_reply, refuse_two_prompts, refuse_two_replies, response_record
from srlm_cli.rules import RuleSet, check_reply
from srlm_cli.stages import Outcome
from srlm_cli.stages.make_pairs import NOT_SHARED, IsNew, consecutive

BAD_PROMPT = "replies of a bad row's prompt"


def graded_by_rules(row: Record, rules: RuleSet) -> Record:
    """Return a response record whose `human` is the share of rules that it keeps: `rules`, and of the row."""
    record = response_record(row)
    results = check_reply(record, rules.of(record))
    if not results:
        raise BadRow("no rules for this row: expected the field `rules`, or --rule NAME")
    return {**record, "human": fmean(results.values())}


def graded_by_people(row: Record) -> Record:
    """Return a response record with `human`, the value that people gave; a larger value is better."""
    record = response_record(row)
    if not is_number(record.get("human")):
        raise BadRow(f"expected `human`, the value that people gave, a number, got {record.get('human')!r}")
    return record


@dataclass(frozen=True)
class Group:
    """The replies to one prompt: their ids, how many rows they and those without text are, and rows before them."""

    ids: list[str]
    rows: int
    before: int
    no_reply: int
    is_last: bool


def from_own(
    responses: Iterable[Record],
    make: Callable[[Iterable[Record]], Iterator[Outcome]],
    graded_by: str,
    is_new: IsNew,
) -> Iterator[Outcome]:
    """Yield what `make` yields for ranked records, with the graded responses as the rows that are read.

    The responses of a prompt must be consecutive. Those that no model wrote (see `records.is_reply`) are dropped. An
    EFT record has the id of its response.
    """
    waiting: deque[Group] = deque()
    before = 0

    def ranked() -> Iterator[Record]:
        nonlocal before
        for rows, is_last in consecutive(responses, is_new):
            refuse_two_prompts(rows)
            refuse_two_replies(rows)
            replies = [row for row in rows if is_reply(row)]
            if not replies:
                before += len(rows)
                continue
            ids = [row["id"] for row in replies]
            waiting.append(Group(ids, len(rows), before, len(rows) - len(replies), is_last))
            before = 0
            yield ranked_row(replies, graded_by)

    for outcome in make(ranked()):
        groups = [waiting.popleft() for _ in range(outcome.read)]
        yield from outcomes_of(outcome, groups)
    if before:
        yield Outcome(read=before, dropped={"no reply": before}, at_end=True)


def outcomes_of(outcome: Outcome, groups: list[Group]) -> Iterator[Outcome]:
    """Yield the outcome of some ranked records as that of the responses of which they were made."""
    before = sum(group.before for group in groups)
    rows, lost = sum(group.rows for group in groups), sum(group.no_reply for group in groups)
    if outcome.bad:  # the first response is the bad row
        if before:
            yield Outcome(read=before, dropped={"no reply": before})
        yield replace(outcome, read=1)
        if rows > 1:
            yield Outcome(read=rows - 1, dropped={BAD_PROMPT: rows - 1})
        return
    lost += before
    ids = groups[-1].ids if groups else []
    yield replace(
        outcome,
        rows=[with_id(row, ids) if "completion" in row else row for row in outcome.rows],
        read=before + rows,
        dropped={**outcome.dropped, **({"no reply": lost} if lost else {})},
        at_end=outcome.at_end or any(group.is_last for group in groups),
    )


def ranked_row(replies: list[Record], graded_by: str) -> Record:
    """Return the replies to one prompt as a ranked record, with the fields that they share."""
    first = replies[0]
    kept = {key: value for key, value in first.items() if key not in NOT_SHARED}
    shared = {key: value for key, value in kept.items() if all(row.get(key) == value for row in replies)}
    return {
        **shared,
        "id": first["prompt_id"],
        "prompt": first["prompt"],
        "graded_by": graded_by,
        "responses": [{"text": row["response"], "score": row["human"]} for row in replies],
    }


def with_id(row: Record, ids: list[str]) -> Record:
    """Return an EFT record with the id of its response in place of the number of the reply."""
    number, *sample = row["id"].removeprefix(f"{row['prompt_id']}/").split("/")
    return {**row, "id": "/".join([ids[int(number)], *sample])}
