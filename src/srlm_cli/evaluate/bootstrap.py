"""Many means over the same prompts, with their intervals from one set of bootstrap draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from typing import TYPE_CHECKING

from srlm_cli.records import Row

if TYPE_CHECKING:
    import numpy as np

Groups = Sequence[Sequence[float]]
RESAMPLES = 2000
COUNTS_AT_ONCE = 1 << 22  # 32 MB of float64


def metrics(task: str, values: Mapping[str, Groups], seed: int = 0) -> list[Row]:
    """Return for each name a row `{task, metric, value, n, ci_low, ci_high}`: the mean of all its values.

    The values of a name are grouped by prompt, and all names have the same prompts in the same order.
    The interval (2.5 to 97.5 per cent) is a bootstrap over prompts with `seed`. `n` counts the values;
    without any, `value` and the interval are null.
    """
    drawn = resampled_means(values, seed)
    rows = []
    for name, groups in values.items():
        n = sum(map(len, groups))
        value = fsum(map(fsum, groups)) / n if n else None
        rows.append({"task": task, "metric": name, "value": value, "n": n, **interval(drawn[name])})
    return rows


def interval(drawn: np.ndarray) -> Row:
    """Return the 95% interval of resampled values as `{ci_low, ci_high}`; those that are not finite do not count."""
    import numpy as np

    finite = drawn[np.isfinite(drawn)]
    low, high = np.quantile(finite, [0.025, 0.975]).tolist() if len(finite) else (None, None)
    return {"ci_low": low, "ci_high": high}


def resampled_means(values: Mapping[str, Groups], seed: int = 0) -> dict[str, np.ndarray]:
    """Return for each name its mean in every resample of the prompts, (RESAMPLES,); NaN where a resample has none."""
    import numpy as np

    sums = [[fsum(group) for group in groups] for groups in values.values()]
    sizes = [[float(len(group)) for group in groups] for groups in values.values()]
    columns = np.ascontiguousarray(np.array([*sums, *sizes]).reshape(2 * len(values), -1).T)
    totals = resampled_sums(columns, seed)
    with np.errstate(invalid="ignore"):
        means = totals[:, : len(values)] / totals[:, len(values) :]
    return dict(zip(values, means.T, strict=True))


def resampled_sums(columns: np.ndarray, seed: int) -> np.ndarray:
    """Return the column sums of RESAMPLES draws of all rows with replacement: (rows, k) to (RESAMPLES, k)."""
    import numpy as np

    size = len(columns)
    random = np.random.default_rng(seed)
    totals = np.zeros((RESAMPLES, columns.shape[1]))
    block = max(1, COUNTS_AT_ONCE // max(size, 1))
    for at in range(0, RESAMPLES if size else 0, block):
        draws = [random.integers(size, size=size) for _ in range(min(block, RESAMPLES - at))]
        counts = np.stack([np.bincount(drawn, minlength=size) for drawn in draws]).astype(float)
        totals[at : at + block] = counts @ columns
    return totals
