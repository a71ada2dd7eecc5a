"""Bradley-Terry ratings, against closed forms, a published table and scipy's optimiser."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from srlm_cli.stats.bradley_terry import ratings, strengths, wins_by_prompt

# Wins of the line over the column, American League East 1987, 13 games a pair (Agresti, Categorical Data
# Analysis, 2nd edition, table 10.10): Milwaukee, Detroit, Toronto, New York, Boston, Cleveland, Baltimore.
BASEBALL = [
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
]
PUBLISHED = [1.58, 1.44, 1.29, 1.25, 1.11, 0.68, 0.0]  # table 10.11, relative to Baltimore


def matches(a: str, b: str, *, won: int = 0, tied: int = 0, lost: int = 0) -> list[dict]:
    winners = ["A"] * won + ["tie"] * tied + ["B"] * lost
    return [{"prompt_id": n, "model_a": a, "model_b": b, "winner": winner} for n, winner in enumerate(winners)]


def by_model(rows: list[dict]) -> dict[str, dict]:
    return {row["model"]: row for row in rows}


def test_a_published_table() -> None:
    found = strengths(np.array(BASEBALL, dtype=float))
    assert found - found[-1] == pytest.approx(PUBLISHED, abs=0.005)


@pytest.mark.parametrize(("won", "tied", "lost"), [(30, 0, 10), (10, 5, 3), (0, 7, 0), (0, 0, 4), (256, 0, 0)])
def test_two_models_in_closed_form(won: int, tied: int, lost: int) -> None:
    rows = by_model(ratings(matches("x", "y", won=won, tied=tied, lost=lost), ["x", "y"]))
    # a tie is half a win each way, and one tie is added: the gap is the log of the odds
    gap = 400 * math.log10((won + tied / 2 + 0.5) / (lost + tied / 2 + 0.5))
    assert rows["x"]["value"] == pytest.approx(gap / 2, abs=1e-6)
    assert rows["y"]["value"] == pytest.approx(-gap / 2, abs=1e-6)
    assert rows["x"]["n"] == rows["y"]["n"] == won + tied + lost


def test_many_models_against_a_general_optimiser() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    draw = random.Random(0)
    names = ["a", "b", "c", "d", "e"]
    played = [
        {"prompt_id": n // 3, "model_a": a, "model_b": b, "winner": draw.choices(["A", "tie", "B"], [4 - i, 2, 1])[0]}
        for n in range(30)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if draw.random() < 0.7  # some pairs meet less often
    ]
    wins = np.full((5, 5), 0.5)
    for one in played:
        a, b = names.index(one["model_a"]), names.index(one["model_b"])
        wins[a, b] += {"A": 1, "tie": 0.5, "B": 0}[one["winner"]]
        wins[b, a] += {"A": 0, "tie": 0.5, "B": 1}[one["winner"]]

    def loss(free: np.ndarray) -> float:
        s = np.append(free, 0.0)
        return sum(wins[a, b] * math.log1p(math.exp(s[b] - s[a])) for a in range(5) for b in range(5) if a != b)

    best = np.append(optimize.minimize(loss, np.zeros(4), tol=1e-12).x, 0.0)
    expected = (best - best.mean()) * 400 / math.log(10)
    assert [row["value"] for row in ratings(played, names)] == pytest.approx(list(expected), abs=0.01)


def test_the_mean_of_all_ratings_is_0() -> None:
    played = matches("x", "y", won=9, lost=2) + matches("y", "z", won=5, tied=1) + matches("x", "z", tied=2, won=1)
    assert sum(row["value"] for row in ratings(played, ["x", "y", "z"])) == pytest.approx(0, abs=1e-6)


def test_winning_or_losing_everything_gives_a_finite_rating() -> None:
    played = matches("x", "y", won=100) + matches("x", "z", won=100) + matches("y", "z", won=100)
    rows = by_model(ratings(played, ["x", "y", "z"]))
    assert rows["x"]["value"] > 0 > rows["z"]["value"] and rows["y"]["value"] == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(row[key]) for row in rows.values() for key in ("value", "ci_low", "ci_high"))
    assert rows["x"]["value"] - rows["z"]["value"] < 2 * 400 * math.log10(201)  # not without bound


def test_nothing_but_ties_is_0_for_all() -> None:
    rows = ratings(matches("x", "y", tied=9) + matches("y", "z", tied=9), ["x", "y", "z"])
    assert [row["value"] for row in rows] == pytest.approx([0, 0, 0])
    assert [row["ci_high"] - row["ci_low"] for row in rows] == pytest.approx([0, 0, 0])


def test_models_that_never_met_are_rated_by_whom_they_met() -> None:
    rows = by_model(
        ratings(matches("w", "x", won=30, lost=10) + matches("y", "z", won=20, lost=20), ["w", "x", "y", "z"])
    )
    assert rows["w"]["value"] > rows["y"]["value"] > rows["x"]["value"]
    assert rows["y"]["value"] == pytest.approx(rows["z"]["value"], abs=1e-6)


def test_without_matches_a_rating_is_null() -> None:
    null = {"value": None, "n": 0, "ci_low": None, "ci_high": None}
    assert [row | null == row for row in ratings([], ["x", "y", "z"])] == [True, True, True]
    rows = by_model(ratings(matches("x", "y", won=2, lost=1), ["x", "y", "z"]))
    assert rows["z"] | null == rows["z"] and rows["x"]["n"] == 3


# --- intervals -------------------------------------------------------------------------------


def test_the_interval_of_two_models_is_that_of_the_log_odds() -> None:
    rows = by_model(ratings(matches("x", "y", won=240, lost=160), ["x", "y"]))
    middle = math.log(240.5 / 160.5)
    error = math.sqrt(1 / 240 + 1 / 160)  # of log-odds; a rating is half the gap of two
    for key, bound in (("ci_low", middle - 1.96 * error), ("ci_high", middle + 1.96 * error)):
        assert rows["x"][key] == pytest.approx(bound * 200 / math.log(10), abs=2)


def test_matches_of_one_prompt_are_not_taken_for_independent() -> None:
    apart = matches("x", "y", won=60, lost=40)
    together = [{**match, "prompt_id": match["prompt_id"] // 10} for match in apart]
    width = [
        row["ci_high"] - row["ci_low"] for row in (ratings(apart, ["x", "y"])[0], ratings(together, ["x", "y"])[0])
    ]
    assert width[1] > 2.5 * width[0]  # 10 prompts of equal matches, not 100: sqrt(10) as wide


def test_matches_of_one_prompt_alone_have_no_interval() -> None:
    one = [{**match, "prompt_id": 0} for match in matches("x", "y", won=6, lost=4)]
    assert all(row["value"] and row["ci_low"] is row["ci_high"] is None for row in ratings(one, ["x", "y"]))
    more = [{**match, "prompt_id": n + 1} for n, match in enumerate(matches("y", "z", won=6, lost=4))]
    known = {row["model"]: row["ci_low"] is not None for row in ratings(one + more, ["x", "y", "z"])}
    assert known == {"x": False, "y": True, "z": True}


def test_the_seed_decides_the_interval() -> None:
    played = matches("x", "y", won=61, tied=33, lost=44) + matches("y", "z", won=50, lost=70)
    once, again, other = (ratings(played, ["x", "y", "z"], seed) for seed in (1, 1, 2))
    assert once == again and [row["value"] for row in once] == [row["value"] for row in other]
    assert [row["ci_low"] for row in once] != [row["ci_low"] for row in other]


def test_wins_by_prompt_by_hand() -> None:
    played = [
        {"prompt_id": "p", "model_a": "x", "model_b": "y", "winner": "A"},
        {"prompt_id": "q", "model_a": "x", "model_b": "y", "winner": "tie"},
        {"prompt_id": "p", "model_a": "y", "model_b": "z", "winner": "B"},
    ]
    assert wins_by_prompt(played, ["x", "y", "z"]).tolist() == [
        [[0, 1, 0], [0, 0, 0], [0, 1, 0]],
        [[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]],
    ]
