"""95 % intervals: by bootstrap over conversations, whose replies belong together, and of proportions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from persona.evaluate.results import Estimate

# --- proportions ------------------------------------------------------------------------------------------------------
# Statistics of a blind comparison: the share that one side won, whether chance explains it, and whether readers agree.

_Z = 1.959963984540054  # the normal distribution's 97.5 % point, for intervals of 95 %


@dataclass(frozen=True)
class Preference:
    """Wins and losses of the first side against the second in blind pairs, with their statistics."""

    wins: int
    losses: int
    ties: int
    rate: float | None
    """Wins over decided pairs, without ties; None if all pairs are ties."""
    rate_low: float | None
    rate_high: float | None
    """95 % Wilson interval of the rate."""
    p: float
    """Exact two-sided binomial probability of a split at least this uneven if neither side is preferred."""
    log_odds: float
    log_odds_low: float
    log_odds_high: float
    """Natural logarithm of wins over losses, with its 95 % interval; 0 is no preference, above 0 the first side."""


def preference(wins: int, losses: int, ties: int) -> Preference:
    """All figures of a comparison with these counts."""
    decided = wins + losses
    low, high = wilson(wins, decided) if decided else (None, None)
    odds = log_odds(wins, losses)
    return Preference(
        wins, losses, ties, wins / decided if decided else None, low, high, binomial_p(wins, decided), *odds
    )


def binomial_p(successes: int, trials: int) -> float:
    """Exact two-sided p-value of a fair coin (Clopper and Pearson 1934); 1 without trials."""
    tail = sum(math.comb(trials, k) for k in range(min(successes, trials - successes) + 1))
    return min(1.0, 2 * tail / 2**trials)  # whole numbers up to the division: nothing is rounded before


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927), which stays within 0 and 1 and holds for few trials."""
    share = successes / trials
    scale = 1 + _Z**2 / trials
    middle = (share + _Z**2 / (2 * trials)) / scale
    half = _Z / scale * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    # At the ends the formula is exact but its rounding is not
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == trials else middle + half


def log_odds(wins: int, losses: int) -> tuple[float, float, float]:
    """Natural logarithm of the odds of winning, with a 95 % Wald interval.

    exp of it compares with the odds ratios of arXiv 2510.13939 (0.16 with prompting, 8.16 after fine-tuning), which
    come from a regression over many readers and authors. If one side never won, half a win is added to both (Haldane
    1956), because the logarithm would be infinite.
    """
    more = 0.0 if wins and losses else 0.5
    first, second = wins + more, losses + more
    value, half = math.log(first / second), _Z * math.sqrt(1 / first + 1 / second)
    return value, value - half, value + half


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Agreement of two readers over the same items beyond chance (Cohen 1960): 1 always, 0 as by chance.

    None if both gave one and the same answer throughout, which leaves nothing to compare.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers cannot be compared")
    total = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    by_chance = sum(first.count(label) * second.count(label) for label in set(first)) / total**2
    return None if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)


RESAMPLES = 4000
LEAST = 5  # conversations; an interval from fewer says nothing
_AT_A_TIME = 2**20  # drawn conversations in memory at a time
_CONFIDENCE = 0.95


def ratio(parts: Sequence[float], wholes: Sequence[float], seed: int) -> Estimate:
    """The sum of `parts` over the sum of `wholes`, one of each per conversation, with a studentised bootstrap interval.

    The bootstrap-t (Efron and Tibshirani 1993, chapter 12.5) holds its confidence for thirty conversations of uneven
    length, where the plain percentiles are too narrow.
    """
    x, n = np.asarray(parts, float), np.asarray(wholes, float)
    value = float(x.sum() / n.sum())
    error = float(_standard_error(x[None], n[None])[0]) if len(x) > 1 else 0.0
    if len(x) < LEAST:
        return Estimate(value)
    if error <= 1e-12 * max(abs(value), 1.0):  # all alike, as when base and tuned are the same
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
    """(resamples,) The deviation of each resample in its own standard errors."""
    parts, wholes = x[drawn], n[drawn]
    off = parts.sum(1) / wholes.sum(1) - value
    # a resample of a few conversations over and over seems surer than any sample of this size can be
    errors = np.maximum(_standard_error(parts, wholes), error / 10)
    return off / errors


def _standard_error(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """(resamples,) The standard error of the ratio estimator, linearised (Cochran 1977, chapter 6)."""
    residual = x - x.sum(1, keepdims=True) / n.sum(1, keepdims=True) * n
    count = x.shape[1]
    return np.sqrt(count / (count - 1) * np.square(residual).sum(1)) / n.sum(1)


def share(parts: Sequence[float], wholes: Sequence[float], seed: int) -> Estimate:
    """`ratio` of shares, with its interval kept within 0 and 1.

    If all parts are 0 or all are whole there is nothing to resample; then the interval is Wilson's, each one a trial.
    """
    whole = ratio(parts, wholes, seed)
    if whole.value is None or whole.low is None or whole.high is None:
        return whole
    if whole.value in (0.0, 1.0):
        return Estimate(whole.value, *wilson(round(whole.value * len(parts)), len(parts)))
    return Estimate(whole.value, max(whole.low, 0.0), min(whole.high, 1.0))


def mapped(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """`function`, which must be increasing, of the figure and of both ends of its interval."""
    value, low, high = (None if end is None else function(end) for end in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high)
