"""Metrics, against scipy and against cases worked out by hand."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest

from helpers import SHARED, Srlm, as_lines, read_rows, write_rows
from srlm_cli.evaluate.columns import with_interval
from srlm_cli.evaluate.reward import (
    Replies,
    at_matched_length,
    baselines,
    best_of_n,
    by_number_of_replies,
    exact_match,
    is_perfect,
    judge_metrics,
    kendall_tau,
    ordered_pairs,
    outcomes,
    reward_metrics,
    spearman,
    tops_among_perfect,
    weighted_kappa,
)
from srlm_cli.records import judged_record
from srlm_cli.stats.bootstrap import metrics, of_sums


def correlations(human: list, scores: list) -> tuple[list[float], list[float]]:
    return spearman(human, scores), kendall_tau(human, scores)


def replies(human: list, scores: list, lengths: list | None = None) -> Replies:
    """Return the replies to a prompt: people's values and the judge's scores, both larger is better."""
    return Replies(human, scores, [score == 5 for score in scores], lengths or [1] * len(human), [0.0] * len(human))


# Two prompts, worked out by hand below. By people's order, the better reply first, the lengths of the
# pairs are 12:10, 12:30, 10:30 and 8:8.
FIRST = replies([0, -1, -2], [5, 3, 4], [12, 10, 30])  # the judge: right, right, wrong
SECOND = replies([-1, 0], [2, 2], [8, 8])  # a tie


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["metric"]: row for row in rows}


def test_the_five_metrics_by_hand() -> None:
    rows = by_name(reward_metrics([FIRST, SECOND]))
    expected = {
        "pairwise_accuracy": (2 / 4, 4),
        "pairwise_accuracy_without_ties": (2 / 3, 3),
        "pairwise_accuracy_ties_half": (2.5 / 4, 4),
        "tie_rate": (1 / 4, 4),
        "best_of_n": ((1.0 + 0.5) / 2, 2),
        "5_best": (1.0, 1),
        "exact_match": (0.0, 2),
        "spearman": ((0.5 + 0.0) / 2, 2),
        "kendall_tau": ((1 / 3 + 0.0) / 2, 2),
        "scored_rate": (1.0, 5),
    }
    assert {name: (pytest.approx(value), n) for name, (value, n) in expected.items()} == {
        name: (row["value"], row["n"]) for name, row in rows.items()
    }
    of_one_prompt = {name for name, row in rows.items() if row["ci_low"] is row["ci_high"] is None}
    assert of_one_prompt == {"pairwise_accuracy_without_ties", "5_best"}
    assert all(
        row["ci_low"] <= row["value"] <= row["ci_high"] for row in rows.values() if row["metric"] not in of_one_prompt
    )
    assert {row["task"] for row in rows.values()} == {"reward"}


def test_a_null_score_agrees_with_nobody() -> None:
    rows = by_name(reward_metrics([replies([0, -1, -2], [None, 4, 1])]))
    assert rows["pairwise_accuracy"]["value"] == pytest.approx(1 / 3)
    assert rows["tie_rate"]["value"] == 0
    assert rows["exact_match"]["value"] == 0
    assert rows["scored_rate"]["value"] == pytest.approx(2 / 3)
    assert rows["spearman"]["value"] == pytest.approx(1.0)


def test_pairs_that_people_tied_do_not_count() -> None:
    assert outcomes(ordered_pairs([0, 0, -1]), [1, 5, 1]) == [None, True]
    assert outcomes(ordered_pairs([-1, 0, 0]), [1, None, 1]) == [False, None]


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
    assert tops_among_perfect([0, -1, -2], [True, False, True]) == [True, False]
    assert tops_among_perfect([0, 0, -1], [True, True, False]) == [True, True]  # top together
    assert by_name(reward_metrics([replies([0, -1], [4, 3])]))["5_best"]["value"] is None


@pytest.mark.parametrize(
    ("scores", "sources", "best", "perfect"),
    [
        ([5.0, 5.0, 5.0], ["text"] * 3, 5.0, True),
        ([5.0, 5.0, 4.0], ["text"] * 3, 5.0, False),
        ([4.5], ["text"], 5.0, False),  # a written 4.5 is no 5
        ([5.0, 5.0], ["text", "finish"], 5.0, True),
        ([5.0, 4.0], ["text", "finish"], 5.0, False),  # 4.5, but of whole numbers
        ([4.5], ["expected"], 5.0, True),
        ([4.49], ["expected"], 5.0, False),
        ([4.9, 4.2], ["expected", "expected"], 5.0, True),
        ([4.75], ["finish"], 5.0, True),
        ([9.0], None, 10.0, False),
        ([10], None, 10.0, True),
        ([None], [None], 5.0, False),
    ],
)
def test_a_perfect_score(scores: list, sources: list | None, best: float, perfect: bool) -> None:
    known = [score for score in scores if score is not None]
    row = {"score": sum(known) / len(known) if known else None, "scores": scores}
    assert is_perfect({**row, "score_from": sources} if sources else row, best) is perfect


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


def test_correlations_with_ties_by_hand() -> None:
    # Ranks 4 3 2 1 and 4 2.5 2.5 1; five of six pairs agree, one is a tie of the judge.
    rho, tau = correlations([0, -1, -2, -3], [5, 3, 3, 1])
    assert rho == [pytest.approx(4.5 / math.sqrt(5 * 4.5))] and tau == [pytest.approx(5 / math.sqrt(6 * 5))]


def test_accuracy_against_a_plain_count() -> None:
    draw = random.Random(1)
    prompts = [([draw.randint(0, 2) for _ in range(4)], [draw.randint(0, 3) for _ in range(4)]) for _ in range(30)]
    pairs = [(h[a] - h[b], s[a] - s[b]) for h, s in prompts for a in range(4) for b in range(a + 1, 4) if h[a] != h[b]]
    rows = by_name(reward_metrics([replies(h, s) for h, s in prompts]))
    assert rows["pairwise_accuracy"]["n"] == len(pairs)
    assert rows["pairwise_accuracy"]["value"] == pytest.approx(sum(x * y > 0 for x, y in pairs) / len(pairs))
    assert rows["tie_rate"]["value"] == pytest.approx(sum(y == 0 for _, y in pairs) / len(pairs))


def test_accuracy_with_ties_as_halves_is_somers_d_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(2)
    for _ in range(40):
        human, scores = [draw.randint(0, 4) for _ in range(6)], [draw.randint(0, 5) for _ in range(6)]
        d = stats.somersd(human, scores).statistic  # (right - wrong) / pairs that people ordered
        row = by_name(reward_metrics([replies(human, scores)]))["pairwise_accuracy_ties_half"]
        assert row["value"] == pytest.approx((d + 1) / 2)


def test_baselines_by_hand() -> None:
    rows = by_name(baselines([FIRST, SECOND]))
    assert (rows["longest_wins"]["value"], rows["longest_wins"]["n"]) == (1 / 4, 4)
    assert (rows["shortest_wins"]["value"], rows["shortest_wins"]["n"]) == (2 / 4, 4)


def test_agreement_at_matched_length_by_hand() -> None:
    # Of 12:10, 12:30, 10:30 and 8:8 the first and the last match: right, and a tie.
    rows = by_name(at_matched_length([FIRST, SECOND], longer=0.25))
    assert {name: (row["value"], row["n"]) for name, row in rows.items()} == {
        "pairwise_accuracy_matched_length": (1 / 2, 2),
        "pairwise_accuracy_matched_length_without_ties": (1.0, 1),
        "longest_wins_matched_length": (1 / 2, 2),
    }
    assert {row["matched_length"] for row in rows.values()} == {0.25}


@pytest.mark.parametrize(
    ("longer", "lengths", "matches"),
    [(0.2, [10, 12], 1), (0.19, [12, 10], 0), (0.0, [7, 7], 1), (0.29, [129, 100], 1), (0.5, [0, 1], 0)],
)
def test_lengths_match_up_to_the_share(longer: float, lengths: list, matches: int) -> None:
    [row, *_] = at_matched_length([replies([0, -1], [5, 1], lengths)], longer=longer)
    assert row["n"] == matches


def test_by_number_of_replies_by_hand() -> None:
    rows = by_number_of_replies([FIRST, SECOND, replies([0, -1], [5, 1])])
    assert [(row["metric"], row["replies"], row["value"], row["n"]) for row in rows] == [
        ("pairwise_accuracy", 2, 1 / 2, 2),
        ("exact_match", 2, 1 / 2, 2),
        ("pairwise_accuracy", 3, pytest.approx(2 / 3), 3),
        ("exact_match", 3, 0.0, 1),
    ]


def judged(prompt: str, scores: list, human: list | None = None, model: str = "M1") -> list[dict]:
    """Return the judged rows of a prompt; without `human` the first reply is people's best."""
    return [
        judged_record(
            {
                "prompt": prompt, "response": f"Reply {k}", "k": k, "score": score,
                "human": human[k] if human else -k, "judge": {"model": model},
            }
        )
        for k, score in enumerate(scores)
    ]  # fmt: skip


def test_the_last_row_of_a_name_is_that_of_all_prompts() -> None:
    rows = by_name(judge_metrics([judged("One?", [5, 3, 4]), judged("Two?", [5, 1])]))
    assert rows["pairwise_accuracy"]["n"] == 4 and rows["exact_match"]["n"] == 2
    assert not any("replies" in row for row in rows.values())


def test_the_random_judge_is_one_draw_of_the_seed() -> None:
    prompts = [judged(f"Question {n}?", [5, 1]) for n in range(400)]
    first, again, other = (by_name(judge_metrics(prompts, seed))["random"] for seed in (0, 0, 1))
    assert first == again != other
    assert first["value"] == pytest.approx(0.5, abs=0.1) and first["n"] == 400
    turned = by_name(judge_metrics([group[::-1] for group in prompts], 0))["random"]
    assert turned["value"] == first["value"]


def test_a_prompt_with_one_reply_has_no_ranking() -> None:
    rows = judge_metrics([judged("One?", [5])])
    assert all((row["value"], row["n"]) == (None, 0) for row in rows)


def test_the_judge_is_named_when_there_is_one() -> None:
    m1, m2 = judged("One?", [5, 1]), judged("Two?", [5, 1], model="M2")
    assert {row["model"] for row in judge_metrics([m1, judged("Two?", [5, 1])])} == {"M1"}
    assert all("model" not in row for row in judge_metrics([m1, m2]))


def test_no_metric_is_nan() -> None:
    prompts = [judged("One?", [1, 1], [0, 0]), judged("Two?", [None, None])]
    rows = judge_metrics(prompts)
    values = [row[key] for row in rows for key in ("value", "ci_low", "ci_high")]
    assert not any(value is not None and math.isnan(value) for value in values)


# --- intervals -------------------------------------------------------------------------------


def metric(groups: list[list[float]], seed: int = 0) -> dict:
    return metrics("t", {"m": groups}, seed)[0]


def test_values_of_one_prompt_are_not_taken_for_independent() -> None:
    one_each = metric([[float(n % 2)] for n in range(200)])
    clustered = metric([[float(n % 2)] * 20 for n in range(10)])
    width = {id(row): row["ci_high"] - row["ci_low"] for row in (one_each, clustered)}
    assert clustered["n"] == 200 and width[id(clustered)] > 3 * width[id(one_each)]


def test_the_seed_of_the_bootstrap() -> None:
    groups = [[math.sin(n)] for n in range(40)]
    assert metric(groups, 1) == metric(groups, 1) != metric(groups, 2)


def test_nothing_to_measure_is_null() -> None:
    empty = {"task": "t", "metric": "m", "value": None, "n": 0, "ci_low": None, "ci_high": None}
    assert metric([]) == metric([[], []]) == empty


def test_values_of_one_prompt_have_no_interval() -> None:
    none = {"ci_low": None, "ci_high": None}
    assert metric([[1.0, 0.0, 1.0, 1.0]]) == {"task": "t", "metric": "m", "value": 0.75, "n": 4, **none}
    assert metric([[], [1.0, 0.0], []]) == {"task": "t", "metric": "m", "value": 0.5, "n": 2, **none}
    assert metric([[1.0], [1.0]]) == {"task": "t", "metric": "m", "value": 1.0, "n": 2, "ci_low": 1.0, "ci_high": 1.0}
    by_prompt = np.array([[3.0, 4.0], [0.0, 0.0]])
    found = of_sums("t", "m", by_prompt, lambda sums: sums[..., 0] / sums[..., 1], 4)
    assert found == {"task": "t", "metric": "m", "value": 0.75, "n": 4, **none}


def test_a_metric_in_a_table() -> None:
    known = {"value": 0.25, "ci_low": 0.125, "ci_high": 0.5}
    assert with_interval(known, "{:.2f}".format, "%") == "0.25% [0.12, 0.50]"
    assert with_interval({**known, "ci_low": None, "ci_high": None}, "{:.2f}".format, "%") == "0.25%"
    assert with_interval({**known, "value": None}, "{:.2f}".format) == with_interval(None, "{:.2f}".format) == "-"


# --- the commands ----------------------------------------------------------------------------

RANKED = [
    {"prompt": f"Question {n}?", "responses": [{"text": "good", "rank": 0}, {"text": "bad indeed", "rank": 1}]}
    for n in range(4)
]


def test_eval_reward_reads_what_judge_writes(srlm: Srlm) -> None:
    piped = srlm("judge", "--engine", "echo", stdin=as_lines(RANKED))
    result = srlm("eval", "reward", stdin=piped.out)
    rows = by_name(result.rows)
    expected = sum(a["score"] > b["score"] for a, b in zip(piped.rows[::2], piped.rows[1::2], strict=True)) / 4
    assert result.code == 0 and rows["pairwise_accuracy"]["value"] == expected
    assert rows["longest_wins"]["value"] == 0.0 and rows["shortest_wins"]["value"] == 1.0
    assert rows["scored_rate"]["n"] == 8 and rows["pairwise_accuracy_matched_length"]["n"] == 0
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


def test_the_order_of_the_rows_does_not_matter(srlm: Srlm) -> None:
    rows = [row for n in range(6) for row in judged(f"Question {n}?", [n % 3, 2, None if n == 4 else 1])]
    straight = srlm("eval", "reward", stdin=as_lines(rows))
    random.Random(0).shuffle(rows)
    assert srlm("eval", "reward", stdin=as_lines(rows)).rows == straight.rows != []


def test_the_scale_and_the_matched_length_can_be_set(srlm: Srlm) -> None:
    text = as_lines([{**row, "response": "x" * 10 * (2 + row["k"])} for row in judged("One?", [10, 4])])  # 20 and 30
    rows = by_name(srlm("eval", "reward", stdin=text).rows)
    assert rows["5_best"]["n"] == 0 and rows["pairwise_accuracy_matched_length"]["n"] == 0
    rows = by_name(srlm("eval", "reward", "--best", "10", "--matched-length", "0.5", stdin=text).rows)
    assert rows["5_best"]["n"] == 1 and rows["pairwise_accuracy_matched_length"]["n"] == 1


def test_a_human_value_that_is_no_number_is_a_bad_row(srlm: Srlm) -> None:
    rows = [*judged("One?", [5, 1]), *judged("Two?", [5, 1], ["good", "bad"])]
    result = srlm("eval", "reward", stdin=as_lines(rows))
    assert result.code == 3 and "<stdin>:3: expected `human`, a number" in result.err
    skipped = srlm("eval", "reward", "--on-error", "skip", stdin=as_lines(rows))
    assert skipped.code == 0 and by_name(skipped.rows)["pairwise_accuracy"]["n"] == 1


@pytest.mark.parametrize("flag", ["--in", "--ranked"])
def test_neither_input_is_written_over(srlm: Srlm, flag: str) -> None:
    write_rows(srlm.folder / "file.jsonl", judged("One?", [5, 1]) if flag == "--in" else RANKED)
    before = (srlm.folder / "file.jsonl").read_bytes()
    result = srlm("eval", "reward", flag, "file.jsonl", "--out", "file.jsonl")
    assert result.code == 2 and "is the input" in result.err
    assert (srlm.folder / "file.jsonl").read_bytes() == before


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data set is not here")
def test_the_metrics_of_human_rankings_of_open_assistant(srlm: Srlm) -> None:
    """A judge that gives people's own scores is right everywhere; the pairs are counted from the file."""
    ranked = read_rows(SHARED / "oasst2" / "ranked_eval.jsonl")
    rows = [
        {"prompt": one["prompt"], "response": reply["text"], "score": reply["score"], "human": reply["score"]}
        for one in ranked
        for reply in one["responses"]
    ]
    result = srlm("eval", "reward", stdin=as_lines(rows))
    whole = by_name(result.rows)
    scores = [[reply["score"] for reply in one["responses"]] for one in ranked]
    pairs = [(a, b) for group in scores for a, b in combinations(group, 2) if a != b]
    assert whole["pairwise_accuracy"]["value"] == 1.0 and whole["pairwise_accuracy"]["n"] == len(pairs)
    assert whole["exact_match"]["value"] == whole["spearman"]["value"] == whole["kendall_tau"]["value"] == 1.0
    apart = [row for row in result.rows if row["metric"] == "pairwise_accuracy" and "replies" in row]
    assert [row["replies"] for row in apart] == sorted({len(group) for group in scores if len(group) > 1})
    assert sum(row["n"] for row in apart) == len(pairs)
    assert 0.4 < whole["random"]["value"] < 0.6


def test_two_rankings_of_one_prompt_need_ids(srlm: Srlm) -> None:
    ranked = [
        {"prompt": "Why?", "responses": [{"text": f"{letter}{k}", "rank": k} for k in range(2)]} for letter in "ab"
    ]
    judged = srlm("judge", "--engine", "echo", stdin=as_lines(ranked))
    assert judged.code == 3 and "<stdin>:2: two replies have the id" in judged.err and "ranking" in judged.err
    own = srlm("judge", "--engine", "echo", stdin=as_lines({**row, "id": str(n)} for n, row in enumerate(ranked))).out
    assert srlm("eval", "reward", stdin=own).code == 0


def test_a_seed_is_not_negative(srlm: Srlm) -> None:
    assert srlm("eval", "reward", "--seed", "-1", stdin="").code == 2


@pytest.mark.parametrize(
    ("human", "scores", "share"),
    [
        ([0, -1, -1, -1], [4, 3, 2, 1], [1.0]),
        ([0, -1, -1, -1], [3, 3, 3, 1], [1 / 3]),
        ([0, -1, -1, -1], [None, 3, 2, 1], [0.0]),
        ([0, 0, -1], [3, 2, 2], [1.0]),  # two are right
        ([0, -1], [None, None], [0.0]),
        ([0, 0], [1, 2], []),  # nothing is best
    ],
)
def test_best_of_n_shares_the_top_among_those_that_tie(human, scores, share):
    assert best_of_n(human, scores) == share


def test_weighted_kappa_is_that_of_the_table_of_both():
    """Against the definition: weights (i - j) squared over the table of both raters' scores, and over chance."""
    random_ = random.Random(3)
    prompts = [
        replies([random_.randint(1, 5) for _ in range(4)], [random_.randint(1, 5) for _ in range(4)]) for _ in range(9)
    ]
    pairs = [(h, s) for one in prompts for h, s in zip(one.human, one.scores, strict=True)]
    chance = sum((h - s) ** 2 for h, _ in pairs for _, s in pairs) / len(pairs) ** 2
    (row,) = weighted_kappa(prompts)
    assert row["value"] == pytest.approx(1 - sum((h - s) ** 2 for h, s in pairs) / len(pairs) / chance)
    assert row["n"] == 36 and row["ci_low"] < row["value"] < row["ci_high"]
    (same,) = weighted_kappa([replies([1, 5, 3], [1, 5, 3])])
    assert same["value"] == 1
    assert not list(weighted_kappa([replies([0, -1], [4, 2])]))  # ranks are no scores


def test_accuracy_by_category_comes_before_that_over_all():
    ones = [(["Math"] * 2, [5, 4]), (["Math"] * 2, [1, 2]), (["Focus"] * 2, [3, 1])]
    rows = [
        {
            "prompt": f"q{n}", "response": str(k), "id": f"{n}/{k}", "prompt_id": str(n), "human": -k,
            "score": scores[k], "category": names[k],
        }
        for n, (names, scores) in enumerate(ones)
        for k in range(2)
    ]  # fmt: skip
    found = judge_metrics([[judged_record(row) for row in rows[at : at + 2]] for at in (0, 2, 4)])
    of = {
        (row["metric"], row.get("category")): row["value"]
        for row in found
        if row["metric"] in ("pairwise_accuracy", "best_of_n") and "replies" not in row
    }
    assert of == {
        ("pairwise_accuracy", "Focus"): 1.0, ("pairwise_accuracy", "Math"): 0.5, ("pairwise_accuracy", None): 2 / 3,
        ("best_of_n", "Focus"): 1.0, ("best_of_n", "Math"): 0.5, ("best_of_n", None): 2 / 3,
    }  # fmt: skip
    assert "category" not in [row for row in found if row["metric"] == "pairwise_accuracy"][-1]
