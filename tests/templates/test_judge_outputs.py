"""2,240 judgements that real judges wrote, against the scores that their authors read from them."""

from __future__ import annotations

import json

import pytest

from helpers import SHARED
from srlm_cli import templates

OUTPUTS = SHARED / "judge_outputs"
pytestmark = pytest.mark.skipif(not OUTPUTS.is_dir(), reason="the shared judge outputs are not here")

RATING = templates.load("rating", fields={"prompt", "response"})
TWO_SCORES = templates.load("compare_scores", fields={"prompt", "first", "second"})


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (OUTPUTS / name).read_text(encoding="utf-8").split("\n") if line]


def test_ratings_are_those_of_the_authors() -> None:
    """One of 800 has no rating: the judge saw an empty reply and gave none, the authors' -1."""
    judged = rows("mtbench_gpt4_single_800.jsonl")
    read = [RATING.score(row["judgment"]) for row in judged]
    assert read == [None if row["score"] == -1 else row["score"] for row in judged]
    assert read.count(None) == 1 and sum(score % 1 != 0 for score in read if score is not None) == 6


@pytest.mark.parametrize(
    ("name", "by_program", "by_hand", "same", "other", "unread"),
    [
        ("vicuna_blog_gpt4_reviews.jsonl", 1001, 39, 37, {(10, 4): 2}, 0),
        ("vicuna_gpt35_reviews.jsonl", 353, 47, 33, {(9, 9): 1}, 13),
    ],
)
def test_pairs_of_scores_are_those_of_the_authors(
    name: str, by_program: int, by_hand: int, same: int, other: dict, unread: int
) -> None:
    """The authors' program read a first line of two numbers (their floats); all others they filled in by hand (ints).

    All that their program read is read alike. Of those filled in by hand, the two files have:
    - 70 with a line of two numbers, a line for each reply, both scores in one sentence or under headings, which are
      read alike;
    - 3 where the authors' numbers are not those of the text: it says 10 and 4 (twice) where they have
      10 and 2, and 9/10 twice where they have 8 and 8;
    - 13 which are not read: 2 are refusals (the authors' -1), the others name one score for both, or their scores far
      apart, or one of them not at all.
    """
    judged = rows(name)
    program = [row for row in judged if isinstance(row["score"][0], float)]
    hand = [row for row in judged if not isinstance(row["score"][0], float)]
    assert (len(program), len(hand)) == (by_program, by_hand)
    assert [list(TWO_SCORES.scores(row["text"]) or ()) for row in program] == [row["score"] for row in program]

    found = [(TWO_SCORES.scores(row["text"]), tuple(row["score"])) for row in hand]
    assert sum(scores == theirs for scores, theirs in found) == same
    differ = [scores for scores, theirs in found if scores not in (theirs, None)]
    assert {scores: differ.count(scores) for scores in differ} == other
    assert sum(scores is None for scores, _ in found) == unread
    assert all(scores is None for scores, theirs in found if theirs == (-1, -1))


def test_who_wins_is_what_the_scores_say() -> None:
    judged = [row for row in rows("vicuna_blog_gpt4_reviews.jsonl") if isinstance(row["score"][0], float)]
    winners = ["tie" if a == b else "A" if a > b else "B" for a, b in (row["score"] for row in judged)]
    assert [TWO_SCORES.verdict(row["text"]) for row in judged] == winners
    assert len({*winners}) == 3


def test_no_score_of_another_scale_is_read_as_one_of_5() -> None:
    """These judges were asked for 1 to 10 and name no "score" of 5: what is read must stand there as such."""
    additive = templates.load("additive", fields={"prompt", "response"})
    texts = [row["judgment"] for row in rows("mtbench_gpt4_single_800.jsonl")]
    assert [additive.score(text) for text in texts] == [None] * 800
