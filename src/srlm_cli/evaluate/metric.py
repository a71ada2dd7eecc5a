"""A metric row: a mean over prompts with its interval."""

from __future__ import annotations

from collections.abc import Sequence

from srlm_cli.records import Row

RESAMPLES = 2000


def metric(task: str, name: str, groups: Sequence[Sequence[float]], seed: int = 0) -> Row:
    """Return `{task, metric, value, n, ci_low, ci_high}`: the mean of all values, grouped by prompt.

    The interval (2.5 to 97.5 per cent) is a bootstrap over prompts with `seed`, since the values of one prompt
    are not independent. `n` counts the values; without any, `value` and the interval are null.
    """
    import numpy as np

    sums = np.array([sum(group) for group in groups], dtype=float)
    sizes = np.array([len(group) for group in groups], dtype=float)
    row = {"task": task, "metric": name, "value": None, "n": int(sizes.sum()), "ci_low": None, "ci_high": None}
    if not sizes.sum():
        return row
    draws = np.random.default_rng(seed).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=RESAMPLES)
    totals = draws @ sizes
    means = (draws @ sums)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return row | {"value": float(sums.sum() / sizes.sum()), "ci_low": float(low), "ci_high": float(high)}
