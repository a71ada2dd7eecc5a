"""EFT rows from a model's own replies: graded by rules or by people, grouped by prompt."""

from __future__ import annotations

import pytest

from helpers import Srlm, as_lines, read_json, read_rows, write_rows

RULES = ["no-commas", "lower-case"]
TEXTS = ["all small", "Not, small", "Small"]
ROWS = [
    {
        "id": f"mine-{n}-{k}", "prompt_id": f"p{n}", "prompt": f"Ask {n}?", "response": text, "k": k, "rules": RULES,
        "model": "M1", "topic": n, "finish_reason": "stop",
    }
    for n in range(3)
    for k, text in enumerate(TEXTS)
]  # fmt: skip
EFT = (
    "make-eft",
    "--quiet",
    "--template",
    "score_only",
    "--method",
    "hindsight",
    "--reason",
    "none",
    "--max-share",
    "1",
)
BY_RULES = (*EFT, "--own", "rules")


def test_the_score_is_the_share_of_rules_kept(srlm: Srlm) -> None:
    result = srlm(*BY_RULES, stdin=as_lines(ROWS))
    assert result.code == 0, result.err
    assert [row["score"] for row in result.rows[0::3]] == [5.0] * 3 and [row["score"] for row in result.rows[1::3]] == [
        0
    ] * 3
    assert all(row["score"] in (2, 3) for row in result.rows[2::3])  # 2.5, to either side
    assert [row["id"] for row in result.rows] == [row["id"] for row in ROWS]
    first = result.rows[0]
    assert (first["prompt_id"], first["graded_by"], first["model"], first["topic"]) == ("p0", "rules", "M1", 0)
    assert "all small" in first["prompt"][-1]["content"] and first["completion"][0]["content"].endswith("5")


def test_rules_of_the_command_grade_too(srlm: Srlm) -> None:
    rows = [{key: value for key, value in row.items() if key != "rules"} for row in ROWS[:3]]
    result = srlm(*BY_RULES, "--rule", "no-commas", "--scale", "balanced", stdin=as_lines(rows))
    assert [row["score"] for row in result.rows] == [5, 0, 5], result.err
    without = srlm(*BY_RULES, stdin=as_lines(rows))
    assert without.code == 3 and "<stdin>:1: no rules for this row" in without.err


def test_people_grade_by_the_field_human(srlm: Srlm) -> None:
    rows = [{**row, "human": float(10 * row["k"])} for row in ROWS]
    linear = (*EFT, "--own", "people", "--scale", "linear", "--score-low", "0", "--score-high", "20")
    result = srlm(*linear, stdin=as_lines(rows))
    assert [row["score"] for row in result.rows[0::3]] == [0] * 3 and [row["score"] for row in result.rows[2::3]] == [
        5
    ] * 3
    assert {row["graded_by"] for row in result.rows} == {"people"}
    write_rows(srlm.folder / "in.jsonl", rows)
    balanced = srlm(*EFT, "--own", "people", "--in", "in.jsonl")
    assert balanced.code == 0 and {row["score"] for row in balanced.rows[2::3]} <= {4, 5}
    missing = srlm(*linear, stdin=as_lines(ROWS))
    assert missing.code == 3 and "expected `human`" in missing.err


def test_accept_compares_the_judge_with_the_grades(srlm: Srlm) -> None:
    argv = ("make-eft", "--engine", "echo", "--own", "rules", "--num-judgements", "40", "--max-share", "1", "--quiet")
    result = srlm(*argv, stdin=as_lines([row for row in ROWS if row["k"] < 2]))
    assert result.code == 0 and result.rows
    for good, bad in zip(result.rows[0::2], result.rows[1::2], strict=True):
        assert good["score"] > bad["score"] and good["id"].rpartition("/")[2] == bad["id"].rpartition("/")[2]
        assert good["id"].startswith("mine-") and bad["id"].split("/")[0] == good["id"].split("/")[0][:-1] + "1"


def test_responses_that_no_model_wrote_are_dropped_and_counted(srlm: Srlm) -> None:
    rows = [
        {**ROWS[0], "response": " "}, ROWS[1], {**ROWS[2], "finish_reason": "content_filter"},
        *({**row, "response": ""} for row in ROWS[3:6]),
        ROWS[6], {**ROWS[7], "response": ""}, ROWS[8],
        {"prompt": "Last?", "response": "", "rules": RULES},
    ]  # fmt: skip
    result = srlm(*BY_RULES, "--out", "out.jsonl", stdin=as_lines(rows))
    assert result.code == 0, result.err
    counts = read_json(srlm.folder / "out.jsonl.meta.json")["counts"]
    assert (counts["read"], counts["kept"], counts["dropped"]) == (10, 3, {"no reply": 7})
    assert [row["id"] for row in read_rows(srlm.folder / "out.jsonl")] == ["mine-0-1", "mine-2-0", "mine-2-2"]


def test_a_held_out_part_is_ranked_rows_with_the_grades(srlm: Srlm) -> None:
    parts = [
        srlm(*BY_RULES, "--eval-share", "0.5", "--seed", "4", "--split", split, stdin=as_lines(ROWS)).rows
        for split in ("train", "eval")
    ]
    held = [row["id"] for row in parts[1]]
    assert 0 < len(held) < 3 and {row["prompt_id"] for row in parts[0]} == {"p0", "p1", "p2"} - set(held)
    assert [reply["score"] for reply in parts[1][0]["responses"]] == [1.0, 0.0, 0.5]
    judged = srlm("judge", "--engine", "echo", "--model", "longest", stdin=as_lines(parts[1]))
    accuracy = [row for row in srlm("eval", "reward", stdin=judged.out).rows if row["metric"] == "pairwise_accuracy"]
    assert accuracy[-1]["n"] == 3 * len(held)


def test_an_unfinished_run_gives_the_rows_of_a_whole_one(srlm: Srlm) -> None:
    for more in ((), ("--eval-share", "0.5", "--seed", "4", "--split", "eval")):
        whole = srlm(*BY_RULES, *more, stdin=as_lines(ROWS)).rows
        write_rows(srlm.folder / "in.jsonl", [*ROWS[:7], {"prompt": 3}, *ROWS[7:]])
        run = (*BY_RULES[:1], *BY_RULES[2:], *more, "--in", "in.jsonl", "--out", f"out{len(more)}.jsonl")
        assert srlm(*run).code == 3
        write_rows(srlm.folder / "in.jsonl", ROWS)
        again = srlm(*run)
        assert again.code == 0 and "resuming after 6 completed inputs" in again.err
        assert read_rows(srlm.folder / f"out{len(more)}.jsonl") == whole


def test_a_prompt_that_comes_back_is_a_bad_row(srlm: Srlm) -> None:
    result = srlm(*BY_RULES, stdin=as_lines([*ROWS[:6], ROWS[0]]))
    assert result.code == 3 and "the responses of prompt p0 are not grouped" in result.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rule", "no-commas"), "add --own rules"),
        (("--own", "people", "--rule", "no-commas"), "add --own rules"),
        (("--own", "rules", "--rule", "nothing"), "no rule 'nothing'"),
        (("--own", "rules", "--thin"), "--thin does not fit"),
        (("--own", "rules", "--shard", "1/2"), "--shard does not fit"),
    ],
)
def test_options_that_do_not_fit(srlm: Srlm, options: tuple[str, ...], said: str) -> None:
    write_rows(srlm.folder / "in.jsonl", ROWS)
    result = srlm(*EFT, *options, "--in", "in.jsonl")
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1
