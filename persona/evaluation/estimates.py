"""How sure a figure is: 95 % bootstrap intervals over conversations, the replies of which belong together."""

from collections.abc import Callable, Sequence

import numpy as np

from persona.evaluation.figures import Estimate
from persona.proportions import wilson

RESAMPLES = 4000
LEAST = 5  # conversations; from fewer an interval says nothing
_AT_A_TIME = 2**20  # drawn conversations in memory at a time
_CONFIDENCE = 0.95


def ratio(parts: Sequence[float], wholes: Sequence[float], seed: int) -> Estimate:
    """The sum of `parts` over the sum of `wholes`, one of each a conversation, with a studentised bootstrap interval.

    The bootstrap-t (Efron and Tibshirani 1993, chapter 12.5) holds its confidence for thirty conversations of uneven
    length, where the plain percentiles are too narrow.
    """
    x, n = np.asarray(parts, float), np.asarray(wholes, float)
    value = float(x.sum() / n.sum())
    error = float(_standard_error(x[None], n[None])[0]) if len(x) > 1 else 0.0
    if len(x) < LEAST:
        return Estimate(value)
    if error <= 1e-12 * max(abs(value), 1.0):  # all alike, as where base and tuned are the same
        return Estimate(value, value, value)
    chance = np.random.default_rng(seed)
    at_a_time = max(1, _AT_A_TIME // len(x))
    t = np.concatenate(
        [
            _studentised(x, n, value, error, chance.integers(len(x), size=(min(at_a_time, RESAMPLES - done), len(x))))
            for done in range(0, RESAMPLES, at_a_time)
        ]
    )
    low, high = np.quantile(t, [(1 + _CONFIDENCE) / 2, (1 - _CONFIDENCE) / 2])
    return Estimate(value, float(value - low * error), float(value - high * error))


def _studentised(x: np.ndarray, n: np.ndarray, value: float, error: float, drawn: np.ndarray) -> np.ndarray:
    """(resamples,) how many of its own standard errors each resample is off."""
    parts, wholes = x[drawn], n[drawn]
    off = parts.sum(1) / wholes.sum(1) - value
    # a resample of a few conversations over and over seems surer than any sample of this size can be
    errors = np.maximum(_standard_error(parts, wholes), error / 10)
    return off / errors


def _standard_error(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """(resamples,) of the ratio estimator, linearised (Cochran 1977, chapter 6)."""
    residual = x - x.sum(1, keepdims=True) / n.sum(1, keepdims=True) * n
    count = x.shape[1]
    return np.sqrt(count / (count - 1) * np.square(residual).sum(1)) / n.sum(1)


def mean(values: Sequence[float], seed: int) -> Estimate:
    """The mean of shares from 0 to 1, one a question, with its interval."""
    return share(values, [1.0] * len(values), seed)


def share(parts: Sequence[float], wholes: Sequence[float], seed: int) -> Estimate:
    """`ratio` of what cannot be below 0 or above 1.

    All or nothing throughout leaves nothing to resample; then the interval is Wilson's, as if each were one trial.
    """
    found = ratio(parts, wholes, seed)
    if found.low is None or found.high is None:
        return found
    if found.value in (0.0, 1.0):
        low, high = wilson(round(found.value * len(parts)), len(parts))
        return Estimate(found.value, low, high)
    return Estimate(found.value, max(found.low, 0.0), min(found.high, 1.0))


def mapped(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """`function`, which must be increasing, of the figure and of both ends of its interval."""
    low, high = estimate.low, estimate.high
    if low is None or high is None:
        return Estimate(function(estimate.value))
    return Estimate(*map(function, (estimate.value, low, high)))
