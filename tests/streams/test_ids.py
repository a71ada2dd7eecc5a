"""Two prompts, or two different replies, with one id are a bad record."""

from __future__ import annotations

import pytest

from helpers import Record, Srlm, as_lines, read_rows
from srlm_cli.errors import BadRow
from srlm_cli.records import judged_record
from srlm_cli.stages.seen import with_ids_checked

ECHO = ("--engine", "echo", "--model", "longest")
COMMANDS = [
    ("judge", *ECHO),
    ("judge", "--engine", "echo", "--model", "rules", "--rule", "no-commas"),
    ("judge", "--rescore"),
    ("eval", "health"),
    ("eval", "reward"),
    ("eval", "rules", "--rule", "no-commas"),
    ("eval", "probe", *ECHO),
]


def row(number: int, **more) -> Record:
    judged = {"score": 1.0, "scores": [1.0], "judgements": ["Score: 1"], "human": 1.0}
    return {"prompt": f"Question {number}?", "response": f"Reply {number}.", **judged, **more}


SAME_ID = [row(n, id="x") for n in range(3)]
SAME_PROMPT_ID = [row(n, id=f"r{n}", prompt_id="p") for n in range(3)]
TWO_REPLIES = [row(0, response=text, id="x", prompt_id="p") for text in ("One.", "Two.")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (SAME_ID, "two replies have the id x"),
        (SAME_PROMPT_ID, "two prompts have the prompt_id p"),
        (TWO_REPLIES, "two replies have the id x"),
    ],
    ids=["id", "prompt_id", "reply"],
)
def test_an_id_of_two_is_a_bad_record(srlm: Srlm, command: tuple, rows: list[Record], said: str) -> None:
    result = srlm(*command, "--quiet", stdin=as_lines(rows))
    assert result.code == 3 and said in result.err and len(result.err.splitlines()) == 1, result.err


def test_two_prompts_with_one_id_are_not_sampled(srlm: Srlm) -> None:
    prompts = [{"id": "x", "prompt": "Why?"}, {"id": "x", "prompt": "How?"}, {"id": "y", "prompt": "When?"}]
    result = srlm("sample", "--engine", "echo", stdin=as_lines(prompts))
    assert result.code == 3 and "<stdin>:2: two prompts have the id x" in result.err, result.err
    skipping = ("--on-error", "skip", "--rejects", "bad.jsonl", "--num-responses", "1")
    skipped = srlm("sample", "--engine", "echo", *skipping, stdin=as_lines(prompts))
    assert skipped.code == 0 and [row["prompt_id"] for row in skipped.rows] == ["x", "y"]
    assert [bad["at"] for bad in read_rows(srlm.folder / "bad.jsonl")] == ["<stdin>:2"]


def test_equal_rows_and_forms_of_one_prompt_pass() -> None:
    check = with_ids_checked(judged_record)
    as_list = row(0, id="b", prompt=[{"role": "user", "content": "Question 0?"}])
    for one in (row(0, id="a", prompt_id="p"), {**as_list, "prompt_id": "p"}, row(0, id="a", prompt_id="p"), row(1)):
        check(one)
    with pytest.raises(BadRow, match="two replies have the id c"):
        [check(row(0, id="c", prompt_id="p", response=text)) for text in "ab"]
