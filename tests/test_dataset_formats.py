"""Rows as other tools document them: read as these tools read them, or refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers import Srlm, as_lines, read_json
from srlm_cli import records
from srlm_cli.dataset_formats import unused_columns
from srlm_cli.errors import BadRow, DataError
from srlm_cli.streams.reader import Reader, Shard, open_lines

ASK, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "Up?"), ("assistant", "Yes."), ("assistant", "No."))
)
MORE = {"role": "user", "content": "Sure?"}
BE_BRIEF = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: Up?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant:"
PAIR = {"chosen": [ASK, YES], "rejected": [ASK, NO]}


def pair(**row: Any) -> tuple[Any, Any, Any]:
    """Return prompt, chosen and rejected of a pair."""
    made = records.pair_record(row)
    return made["prompt"], made["chosen"], made["rejected"]


# --- pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Up?"}, {"prompt": " Up?\n"}, {"prompt": [ASK]}, {"prompt": None}])
def test_sides_that_are_whole_dialogues_begin_with_the_prompt(prompt: dict) -> None:
    """TRL: a prompt that is a text is passed over where the sides are dialogues; UltraFeedback has such rows."""
    assert pair(**prompt, **PAIR) == ([ASK], [YES], [NO])


def test_all_turns_that_the_sides_share_are_the_prompt() -> None:
    long = {"chosen": [BE_BRIEF, ASK, NO, MORE, YES], "rejected": [BE_BRIEF, ASK, NO, MORE, NO]}
    assert pair(**long) == ([BE_BRIEF, ASK, NO, MORE], [YES], [NO])
    for prompt in ("Up?", "Sure?", [ASK], [BE_BRIEF, ASK], [ASK, NO, MORE]):
        assert pair(prompt=prompt, **long)[0] == [BE_BRIEF, ASK, NO, MORE]
    assert pair(prompt=[BE_BRIEF, ASK], **PAIR) == ([BE_BRIEF, ASK], [YES], [NO])


def test_equal_sides_keep_their_last_turn() -> None:
    assert pair(chosen=[ASK, YES], rejected=[ASK, YES]) == ([ASK], [YES], [YES])


def test_a_side_may_be_one_message() -> None:
    """LLaMA-Factory's sharegpt pairs, and axolotl's chat_template.default."""
    said = {"from": "gpt", "value": "Yes."}, {"from": "gpt", "value": "No."}
    told = [{"from": "human", "value": "Up?"}]
    assert pair(conversations=told, chosen=said[0], rejected=said[1]) == ([ASK], [YES], [NO])
    assert pair(messages=[ASK], chosen=YES, rejected=NO, system="Be brief.") == ([BE_BRIEF, ASK], [YES], [NO])


def test_pairs_have_other_names() -> None:
    """axolotl's chatml.argilla and chatml.intel, LLaMA-Factory's alpaca pairs."""
    sides = {"chosen": "Yes.", "rejected": "No."}
    assert pair(instruction="Up?", chosen_response="Yes.", rejected_response="No.") == ("Up?", "Yes.", "No.")
    assert pair(system="Be brief.", question="Up?", **sides) == ([BE_BRIEF, ASK], "Yes.", "No.")
    assert pair(instruction="Up?", input="Now.", **sides)[0] == "Up?\n\nNow."
    assert pair(system="Be brief.", prompt="Up?", **sides)[0] == [BE_BRIEF, ASK]


def test_texts_of_hh_are_dialogues() -> None:
    asked = [ASK, YES, MORE]
    assert pair(chosen=HH + " Yes.", rejected=HH + " No.") == (asked, [YES], [NO])
    assert pair(prompt=HH, chosen="Yes.", rejected="No.") == (asked, "Yes.", "No.")
    assert pair(prompt="Sure?", chosen=HH + " Yes.", rejected=HH + " No.")[0] == asked
    assert records.prompt_record({"prompt": HH})["prompt"] == asked
    assert records.prompt_record({"prompt": "Human: is this a question?"})["prompt"].startswith("Human:")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": [ASK, YES], "rejected": [MORE, NO]}, "begin with the same turns"),
        (
            {"chosen": [ASK, YES, MORE, YES], "rejected": [ASK, NO, MORE, NO]},
            "`chosen` to be turns of the assistant only",
        ),
        ({"prompt": "Up?", "chosen": [YES, MORE, NO], "rejected": "No."}, "`chosen` to be turns of the assistant only"),
        ({"prompt": "Up?", "chosen": [ASK, YES], "rejected": "No."}, "got a whole dialogue as `chosen` only"),
        ({"prompt": "Up?", "chosen": [ASK, YES], "rejected": [NO]}, "got a whole dialogue as `chosen` only"),
        ({"prompt": "Down?", **PAIR}, "another text"),
        ({"prompt": [MORE], **PAIR}, "another text"),
        ({"chosen": [ASK], "rejected": [ASK, NO]}, "begin with the same turns"),
        ({"chosen": HH + " Yes.", "rejected": HH}, "`rejected` to hold text"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "expected `prompt` (or"),
        ({"prompt": "Up?", "chosen": ["Yes.", "Yes!"], "rejected": ["No."]}, "`chosen` to be"),
        (
            {"prompt": "Up?", "chosen": [{"role": "assistant", "content": ""}], "rejected": "No."},
            "`chosen` to hold text",
        ),
    ],
)
def test_a_pair_that_cannot_be_told_is_refused(row: dict, words: str) -> None:
    with pytest.raises(BadRow) as refused:
        records.pair_record(row)
    assert words in str(refused.value)


# --- prompts and completions -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Up?", "input": "", "system": "Be brief."}, [BE_BRIEF, ASK]),
        ({"instruction": "Sure?", "history": [["Up?", "Yes."]]}, [ASK, YES, MORE]),
        ({"prompt": "Sure?", "history": [["Up?", "Yes."]], "system": "Be brief."}, [BE_BRIEF, ASK, YES, MORE]),
        ({"instruction": "Up?", "history": [], "system": ""}, "Up?"),
        ({"instruction": "Up?", "context": "It rains."}, "Up?\n\nIt rains."),
        ({"context": "It rains.", "question": "Up?"}, "It rains.\n\nUp?"),
        ({"system_prompt": "Be brief.", "question": "Up?", "response": "Yes."}, [BE_BRIEF, ASK]),
        ({"conversations": [ASK, YES], "system": "Be brief."}, [BE_BRIEF, ASK]),
        ({"conversations": [{"role": "human", "value": "Up?"}, {"role": "gpt", "value": "Yes."}]}, [ASK]),
        ({"messages": [BE_BRIEF, ASK], "system": "Be brief."}, [BE_BRIEF, ASK]),
        ({"messages": [BE_BRIEF, ASK], "system": "Be long."}, [BE_BRIEF, ASK]),
        ({"prompt": "Up?", "system": None, "messages": None, "chosen": None, "rejected": None}, "Up?"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "U"}, {"text": "p?"}]}]}, [ASK]),
        ({"prompt": [{"from": "human", "value": "Up?"}]}, [ASK]),
        ({"prompt": "Up?", "messages": [ASK, YES, MORE, NO]}, "Up?"),
    ],
)
def test_a_prompt_has_what_its_tool_would_show(row: dict, prompt: Any) -> None:
    made = records.prompt_record(row)
    assert made["prompt"] == prompt
    # what it was made of is gone: a later stage that reads the row again must not add it once more
    assert records.prompt_record(made)["prompt"] == prompt


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"instruction": "Up?", "context": "It rains.", "response": "No."}, "Up?\n\nIt rains.", "No."),
        ({"question": "Up?", "answer": "Yes."}, "Up?", "Yes."),
        ({"system_prompt": "Be brief.", "question": "Up?", "response": "Yes."}, [BE_BRIEF, ASK], "Yes."),
        ({"prompt": "Up?", "completion": [ASK, YES]}, [ASK], [YES]),
        ({"completion": [BE_BRIEF, ASK, YES]}, [BE_BRIEF, ASK], [YES]),
        ({"prompt": "Up?", "prompt_id": "7", "messages": [ASK, YES, MORE, NO]}, [ASK, YES, MORE], "No."),
        ({"prompt": "Up?", "messages": [ASK, YES], **PAIR}, [ASK], "Yes."),
        ({"instruction": "Sure?", "output": "No.", "history": [["Up?", "Yes."]]}, [ASK, YES, MORE], "No."),
        ({"prompt": HH, "completion": "No."}, [ASK, YES, MORE], "No."),
    ],
)
def test_a_completion_is_the_answer_of_its_tool(row: dict, prompt: Any, completion: Any) -> None:
    made = records.completion_record(row)
    assert (made["prompt"], made["completion"]) == (prompt, completion)


@pytest.mark.parametrize(
    ("check", "row", "words"),
    [
        (
            records.prompt_record,
            {"instruction": "Up?", "history": [["Up?"]]},
            "`history` to be a list of [prompt, reply]",
        ),
        (records.prompt_record, {"instruction": "Up?", "history": "Yes."}, "`history` to be a list"),
        (records.prompt_record, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "to be texts"),
        (records.prompt_record, {"messages": [{"role": "user", "content": None}]}, "{role, content} with texts"),
        (records.prompt_record, {"conversations": [{"from": "observation", "value": "4"}]}, "got 'observation'"),
        (records.prompt_record, {"prompt": "Up?", "messages": [MORE, NO]}, "another text"),
        (records.completion_record, {"prompt": "Up?", "completion": [ASK, YES, MORE]}, "assistant only"),
        (records.completion_record, {"prompt": "Up?", "response": "Yes."}, "expected `completion`"),
        (records.completion_record, {"conversations": [YES]}, "ends with an assistant turn after a user turn"),
    ],
)
def test_what_cannot_be_read_is_refused(check, row: dict, words: str) -> None:
    with pytest.raises(BadRow) as refused:
        check(row)
    assert words in str(refused.value)


def test_responses_to_rows_of_alpaca_are_not_trained_on_for_its_outputs() -> None:
    """The answer of the file is no answer to train on in a row that `sample` made of it."""
    sampled = records.prompt_record({"instruction": "Up?", "output": "Yes."}) | {"response": "Maybe."}
    with pytest.raises(BadRow, match="expected `completion`"):
        records.completion_record(sampled)


def test_an_own_judged_row_is_read_in_one_look_and_another_is_not() -> None:
    own = {"id": "a/0", "prompt_id": "a", "prompt": "Up?", "response": "Yes.", "score": 3}
    assert records.is_judged_reply(own)
    assert not records.is_judged_reply({**own, "system": "Be brief."}) and not records.is_judged_reply(
        {**own, "prompt": HH}
    )
    assert records.judged_record({**own, "system": "Be brief."})["prompt"] == [BE_BRIEF, ASK]


# --- columns that are not used ---------------------------------------------------------------


def test_a_column_that_is_not_used_is_told() -> None:
    told = {"prompt": "Up?", "tools": "[{}]", "images": [], "history": None, "context": "It rains.", "input": ""}
    assert unused_columns(records.prompt_record(told)) == ["context", "tools"]
    assert unused_columns(records.prompt_record({"messages": [BE_BRIEF, ASK], "system": "Be long."})) == ["system"]
    assert unused_columns(records.prompt_record({"messages": [ASK], "history": [["a", "b"]]})) == ["history"]
    assert unused_columns(records.prompt_record({"instruction": "Up?", "input": "Now.", "context": "x"})) == []


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_columns_that_are_not_used_are_a_warning_with_a_count(srlm: Srlm, quiet: list[str]) -> None:
    rows = [{"prompt": f"Ask {n}?", "tools": [{"name": "clock"}] if n else []} for n in range(3)]
    result = srlm("sample", "--engine", "echo", "-n", "1", "--out", "out.jsonl", *quiet, stdin=as_lines(rows))
    assert result.code == 0
    assert result.err.count("srlm sample: warning: 2 rows with an unused `tools` column") == 1
    assert read_json(srlm.folder / "out.jsonl.meta.json")["warnings"] == {"rows with an unused `tools` column": 2}


# --- JSON arrays -----------------------------------------------------------------------------


def read(path) -> list[tuple[str, int]]:
    """Return the prompts of a file, and the lines they stand on."""
    rows = Reader([str(path)], records.prompt_record)
    found = [(row["prompt"], int(rows.at.rpartition(":")[2])) for row in rows]
    if rows.error:
        raise rows.error
    return found


def test_a_json_array_is_read_and_its_elements_stand_where_they_begin(tmp_path) -> None:
    rows = [{"prompt": f"Ask {n},\n] of }} [?", "more": {"deep": [n]}} for n in range(4)]
    asked = [row["prompt"] for row in rows]
    path = tmp_path / "in.json"
    path.write_text(json.dumps(rows, indent=2))
    assert read(path) == list(zip(asked, [2, 10, 18, 26], strict=True))
    path.write_text("\ufeff\n [" + ",".join(map(json.dumps, rows)) + "]\n\n")
    assert [prompt for prompt, _ in read(path)] == asked
    path.write_text("[]")
    assert read(path) == []


def test_rows_after_a_line_that_is_a_list_are_lines(tmp_path) -> None:
    (tmp_path / "in").write_text('[{"prompt": "a"}]\n{"prompt": "b"}\n')
    rows = Reader([str(tmp_path / "in")], records.prompt_record, on_error="skip")
    assert [row["prompt"] for row in rows] == ["b"] and rows.skipped == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"prompt": "a"},\n{"prompt": b}\n]', 3),
        ('[\n{"prompt": "a"}\n{"prompt": "b"}\n]', 3),
        ('[{"prompt": "a"},', 1),
    ],
)
def test_a_broken_array_is_named_whatever_on_error_says(tmp_path, text: str, line: int) -> None:
    (tmp_path / "in").write_text(text)
    with pytest.raises(DataError, match=f"in:{line}: not a JSON array"):
        list(Reader([str(tmp_path / "in")], records.prompt_record, on_error="skip"))


def test_an_array_is_a_pipe_and_has_shards_and_bad_rows(srlm: Srlm) -> None:
    rows = [{"prompt": f"Ask {n}?"} for n in range(5)]
    text = json.dumps([*rows[:2], {"text": "no prompt"}, *rows[2:]], indent=1)
    argv = ["sample", "--engine", "echo", "-n", "1", "--quiet"]
    stopped = srlm(*argv, stdin=text)
    assert stopped.code == 3 and "<stdin>:8: expected `prompt`" in stopped.err and len(stopped.rows) == 2
    whole = srlm(*argv, "--on-error", "skip", stdin=text).rows
    assert [row["prompt"] for row in whole] == [row["prompt"] for row in rows]
    (srlm.folder / "in.json").write_text(text)
    parts = [srlm(*argv, "--on-error", "skip", "--in", "in.json", "--shard", f"{k}/3").rows for k in (1, 2, 3)]
    assert sum(parts, []) == whole


def test_an_array_has_the_lines_of_its_text(tmp_path) -> None:
    (tmp_path / "in").write_text('[\n\n{"a": 1},\n{"a": 2}, {"a": 3}]')
    with open_lines(str(tmp_path / "in")) as lines:
        assert list(lines) == [b"\n", b"\n", b'{"a": 1}\n', b'{"a": 2}\n', b'{"a": 3}\n']
    rows = Reader([str(tmp_path / "in")], lambda row: row, shard=Shard(2, 2))
    assert [row["a"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("row", [{"instruction": "", "output": "x"}, {"question": " "}])
def test_an_empty_prompt_of_another_form_is_a_bad_row(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="expected a prompt, got an empty one"):
        records.prompt_record(row)
