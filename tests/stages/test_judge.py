"""The judge: how K scores are averaged, and what an unreadable one becomes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from helpers import ListEngine, Srlm, as_lines, asked_text, read_rows
from srlm_cli import records, templates
from srlm_cli.commands.judge import judgeable, of_one_writer
from srlm_cli.commands.judge.asked import Asked
from srlm_cli.engines import LazyEngine
from srlm_cli.engines.base import EngineSpec, Sampling
from srlm_cli.errors import BadRow, EngineError
from srlm_cli.options.common import EngineOptions
from srlm_cli.options.judge import JudgingOptions
from srlm_cli.options.judging import ScorerOptions
from srlm_cli.options.kinds import KindOptions
from srlm_cli.runner.tally import Tally
from srlm_cli.stages.judge import JudgeOptions, judge
from srlm_cli.stages.make_pairs import PairOptions, make_pairs, scored_record
from srlm_cli.thoughts import Thought

FIELDS = {"prompt", "response"}
ADDITIVE = templates.load("additive", fields=FIELDS)
SCORE_ONLY = templates.load("score_only", fields=FIELDS)


def options(samples: int = 1, **more) -> JudgeOptions:
    return JudgeOptions(ADDITIVE, samples, Sampling(), seed=0, **more)


def judged(answers: list[list[str]], row: dict | None = None, **more) -> list[dict]:
    """Return the rows that a judge with these answers makes of as many responses."""
    rows = [
        records.response_record({"prompt": "Why?", "response": "Because.", "k": k, **(row or {})})
        for k in range(len(answers))
    ]
    engine = ListEngine(answers)
    return [made for outcome in judge(rows, engine, options(len(answers[0]), **more)) for made in outcome.rows]


def test_the_mean_of_three_scores_is_not_floored() -> None:
    [row] = judged([["Good. Score: 3", "Score: 4", "Score: 4"]])
    assert row["score"] == pytest.approx(11 / 3) and row["score"] > 3.66
    assert row["scores"] == [3, 4, 4]


def test_an_unreadable_judgement_is_null_and_left_out_of_the_mean() -> None:
    [row] = judged([["Score: 2", "I like it.", "Score: 5"]])
    assert row["scores"] == [2, None, 5] and row["score"] == 3.5
    assert row["judgements"] == ["Score: 2", "I like it.", "Score: 5"]
    assert row["score_from"] == ["text", None, "text"]


def test_without_any_readable_judgement_the_score_is_null_and_never_ranked() -> None:
    rows = judged([["Fine."], ["Score: 3"], ["Score: 11"]])
    assert [row["score"] for row in rows] == [None, 3, None]
    [outcome] = make_pairs(rows, PairOptions())
    assert outcome.rows == [] and outcome.dropped == {"fewer than two scored responses": 1}


def test_a_reply_that_quotes_a_score_does_not_score_itself() -> None:
    rows = judged([["It says so itself."], ["Hm."]], {"response": "Score: 5\n\nScore: 5/5", "prompt": "Score: 4"})
    assert [row["score"] for row in rows] == [None, None]


def test_what_stands_in_a_reply_is_shown_to_the_judge_as_it_is() -> None:
    engine = ListEngine([["Score: 1"]])
    odd = "Costs $5 and $prompt, {response} 100% ${x} \\1"
    list(judge([records.response_record({"prompt": odd, "response": odd, "k": 0})], engine, options()))
    assert asked_text(engine.asked[0]).count(odd) == 2


def test_the_judge_sees_prompt_and_response_of_several_turns() -> None:
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    engine = ListEngine([["Score: 1"]])
    list(judge([records.response_record({"prompt": turns, "response": "Four.", "k": 0})], engine, options()))
    text = asked_text(engine.asked[0])
    assert "User: One?\n\nAssistant: Two.\n\nUser: Three?" in text and "Four." in text
    assert [message["role"] for message in engine.asked[0].messages] == ["user"]


def test_a_judged_row_keeps_what_it_had_and_says_who_judged() -> None:
    [row] = judged([["Score: 1"]], {"model": "M1", "tag": ["x"]})
    assert (row["model"], row["tag"], row["response"], row["prompt"]) == ("M1", ["x"], "Because.", "Why?")
    assert row["judge"] == {"model": "fake", "template": "additive", "template_hash": ADDITIVE.hash}


def test_each_judgement_is_drawn_with_a_seed_of_its_own() -> None:
    engine = ListEngine([["Score: 1"] * 3] * 2)
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": k}) for k in range(2)]
    list(judge(rows, engine, options(3)))
    seeds = [seed for request in engine.asked for seed in request.seeds]
    assert len(seeds) == len(set(seeds)) == 6


def test_counts_say_how_many_could_not_be_read() -> None:
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0})]
    [outcome] = judge(rows, ListEngine([["Score: 2", "Hm.", "Hm."]], reasons="length"), options(3))
    assert outcome.counts == {"judgements": 3, "unparsed": 2, "forced scores": 0, "low score mass": 0, "cut off": 3}
    assert outcome.read == 1 and outcome.tokens_in == 10 and outcome.tokens_out == 3


def test_force_score_asks_only_for_the_missing_ones_behind_what_was_written() -> None:
    engine = ListEngine([["Score: 2", "Well put."], ["4"]])
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0})]
    [outcome] = judge(rows, engine, options(2, force_score=True))
    [row] = outcome.rows
    assert (row["scores"], row["score_from"], row["score"]) == ([2, 4], ["text", "finish"], 3)
    assert row["judgements"] == ["Score: 2", "Well put."]
    asked = engine.asked[1]
    assert asked.prefix == "Well put.\nScore: " and asked.choices == ("0", "1", "2", "3", "4", "5")
    assert asked.messages == engine.asked[0].messages
    assert outcome.counts["forced scores"] == 1 and outcome.counts["unparsed"] == 0
    assert outcome.tokens_out == 3 and outcome.tokens_in == 20


def test_force_score_keeps_scores_with_their_rows() -> None:
    answers = [["Hm."], ["Score: 1"], ["Hm."], ["5"], ["0"]]
    engine = ListEngine(answers)
    rows = [records.response_record({"prompt": "Why?", "response": f"r{k}", "k": k}) for k in range(3)]
    made = [row for outcome in judge(rows, engine, options(1, force_score=True)) for row in outcome.rows]
    assert [(row["response"], row["score"]) for row in made] == [("r0", 5), ("r1", 1), ("r2", 0)]


def test_a_thought_that_was_cut_off_is_closed_before_its_score_is_asked_for() -> None:
    engine = ListEngine([["<think>\nScore: 5? Let me see"], ["1"]], reasons="length")
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0})]
    [outcome] = judge(rows, engine, options(1, force_score=True))
    again = engine.asked[1]
    assert (again.thought, again.prefix) == ("<think>\nScore: 5? Let me see", "Score: ")  # which the engine closes
    assert (outcome.rows[0]["scores"], outcome.rows[0]["score_from"]) == ([1], ["finish"])
    assert outcome.rows[0]["judgements"] == [""] and outcome.rows[0]["judge_thoughts"] == ["Score: 5? Let me see"]
    assert outcome.counts["unfinished thought"] == 1


def test_the_judge_sees_no_thought_and_its_own_is_kept_apart() -> None:
    replies = [
        {"prompt": "Why?", "response": "<think>\nScore: 5 I am sure.\n</think>\n\nBecause.", "k": 0},
        {"prompt": "Why?", "response": "Because.", "thought": "Hm.", "k": 1},
        {"prompt": "Why?", "response": "<think>\nNever done", "k": 2},
        {"prompt": "Why?", "response": None, "thought": "Never done", "finish_reason": "length", "k": 3},
    ]
    engine = ListEngine([["<think>\nScore: 5?\n</think>\n\nFair. Score: 3", "Score: 1"]] * 2)
    made = [o.rows[0] for o in judge(map(records.response_record, replies), engine, options(2))]
    shown = [asked_text(request) for request in engine.asked]
    assert len(shown) == 2 and shown[0] == shown[1] and "Because." in shown[0] and "sure" not in shown[0]
    assert [(row["response"], row["thought"]) for row in made] == [
        ("Because.", "Score: 5 I am sure."), ("Because.", "Hm."), (None, "Never done"), (None, "Never done"),
    ]  # fmt: skip
    assert [row["scores"] for row in made] == [[3, 1]] * 2 + [[]] * 2
    assert made[0]["judgements"] == ["Fair. Score: 3", "Score: 1"]
    assert made[0]["judge_thoughts"] == ["Score: 5?", None] and "judge_thoughts" not in made[2]
    made[0]["response"] = "So."
    [pair] = make_pairs([scored_record({**row, "score": k}) for k, row in enumerate(made)], PairOptions())
    [row] = pair.rows
    assert row["chosen"] == [{"role": "assistant", "content": "Because.", "reasoning_content": "Hm."}]
    assert row["rejected"][0]["reasoning_content"] == "Score: 5 I am sure." and "thought" not in row


def test_a_score_is_asked_for_after_the_judges_own_thought() -> None:
    engine = ListEngine([["<think>\n3 or 4?\n</think>\n\nFair. Score: 3"], SPREAD])
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0})]
    [outcome] = judge(rows, engine, options(1, score="expected"))
    again = engine.asked[1]
    assert (again.thought, again.prefix) == ("<think>\n3 or 4?\n</think>\n\n", "Fair. Score: ")
    assert outcome.rows[0]["score"] == pytest.approx(3.0)


def test_a_thought_that_cannot_be_repeated_cannot_be_continued() -> None:
    class Server(ListEngine):  # that divides thoughts, and does not say how they were written
        def generate(self, requests):
            for made in super().generate(requests):
                yield replace(made, thoughts=(Thought("Hm.", ""),))

    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0})]
    with pytest.raises(EngineError, match="cannot be asked for a score after it"):
        list(judge(rows, Server([["Score: 3"], SPREAD]), options(1, score="expected")))


SPREAD = [0.0, 0.1, 0.2, 0.4, 0.2, 0.1]  # mean 0.1 + 0.4 + 1.2 + 0.8 + 0.5


def test_an_expected_score_is_the_mean_at_the_place_of_the_written_one() -> None:
    engine = ListEngine([["Good.\n**Score:** 4/5. Well done.", "Score: 2"], SPREAD, [0.0, 0.5, 0.5, 0.0, 0.0, 0.0]])
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0})]
    [outcome] = judge(rows, engine, options(2, score="expected"))
    [row] = outcome.rows
    assert row["scores"] == [pytest.approx(3.0), 1.5] and row["score"] == pytest.approx(2.25)
    assert row["score_from"] == ["expected", "expected"]
    assert row["judgements"] == ["Good.\n**Score:** 4/5. Well done.", "Score: 2"]
    assert [request.prefix for request in engine.asked[1:]] == ["Good.\n**Score:** ", "Score: "]
    assert all(request.choices == ADDITIVE.choices for request in engine.asked[1:])


def test_without_a_written_score_an_expected_one_needs_force_score() -> None:
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0})]
    [outcome] = judge(rows, ListEngine([["Well put."]]), options(1, score="expected"))
    assert outcome.rows[0]["scores"] == [None] and outcome.counts["unparsed"] == 1
    engine = ListEngine([["Well put."], SPREAD])
    [outcome] = judge(rows, engine, options(1, score="expected", force_score=True))
    assert outcome.rows[0]["scores"] == [pytest.approx(3.0)] and outcome.rows[0]["score_from"] == ["finish"]
    assert engine.asked[1].prefix == "Well put.\nScore: "


def test_a_template_that_asks_at_once_is_expected_without_writing() -> None:
    engine = ListEngine([SPREAD, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    rows = [records.response_record({"prompt": "Why?", "response": f"r{k}", "k": k}) for k in range(2)]
    given = JudgeOptions(SCORE_ONLY, 3, Sampling(), seed=0, score="expected")
    made = [row for outcome in judge(rows, engine, given) for row in outcome.rows]
    assert [row["score"] for row in made] == [pytest.approx(3.0), 0.0]
    assert [row["judgements"] for row in made] == [["Score: 3"], ["Score: 0"]]
    assert [request.prefix for request in engine.asked] == ["Score: ", "Score: "]
    assert all(row["score_from"] == ["direct"] for row in made)


def test_the_probability_of_all_scores_is_told_and_a_low_one_is_no_score() -> None:
    spread = [0.0, 0.0, 0.0, 0.3, 0.3, 0.0]
    low = [0.0, 0.0, 0.0, 0.09, 0.09, 0.0]
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0})]
    [outcome] = judge(rows, ListEngine([["Score: 4", "Score: 2", "Hm."], spread, low]), options(3, score="expected"))
    [row] = outcome.rows
    assert row["score_mass"] == [pytest.approx(0.6), pytest.approx(0.18), None]
    assert row["scores"] == [pytest.approx(3.5), None, None] and row["score"] == pytest.approx(3.5)
    assert row["score_from"] == ["expected", None, None]
    assert row["judgements"] == ["Score: 4", "Score: 2", "Hm."]
    assert outcome.counts["low score mass"] == 1 and outcome.counts["unparsed"] == 2


@pytest.mark.parametrize(("least", "score"), [(0.0, 3.5), (0.07, 3.5), (0.09, None)])
def test_the_least_mass_of_an_expected_score_is_an_option(least: float, score: float | None) -> None:
    low = [0.0, 0.0, 0.0, 0.04, 0.04, 0.0]
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0})]
    for form, answers in ((ADDITIVE, [["Score: 4"], low]), (SCORE_ONLY, [low])):
        given = JudgeOptions(form, 1, Sampling(), seed=0, score="expected", min_score_mass=least)
        [outcome] = judge(rows, ListEngine(answers), given)
        [row] = outcome.rows
        assert row["scores"] == [score if score is None else pytest.approx(score)]
        assert row["score_mass"] == [pytest.approx(0.08)] and outcome.counts["unparsed"] == int(score is None)
        if form is SCORE_ONLY:
            assert row["judgements"] == ["" if score is None else "Score: 3"]


def test_a_score_that_was_asked_for_tells_its_mass_and_a_text_alone_has_none() -> None:
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": 0, "score_mass": ["old"]})]
    [outcome] = judge(rows, ListEngine([["Hm."], [0.0, 0.01, 0.0, 0.0, 0.0, 0.0]]), options(1, force_score=True))
    assert outcome.rows[0]["scores"] == [1] and outcome.rows[0]["score_mass"] == [0.01]
    [outcome] = judge(rows, ListEngine([["Score: 1"]]), options(1))
    assert "score_mass" not in outcome.rows[0]


def test_a_ranked_row_is_judged_as_its_replies() -> None:
    row = {"prompt": "Why?", "responses": [{"text": "A", "rank": 0}, {"text": "B", "rank": 1}]}
    assert [(made["response"], made["human"]) for made in judgeable(row)] == [("A", 0.0), ("B", -1.0)]


def test_rows_of_another_writer_are_not_self_rewarding() -> None:
    rows = [{"model": "M1"}, {"model": "M2"}]
    with pytest.raises(BadRow, match="M2"):
        list(of_one_writer(rows, "M1"))
    with pytest.raises(BadRow, match="no named model"):
        list(of_one_writer([{"model": "M1"}, {}], "M1"))


def test_the_model_is_loaded_once_and_only_when_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def fake(spec: EngineSpec) -> ListEngine:
        opened.append(spec)
        return ListEngine([["Score: 1"]] * 10)

    monkeypatch.setattr("srlm_cli.engines.open_engine", fake)
    engine = LazyEngine(EngineSpec("hf", "M1"))
    assert list(judge([], engine, options())) == [] and engine.loads == 0
    rows = [records.response_record({"prompt": "Why?", "response": "Because.", "k": k}) for k in range(4)]
    list(judge(rows, engine, options()))
    list(judge(rows, engine, options(force_score=True)))
    assert engine.loads == len(opened) == 1


# --- the command -----------------------------------------------------------------------------

RESPONSES = [{"prompt": "Why?", "response": f"r{k}", "k": k} for k in range(3)]


@pytest.mark.parametrize(
    ("options", "said", "never"),
    [
        ((), "--force-score lets", "--by"),
        (("--by", "group"), "--by pointwise --force-score", "score_only"),
        (("--by", "pairwise"), "--direct takes", "--force-score"),
    ],
)
def test_the_remedy_for_unread_judgements_is_one_that_the_kind_takes(
    srlm: Srlm, options: tuple[str, ...], said: str, never: str
) -> None:
    rows = [{"prompt": "a", "response": text, "id": text, "prompt_id": "a"} for text in ("b", "c")]
    for limit, code in (("0", 4), ("1", 0)):
        argv = ["judge", "--engine", "echo", "--max-new-tokens", "3", "--max-unparsed", limit, *options]
        result = srlm(*argv, stdin=as_lines(rows))
        assert result.code == code and said in result.err and never not in result.err, result.err


def test_the_remedy_for_low_score_mass_is_the_least_mass() -> None:
    """A forced score would be null for the same reason."""
    judging = JudgingOptions(score="expected", template="score_only")
    asked = Asked(None, EngineOptions(), None, None, None, KindOptions(), ScorerOptions(), judging)
    low = Tally(counts=Counter({"judgements": 5, "unparsed": 4, "low score mass": 3}))
    assert asked.remedy(low).startswith("a lower --min-score-mass") and "--force-score" not in asked.remedy(low)
    assert "(a lower --min-score-mass" in str(replace(asked, judging=replace(judging, max_unparsed=0.1)).limit()(low))
    unread = Tally(counts=Counter({"judgements": 5, "unparsed": 4, "low score mass": 1}))
    assert asked.remedy(unread).startswith("--force-score")


def test_the_limit_of_unparsed_judgements_fails_when_all_is_written(srlm: Srlm) -> None:
    argv = ["judge", "--engine", "echo", "--max-new-tokens", "3", "--max-unparsed", "0.5", "--out", "out.jsonl"]
    result = srlm(*argv, stdin=as_lines(RESPONSES))
    assert result.code == 4 and "100.0%" in result.err and "--max-unparsed" in result.err
    assert [row["score"] for row in read_rows(srlm.folder / "out.jsonl")] == [None] * 3


def test_a_limit_that_holds_leaves_the_rows_as_unfinished(srlm: Srlm) -> None:
    argv = ["judge", "--engine", "echo", "--max-new-tokens", "3", "--max-unparsed", "0.5", "--on-limit", "hold"]
    for _ in range(2):
        assert srlm(*argv, "--out", "out.jsonl", stdin=as_lines(RESPONSES)).code == 4
        assert not (srlm.folder / "out.jsonl").exists()
        assert len(read_rows(srlm.folder / "out.jsonl.part")) == 3


@pytest.mark.parametrize(
    ("rows", "code", "words"),
    [
        (RESPONSES, 2, "does not name its `model`"),
        ([{**row, "model": "echo"} for row in RESPONSES], 2, "echo engine"),
    ],
)
def test_without_a_model_the_rows_have_to_name_their_writer(srlm: Srlm, rows: list, code: int, words: str) -> None:
    result = srlm("judge", stdin=as_lines(rows))
    assert result.code == code and words in result.err and "--model" in result.err and "<stdin>:1" in result.err


def test_force_score_needs_a_template_with_choices(srlm: Srlm) -> None:
    (srlm.folder / "own.toml").write_text('text = "$prompt $response"\npattern = "(\\\\d)"\nhigh = 5\n')
    argv = ["judge", "--engine", "echo", "--template", "own.toml"]
    assert srlm(*argv, "--force-score", stdin=as_lines(RESPONSES)).code == 2
    assert srlm(*argv, stdin=as_lines(RESPONSES)).code == 0
