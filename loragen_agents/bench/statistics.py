"""Means with bootstrap intervals, paired differences, and the quantiles of timings.

Numbers in, numbers out: knows nothing of variants, samples or files. Every resampling is seeded, so equal scores give
equal intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
_SEED = 20250501
_LEVEL = 95.0


@dataclass(frozen=True)
class Mean:
    """The mean of `n` values with its 95% bootstrap interval; NaN throughout where n is 0."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A paired difference B - A: mean, 95% bootstrap interval, and a two-sided bootstrap p-value."""

    value: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class Timing:
    """Median and 95th percentile of `n` measured durations, in the unit they came in."""

    median: float
    p95: float
    n: int


def means(columns: Mapping[str, Sequence[float]]) -> dict[str, Mean]:
    """The mean and percentile interval of every column; columns may differ in length."""
    return {key: _mean(np.asarray(values, dtype=np.float64)) for key, values in columns.items()}


def paired_differences(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> dict[str, Difference]:
    """B - A of every column that both have, resampled over the pairs.

    Args:
        a, b: columns of equal length, the same sample at the same place.

    Raises:
        ValueError: a column has another length on the other side.
    """
    result = {}
    for key in a:
        if key not in b:
            continue
        if len(a[key]) != len(b[key]):
            raise ValueError(f"column {key!r} has {len(a[key])} values on one side and {len(b[key])} on the other")
        differences = np.asarray(b[key], dtype=np.float64) - np.asarray(a[key], dtype=np.float64)
        mean = _mean(differences)
        resampled = _resampled_means(differences)
        # Both tails count the resamples at zero: two equal columns have p = 1.
        tail = min(float(np.mean(resampled <= 0)), float(np.mean(resampled >= 0))) if len(differences) else 1.0
        result[key] = Difference(mean.value, mean.low, mean.high, min(1.0, 2 * tail), mean.n)
    return result


def timing(values: Sequence[float]) -> Timing | None:
    """Median and 95th percentile, or None where nothing was measured."""
    if not values:
        return None
    median, p95 = np.percentile(np.asarray(values, dtype=np.float64), [50, 95])
    return Timing(float(median), float(p95), len(values))


def _mean(values: np.ndarray) -> Mean:
    if len(values) == 0:
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    low, high = np.percentile(_resampled_means(values), [50 - _LEVEL / 2, 50 + _LEVEL / 2])
    return Mean(float(values.mean()), float(low), float(high), len(values))


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """Means of RESAMPLES draws with replacement, shape (RESAMPLES,)."""
    n = len(values)
    if n == 0:
        return np.empty(0)
    return _counts(n) @ values / n


@lru_cache(maxsize=16)
def _counts(n: int) -> np.ndarray:
    """How often each of `n` values is drawn in each resample, shape (RESAMPLES, n): a multinomial, so that resampled
    means are one matrix product."""
    return np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float32)
