"""Agreement of raters: published tables, scikit-learn's and krippendorff's figures, and what the figures must obey."""

from __future__ import annotations

import random

import pytest

from srlm_cli.stats.reliability import Reliability

N = None
# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): three coders and fifteen units, four and twelve.
THREE = [
    [N, N, N, N, N, 3, 4, 1, 2, 1, 1, 3, 3, N, 3],
    [1, N, 2, 1, 3, 3, 4, 3, N, N, N, N, N, N, N],
    [N, N, 2, 1, 3, 4, 4, N, 2, 1, 1, 3, 3, N, 4],
]
FOUR = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
    [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
]
# No rater of these two gave 2, 3 or 4: scikit-learn 1.9.1 has 0.5833 with labels=range(6), and 0.7059 without.
SPARSE = [[0, 5, 5, 1, 0, 5, 1, 0, 5, 1, 0, 5], [0, 5, 1, 1, 1, 5, 5, 0, 5, 0, 0, 1]]


def of(raters: list[list[float | None]]) -> Reliability:
    """Return the agreement of raters, each with one score a reply, all replies to one prompt."""
    found = Reliability(len(raters))
    found.add(zip(*raters, strict=True))
    return found


@pytest.mark.parametrize(("raters", "alpha"), [(THREE, 0.8108448928121059), (FOUR, 0.8491071428571428)])
def test_alpha_of_published_tables(raters: list, alpha: float) -> None:
    assert of(raters).alpha() == pytest.approx(alpha, abs=1e-12)  # krippendorff 0.9.0 has these digits


def test_kappa_is_of_the_whole_scale_and_not_of_the_labels_that_occur() -> None:
    [pair] = of(SPARSE).of_pairs()
    assert pair["kappa"] == pytest.approx(7 / 12, abs=1e-12)
    assert (pair["same_score"], pair["n"]) == (7 / 12, 12)


def test_kappa_is_that_of_the_table_of_both_raters() -> None:
    draw = random.Random(3)
    a = [draw.randint(0, 5) for _ in range(80)]
    b = [min(5, max(0, score + draw.choice([-2, -1, 0, 0, 1]))) for score in a]
    cells = [(i, j) for i in range(6) for j in range(6)]
    observed = sum((i - j) ** 2 * sum((x, y) == (i, j) for x, y in zip(a, b, strict=True)) for i, j in cells) / 80
    expected = sum((i - j) ** 2 * a.count(i) * b.count(j) for i, j in cells) / 80**2
    assert of([a, b]).of_pairs()[0]["kappa"] == pytest.approx(1 - observed / expected, abs=1e-12)


def test_prompts_add_up_and_large_scores_lose_nothing() -> None:
    draw = random.Random(5)
    raters = [[draw.choice([N, 1.5, 2, 4.25]) for _ in range(60)] for _ in range(3)]
    apart = Reliability(3)
    for scores in zip(*raters, strict=True):
        apart.add([[None if score is None else score + 1e9 for score in scores]])
    assert apart.alpha() == pytest.approx(of(raters).alpha(), abs=1e-6)
    for one, other in zip(apart.of_pairs(), of(raters).of_pairs(), strict=True):
        assert one["kappa"] == pytest.approx(other["kappa"], abs=1e-6) and one["n"] == other["n"]
        assert one["n_order"] == 0 < other["n_order"]


def test_order_is_compared_within_a_prompt_and_ties_are_an_order() -> None:
    found = Reliability(2)
    found.add([(1, 10), (2, 20), (2, 5)])  # 1 < 2 alike, 1 < 2 against 10 > 5, a tie against none
    found.add([(3, 7), (3, 7)])  # both tie
    [pair] = found.of_pairs()
    assert (pair["same_order"], pair["n_order"]) == (2 / 4, 4)


@pytest.mark.parametrize("raters", [[[], []], [[N, 1], [2, N]], [[3, 3], [3, 3]]], ids=["none", "apart", "one score"])
def test_what_cannot_be_compared_is_not_defined(raters: list) -> None:
    found = of(raters)
    assert found.alpha() is None and found.of_pairs()[0]["kappa"] is None


def test_full_agreement_is_1() -> None:
    found = of([[0, 5, 2.5], [0, 5, 2.5]])
    assert found.alpha() == found.of_pairs()[0]["kappa"] == 1.0
