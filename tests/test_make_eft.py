"""EFT rows: judgements that agree with people, or scores from their ranking."""

from __future__ import annotations

import pytest

from helpers import ListEngine, Srlm, as_lines, asked_text, read_json
from srlm_cli import templates
from srlm_cli.engines.base import Sampling
from srlm_cli.errors import BadRow
from srlm_cli.records import ranked_record
from srlm_cli.stages.judge import judge_prompt
from srlm_cli.stages.make_eft import (
    EftOptions,
    Thinning,
    accept,
    agrees,
    hindsight,
    human_scores,
    reason_fault,
    upto_score,
)

FORM = templates.load("additive", fields={"prompt", "response"})
REASONS = templates.load("hindsight", fields={"prompt", "response", "score"})


def options(**more) -> EftOptions:
    return EftOptions(**{"template": FORM, "sampling": Sampling(), "seed": 0, **more})


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
    [outcome] = accept([ranked(0, 1)], ListEngine(answers), options(samples=3))
    assert [(row["completion"], row["score"]) for row in outcome.rows] == [
        ([{"role": "assistant", "content": "Good. Score: 5"}], 5),
        ([{"role": "assistant", "content": "Bad.\nScore: 2"}], 2),
    ]
    assert [row["prompt"] for row in outcome.rows] == [judge_prompt("Why?", f"reply {k}", FORM) for k in (0, 1)]
    assert outcome.dropped == {"judgements: no score": 2, "judgements: not in the order of people": 2}
    assert outcome.counts == {"judgements": 6, "accepted": 2}
    assert outcome.read == 1 and outcome.tokens_out == 6


def test_accept_groups_the_replies_of_each_prompt() -> None:
    rows = [ranked(0, 1, prompt="One?"), ranked(0, 1, 2, prompt="Two?")]
    made = list(
        accept(
            rows, ListEngine([["Score: 5"], ["Score: 1"], ["Score: 5"], ["Score: 3"], ["Score: 0"]]), options(samples=1)
        )
    )
    assert [len(outcome.rows) for outcome in made] == [2, 3]


def test_hindsight_without_reasons_is_the_score_of_the_rank() -> None:
    [outcome] = hindsight([ranked(2, 0, 1)], None, options())
    assert [row["completion"][0]["content"] for row in outcome.rows] == ["Score: 0", "Score: 5", "Score: 2"]
    assert [row["score"] for row in outcome.rows] == [0, 5, 2]
    assert all(FORM.score(row["completion"][0]["content"]) == row["score"] for row in outcome.rows)


def test_hindsight_lets_the_model_write_reasons_that_name_no_score() -> None:
    engine = ListEngine([["Clear and right."], ["I give it 2 of 5."]])
    [outcome] = hindsight([ranked(0, 1)], engine, options(reason_template=REASONS))
    assert [row["completion"][0]["content"] for row in outcome.rows] == ["Clear and right.\nScore: 5"]
    assert outcome.dropped == {"replies: the reason names the score": 1} and outcome.counts == {"replies": 2}
    assert "rated 5 of 5" in asked_text(engine.asked[0]) and "rated 0 of 5" in asked_text(engine.asked[1])


def test_a_reason_that_was_cut_off_teaches_nothing() -> None:
    engine = ListEngine([["Clear and"], ["Right but"]], reasons="length")
    [outcome] = hindsight([ranked(0, 1)], engine, options(reason_template=REASONS))
    assert outcome.rows == [] and outcome.dropped == {"replies: no reason": 2}


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("Clear.", False),
        ("", True),
        ("It earns a high score.", True),
        ("4/5", True),
        ("Three points", True),
        ("Of 5 rivers it names 4.", False),
    ],
)
def test_reasons_that_give_the_score_away(reason: str, bad: bool) -> None:
    assert bool(reason_fault(reason)) is bad


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([{"rank": 0}, {"rank": 1}], [5, 0]),
        ([{"rank": 1}, {"rank": 2}, {"rank": 3}], [5, 2, 0]),
        ([{"rank": 1}, {"rank": 1}, {"rank": 9}], [5, 5, 0]),
        ([{"score": 0.0}, {"score": 1.0}, {"score": 0.5}, {"score": 0.7}], [0, 5, 2, 4]),
        ([{"rank": 0, "score": None}, {"rank": 1, "score": None}], [5, 0]),
    ],
)
def test_scores_from_what_people_thought(replies: list[dict], expected: list[int]) -> None:
    row = ranked_record({"prompt": "Why?", "responses": [{"text": "x", **reply} for reply in replies]})
    assert human_scores(row, (0.0, 1.0)) == expected


def test_a_score_outside_the_range_is_a_bad_row() -> None:
    """A scale of 1 to 5 read as 0 to 1 would make every reply perfect."""
    row = ranked_record({"prompt": "Why?", "responses": [{"text": "x", "score": 5}, {"text": "y", "score": 1}]})
    with pytest.raises(BadRow, match="score-high"):
        human_scores(row, (0.0, 1.0))
    assert human_scores(row, (1.0, 5.0)) == [5, 0]


def test_replies_that_people_liked_alike_do_not_become_perfect() -> None:
    """One rank for all says nothing of how good the replies are."""
    [outcome] = hindsight([ranked(3, 3)], None, options())
    assert outcome.rows == [] or {row["score"] for row in outcome.rows} != {5}


def test_human_scores_have_a_range_of_their_own() -> None:
    row = ranked(1, 10, 5.5, name="score")
    assert human_scores(row, (1.0, 10.0)) == [0, 5, 2]


def test_what_follows_the_score_is_cut() -> None:
    assert upto_score("Good.\nScore: 4/5. Bye!", FORM) == "Good.\nScore: 4"
    assert upto_score("Score: 2, no: **Score: 3** then", FORM).endswith("Score: 3")


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
    argv = ["make-eft", "--method", "hindsight", "--reason", "none", "--score-low", "1", "--score-high", "1"]
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
    assert result.code == 0 and [row["score"] for row in result.rows] == [5, 0], result.err
