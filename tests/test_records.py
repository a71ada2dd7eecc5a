"""Rows as people have them become the project's own records; what cannot be understood says why."""

from __future__ import annotations

import pytest

from srlm_cli import records
from srlm_cli.errors import BadRow
from srlm_cli.seeds import derive

SPOKEN = [{"role": "user", "content": "Hello?"}]
DIALOGUE = [*SPOKEN, {"role": "assistant", "content": "Yes."}]


def test_a_metric_has_its_new_name_whatever_version_wrote_it() -> None:
    for old, new in records.RENAMED_METRICS.items():
        row = {"metric": old, "value": 0.5, "n": 3}
        assert records.metric_record(row) == {**row, "metric": new} == records.metric_record({**row, "metric": new})


def test_a_prompt_keeps_unknown_fields_and_gets_an_id() -> None:
    row = records.prompt_record({"prompt": "Hello?", "lang": "en"})
    assert row == {"id": records.prompt_id("Hello?"), "prompt": "Hello?", "lang": "en"}


def test_an_own_id_stays_and_becomes_text() -> None:
    assert records.prompt_record({"id": 7, "prompt": "Hello?"})["id"] == "7"
    assert records.prompt_record({"id": 0, "prompt": "Hello?"})["id"] == "0"
    assert records.prompt_record({"id": "", "prompt": "Hello?"})["id"] == records.prompt_id("Hello?")


@pytest.mark.parametrize("value", [True, False, [1], {}, []], ids=str)
def test_an_id_that_is_not_a_text_or_a_number_is_a_bad_row(value: object) -> None:
    with pytest.raises(BadRow, match="expected `id`, a text or a number, got"):
        records.prompt_record({"id": value, "prompt": "Why?"})
    with pytest.raises(BadRow, match="expected `prompt_id`, a text or a number, got"):
        records.response_record({"prompt_id": value, "prompt": "Why?", "response": "So."})


def test_the_id_of_a_prompt_is_its_text_whatever_its_form() -> None:
    assert records.prompt_id("Hello?") == records.prompt_id(SPOKEN)
    assert records.prompt_id("Hello?") != records.prompt_id("Hello!")
    assert records.prompt_id(SPOKEN) != records.prompt_id([{"role": "system", "content": "Hello?"}, *SPOKEN])
    assert len(records.prompt_id("Hello?")) == 16


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Sum up.", "input": "A text.", "output": "T."}, "Sum up.\n\nA text."),
        ({"instruction": "Sum up.", "input": ""}, "Sum up."),
        ({"messages": DIALOGUE}, SPOKEN),
        ({"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]}, SPOKEN),
        ({"prompt": SPOKEN}, SPOKEN),
        ({"prompt": "Hello?", "responses": [{"text": "Yes.", "rank": 0}]}, "Hello?"),
    ],
)
def test_prompts_come_in_many_forms(row: dict, prompt: object) -> None:
    made = records.prompt_record(row)
    assert made["prompt"] == prompt and made["id"] == records.prompt_id(prompt)
    assert "responses" not in made


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "Hello?", "completion": "Yes."}, "Hello?", "Yes."),
        ({"prompt": SPOKEN, "completion": DIALOGUE[1:]}, SPOKEN, DIALOGUE[1:]),
        ({"instruction": "Sum up.", "input": "A.", "output": "B."}, "Sum up.\n\nA.", "B."),
        ({"messages": DIALOGUE}, SPOKEN, "Yes."),
        (
            {"conversations": [{"from": who, "value": who} for who in ("system", "user", "gpt")]},
            [{"role": who, "content": who} for who in ("system", "user")],
            "gpt",
        ),
    ],
)  # fmt: skip
def test_completions_come_in_many_forms(row: dict, prompt: object, completion: object) -> None:
    made = records.completion_record(row)
    assert (made["prompt"], made["completion"]) == (prompt, completion)


@pytest.mark.parametrize(
    ("check", "row", "words"),
    [
        (records.prompt_record, {"text": "Hello?"}, "got the fields `text`"),
        (records.prompt_record, {"prompt": None}, "`prompt` to be a text, got nothing"),
        (records.prompt_record, {"prompt": 3}, "got a number"),
        (records.prompt_record, {"prompt": " \n"}, "empty"),
        (records.prompt_record, {"prompt": []}, "list of {role, content}"),
        (records.prompt_record, {"prompt": [{"role": "user"}]}, "{role, content}"),
        (records.prompt_record, {"conversations": [{"from": "robot", "value": "x"}]}, "robot"),
        (records.prompt_record, {"conversations": "x"}, "`conversations`"),
        (records.prompt_record, {"prompt": "Hello?", "chat_template_kwargs": 1}, "to be an object, got 1"),
        (records.completion_record, {"prompt": "Hello?", "completion": "Yes.", "chat_template_kwargs": []}, "object"),
        (records.completion_record, {"prompt": "Hello?"}, "`completion`"),
        (records.completion_record, {"prompt": "Hello?", "completion": ""}, "empty"),
        (records.completion_record, {"messages": SPOKEN}, "assistant turn"),
        (records.ranked_record, {"prompt": "Hello?"}, "`responses`"),
        (records.ranked_record, {"prompt": "Hello?", "responses": []}, "`responses`"),
        (records.ranked_record, {"prompt": "Hello?", "responses": [{"text": "Yes."}]}, "`rank` or `score`"),
        (records.ranked_record, {"prompt": "Hello?", "responses": [{"text": "Yes.", "rank": True}]}, "number"),
        (records.ranked_record, {"prompt": "Hello?", "responses": ["Yes."]}, "`responses`"),
        (records.response_record, {"prompt": "Hello?"}, "`response`"),
        (records.judged_record, {"prompt": "Hello?", "response": "Yes."}, "`score`"),
        (records.judged_record, {"prompt": "Hello?", "response": "Yes.", "score": "4"}, "'4'"),
        (records.judged_record, {"prompt": "Hello?", "response": "Yes.", "score": True}, "`score`"),
        (records.judged_record, {"prompt": "Hello?", "response": "Yes.", "score": 10**400}, "a number or null"),
        (records.judged_record, {"prompt": "Hello?", "response": "Yes.", "score": -(10**309)}, "a number or null"),
        (records.pair_record, {"prompt": "Hello?", "chosen": "Yes."}, "`rejected`"),
        (records.pair_record, {"prompt": "Hello?", "chosen": "Yes.", "rejected": ""}, "empty"),
    ],
)
def test_what_cannot_be_understood_says_what_was_expected(check, row: dict, words: str) -> None:
    with pytest.raises(BadRow) as caught:
        check(row)
    assert words in str(caught.value)


def test_a_response_is_named_by_its_prompt_and_its_number() -> None:
    own = records.prompt_id("Hello?")
    assert records.response_record({"prompt": "Hello?", "response": "Yes.", "k": 0})["id"] == f"{own}/0"
    assert records.response_record({"prompt": "Hello?", "response": "Yes.", "prompt_id": "p1", "k": 2})["id"] == "p1/2"


def test_responses_without_a_number_get_ids_of_their_text() -> None:
    rows = [records.response_record({"prompt": "Hello?", "response": text}) for text in ("Yes.", "No.", "Yes.")]
    assert rows[0]["id"] == rows[2]["id"] != rows[1]["id"]
    assert {row["prompt_id"] for row in rows} == {records.prompt_id("Hello?")}


def test_an_empty_response_is_a_response() -> None:
    assert records.response_record({"prompt": "Hello?", "response": ""})["response"] == ""


def test_a_score_may_be_null() -> None:
    assert records.judged_record({"prompt": "Hello?", "response": "Yes.", "score": None})["score"] is None


@pytest.mark.parametrize("change", [{}, {"k": 3}, {"score": 4.5}, {"score": None}, {"finish_reason": "stop"}])
def test_a_row_that_is_told_to_be_judged_is_its_own_record(change: dict) -> None:
    row = {"response": "Yes.", "score": 4, "lang": "en", "prompt": "Hello?", "prompt_id": "p", "id": "p/0", **change}
    assert records.is_judged_reply(row) and records.judged_record(row) == row


@pytest.mark.parametrize("field", ["id", "prompt_id", "prompt", "response", "score"])
@pytest.mark.parametrize("value", [..., "", " \n", 7, 10**400, True, None, [], SPOKEN, {"a": 1}])
def test_a_row_that_has_to_be_looked_at_is_not_told_to_be_judged(field: str, value: object) -> None:
    row = {"response": "Yes.", "score": 4, "prompt": "Hello?", "prompt_id": "p", "id": "p/0", field: value}
    if value is ...:
        del row[field]
    try:
        same = records.judged_record(row) == row
    except BadRow:
        same = False
    assert not records.is_judged_reply(row) or same


def test_a_ranked_row_becomes_its_responses() -> None:
    replies = [{"text": "A", "rank": 1}, {"text": "B", "rank": 0}, {"text": "C", "rank": 2, "score": None}]
    ranked = records.ranked_record({"id": "r", "prompt": "Hello?", "responses": replies, "lang": "en"})
    rows = records.responses_of(ranked)
    assert [(row["id"], row["response"], row["human"]) for row in rows] == [
        ("r/0", "A", -1.0), ("r/1", "B", 0.0), ("r/2", "C", -2.0)
    ]  # fmt: skip
    assert all((row["prompt_id"], row["prompt"], row["lang"]) == ("r", "Hello?", "en") for row in rows)
    assert all("responses" not in row for row in rows)


def test_ranks_and_scores_are_not_mixed() -> None:
    replies = [{"text": "A", "rank": 1}, {"text": "B", "score": 0.5}]
    with pytest.raises(BadRow, match="not some of each"):
        records.ranked_record({"prompt": "Hello?", "responses": replies})


def test_the_row_as_read_is_not_changed() -> None:
    row = {"prompt": "Hello?", "responses": [{"text": "A", "rank": 1}]}
    before = repr(row)
    records.prompt_record(row), records.responses_of(records.ranked_record(row))
    assert repr(row) == before


def test_prompts_as_messages_and_as_text() -> None:
    assert records.as_messages("Hello?") == SPOKEN
    assert records.as_messages(DIALOGUE) == DIALOGUE
    assert records.as_text(SPOKEN) == "Hello?"
    assert records.as_text(DIALOGUE) == "User: Hello?\n\nAssistant: Yes."


def test_derived_seeds_depend_on_each_part_and_on_nothing_else() -> None:
    seeds = {derive(0, "a", 1), derive(1, "a", 1), derive(0, "b", 1), derive(0, "a", 2), derive(0, "a1"), derive(0)}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive(3, "sample", "id", 0) == derive(3, "sample", "id", 0)
    assert derive(0, "1", "23") != derive(0, "12", "3")


def test_a_seed_can_be_derived_from_any_text() -> None:
    assert derive(0, "half \ud83d of it") != derive(0, "half  of it")


def test_a_ranked_row_in_place_of_a_response_is_named() -> None:
    with pytest.raises(BadRow, match="got a ranked row with `responses`, which `srlm judge` reads first"):
        records.judged_record({"prompt": "a", "responses": [{"text": "b", "rank": 0}]})
