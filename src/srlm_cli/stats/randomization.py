"""Whether a sum over prompts is above 0 by more than chance: Fisher's randomization test, by random signs."""

from __future__ import annotations

from collections.abc import Sequence

DRAWS = 10_000
DRAWS_AT_ONCE = 1000


def p_above_zero(values: Sequence[float], seed: int = 0) -> float:
    """Return the one-sided p value of a sum of values, one per prompt, whose signs would be random without an effect.

    It is (1 + draws with a sum at least as large) / (1 + draws), so it is never 0, and it holds its level with few
    prompts, too: a bootstrap of 10 to 16 prompts rejects a true null about twice as often as it should.
    """
    import numpy as np

    known = np.array([value for value in values if value])  # a 0 is 0 with both signs
    random, reached = np.random.default_rng(seed), 0
    for _ in range(0, DRAWS, DRAWS_AT_ONCE):
        signs = random.integers(2, size=(DRAWS_AT_ONCE, len(known)), dtype=np.int8) * 2 - 1
        reached += int((signs @ known >= known.sum() - 1e-9).sum())
    return (1 + reached) / (1 + DRAWS)
