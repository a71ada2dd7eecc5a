"""One rating a model from matches between many: the Bradley-Terry model (Bradley and Terry, 1952)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from math import log
from typing import TYPE_CHECKING

from srlm_cli.records import Record
from srlm_cli.stats.bootstrap import in_order, interval, resampled_sums

if TYPE_CHECKING:
    from numpy import ndarray

# One tie more between every two models: 1/2 a win each way, the usual correction of log-odds for small counts
# (Haldane, 1956; Anscombe, 1956). A model that wins or loses every match so keeps a finite rating.
PRIOR = 0.5
SHARE = {"A": 1.0, "tie": 0.5, "B": 0.0}  # of a win, for A
ELO = 400 / log(10)  # 400 points are odds of ten to one, as in chess
STEPS = 100
PRECISION = 1e-8
NOTHING = {"value": None, "n": 0, "ci_low": None, "ci_high": None}


def ratings(matches: Iterable[Record], names: Sequence[str], seed: int = 0) -> list[Record]:
    """Return a metric row `bradley_terry` for each of `names`, from match rows between any of them.

    The rating is by maximum likelihood, a tie half a win each way and `PRIOR` added; 400 points are
    odds of 10:1, and the mean over all models is 0. The interval (2.5 to 97.5 per cent) is a
    bootstrap over prompts with `seed`; where all prompts agree it has no width, and it is null for a
    model with matches of one prompt. `n` counts the model's matches; without any, the rating is null.
    """
    import numpy as np

    wins = wins_by_prompt(matches, names)
    total = wins.sum(axis=0)
    resampled = resampled_sums(wins.reshape(len(wins), total.size), seed).reshape(-1, *total.shape)
    prior = PRIOR * (1 - np.eye(len(names)))
    values, drawn = ELO * strengths(total + prior), ELO * strengths(resampled + prior)
    rows = []
    for at, name in enumerate(names):
        n = int(total[at].sum() + total[:, at].sum())
        prompts = np.count_nonzero(wins[:, at].any(axis=-1) | wins[:, :, at].any(axis=-1))
        found = {"value": float(values[at]), "n": n, **interval(drawn[:, at], prompts)} if n else NOTHING
        rows.append({"task": "head_to_head", "metric": "bradley_terry", **found, "model": name})
    return rows


def wins_by_prompt(matches: Iterable[Record], names: Sequence[str]) -> ndarray:
    """Return (prompts, models, models): how often the row's model beat the column's, a tie half a win each way."""
    import numpy as np

    place = {name: at for at, name in enumerate(names)}
    played = array("d")  # A, B and the share of a win for A, of each match
    prompts = array("q")
    for match in matches:
        prompts.append(hash(match["prompt_id"]))
        played.extend((place[match["model_a"]], place[match["model_b"]], SHARE[match["winner"]]))
    of = in_order(prompts)
    a, b, share = np.frombuffer(played).reshape(-1, 3).T if prompts else np.empty((3, 0))
    a, b = a.astype(int), b.astype(int)
    wins = np.zeros((int(of.max(initial=-1)) + 1, len(names), len(names)))
    np.add.at(wins, (of, a, b), share)
    np.add.at(wins, (of, b, a), 1 - share)
    return wins


def strengths(wins: ndarray) -> ndarray:
    """Return the maximum-likelihood log-strengths of win counts, (..., models, models) to (..., models), mean 0.

    P(i beats j) = 1 / (1 + exp(s_j - s_i)). They are finite if every model can be reached from every other
    by wins (Ford, 1957), which `PRIOR` ensures. Newton's method, vectorized over all problems.
    """
    import numpy as np

    games = wins + wins.swapaxes(-1, -2)
    found = np.zeros(wins.shape[:-1])
    for _ in range(STEPS):
        expected = 1 / (1 + np.exp(found[..., None, :] - found[..., :, None]))
        gradient = (wins - games * expected).sum(axis=-1)
        weights = games * expected * (1 - expected)
        # a constant added to all strengths changes no likelihood: 1/models makes the matrix regular
        curvature = np.eye(wins.shape[-1]) * weights.sum(axis=-1)[..., None] - weights + 1 / wins.shape[-1]
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        largest = np.abs(step).max(axis=-1, keepdims=True)
        found += step / np.maximum(largest, 1)  # a full step from far away can overshoot for ever
        if largest.max() < PRECISION:
            break
    return found - found.mean(axis=-1, keepdims=True)
