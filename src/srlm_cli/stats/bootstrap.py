"""Many means over the same prompts, with their intervals from one set of bootstrap draws."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import fsum, isfinite, nan
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar

from srlm_cli.records import Record

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Values = Callable[[T], Sequence[float]]
Groups = Sequence[Sequence[float]]
RESAMPLES = 2000
COUNTS_AT_ONCE = 1 << 22  # 32 MB of float64


def metrics(task: str, values: Mapping[str, Groups], seed: int = 0) -> list[Record]:
    """Return for each name a row `{task, metric, value, n, ci_low, ci_high}`: the mean of all its values.

    The values of a name are grouped by prompt, and all names have the same prompts in the same order.
    The interval (2.5 to 97.5 per cent) is a bootstrap over prompts with `seed`. `n` counts the values;
    without any, or if they are too large, `value` and the interval are null. The interval of
    values of one prompt is null, too.
    """
    return measured(task, zip(*values.values(), strict=True), parts_of(values), seed)


def measured(task: str, prompts: Iterable[T], values: Mapping[str, Values[T]], seed: int = 0) -> list[Record]:
    """Return the metrics of `metrics`, with the values of each name computed from a prompt by a function.

    Of each prompt a sum and a count are kept for each name, 16 bytes, and not the values.
    """
    import numpy as np

    columns = columns_of(prompts, values)
    sums, sizes = columns[:, : len(values)], columns[:, len(values) :]
    drawn = means(resampled_sums(columns, seed))
    rows = []
    for at, name in enumerate(values):
        n = int(sizes[:, at].sum())
        value = finite(total(sums[:, at]) / n) if n else None
        rows.append(
            {
                "task": task,
                "metric": name,
                "value": value,
                "n": n,
                **interval(drawn[:, at], np.count_nonzero(sizes[:, at])),
            }
        )
    return rows


def total(values: Iterable[float]) -> float:
    """Return the exact sum, NaN if it is too large for a float."""
    try:
        return fsum(values)
    except (OverflowError, ValueError):  # ValueError: of infinities of both signs
        return nan


def finite(value: float) -> float | None:
    """Return a number, None in place of one that JSON does not have."""
    return value if isfinite(value) else None


def of_sums(
    task: str, metric: str, columns: np.ndarray, formula: Callable[[np.ndarray], np.ndarray], n: int, seed: int = 0
) -> Record:
    """Return a metric that is a formula over the sums of the columns, (prompts, k), of all prompts.

    `formula` takes sums, (..., k), and returns values, (...); a value that is not finite is null. A prompt whose
    columns are all 0 has no part in it.
    """
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = float(formula(columns.sum(axis=0)))
        drawn = formula(resampled_sums(columns, seed))
    value = value if n and np.isfinite(value) else None
    limits = interval(drawn if value is not None else drawn[:0], np.count_nonzero(columns.any(axis=1)))
    return {"task": task, "metric": metric, "value": value, "n": n, **limits}


def columns_of(prompts: Iterable[T], values: Mapping[str, Values[T]]) -> np.ndarray:
    """Return for each prompt the sums of its values by name and then how many there are: (prompts, 2 names)."""
    import numpy as np

    columns = array("d")
    for one in prompts:
        groups = [of(one) for of in values.values()]
        columns.extend(map(total, groups))
        columns.extend(map(len, groups))
    return np.frombuffer(columns).reshape(-1, 2 * len(values))


def in_order(keys: array) -> np.ndarray:
    """Return the number, from 0, of each of many integers (n,), in the order in which they first came."""
    import numpy as np

    _, first, number = np.unique(np.asarray(keys, dtype=np.int64), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def means(totals: np.ndarray) -> np.ndarray:
    """Return sums over counts, (..., 2 names) to (..., names); NaN where there is nothing to count."""
    import numpy as np

    names = totals.shape[-1] // 2
    with np.errstate(invalid="ignore", over="ignore"):
        return totals[..., :names] / totals[..., names:]


def parts_of(names: Iterable[str]) -> dict[str, Values]:
    """Return for each name the function that takes its part of a tuple with a part for each of them."""
    return {name: itemgetter(at) for at, name in enumerate(names)}


def interval(drawn: np.ndarray, prompts: int) -> Record:
    """Return the 95% interval of resampled values as `{ci_low, ci_high}`; those that are not finite do not count.

    It is null if fewer than two prompts have values: one prompt, drawn again and again, gives the same value each time.
    """
    import numpy as np

    finite = drawn[np.isfinite(drawn)] if prompts > 1 else drawn[:0]
    low, high = np.quantile(finite, [0.025, 0.975]).tolist() if len(finite) else (None, None)
    return {"ci_low": low, "ci_high": high}


def resampled_means(values: Mapping[str, Groups], seed: int = 0) -> dict[str, np.ndarray]:
    """Return for each name its mean in every resample of the prompts, (RESAMPLES,); NaN where a resample has none."""
    columns = columns_of(zip(*values.values(), strict=True), parts_of(values))
    return dict(zip(values, means(resampled_sums(columns, seed)).T, strict=True))


def resampled_sums(columns: np.ndarray, seed: int) -> np.ndarray:
    """Return the column sums of RESAMPLES draws of all rows with replacement: (rows, k) to (RESAMPLES, k)."""
    import numpy as np

    size = len(columns)
    random = np.random.default_rng(seed)
    totals = np.zeros((RESAMPLES, columns.shape[1]))
    block = max(1, COUNTS_AT_ONCE // max(size, 1))
    for at in range(0, RESAMPLES if size else 0, block):
        counts = np.empty((min(block, RESAMPLES - at), size))
        for one in counts:
            one[:] = np.bincount(random.integers(size, size=size), minlength=size)
        with np.errstate(invalid="ignore", over="ignore"):
            totals[at : at + block] = counts @ columns
    return totals
