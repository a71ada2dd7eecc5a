"""Calibration: what people thought of the replies in each bin of the judge's score."""

from __future__ import annotations

import json
import random

import pytest

from helpers import Srlm, as_lines
from srlm_cli.evaluate.calibration import BINS, metrics
from srlm_cli.evaluate.reward import Replies, judge_metrics


def replies(human: list[float], scores: list[float | None]) -> Replies:
    return Replies([float(h) for h in human], scores, [], [], [])


def test_few_scores_have_a_bin_each_with_the_mean_of_peoples_scores() -> None:
    rows = metrics([replies([5, 1, 3], [4.0, 1.0, 4.0]), replies([2, 4], [1.0, None])])
    found = [(row["bin"], row["score"], row["score_low"], row["score_high"], row["value"], row["n"]) for row in rows]
    assert found == [(1, 1.0, 1.0, 1.0, 1.5, 2), (2, 4.0, 4.0, 4.0, 4.0, 2)]
    assert {row["people"] for row in rows} == {"score"} and {row["metric"] for row in rows} == {"calibration"}
    assert rows[0]["ci_low"] == 1.0 and rows[0]["ci_high"] == 2.0  # the prompts are drawn, with all their replies


def test_ranks_count_as_the_share_of_the_others_below() -> None:
    rows = metrics([replies([0, -1, -2], [3.0, 2.0, 2.0]), replies([-1, -1, 0], [2.0, 3.0, 3.0]), replies([0], [3.0])])
    by_score = {row["score"]: row for row in rows}
    assert by_score[2.0]["value"] == pytest.approx((0.5 + 0.0 + 0.25) / 3)
    assert by_score[3.0]["value"] == pytest.approx((1.0 + 0.25 + 1.0) / 3)
    assert [row["n"] for row in rows] == [3, 3] and {row["people"] for row in rows} == {"place"}


def test_many_scores_are_in_bins_of_about_equal_size_and_equal_scores_together() -> None:
    draw = random.Random(0)
    prompts = [replies([draw.random(), 1 + draw.random()], [draw.random(), 1 + draw.random()]) for _ in range(100)]
    prompts += [replies([3], [0.5])] * 50
    rows = metrics(prompts)
    assert len(rows) <= BINS and sum(row["n"] for row in rows) == 250
    assert max(row["n"] for row in rows) >= 50  # the score that came 50 times is in one bin
    assert all(row["score_low"] <= row["score"] <= row["score_high"] for row in rows)
    assert all(a["score_high"] < b["score_low"] for a, b in zip(rows, rows[1:], strict=False))
    for row in rows:
        inside = [
            h
            for one in prompts
            for h, s in zip(one.human, one.scores, strict=True)
            if row["score_low"] <= s <= row["score_high"]
        ]
        assert row["n"] == len(inside) and row["value"] == pytest.approx(sum(inside) / len(inside))


def test_nothing_to_bin_is_no_row() -> None:
    assert metrics([]) == metrics([replies([1, 2], [None, None])]) == metrics([replies([0], [3.0])]) == []


def test_eval_reward_writes_the_bins_before_the_rows_over_all(srlm: Srlm) -> None:
    rows = [
        {"prompt": f"Ask {n}?", "response": "so " * k, "k": k, "human": float(k), "score": float(k % 3)}
        for n in range(4)
        for k in range(1, 5)
    ]
    found = [json.loads(line) for line in srlm("eval", "reward", stdin=as_lines(rows)).out.splitlines()]
    bins = [row for row in found if "bin" in row]
    assert [(row["score"], row["value"], row["n"]) for row in bins] == [(0.0, 3.0, 4), (1.0, 2.5, 8), (2.0, 2.0, 4)]
    last = {row["metric"]: at for at, row in enumerate(found)}
    assert (
        last["calibration"]
        < last["pairwise_accuracy"]
        == found.index(next(row for row in found if row["metric"] == "pairwise_accuracy" and "replies" not in row))
    )


def test_a_prompt_in_memory_has_the_same_bins() -> None:
    group = [
        {"id": f"a/{k}", "response": "so", "human": float(k), "score": float(k), "prompt_id": "a"} for k in (1, 2, 3)
    ]
    rows = [row for row in judge_metrics([group]) if row["metric"] == "calibration"]
    assert [row["value"] for row in rows] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("human", "score"), [(1e308, 3.0), (1e308, 1e308), (1e200, 3.0)])
@pytest.mark.filterwarnings("error")
def test_numbers_that_are_too_large_to_add_have_no_mean(human: float, score: float) -> None:
    group = [
        {"id": f"a/{k}", "response": "so", "human": h, "score": s, "prompt_id": "a"}
        for k, (h, s) in enumerate([(human, score), (human, score), (1.0, 1.0)])
    ]
    rows = judge_metrics([group])
    json.dumps(rows, allow_nan=False)
    bins = [row for row in rows if row["metric"] == "calibration"]
    assert bins[0]["value"] == 1.0 and bins[1]["n"] == 2
    assert bins[1]["value"] == (None if human == 1e308 else human)
    assert bins[1]["score"] == (None if score == 1e308 else score)
    assert [row["value"] for row in rows if row["metric"] == "weighted_kappa"] == [None]
    assert [row["value"] for row in rows if row["metric"] == "pairwise_accuracy"][-1] == 1.0
