"""Logistic regression with soft labels and an L1 penalty, for many weightings of the same rows together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

STEPS, SWEEPS, HALVINGS = 200, 100, 40
TOLERANCE = 1e-7


def probability(coefficients: ndarray, features: ndarray) -> ndarray:
    """Return P(label 1), (R, n), of features (n, k) under coefficients (R, k)."""
    from scipy.special import expit

    return expit(coefficients @ features.T)


def objective(coefficients: ndarray, features: ndarray, labels: ndarray, weights: ndarray, c: float) -> ndarray:
    """Return sum |coefficient| / c + sum weight * log loss for each of R coefficients (R, k)."""
    import numpy as np

    scores = coefficients @ features.T
    losses = np.logaddexp(0, scores) - labels * scores
    return np.abs(coefficients).sum(1) / c + (weights * losses).sum(1)


def solve(features: ndarray, labels: ndarray, weights: ndarray, c: float, start: ndarray | float = 0.0) -> ndarray:
    """Return the coefficients (R, k) that minimise `objective` for each row of `weights` (R, n).

    `features` are (n, k), `labels` (n,) in 0..1; an intercept is a column of ones and penalised like any other, as
    liblinear does. Proximal Newton: each step minimises the loss's second-order model and the penalty.
    """
    import numpy as np

    many, k = len(weights), features.shape[1]
    squares = (features[:, :, None] * features[:, None, :]).reshape(-1, k * k)
    best = np.zeros((many, k)) + start
    least = objective(best, features, labels, weights, c)
    for _ in range(STEPS):
        p = probability(best, features)
        gradient = (weights * (p - labels)) @ features
        curvature = ((weights * p * (1 - p)) @ squares).reshape(many, k, k) + 1e-9 * np.eye(k)
        step = lasso(gradient, curvature, best, c) - best
        for _ in range(HALVINGS):
            value = objective(best + step, features, labels, weights, c)
            worse = value > least * (1 + 1e-12)
            if not worse.any():
                break
            step[worse] /= 2
        best, least = best + step, np.minimum(value, least)
        if np.abs(step).max() < TOLERANCE:
            break
    return best


def lasso(gradient: ndarray, curvature: ndarray, at: ndarray, c: float) -> ndarray:
    """Return what minimises gradient * d + d * curvature * d / 2 + |x| / c, d = x - at: coordinate descent."""
    import numpy as np

    x = at.copy()
    for _ in range(SWEEPS):
        before = x.copy()
        for j in range(x.shape[1]):
            own = curvature[:, j, j]
            free = x[:, j] - (gradient[:, j] + (curvature[:, j] * (x - at)).sum(1)) / own
            x[:, j] = np.sign(free) * np.maximum(np.abs(free) - 1 / (c * own), 0)
        if np.abs(x - before).max() < TOLERANCE:
            break
    return x
