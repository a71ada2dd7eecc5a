"""EFT rows: judgements that agree with people, or scores from their ranking."""

from __future__ import annotations

import pytest

from helpers import ListEngine, Srlm, as_lines, asked_text, read_json, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines.base import Sampling
from srlm_cli.errors import BadRow, OptionError
from srlm_cli.records import ranked_record
from srlm_cli.stages.judge import Judgement, judge_prompt
from srlm_cli.stages.make_eft import (
    EftOptions,
    Thinning,
    accept,
    agrees,
    ending_in_score,
    hindsight,
    reason_fault,
)
from srlm_cli.stages.rank_scores import RankScores
from srlm_cli.stages.split import eval_part, train_part

FORM = templates.load("additive", fields={"prompt", "response"})
REASONS = templates.load("hindsight", fields={"prompt", "response", "score", "high"})
RANK_SCORES = RankScores(0, 5)


def options(**more) -> EftOptions:
    return EftOptions(
        **{"template": FORM, "sampling": Sampling(), "seed": 0, "num_judgements": 1, "rank_scores": RANK_SCORES, **more}
    )


def ranked(*ranks: float, name: str = "rank", prompt: str = "Why?") -> dict:
    replies = [{"text": f"reply {k}", name: rank} for k, rank in enumerate(ranks)]
    return ranked_record({"id": "p", "prompt": prompt, "responses": replies})


@pytest.mark.parametrize(
    ("human", "scores", "ties", "expected"),
    [
        ([0, -1, -2], [5, 3, 1], False, True),
        ([0, -1, -2], [5, 1, 3], False, False),
        ([0, -1], [3, 3], False, False),
        ([0, -1], [3, 3], True, True),
        ([0, -1], [2, 3], True, False),
        ([0, 0, -1], [2, 4, 1], False, True),
        ([0, 0], [2, 4], False, False),
        ([0], [2], False, False),
    ],
)
def test_agreement_is_over_every_pair_that_people_ordered(
    human: list, scores: list, ties: bool, expected: bool
) -> None:
    assert agrees(human, scores, ties) is expected


def test_accept_keeps_the_rankings_that_agree() -> None:
    answers = [["Good. Score: 5 and more", "Score: 1", "Hm."], ["Bad.\nScore: 2", "Score: 4", "Score: 3"]]
    [outcome] = accept([ranked(0, 1)], ListEngine(answers), options(num_judgements=3))
    assert [(row["completion"], row["score"]) for row in outcome.rows] == [
        ([{"role": "assistant", "content": "Good. Score: 5"}], 5),
        ([{"role": "assistant", "content": "Bad.\nScore: 2"}], 2),
    ]
    assert [row["prompt"] for row in outcome.rows] == [
        judge_prompt({"prompt": "Why?", "response": f"reply {k}"}, FORM) for k in (0, 1)
    ]
    assert outcome.dropped == {"judgements: no score": 2, "judgements: not in the order of people": 2}
    assert outcome.counts == {"judgements": 6, "accepted": 2}
    assert outcome.read == 1 and outcome.tokens_out == 6


def test_accept_groups_the_replies_of_each_prompt() -> None:
    rows = [ranked(0, 1, prompt="One?"), ranked(0, 1, 2, prompt="Two?")]
    made = list(
        accept(
            rows,
            ListEngine([["Score: 5"], ["Score: 1"], ["Score: 5"], ["Score: 3"], ["Score: 0"]]),
            options(num_judgements=1),
        )
    )
    assert [len(outcome.rows) for outcome in made] == [2, 3]


def test_accept_compares_the_replies_without_an_empty_one() -> None:
    row = ranked(0, 1, 2)
    row["responses"][1]["text"] = " "
    [outcome] = accept(
        [row], ListEngine([["Score: 5", "Score: 1"], ["Score: 2", "Score: 4"]]), options(num_judgements=2)
    )
    assert [row["score"] for row in outcome.rows] == [5, 2]
    assert outcome.dropped == {"judgements: no reply": 2, "judgements: not in the order of people": 2}
    assert outcome.counts == {"judgements": 6, "accepted": 2}
    row["responses"][0]["text"] = row["responses"][2]["text"] = ""
    [outcome] = accept([row], ListEngine([]), options(num_judgements=2))
    assert (outcome.rows, outcome.dropped) == ([], {"judgements: no reply": 6})


def test_accept_can_ask_for_a_score_that_was_not_written() -> None:
    engine = ListEngine([["Good."], ["Bad. Score: 1"], ["4"]])
    [outcome] = accept([ranked(0, 1)], engine, options(force_score=True))
    assert [row["completion"][0]["content"] for row in outcome.rows] == ["Good.\nScore: 4", "Bad. Score: 1"]
    assert engine.asked[2].prefix == "Good.\nScore: "


def test_hindsight_without_reasons_is_the_score_of_the_rank() -> None:
    [outcome] = hindsight([ranked(2, 0, 1)], None, options())
    scores = [row["score"] for row in outcome.rows]
    assert [row["completion"][0]["content"] for row in outcome.rows] == [f"Score: {score:g}" for score in scores]
    assert scores[0] in (0, 1) and scores[1] in (4, 5) and scores[2] in (2, 3)
    assert all(FORM.score(row["completion"][0]["content"]) == row["score"] for row in outcome.rows)


def test_hindsight_makes_several_rows_of_a_reply_that_cover_its_stretch() -> None:
    [outcome] = hindsight([ranked(0, 1)], None, options(rows_per_reply=3))
    assert sorted(row["score"] for row in outcome.rows[:3]) == [3, 4, 5]
    assert sorted(row["score"] for row in outcome.rows[3:]) == [0, 1, 2]
    assert [row["id"] for row in outcome.rows] == [f"p/{k}/{j}" for k in range(2) for j in range(3)]


def test_hindsight_keeps_reasons_that_do_not_tell_on_it() -> None:
    engine = ListEngine([["Clear and right."], ["I give it 4 out of 5."]])
    [outcome] = hindsight([ranked(0, 1)], engine, options(reason_template=REASONS))
    [row] = outcome.rows
    assert row["completion"][0]["content"] == f"Clear and right.\nScore: {row['score']:g}"
    assert outcome.dropped == {"targets: the reason names a score": 1} and outcome.counts == {"targets": 2}
    told = [asked_text(request).split("rated ")[1].split(" by people")[0] for request in engine.asked]
    assert told[0] in ("3 of 5", "4 of 5", "5 of 5") and told[1] in ("0 of 5", "1 of 5", "2 of 5")


def test_a_reason_that_was_cut_off_teaches_nothing() -> None:
    engine = ListEngine([["Clear and"], ["Right but"]], reasons="length")
    [outcome] = hindsight([ranked(0, 1)], engine, options(reason_template=REASONS))
    assert outcome.rows == [] and outcome.dropped == {"targets: no reason": 2}


@pytest.mark.parametrize(
    ("reason", "fault"),
    [
        ("Clear.", ""),
        ("", "no reason"),
        ("It earns a high score.", ""),
        ("A clear 4/5 reply.", ""),
        ("4/5", "names"),
        ("3/5", "names"),
        ("Three points", "names"),
        ("Four points for a clear reply", ""),
        ("It is rated 2.", "names"),
        ("It was given a score of two", "names"),
        ("Clear.\nScore: 4", "names"),
        ("Of 5 rivers it names 4.", ""),
        ("As asked I say what is good and what is lacking in the reply: all.", "instruction"),
        ("It says what is good and what works.", "instruction"),
    ],
)
def test_reasons_that_cannot_teach(reason: str, fault: str) -> None:
    found = reason_fault(reason, 4, options(reason_template=REASONS))
    assert (fault in found) if fault else found == "", found


# --- scores from what people thought ---------------------------------------------------------


def scores_of(replies: list[dict], uniform: float, rank_scores: RankScores = RANK_SCORES) -> list:
    return rank_scores.of(
        ranked_record({"prompt": "Why?", "responses": [{"text": "x", **reply} for reply in replies]}), uniform
    )


@pytest.mark.parametrize(
    ("replies", "uniform", "expected"),
    [
        ([{"rank": 0}, {"rank": 1}], 0.0, [3, 0]),
        ([{"rank": 0}, {"rank": 1}], 0.5, [4, 1]),
        ([{"rank": 0}, {"rank": 1}], 0.99, [5, 2]),
        ([{"rank": 1}, {"rank": 2}, {"rank": 3}], 0.0, [4, 2, 0]),
        ([{"rank": 1}, {"rank": 2}, {"rank": 3}], 0.9, [5, 3, 1]),
        ([{"rank": 1}, {"rank": 1}, {"rank": 9}], 0.0, [2, 2, 0]),
        ([{"rank": 1}, {"rank": 1}, {"rank": 9}], 0.99, [5, 5, 1]),
        ([{"rank": n} for n in range(6)], 0.7, [5, 4, 3, 2, 1, 0]),
        ([{"rank": 0, "score": None}, {"rank": 1, "score": None}], 0.0, [3, 0]),
        ([{"rank": 3}, {"rank": 3}], 0.5, [None, None]),
    ],
)
def test_ranks_become_scores_by_their_place(replies: list, uniform: float, expected: list) -> None:
    assert scores_of(replies, uniform) == expected


@pytest.mark.parametrize("size", range(2, 9))
def test_scores_from_ranks_are_balanced_and_never_turn_an_order_around(size: int) -> None:
    counts, steps = [0] * 6, 600
    for step in range(steps):
        scores = scores_of([{"rank": n} for n in range(size)], step / steps)
        assert scores == sorted(scores, reverse=True)
        for score in scores:
            counts[score] += 1
    assert all(abs(count - size * steps / 6) <= size for count in counts), counts


def test_human_scores_are_balanced_over_the_data() -> None:
    data = [0.0] * 4 + [0.5] * 4 + [0.9] * 4
    rank_scores = RankScores(0, 5, data)
    assert scores_of([{"score": 0.0}, {"score": 0.5}, {"score": 0.9}], 0.0, rank_scores) == [0, 2, 4]
    assert scores_of([{"score": 0.0}, {"score": 0.5}, {"score": 0.9}], 0.6, rank_scores) == [1, 3, 5]


def test_linear_scores_are_right_on_the_mean() -> None:
    rank_scores = RankScores(0, 5, linear=(1.0, 10.0))
    drawn = [
        scores_of([{"score": 1}, {"score": 10}, {"score": 5.5}], uniform / 10, rank_scores) for uniform in range(10)
    ]
    assert {(row[0], row[1]) for row in drawn} == {(0, 5)}
    assert sorted(row[2] for row in drawn) == [2] * 5 + [3] * 5


def test_a_score_outside_the_range_is_a_bad_row() -> None:
    """A scale of 1 to 5 read as 0 to 1 would make every reply perfect."""
    with pytest.raises(BadRow, match="score-high"):
        scores_of([{"score": 5}, {"score": 1}], 0.0, RankScores(0, 5, linear=(0.0, 1.0)))


def test_balanced_scores_need_all_scores() -> None:
    with pytest.raises(OptionError, match="linear"):
        scores_of([{"score": 1}, {"score": 2}], 0.0)


def test_another_template_has_another_range() -> None:
    assert scores_of([{"rank": 0}, {"rank": 1}], 0.99, RankScores(1, 10)) == [10, 5]


# --- train and eval --------------------------------------------------------------------------

MANY = [{**ranked(0, 1, prompt=f"Question {n}?"), "id": str(n)} for n in range(200)]


def test_every_prompt_is_in_one_part_whatever_the_order() -> None:
    evals = [row["id"] for outcome in eval_part(MANY, 0.25, 7) for row in outcome.rows]
    trained = list(train_part(MANY, lambda rows: hindsight(rows, None, options()), 0.25, 7))
    ids = [row["prompt_id"] for outcome in trained for row in outcome.rows]
    assert 30 < len(evals) < 70 and set(evals).isdisjoint(ids) and set(evals) | set(ids) == {row["id"] for row in MANY}
    assert sum(outcome.read for outcome in trained) == len(MANY)
    assert sum(outcome.dropped.get("prompts: held out for eval", 0) for outcome in trained) == len(evals)
    backwards = [row["id"] for outcome in eval_part(MANY[::-1], 0.25, 7) for row in outcome.rows]
    assert sorted(backwards) == sorted(evals)
    assert evals != [row["id"] for outcome in eval_part(MANY, 0.25, 8) for row in outcome.rows]


def test_the_last_prompts_held_out_are_counted_too() -> None:
    outcomes = list(train_part(MANY[:3], lambda rows: hindsight(rows, None, options()), 1.0, 0))
    assert [(o.read, o.rows, o.dropped) for o in outcomes] == [(3, [], {"prompts: held out for eval": 3})]


@pytest.mark.parametrize("name", ["make-eft", "sft", "dpo"])
def test_a_held_out_prompt_is_refused(srlm: Srlm, name: str) -> None:
    write_rows(srlm.folder / "held.jsonl", [ranked(0, 1, prompt="Why  IS the sky blue?")])
    prompt = "why is the sky blue?\n"
    rows = {
        "make-eft": [ranked(0, 1, prompt="Else?"), ranked(0, 1, prompt=prompt)],
        "sft": [{"prompt": "Else?", "completion": "x"}, {"prompt": prompt, "completion": "x"}],
        "dpo": [
            {"prompt": "Else?", "chosen": "x", "rejected": "y"},
            {"prompt": prompt, "chosen": "x", "rejected": "y"},
        ],
    }[name]
    argv = {
        "make-eft": ["--method", "hindsight", "--reason", "none"],
        "sft": ["--model", "smollm2-135m-instruct", "--out", "m"],
        "dpo": ["--model", "smollm2-135m-instruct", "--out", "m"],
    }[name]
    result = srlm(name, *argv, "--held-out", "held.jsonl", stdin=as_lines(rows))
    assert result.code == 3 and "<stdin>:2:" in result.err and "in the evaluation file held.jsonl" in result.err


def test_an_eft_row_of_a_held_out_prompt_is_refused_in_training(srlm: Srlm) -> None:
    write_rows(srlm.folder / "held.jsonl", [ranked(0, 1, prompt="why?")])
    eft = srlm("make-eft", "--method", "hindsight", "--reason", "none", stdin=as_lines([ranked(0, 1)]))
    argv = ["sft", "--model", "smollm2-135m-instruct", "--out", "m", "--held-out", "held.jsonl"]
    assert srlm(*argv, stdin=eft.out).code == 3


def test_the_parts_are_made_by_two_commands(srlm: Srlm) -> None:
    write_rows(srlm.folder / "ranked.jsonl", MANY)
    argv = ["make-eft", "--in", "ranked.jsonl", "--eval-share", "0.25"]
    held = srlm(*argv, "--split", "eval", "--out", "held.jsonl")
    made = srlm(*argv, "--method", "hindsight", "--reason", "none", "--held-out", "held.jsonl", "--out", "eft.jsonl")
    assert (held.code, made.code) == (0, 0), made.err
    counts = read_json(srlm.folder / "eft.jsonl.meta.json")["counts"]
    assert counts["dropped"]["prompts: held out for eval"] == len(read_rows(srlm.folder / "held.jsonl"))
    assert srlm("make-eft", "--split", "eval", stdin="").code == 2


def test_human_scores_balance_over_a_file_and_not_over_a_pipe(srlm: Srlm) -> None:
    rows = [ranked(n, n + 0.5, name="score", prompt=f"{n}?") for n in range(6)]
    write_rows(srlm.folder / "ranked.jsonl", rows)
    argv = ["make-eft", "--method", "hindsight", "--reason", "none", "--max-share", "1"]
    made = srlm(*argv, "--in", "ranked.jsonl")
    assert [row["score"] for row in made.rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    piped = srlm(*argv, stdin=as_lines(rows))
    assert piped.code == 2 and "--scale linear" in piped.err
    linear = srlm(*argv, "--scale", "linear", "--score-high", "5.5", stdin=as_lines(rows))
    assert (linear.rows[0]["score"], linear.rows[-1]["score"]) == (0, 5)


def test_what_follows_the_score_is_cut() -> None:
    cut = [
        ending_in_score(Judgement(text, 4, "text", "stop"), FORM)
        for text in ("Good.\nScore: 4/5. Bye!", "Score: 2, no: **Score: 3** then")
    ]
    assert cut == ["Good.\nScore: 4", "Score: 2, no: **Score: 3"]


def test_thinning_holds_a_common_score_down() -> None:
    rows = [{"score": 4}] * 100
    kept, dropped = Thinning(0.4, [{"score": s} for s in (0, 1, 2, 3, 5) for _ in range(6)]).split(rows)
    assert len(kept) + dropped == 100 and len(kept) == 20
    assert Thinning(1.0).split(rows) == (rows, 0)


def test_thinning_goes_on_where_an_earlier_run_stopped() -> None:
    rows = [{"score": s} for s in (4, 4, 4, 1, 4, 2, 4, 4) * 10]
    whole, _ = Thinning(0.4).split(rows)
    first, _ = Thinning(0.4).split(rows[:37])
    rest, _ = Thinning(0.4, first).split(rows[37:])
    assert first + rest == whole


# --- the command -----------------------------------------------------------------------------


def test_a_score_range_of_no_width_is_refused(srlm: Srlm) -> None:
    linear = ["--scale", "linear", "--score-low", "1", "--score-high", "1"]
    argv = ["make-eft", "--method", "hindsight", "--reason", "none", *linear]
    rows = [{"prompt": "Why?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 0}]}]
    result = srlm(*argv, stdin=as_lines(rows))
    assert result.code == 2 and "--score-" in result.err, result.err


def test_hindsight_without_reasons_needs_no_model(srlm: Srlm) -> None:
    argv = ["make-eft", "--method", "hindsight", "--reason", "none", "--out", "eft.jsonl"]
    result = srlm(*argv, stdin=as_lines([ranked(0, 1)]))
    assert result.code == 0 and "model" not in read_json(srlm.folder / "eft.jsonl.meta.json")


def test_ranks_may_stand_beside_a_score_of_null(srlm: Srlm) -> None:
    rows = [
        {
            "prompt": "Why?",
            "responses": [{"text": "a", "rank": 0, "score": None}, {"text": "b", "rank": 1, "score": None}],
        }
    ]
    result = srlm("make-eft", "--method", "hindsight", "--reason", "none", stdin=as_lines(rows))
    assert result.code == 0 and len(result.rows) == 2 and result.rows[0]["score"] > result.rows[1]["score"], result.err
