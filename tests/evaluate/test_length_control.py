"""Length-controlled win rates: closed forms, scikit-learn's figures, the published figures, the command."""

from __future__ import annotations

import json
import math
import random
import runpy
import statistics
from collections.abc import Iterable

import numpy as np
import pytest

from helpers import ROOT, SHARED, Srlm, as_lines, write_rows
from srlm_cli.errors import BadRow
from srlm_cli.evaluate import length_control as pure
from srlm_cli.evaluate.length_control import C, Comparisons, by_model, of_matches, preference_record
from srlm_cli.stats.logistic import probability, solve

BENCHMARK = ROOT / "benchmarks" / "length_control.py"
ALPACA_EVAL = SHARED / "alpaca_eval_lc"
NO_PENALTY = 1e9


def comparison(d: float, wins: float, index: int | None = None, **more) -> dict:
    """Return a row in which the model wins with this probability and writes d characters less."""
    lengths = {"len_baseline": 5000 + d, "len_model": 5000}
    return preference_record({"model": "M2", "index": index, **lengths, "preference": 1 + wins, **more})


def two_lengths(shorter: float, longer: float, many: int = 10, **more) -> list[dict]:
    """Return rows of a model that is 100 characters shorter half the time, with its win rate in each half."""
    halves = (100, shorter), (-100, longer)
    return [comparison(d, rate, index, **more) for d, rate in halves for index in range(many)]


def fit(rows: list[dict], reference: list[dict] | tuple = (), c: float = C) -> pure.Fit:
    return pure.fit(Comparisons(rows), by_model(reference), c)


def length_control(rows: Iterable[dict], reference: Iterable[dict] = (), seed: int = 0) -> tuple[list[dict], str]:
    return pure.length_control(by_model(rows), by_model(reference), seed=seed)


def controlled(rows: list[dict], seed: int = 0) -> dict:
    return pure.controlled(Comparisons(rows), seed=seed)


# --- the model -------------------------------------------------------------------------------


def test_at_equal_lengths_the_log_odds_are_halfway() -> None:
    fitted = fit(two_lengths(0.8, 0.5), c=NO_PENALTY)  # odds 4 and 1, halfway 2
    assert fitted.win_rate == pytest.approx(2 / 3, abs=1e-6)
    t = math.tanh(100 / statistics.stdev([100] * 10 + [-100] * 10))
    assert fitted.coefficients["length"] == pytest.approx(math.log(2) / t, abs=1e-5)
    assert fitted.coefficients["intercept"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(("rate", "left"), [(0.75, 0.749), (0.25, 0.251)])
def test_without_a_length_effect_it_is_the_win_rate_but_for_the_penalty(rate: float, left: float) -> None:
    fitted = fit(two_lengths(rate, rate, many=20))  # the penalty on the intercept moves it by 1 / (n C)
    assert fitted.win_rate == pytest.approx(left, abs=1e-9) and C == 25
    assert fitted.coefficients["length"] == 0


def test_the_win_rate_is_a_mean_over_difficulties() -> None:
    rows = [
        comparison(d, 0.9 if q > 0 else 0.4, index, difficulty=q)
        for index, (d, q) in enumerate([(100, 1), (-100, 1), (100, -1), (-100, -1)] * 5)
    ]
    fitted = fit(rows, c=NO_PENALTY)
    assert fitted.terms == ["length", "difficulty"]
    assert fitted.win_rate == pytest.approx((0.9 + 0.4) / 2, abs=1e-6)
    assert fitted.coefficients["difficulty"] == pytest.approx((math.log(9) - math.log(4 / 6)) / 2, abs=1e-5)


def test_swapped_sides_share_one() -> None:
    draw = random.Random(0)
    rows = [comparison(draw.gauss(0, 300), draw.random(), difficulty=draw.gauss(0, 1)) for _ in range(50)]
    swapped = [
        {**row, "len_baseline": row["len_model"], "len_model": row["len_baseline"], "preference": 3 - row["preference"]}
        for row in rows
    ]
    assert fit(rows).win_rate + fit(swapped).win_rate == pytest.approx(1, abs=1e-6)


def known(a: float, b: float, intercept: float, many: int, **more) -> list[dict]:
    """Return rows whose preferences are the probabilities of a model with these coefficients."""
    draw = random.Random(1)
    d, q = [draw.gauss(-200, 400) for _ in range(many)], [draw.gauss(0, 1) for _ in range(many)]
    spread = statistics.stdev(d)
    scores = [a * math.tanh(x / spread) + b * y + intercept for x, y in zip(d, q, strict=True)]
    wins = [1 / (1 + math.exp(-score)) for score in scores]
    return [comparison(*row, difficulty=y, **more) for row, y in zip(zip(d, wins, strict=True), q, strict=True)]


def test_a_known_model_is_found_again_with_a_reference_or_without() -> None:
    rows = known(-1.5, 0.4, 0.7, 200)
    variants = known(-1.5, 0.4, 0.0, 100)
    expected = {"length": -1.5, "difficulty": 0.4, "intercept": 0.7}
    for reference in ([], variants):
        fitted = fit(rows, reference, c=NO_PENALTY)
        assert fitted.coefficients == pytest.approx(expected, abs=1e-5)
        wins = [1 / (1 + math.exp(-0.4 * row["difficulty"] - 0.7)) for row in rows]
        assert fitted.win_rate == pytest.approx(statistics.mean(wins), abs=1e-6)
    assert fitted.terms == ["length", "difficulty", "reference"]


@pytest.mark.parametrize("names", [["wordy"], ["wordy", "terse"]])
def test_the_reference_weighs_a_fifth_of_the_rows_however_many_variants(names: list[str]) -> None:
    reference = [row for name in names for row in two_lengths(0.2, 0.8, model=name)]
    fitted = fit(two_lengths(0.8, 0.2), reference, c=NO_PENALTY)
    # 20 rows at 0.8 and a fifth of 20 at 0.2: (16 + 0.8) / 24 = 0.7 on the side where the model is shorter
    t = math.tanh(100 / statistics.stdev([100] * 10 + [-100] * 10))
    assert fitted.coefficients["length"] == pytest.approx(math.log(7 / 3) / t, abs=1e-5)


def test_lengths_are_scaled_variant_by_variant() -> None:
    wide = [{**row, "len_baseline": 5000 + 50 * (row["len_baseline"] - 5000)} for row in two_lengths(0.2, 0.8)]
    near, far = (fit(two_lengths(0.8, 0.2), [*two_lengths(0.2, 0.8, model="x"), *rows]) for rows in ([], wide))
    assert far.coefficients["length"] == pytest.approx(near.coefficients["length"], abs=1e-6)


# 12 rows, and what scikit-learn 1.9.1 makes of them (LogisticRegression, penalty l1, liblinear, no intercept of its
# own but a column of ones, tol 1e-12, each row twice: label 1 with the preference as weight, 0 with the rest).
LENGTHS = [300, 500, 700, 800, 900, 950, 1000, 1200, 1500, 1800, 2100, 2600]
WINS = [0.1, 0.3, 0, 0.5, 0.4, 0.2, 0.9, 0.5, 0.7, 1, 0.6, 0.95]
DIFFICULTIES = [-1, 0.5, 0, 2, -0.5, 1, 0.3, -0.7, 1.2, -2, 0.4, 0.8]


@pytest.mark.parametrize(
    ("c", "expected", "rate"),
    [
        (1.0, [-0.665402706761415, 0, 0], 0.5),
        (25.0, [-2.0467452027008446, -0.018790373094461164, -0.33228974186123433], 0.416929752496303),
    ],
)
def test_the_fit_is_that_of_scikit_learn(c: float, expected: list[float], rate: float) -> None:
    rows = [
        preference_record({"len_baseline": 900, "len_model": length, "preference": 1 + wins, "difficulty": difficulty})
        for length, wins, difficulty in zip(LENGTHS, WINS, DIFFICULTIES, strict=True)
    ]
    fitted = fit(rows, c=c)
    assert list(fitted.coefficients.values()) == pytest.approx(expected, abs=1e-6)
    assert fitted.win_rate == pytest.approx(rate, abs=1e-7)


@pytest.mark.parametrize("c", [0.05, 1.0, 25.0, 1e4])
@pytest.mark.parametrize("kind", ["soft", "all won", "length decides"])
def test_the_fit_is_a_minimum(c: float, kind: str) -> None:
    """At the minimum the loss pulls each coefficient with 1/c, or with less where the coefficient is 0."""
    draw = np.random.default_rng(2)
    features = np.column_stack([np.tanh(draw.normal(size=60)), draw.normal(size=60), np.ones(60)])
    labels = {"soft": draw.random(60), "all won": np.ones(60), "length decides": (features[:, 0] > 0.1).astype(float)}
    weights = draw.integers(0, 4, size=(5, 60)).astype(float)
    best = solve(features, labels[kind], weights, c)
    pull = (weights * (labels[kind] - probability(best, features))) @ features
    held = np.where(best == 0, np.abs(pull) <= 1 / c, np.isclose(pull, np.sign(best) / c, atol=1e-4 + 1e-3 / c))
    assert held.all(), (best, pull)


# --- the published figures -------------------------------------------------------------------


@pytest.mark.skipif(not ALPACA_EVAL.is_dir(), reason="the shared AlpacaEval figures are not here")
@pytest.mark.skipif(not BENCHMARK.is_file(), reason="the benchmarks are not here")
def test_the_published_figures_are_reproduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    benchmark = runpy.run_path(str(BENCHMARK))
    found = benchmark["misses"](ALPACA_EVAL)
    sizes = {model: abs(miss) for model, (_, _, miss) in found.items()}
    assert len(sizes) == 29
    assert max(sizes[model] for model, (n, _, _) in found.items() if n == 805) < 0.1
    assert statistics.median(sizes.values()) < 0.01
    # with the C that cross-validation had chosen for them when they were published
    for c, models in ((10 ** (4 / 9), ["claude-2", "phi-2"]), (10 ** (4 / 3), ["NullModel", "alpaca-7b"])):
        assert max(abs(miss) for _, _, miss in benchmark["misses"](ALPACA_EVAL, c, models).values()) < 0.003


# --- metric rows -----------------------------------------------------------------------------


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["metric"]: row for row in rows}


def test_the_interval_without_a_length_effect_is_that_of_a_share() -> None:
    draw = random.Random(3)
    rows = [comparison(draw.choice([-100, 100]), float(index % 5 < 3), index) for index in range(400)]
    row = controlled(rows)
    assert (row["n"], row["terms"], row["c"]) == (400, ["length"], C)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 400)
    assert (row["ci_low"], row["ci_high"]) == (
        pytest.approx(row["value"] - half, abs=0.01),
        pytest.approx(row["value"] + half, abs=0.01),
    )
    assert controlled(rows, seed=1)["ci_low"] != row["ci_low"] == controlled(rows)["ci_low"]


def test_rows_of_one_prompt_are_drawn_together() -> None:
    draw = random.Random(4)
    rows = [comparison(draw.gauss(0, 100), float(index % 2), index) for index in range(20) for _ in range(10)]
    apart = controlled([{**row, "index": None} for row in rows])
    together = controlled(rows)
    assert together["value"] == apart["value"]
    assert together["ci_high"] - together["ci_low"] > 2 * (apart["ci_high"] - apart["ci_low"])


def test_comparisons_of_one_prompt_have_no_interval() -> None:
    row = controlled([{**row, "index": 7} for row in two_lengths(0.8, 0.5)])
    assert row["value"] is not None and row["ci_low"] is row["ci_high"] is None


def test_models_are_told_apart_and_keep_their_order() -> None:
    second = [{**row, "model": "M3", "baseline": "M1"} for row in two_lengths(0.5, 0.5)]
    rows, _ = length_control([*two_lengths(0.8, 0.5), *second, comparison(0, 1)])
    assert [(row["model"], row.get("baseline"), row["n"]) for row in rows[::4]] == [("M2", None, 21), ("M3", "M1", 20)]
    first = by_name(rows[:4])
    assert list(first) == ["win_rate", "length_controlled_win_rate", "length", "baseline_length"]
    assert first["win_rate"]["value"] == pytest.approx((8 + 5 + 1) / 21)
    assert (first["length"]["value"], first["baseline_length"]["value"]) == (5000, 5000)
    assert by_name(rows[4:])["length_controlled_win_rate"]["value"] == pytest.approx(0.5)
    assert {row["task"] for row in rows} == {"length_control"}


@pytest.mark.parametrize("rows", [two_lengths(0.8, 0.5, many=4), [comparison(30, 0.8)] * 20], ids=["few", "equal"])
def test_where_length_cannot_be_told_from_quality_there_is_no_value(rows: list[dict]) -> None:
    made, left_out = length_control(rows)
    row = by_name(made)["length_controlled_win_rate"]
    assert (row["value"], row["ci_low"], row["ci_high"], row["terms"]) == (None, None, None, [])
    assert by_name(made)["win_rate"]["value"] is not None
    assert left_out.startswith("no length-controlled win rate (")


def test_what_was_left_out_is_said_with_the_number_of_models() -> None:
    hard = two_lengths(0.8, 0.5, difficulty=0.5)
    some = [*two_lengths(0.8, 0.5, model="M3"), comparison(7, 0, model="M3", difficulty=1.0)]
    assert length_control(hard, hard)[1] == ""
    assert "reference rows" in length_control(hard)[1] and "difficulty" not in length_control(hard)[1]
    rows, left_out = length_control([*hard, *some], hard)
    assert left_out == "no difficulty term (not every row has a `difficulty`) for 1 of 2 models"
    assert [row["terms"] for row in rows if "terms" in row] == [["length", "difficulty", "reference"],
                                                                ["length", "reference"]]  # fmt: skip
    assert "no reference term (its rows have no `difficulty`)" in length_control(hard, some)[1]


# --- matches ---------------------------------------------------------------------------------


def match(winner: str, a: int, b: int, **more) -> dict:
    return {"winner": winner, "model_a": "M2", "model_b": "M1", "response_a": "a" * a, "response_b": "b" * b, **more}


def test_matches_are_preferences_for_a() -> None:
    rows = [preference_record(match(winner, 3, 5, prompt_id="p")) for winner in ("A", "tie", "B")]
    assert [row["preference"] for row in rows] == [2, 1.5, 1]
    assert {(row["model"], row["baseline"], row["index"], row["len_model"], row["len_baseline"]) for row in rows} == {
        ("M2", "M1", "p", 3, 5)
    }
    assert preference_record(match("tie", 3, 5, probability=0.7))["preference"] == 1.7


def test_the_rate_of_matches_is_that_of_the_same_rows() -> None:
    played = [match(winner, 100, 200) for winner in "AAAAAAAABB"] + [match(winner, 200, 100) for winner in "AAAAABBBBB"]
    row = of_matches(played, seed=5)
    assert row["value"] == pytest.approx(fit(two_lengths(0.8, 0.5)).win_rate, abs=1e-6)
    assert {key: row[key] for key in ("task", "metric", "n", "win_rate", "model", "baseline")} == {
        "task": "head_to_head", "metric": "length_controlled_win_rate", "n": 20, "win_rate": 0.65,
        "model": "M2", "baseline": "M1",
    }  # fmt: skip
    assert row["ci_low"] < row["value"] < row["ci_high"]
    assert of_matches(played, seed=6)["ci_low"] != row["ci_low"] == of_matches(played, seed=5)["ci_low"]


def test_matches_that_cannot_be_controlled_have_no_row() -> None:
    assert of_matches([]) is of_matches([match("A", 1, 2)] * 20) is of_matches([match("A", 1, 2)]) is None


# --- bad rows --------------------------------------------------------------------------------

GOOD = {"model": "M2", "index": 0, "len_baseline": 900, "len_model": 1200, "preference": 1.25}


def test_0_is_a_tie_and_the_ends_are_allowed() -> None:
    assert [preference_record({**GOOD, "preference": value})["preference"] for value in (0, 1, 2)] == [1.5, 1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preference": None}, "`preference`"),
        ({"preference": 0.5}, "`preference`"),
        ({"preference": 2.1}, "`preference`"),
        ({"preference": True}, "`preference`"),
        ({"preference": "1.5"}, "`preference`"),
        ({"len_model": None}, "`len_model`"),
        ({"len_model": -1}, "`len_model`"),
        ({"len_baseline": "900"}, "`len_baseline`"),
        ({"difficulty": "hard"}, "`difficulty`"),
        ({"model": ["M2"]}, "`model`"),
        ({"index": {}}, "`index`"),
    ],
)
def test_what_a_row_has_to_hold(change: dict, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        preference_record({**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [({"winner": "C"}, "`winner`"), ({"winner": None}, "`winner`"), ({"response_a": None}, "`response_a`"),
     ({"probability": 1.5}, "`probability`")],
)  # fmt: skip
def test_what_a_match_has_to_hold(change: dict, words: str) -> None:
    with pytest.raises(BadRow, match=words):
        preference_record({**match("A", 3, 5), **change})


# --- the command -----------------------------------------------------------------------------

ROWS = [
    {"model": model, "index": index, "len_baseline": 1000, "len_model": 800 + 40 * index, "preference": 1 + index / 12}
    for model in ("M2", "M3")
    for index in range(12)
]


def test_the_command_in_a_pipe(srlm: Srlm) -> None:
    result = srlm("eval", "length-control", "--seed", "3", stdin=as_lines(ROWS))
    expected, left_out = length_control(map(preference_record, ROWS), seed=3)
    assert result.code == 0 and result.rows == json.loads(json.dumps(expected))
    assert [row["model"] for row in result.rows] == ["M2"] * 4 + ["M3"] * 4
    summary, note = result.err.splitlines()
    assert summary.startswith("srlm eval length-control: 24 read, 8 written") and note.endswith(left_out)
    assert "no difficulty term" in note and "no reference term" in note
    assert srlm("eval", "length-control", "-q", stdin=as_lines(ROWS)).err == ""


def test_difficulty_and_reference_are_terms_where_they_are_given(srlm: Srlm) -> None:
    rows = [{**row, "difficulty": math.sin(at)} for at, row in enumerate(ROWS)]
    write_rows(srlm.folder / "variants.jsonl", [{**row, "model": "wordy"} for row in rows])
    argv = ["eval", "length-control", "--reference", "variants.jsonl"]
    result = srlm(*argv, "--inverse-penalty", "3", stdin=as_lines(rows))
    found = by_name(result.rows)["length_controlled_win_rate"]
    assert (found["terms"], found["c"]) == (["length", "difficulty", "reference"], 3)
    assert list(found["coefficients"]) == ["length", "difficulty", "intercept"]
    assert len(result.err.splitlines()) == 1
    own = srlm(*argv, "--in", "variants.jsonl", "--out", "variants.jsonl")
    assert own.code == 2 and "variants.jsonl" in own.err


def test_it_reads_the_matches_of_head_to_head(srlm: Srlm) -> None:
    sides = {
        model: [{"prompt": f"Question {n}?", "response": model * (n * 7 % 5 + size), "model": model} for n in range(12)]
        for model, size in (("M1", 1), ("M2", 3))
    }
    write_rows(srlm.folder / "b.jsonl", sides["M1"])
    argv = ["eval", "head-to-head", "--engine", "echo", "--direct", "--against", "b.jsonl", "--matches", "m.jsonl"]
    assert srlm(*argv, stdin=as_lines(sides["M2"])).code == 0
    result = srlm("eval", "length-control", "--in", "m.jsonl")
    found = by_name(result.rows)
    assert result.code == 0 and {(row["model"], row["baseline"], row["n"]) for row in result.rows} == {("M2", "M1", 12)}
    assert found["length"]["value"] == statistics.mean(len(row["response"]) for row in sides["M2"])


def test_a_bad_row_is_named_and_can_be_skipped(srlm: Srlm) -> None:
    lines = as_lines([*ROWS, {**GOOD, "preference": None}])
    result = srlm("eval", "length-control", stdin=lines)
    assert (result.code, result.out) == (3, "") and "<stdin>:25: expected `preference`" in result.err
    skipped = srlm("eval", "length-control", "--on-error", "skip", stdin=lines)
    assert skipped.code == 0 and "1 dropped: bad row" in skipped.err
    assert skipped.rows == srlm("eval", "length-control", stdin=as_lines(ROWS)).rows
    write_rows(srlm.folder / "variants.jsonl", [{}])
    bad = srlm("eval", "length-control", "--reference", "variants.jsonl", stdin=as_lines(ROWS))
    assert bad.code == 3 and "variants.jsonl:1: expected `preference`" in bad.err


def test_no_rows_are_null_metrics(srlm: Srlm) -> None:
    result = srlm("eval", "length-control")
    assert result.code == 0 and len(result.rows) == 4
    assert {(row["value"], row["n"]) for row in result.rows} == {(None, 0)}
