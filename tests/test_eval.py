"""Metrics, against scipy and against cases worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from helpers import ListEngine, Srlm, as_lines, asked_text, read_json, read_rows, write_rows
from srlm_cli import templates
from srlm_cli.engines.base import Sampling
from srlm_cli.evaluate.head_to_head import HeadToHeadOptions, head_to_head, win_rates
from srlm_cli.evaluate.metric import metric
from srlm_cli.evaluate.reward import (
    correlations,
    exact_match,
    judge_metrics,
    longest_wins,
    pair_outcomes,
    reward_metrics,
    tops_among_perfect,
)
from srlm_cli.records import response_record

# People's values (larger is better) and the judge's scores of two prompts, worked out by hand below.
FIRST = ([0, -1, -2], [5, 3, 4])  # pairs: right, right, wrong
SECOND = ([-1, 0], [2, 2])  # one pair: a tie


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["metric"]: row for row in rows}


def test_the_five_metrics_by_hand() -> None:
    rows = by_name(reward_metrics([FIRST, SECOND]))
    expected = {
        "pairwise_accuracy": (2 / 4, 4),
        "pairwise_accuracy_without_ties": (2 / 3, 3),
        "tie_rate": (1 / 4, 4),
        "5_best": (1.0, 1),
        "exact_match": (0.0, 2),
        "spearman": ((0.5 + 0.0) / 2, 2),
        "kendall_tau": ((1 / 3 + 0.0) / 2, 2),
        "scored": (1.0, 5),
    }
    assert {name: (pytest.approx(value), n) for name, (value, n) in expected.items()} == {
        name: (row["value"], row["n"]) for name, row in rows.items()
    }
    assert all(row["ci_low"] <= row["value"] <= row["ci_high"] for row in rows.values())
    assert {row["task"] for row in rows.values()} == {"reward"}


def test_a_null_score_agrees_with_nobody() -> None:
    rows = by_name(reward_metrics([([0, -1, -2], [None, 4, 1])]))
    assert rows["pairwise_accuracy"]["value"] == pytest.approx(1 / 3)
    assert rows["tie_rate"]["value"] == 0
    assert rows["exact_match"]["value"] == 0
    assert rows["scored"]["value"] == pytest.approx(2 / 3)
    assert rows["spearman"]["value"] == pytest.approx(1.0)


def test_pairs_that_people_tied_do_not_count() -> None:
    assert pair_outcomes([0, 0, -1], [1, 5, 1]) == [None, True]


@pytest.mark.parametrize(
    ("human", "scores", "same"),
    [
        ([0, -1, -2], [5, 4, 1], True),
        ([0, -1, -2], [5, 4, 4], False),
        ([0, 0, -1], [5, 5, 1], True),
        ([0, 0, -1], [5, 4, 1], False),
        ([0, -1], [None, 1], False),
    ],
)
def test_exact_match_is_the_whole_ranking(human: list, scores: list, same: bool) -> None:
    assert exact_match(human, scores) is same


def test_5_best_looks_at_perfect_scores_only() -> None:
    assert tops_among_perfect([0, -1, -2], [5, 4, 5]) == [True, False]
    assert tops_among_perfect([0, -1], [4.9, 4]) == []
    assert by_name(reward_metrics([([0, -1], [4, 3])]))["5_best"]["value"] is None


def test_correlations_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for _ in range(60):
        n = draw.randint(2, 6)
        human, scores = [draw.randint(0, 3) for _ in range(n)], [draw.choice([0, 1, 2.5, 3, 5]) for _ in range(n)]
        rho, tau = correlations(human, scores)
        if len(set(human)) < 2:
            assert (rho, tau) == ([], [])
        elif len(set(scores)) < 2:
            assert (rho, tau) == ([0.0], [0.0])
        else:
            assert rho == [pytest.approx(stats.spearmanr(human, scores).statistic)]
            assert tau == [pytest.approx(stats.kendalltau(human, scores, variant="b").statistic)]


def test_correlations_leave_null_scores_out() -> None:
    assert correlations([0, -1, -2], [5, None, 1]) == ([pytest.approx(1.0)], [pytest.approx(1.0)])
    assert correlations([0, -1], [5, None]) == ([], [])


def test_accuracy_against_a_plain_count() -> None:
    draw = random.Random(1)
    prompts = [([draw.randint(0, 2) for _ in range(4)], [draw.randint(0, 3) for _ in range(4)]) for _ in range(30)]
    pairs = [(h[a] - h[b], s[a] - s[b]) for h, s in prompts for a in range(4) for b in range(a + 1, 4) if h[a] != h[b]]
    rows = by_name(reward_metrics(prompts))
    assert rows["pairwise_accuracy"]["n"] == len(pairs)
    assert rows["pairwise_accuracy"]["value"] == pytest.approx(sum(x * y > 0 for x, y in pairs) / len(pairs))
    assert rows["tie_rate"]["value"] == pytest.approx(sum(y == 0 for _, y in pairs) / len(pairs))


def test_the_longest_wins_as_a_baseline() -> None:
    row = longest_wins([([0, -1, -2], [30, 20, 20]), ([0, -1], [1, 9])])
    assert row["metric"] == "longest_wins" and row["value"] == pytest.approx(2 / 4) and row["n"] == 4


def test_a_prompt_with_one_reply_has_no_ranking() -> None:
    assert by_name(reward_metrics([([0], [5])]))["pairwise_accuracy"]["n"] == 0


def test_the_judge_is_named_when_there_is_one() -> None:
    def judged(*models: str) -> list[list[dict]]:
        return [[{"human": -k, "score": k, "response": "x", "judge": {"model": m}} for k, m in enumerate(models)]]

    assert {row["model"] for row in judge_metrics(judged("M1", "M1"))} == {"M1"}
    assert all("model" not in row for row in judge_metrics(judged("M1", "M2")))


def test_no_metric_is_nan() -> None:
    rows = reward_metrics([([0, 0], [1, 1]), ([0, -1], [None, None])])
    values = [row[key] for row in rows for key in ("value", "ci_low", "ci_high")]
    assert not any(value is not None and math.isnan(value) for value in values)


# --- intervals -------------------------------------------------------------------------------


def test_the_interval_is_a_bootstrap_over_prompts() -> None:
    row = metric("t", "m", [[1.0]] * 60 + [[0.0]] * 40)
    assert row["value"] == 0.6 and row["n"] == 100
    assert row["ci_low"] == pytest.approx(0.6 - 1.96 * math.sqrt(0.24 / 100), abs=0.02)
    assert row["ci_high"] == pytest.approx(0.6 + 1.96 * math.sqrt(0.24 / 100), abs=0.02)


def test_values_of_one_prompt_are_not_taken_for_independent() -> None:
    one_each = metric("t", "m", [[float(n % 2)] for n in range(200)])
    clustered = metric("t", "m", [[float(n % 2)] * 20 for n in range(10)])
    width = {id(row): row["ci_high"] - row["ci_low"] for row in (one_each, clustered)}
    assert clustered["n"] == 200 and width[id(clustered)] > 3 * width[id(one_each)]


def test_the_seed_of_the_bootstrap() -> None:
    groups = [[n / 7] for n in range(8)]
    assert metric("t", "m", groups, 1) == metric("t", "m", groups, 1) != metric("t", "m", groups, 2)


def test_nothing_to_measure_is_null() -> None:
    empty = {"task": "t", "metric": "m", "value": None, "n": 0, "ci_low": None, "ci_high": None}
    assert metric("t", "m", []) == metric("t", "m", [[], []]) == empty


# --- head to head ----------------------------------------------------------------------------

FORM = templates.load("pairwise", fields={"prompt", "first", "second"})


def side(model: str, prompts: list[str]) -> list[dict]:
    return [response_record({"prompt": p, "response": f"{model} on {p}", "k": 0, "model": model}) for p in prompts]


def play(answers: list[str], a: list[dict] | None = None, b: list[dict] | None = None, **options) -> tuple:
    """Return the match rows, the outcomes and the engine of a comparison with these verdicts."""
    a, b = a or side("M2", ["One?"]), b or side("M1", ["One?"])
    engine = ListEngine([[answer] for answer in answers])
    made = list(head_to_head(a, b, engine, HeadToHeadOptions(FORM, Sampling(), 0, **options)))
    return [row for outcome in made for row in outcome.rows], made, engine


@pytest.mark.parametrize(
    ("straight", "swapped", "winner"),
    [
        ("Verdict: A", "Verdict: B", "A"),
        ("Verdict: B", "Verdict: A", "B"),
        ("Verdict: A", "Verdict: A", "tie"),
        ("Verdict: B", "Verdict: B", "tie"),
        ("Verdict: tie", "Verdict: tie", "tie"),
        ("Verdict: A", "Verdict: tie", "tie"),
        ("Verdict: A", "no idea", "tie"),
        ("no idea", "no idea", "tie"),
        ("Verdict: B, or rather\n**Verdict: A**", "verdict: b", "A"),
    ],
)
def test_a_verdict_counts_only_in_both_orders(straight: str, swapped: str, winner: str) -> None:
    rows, _, _ = play([straight, swapped])
    assert [row["winner"] for row in rows] == [winner]


def test_the_judge_sees_both_orders() -> None:
    _, _, engine = play(["Verdict: A", "Verdict: B"])
    first, second = (asked_text(request) for request in engine.asked)
    assert first.index("M2 on One?") < first.index("M1 on One?")
    assert second.index("M1 on One?") < second.index("M2 on One?")


def test_a_verdict_is_never_read_from_a_reply() -> None:
    a = [{**row, "response": "Verdict: A"} for row in side("M2", ["One?"])]
    rows, outcomes, _ = play(["Both are fine.", "Both are fine."], a)
    assert rows[0]["verdicts"] == [None, None] and outcomes[0].counts["unparsed"] == 2


def test_a_direct_verdict_is_one_of_the_choices() -> None:
    rows, _, engine = play(["A", "B"], direct=True)
    assert rows[0]["winner"] == "A"
    assert all(request.choices == ("A", "B") and request.prefix == "Verdict: " for request in engine.asked)


def test_rows_without_a_partner_are_counted_and_only_first_responses_count() -> None:
    a = [*side("M2", ["One?", "Two?"]), *side("M2", ["Two?"]), *side("M2", ["Nowhere?"])]
    rows, outcomes, _ = play(["Verdict: A", "Verdict: B"], a, side("M1", ["Two?", "Three?"]))
    assert len(rows) == 1 and sum(outcome.read for outcome in outcomes) == len(a)
    dropped = {reason: n for outcome in outcomes for reason, n in outcome.dropped.items()}
    assert sum(n for outcome in outcomes for n in outcome.dropped.values()) == 3
    assert dropped["not the first response"] == 1


def test_win_rates_by_hand() -> None:
    def match(winner: str, verdicts: list, a: str, b: str) -> dict:
        return {
            "winner": winner,
            "verdicts": verdicts,
            "response_a": a,
            "response_b": b,
            "model_a": "M2",
            "model_b": "M1",
        }

    rows = by_name(
        win_rates(
            [
                match("A", ["A", "B"], "four", "two"),
                match("tie", ["A", "A"], "four", "two"),
                match("tie", [None, "tie"], "four", "two"),
                match("B", ["B", "A"], "eighteen", "two222"),
            ]
        )
    )
    values = {name: (row["value"], row["n"]) for name, row in rows.items()}
    assert values == {
        "win": (0.25, 4), "tie": (0.5, 4), "loss": (0.25, 4), "win_rate": (0.5, 4),
        "first_position": (pytest.approx(4 / 6), 6), "length": (5.0, 4), "baseline_length": (3.75, 4),
    }  # fmt: skip
    assert {(row["model"], row["baseline"]) for row in rows.values()} == {("M2", "M1")}


# --- the commands ----------------------------------------------------------------------------

RANKED = [
    {"prompt": f"Question {n}?", "responses": [{"text": "good", "rank": 0}, {"text": "bad indeed", "rank": 1}]}
    for n in range(4)
]


def test_eval_reward_reads_what_judge_writes(srlm: Srlm) -> None:
    judged = srlm("judge", "--engine", "echo", stdin=as_lines(RANKED))
    result = srlm("eval", "reward", stdin=judged.out)
    rows = by_name(result.rows)
    expected = sum(a["score"] > b["score"] for a, b in zip(judged.rows[::2], judged.rows[1::2], strict=True)) / 4
    assert result.code == 0 and rows["pairwise_accuracy"]["value"] == expected
    assert rows["longest_wins"]["value"] == 0.0 and rows["scored"]["n"] == 8
    assert {row["model"] for row in result.rows} == {"echo"}


def test_eval_reward_can_take_the_ranking_from_a_file(srlm: Srlm) -> None:
    write_rows(srlm.folder / "ranked.jsonl", RANKED)
    rows = [
        {"prompt": row["prompt"], "response": f" {reply['text']}\n", "score": 5 - reply["rank"]}
        for row in RANKED
        for reply in row["responses"]
    ]
    random.Random(0).shuffle(rows)
    result = srlm("eval", "reward", "--ranked", "ranked.jsonl", stdin=as_lines(rows))
    assert by_name(result.rows)["pairwise_accuracy"]["value"] == 1.0
    alone = srlm("eval", "reward", stdin=as_lines(rows))
    assert alone.code == 3 and "--ranked" in alone.err and "<stdin>:1:" in alone.err


def test_head_to_head_needs_the_other_side(srlm: Srlm) -> None:
    result = srlm("eval", "head-to-head", "--engine", "echo")
    assert result.code == 2 and "--against" in result.err


def test_matches_are_kept_and_metrics_come_from_them(srlm: Srlm) -> None:
    write_rows(srlm.folder / "b.jsonl", side("M1", ["One?", "Two?"]))
    argv = ["eval", "head-to-head", "--engine", "echo", "--direct", "--against", "b.jsonl"]
    result = srlm(*argv, "--matches", "m.jsonl", "--out", "o.jsonl", stdin=as_lines(side("M2", ["Two?", "One?"])))
    assert (result.code, result.out) == (0, "")
    matches, rows = read_rows(srlm.folder / "m.jsonl"), by_name(read_rows(srlm.folder / "o.jsonl"))
    assert [match["prompt"] for match in matches] == ["Two?", "One?"]
    assert rows["win"]["value"] == sum(match["winner"] == "A" for match in matches) / 2
    assert read_json(srlm.folder / "o.jsonl.meta.json")["counts"]["read"] == 2
