"""The randomization test: exact values, and its level where nothing is to be found."""

from __future__ import annotations

from random import Random

import pytest

from srlm_cli.stats.randomization import DRAWS, p_above_zero


@pytest.mark.parametrize(
    ("values", "exact"),
    [
        ([0.5] * 6, 1 / 64),
        ([0.5] * 6 + [0.0] * 20, 1 / 64),
        ([0.5] * 5 + [-0.5], 7 / 64),
        ([3.0, 1.0, -1.0], 3 / 8),
        ([], 1.0),
        ([-1.0, -1.0], 1.0),
    ],
)
def test_the_p_value_is_the_share_of_the_signs(values: list[float], exact: float) -> None:
    assert p_above_zero(values) == pytest.approx(exact, abs=4 * (0.25 / DRAWS) ** 0.5)


def test_the_p_value_is_never_0_and_the_same_for_one_seed() -> None:
    assert p_above_zero([1.0] * 50) == 1 / (DRAWS + 1)
    assert p_above_zero([1.0, 2.0, -1.5], 3) == p_above_zero([1.0, 2.0, -1.5], 3)


def test_it_holds_its_level_with_few_values() -> None:
    draw = Random(1)
    found = [p_above_zero([draw.choice((-0.5, 0.5)) for _ in range(10)]) <= 0.05 for _ in range(300)]
    assert sum(found) / len(found) <= 0.05
