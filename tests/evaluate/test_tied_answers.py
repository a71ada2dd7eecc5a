"""The score of prompts with several right answers, worked out by hand."""

from __future__ import annotations

from math import tanh

import pytest

from srlm_cli.evaluate.reward import Replies
from srlm_cli.evaluate.tied_answers import ahead, metrics


def prompt(name: str, right: list, wrong: list) -> Replies:
    human, scores = [0.0] * len(right) + [-1.0] * len(wrong), right + wrong
    nothing = [0.0] * len(human)
    return Replies(
        human, scores, [False] * len(human), [1] * len(human), nothing, [None] * len(human), [name] * len(human)
    )


def test_the_parts_have_their_weights():
    ones = [
        prompt("ref:1", [5], [3, 2]),  # right, gap 2
        prompt("tied:1", [5, 4], [2, 1]),  # right, gap 2, spread 1: preferred, also with the ref
        prompt("ref:2", [2], [3]),  # wrong, gap -1
        prompt("tied:2", [5, 1], [0.5]),  # right, gap 0.5, spread 4: not preferred
    ]
    (row,) = metrics(ones)
    expected = 0.3 * 2 / 2 + 0.3 * 1 / 2 + 0.2 * 1 / 2 + 0.2 * 1 / 2 + 0.01 * (tanh(2 / 1 - 1) + tanh(-1 / 4 - 1)) / 2
    assert row["value"] == pytest.approx(expected) and row["n"] == 2
    assert row["ci_low"] <= expected <= row["ci_high"]


def test_a_score_that_cannot_be_read_is_the_worst():
    (row,) = metrics([prompt("ref:1", [5], [None]), prompt("tied:1", [5, 5], [1])])
    assert row["value"] == pytest.approx(0.3 * 1 + 0.2 * 1 - 0.01)


def test_a_prompt_without_its_other_one_counts_for_the_accuracy():
    (row,) = metrics([prompt("ref:1", [5], [3])])
    assert row["value"] == pytest.approx(0.3)


def test_without_names_there_is_no_score():
    assert not list(metrics([Replies([0, -1], [2, 1], [False] * 2, [1, 1], [0.0, 0.0], ["Math"] * 2, [None] * 2)]))
    assert not list(metrics([Replies([0, -1], [2, 1], [False] * 2, [1, 1], [0.0, 0.0])]))


@pytest.mark.parametrize(
    ("gap", "spread", "value"),
    [(1, 0, 1.0), (-1, 0, -1.0), (0, 0, 0.0), (float("-inf"), float("inf"), -1.0), (2, 1, tanh(1))],
)
def test_how_far_right_replies_are_ahead(gap, spread, value):
    assert ahead(gap, spread) == value
