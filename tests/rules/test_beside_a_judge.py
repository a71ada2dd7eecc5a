"""Rules beside a judge, alone, and as a measure: the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import Srlm, as_lines, read_rows, write_rows

RULES = ["no-commas", "words:..3"]
ROWS = [
    {"id": f"p{n}/{k}", "prompt_id": f"p{n}", "prompt": f"Ask {n}?", "response": text, "k": k, "rules": RULES}
    for n in range(2)
    for k, text in enumerate(["One two", "One, two", "One, two, three and four", " "])
]
ALONE = [5.0, 2.5, 0.0, None]
CONSTANT = ("judge", "--engine", "echo", "--model", "constant:4", "--quiet", "-k", "2")
OWN = """
def polite(row):
    print("a word in between")
    return "please" in row["response"]

def half(row):
    return 0.5

def wrong(row):
    return 7

def fails(row):
    return row["nothing"]
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(OWN)
    return "mine.py"


def test_rules_alone_are_the_share_of_rules_kept(srlm: Srlm) -> None:
    result = srlm("judge", "--engine", "echo", "--model", "rules", stdin=as_lines(ROWS))
    assert result.code == 0, result.err
    assert [row["score"] for row in result.rows] == ALONE * 2
    first, *_, last = result.rows[:4]
    assert first["rules"] == {"no-commas": True, "words:..3": True} and first["score_rules"] == 5
    assert (first["scores"], first["score_from"], first["judgements"]) == ([5.0], ["rules"], ["Score: 5"])
    assert first["judge"]["model"] == "echo:rules"
    assert last["rules"] == {"no-commas": False, "words:..3": False} and last["scores"] == []
    assert "16 rules, 6 rules kept" in result.err
    pairs = srlm("make-pairs", "--quiet", stdin=result.out).rows
    assert [(pair["chosen_id"], pair["rejected_id"]) for pair in pairs] == [("p0/0", "p0/2"), ("p1/0", "p1/2")]


def test_rules_alone_are_a_healthy_judge(srlm: Srlm) -> None:
    rows = [row for row in ROWS if row["k"] < 3]
    judged = srlm("judge", "--engine", "echo", "--model", "rules", "--quiet", stdin=as_lines(rows))
    health = srlm("eval", "health", "--quiet", stdin=judged.out)
    assert health.code == 0, health.err
    found = {row["metric"]: row["value"] for row in health.rows if row["metric"] != "share_of_score"}
    assert (found["parse_rate"], found["mean_score"], found["gap"]) == (1.0, 2.5, 5.0)


@pytest.mark.parametrize(
    ("combine", "scores"),
    [((), [4, 0, 0, None]), (("--combine", "gate"), [4, 0, 0, None]), (("--combine", "mean"), [4.5, 3.25, 2, None]),
     (("--combine", "min"), [4, 2.5, 0, None])],
)  # fmt: skip
def test_how_rules_and_judge_make_the_score(srlm: Srlm, combine: tuple[str, ...], scores: list) -> None:
    rows = [{**row, "rules": RULES[:1]} for row in ROWS]
    result = srlm(*CONSTANT, "--rule", RULES[1], *combine, stdin=as_lines(rows))
    assert [row["score"] for row in result.rows] == scores * 2, result.err
    assert [row["score_rules"] for row in result.rows[:4]] == [5.0, 2.5, 0.0, 0.0]
    assert [row["score_judge"] for row in result.rows[:4]] == [4, 4, 4, None]
    assert list(result.rows[0]["rules"]) == [RULES[1], RULES[0]]
    assert result.rows[0]["judge"]["combine"] == (combine[1] if combine else "gate")


def test_a_judge_that_is_not_asked_for_rules_does_not_read_them(srlm: Srlm) -> None:
    rows = [{**row, "rules": ["what is this?"]} for row in ROWS]
    result = srlm(*CONSTANT, stdin=as_lines(rows))
    assert [row["score"] for row in result.rows[:4]] == [4, 4, 4, None]
    assert all(row["rules"] == ["what is this?"] and "score_rules" not in row for row in result.rows)


def test_a_row_without_rules_keeps_the_score_of_the_judge(srlm: Srlm) -> None:
    rows = [{key: value for key, value in ROWS[1].items() if key != "rules"}, {**ROWS[5], "rules": []}, ROWS[2]]
    result = srlm(*CONSTANT, "--combine", "gate", stdin=as_lines(rows))
    assert [row["score"] for row in result.rows] == [4, 4, 0]
    assert "score_rules" not in result.rows[0] and result.rows[1]["rules"] == []
    alone = srlm("judge", "--engine", "echo", "--model", "rules", stdin=as_lines(rows))
    assert alone.code == 3 and "<stdin>:1: no rules for this row" in alone.err


def test_rescore_and_a_second_judge_leave_nothing_of_the_first(srlm: Srlm) -> None:
    plain = srlm(*CONSTANT, stdin=as_lines(ROWS)).rows
    ruled = srlm(*CONSTANT, "--combine", "mean", stdin=as_lines(ROWS))
    assert srlm(*CONSTANT, stdin=ruled.out).rows == plain
    again = srlm("judge", "--rescore", "--quiet", stdin=ruled.out)
    assert again.rows == plain, again.err
    mixed = srlm("judge", "--rescore", "--combine", "mean", "--quiet", stdin=as_lines(plain))
    assert mixed.rows == ruled.rows


@pytest.mark.parametrize("arguments", [("judge", "--engine", "echo"), ("eval", "rules")])
@pytest.mark.parametrize(
    "wrong",
    [("--rule", "nothing"), ("--rule", "words:x"), ("--rule-file", "mine.py"), ("--rule-file", "mine.py:no"),
     ("--rule-file", "nowhere.py:polite"), ("--rule-file", "broken.py:polite"), ("--rule-file", "mine.txt:polite")],
)  # fmt: skip
def test_a_wrong_rule_is_a_usage_error_in_one_line(
    srlm: Srlm, own: str, arguments: tuple[str, ...], wrong: tuple[str, str]
) -> None:
    (srlm.folder / "broken.py").write_text("1 / 0")
    (srlm.folder / "mine.txt").write_text(OWN)
    result = srlm(*arguments, *wrong, stdin=as_lines(ROWS))
    assert result.code == 2 and result.out == "" and len(result.err.splitlines()) == 1, result.err
    assert "--rule" in result.err


def test_rules_alone_have_nothing_to_combine_with(srlm: Srlm) -> None:
    result = srlm("judge", "--engine", "echo", "--model", "rules", "--combine", "mean", stdin=as_lines(ROWS))
    assert result.code == 2 and "leave out --combine" in result.err


@pytest.mark.parametrize("arguments", [("judge", "--engine", "echo", "--model", "rules"), ("eval", "rules")])
def test_bad_rules_of_a_row_are_a_bad_row(srlm: Srlm, arguments: tuple[str, ...]) -> None:
    rows = [ROWS[0], {**ROWS[1], "rules": ["words"]}, ROWS[2]]
    result = srlm(*arguments, stdin=as_lines(rows))
    assert result.code == 3 and "<stdin>:2: `rules`: rule words takes a range" in result.err
    skipped = srlm(*arguments, "--on-error", "skip", stdin=as_lines(rows))
    assert skipped.code == 0 and "1 dropped: bad row" in skipped.err


def test_your_own_functions(srlm: Srlm, own: str) -> None:
    rows = [{**ROWS[0], "response": "Yes please"}, ROWS[1]]
    result = srlm(*CONSTANT, "--rule-file", f"{own}:polite", "--rule-file", f"{own}:half", stdin=as_lines(rows))
    assert [row["score_rules"] for row in result.rows] == [5 * (1 + 0.5 + 2) / 4, 5 * (0 + 0.5 + 1) / 4], result.err
    assert result.rows[0]["rules"] == {
        "own:mine.polite": True,
        "own:mine.half": 0.5,
        "no-commas": True,
        "words:..3": True,
    }
    assert [row["score"] for row in result.rows] == [0, 0]  # half a rule is not a rule kept
    for name, said in (("wrong", "true, false, or a number from 0 to 1, got 7"), ("fails", "KeyError: 'nothing'")):
        failed = srlm(*CONSTANT, "--rule-file", f"{own}:{name}", stdin=as_lines(rows))
        assert failed.code == 3 and said in failed.err and "<stdin>:1" in failed.err


def test_a_changed_function_is_another_run(srlm: Srlm, own: str) -> None:
    write_rows(srlm.folder / "in.jsonl", [*ROWS[:2], {"prompt": 3}])
    run = (*CONSTANT, "--rule-file", f"{own}:polite", "--in", "in.jsonl", "--out", "out.jsonl")
    assert srlm(*run).code == 3
    write_rows(srlm.folder / "in.jsonl", ROWS[:4])
    (srlm.folder / own).write_text(OWN + "\n# changed\n")
    assert srlm(*run).code == 2
    (srlm.folder / own).write_text(OWN)
    assert srlm(*run).code == 0
    assert read_rows(srlm.folder / "out.jsonl") == srlm(*run[:-4], stdin=as_lines(ROWS[:4])).rows


def test_a_jury_keeps_the_scores_of_no_single_juror(srlm: Srlm) -> None:
    for name, model in (("a", "rules"), ("b", "constant:3")):
        srlm("judge", "--engine", "echo", "--model", model, "--out", f"{name}.jsonl", stdin=as_lines(ROWS[:2]))
    jury = srlm("jury", "--in", "a.jsonl", "--in", "b.jsonl", "--quiet")
    assert [row["score"] for row in jury.rows] == [4.0, 2.75], jury.err
    assert not any("score_rules" in row for row in jury.rows)


# --- eval rules ------------------------------------------------------------------------------


def values(rows: list[dict]) -> dict[str, tuple[float, int]]:
    return {row.get("rule", row["metric"]): (row["value"], row["n"]) for row in rows}


def test_the_share_of_rules_kept_per_rule_and_in_all(srlm: Srlm) -> None:
    result = srlm("eval", "rules", "--quiet", stdin=as_lines([{**row, "model": "M1"} for row in ROWS]))
    assert values(result.rows) == {
        "no-commas": (0.25, 8), "words": (0.5, 8), "rules_kept": (0.375, 16), "all_rules_kept": (0.25, 8),
        "length": ((7 + 8 + 24 + 1) / 4, 8),
    }  # fmt: skip
    assert {row["task"] for row in result.rows} == {"rules"} and {row["model"] for row in result.rows} == {"M1"}
    assert all(row["ci_low"] == row["value"] == row["ci_high"] for row in result.rows)  # the two prompts are alike


def test_intervals_are_over_prompts(srlm: Srlm) -> None:
    rows = [{"prompt": f"{n}", "response": "a" if n % 2 else "A", "rules": ["lower-case"]} for n in range(40)]
    kept = next(row for row in srlm("eval", "rules", stdin=as_lines(rows)).rows if row["metric"] == "rules_kept")
    assert kept["value"] == 0.5 and 0.3 < kept["ci_low"] < 0.4 and 0.6 < kept["ci_high"] < 0.7


def test_rules_of_a_file_of_prompts(srlm: Srlm) -> None:
    write_rows(srlm.folder / "prompts.jsonl", [{"prompt": f"Ask {n}?", "rules": RULES} for n in range(2)])
    bare = [{key: value for key, value in row.items() if key != "rules"} for row in ROWS]
    expected = srlm("eval", "rules", "--quiet", stdin=as_lines(ROWS)).rows
    assert srlm("eval", "rules", "--quiet", "--prompts", "prompts.jsonl", stdin=as_lines(bare)).rows == expected
    other = srlm("eval", "rules", "--prompts", "prompts.jsonl", stdin=as_lines([{**bare[0], "prompt": "Another?"}]))
    assert other.code == 3 and "<stdin>:1: its prompt is not in prompts.jsonl" in other.err


def test_rows_without_any_rule_are_a_usage_error(srlm: Srlm) -> None:
    result = srlm("eval", "rules", stdin=as_lines([{"prompt": "a", "response": "b"}]))
    assert result.code == 2 and "no row has `rules`" in result.err


def test_a_fall_below_the_round_before_is_a_limit(srlm: Srlm) -> None:
    better = [{**row, "response": "One"} for row in ROWS]
    srlm("eval", "rules", "--out", "before.jsonl", stdin=as_lines(better))
    run = ("eval", "rules", "--quiet", "--before", "before.jsonl")
    fell = srlm(*run, "--max-fall", "0.6", stdin=as_lines(ROWS))
    assert fell.code == 4 and "37.5% of the rules are kept, 100.0% in the previous round" in fell.err and fell.rows
    assert srlm(*run, "--max-fall", "0.625", stdin=as_lines(ROWS)).code == 0
    assert srlm(*run, stdin=as_lines(ROWS)).code == 0
    held = srlm(*run, "--max-fall", "0.1", "--on-limit", "hold", "--out", "held.jsonl", stdin=as_lines(ROWS))
    assert held.code == 4 and not (srlm.folder / "held.jsonl").exists()
