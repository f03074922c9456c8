"""Exact tests and intervals of right and wrong answers, from counts of test rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special  # scipy.stats takes longer to load than a small study to collect

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

ALPHA = 0.05


def mcnemar(first: Counts, second: Counts) -> Floats:
    """McNemar's exact two-sided p: ``first`` rows that only one got right, ``second`` that only the other did."""
    found: Floats = np.minimum(1, 2 * special.bdtr(np.minimum(first, second), first + second, 0.5))
    return found


def clopper_pearson(right: Floats, n: Floats) -> tuple[Floats, Floats]:
    """The exact 95% interval of a share, ``right`` of ``n`` rows; neither need be whole."""
    wrong = np.maximum(n - right, 0.0)
    with np.errstate(invalid="ignore"):
        low = special.betaincinv(np.maximum(right, 1e-9), wrong + 1, ALPHA / 2)
        high = special.betaincinv(right + 1, np.maximum(wrong, 1e-9), 1 - ALPHA / 2)
    return np.where(right <= 0, 0.0, low), np.where(wrong <= 0, 1.0, high)


def paired_interval(first: Counts, second: Counts, n: int) -> tuple[Floats, Floats]:
    """A 95% interval of the difference of two shares of the same ``n`` rows.

    ``first`` counts the rows that only one got right, ``second`` those that only the other did. The exact intervals of
    these two shares are put together with their correlation, -p q / sqrt(p (1 - p) q (1 - q)) (Newcombe, Statistics in
    Medicine 17, 1998; Zou and Donner, Statistics in Medicine 27, 2008), which is not empty where no row differs: 0 and
    0 of 12 give -0.265 to 0.265. So that interval and test do not contradict each other, it holds 0 where McNemar's
    exact test shows no difference and ends at 0 where it does. It covers the truth at least 95 times of 100 (by
    enumeration, tests/test_stats.py).
    """
    p, q, rows = first / n, second / n, np.full(len(first), float(n))
    (low_p, high_p), (low_q, high_q) = (clopper_pearson(count.astype(np.float64), rows) for count in (first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = np.nan_to_num(-np.sqrt(p * q / ((1 - p) * (1 - q))))
    below, above = (p - low_p, high_q - q), (high_p - p, q - low_q)
    arms = (np.sqrt(a**2 + b**2 - 2 * correlation * a * b) for a, b in (below, above))
    low, high = p - q - next(arms), p - q + next(arms)
    tie = mcnemar(first, second) >= ALPHA
    low = np.where(tie, np.minimum(low, 0.0), np.where(first > second, np.maximum(low, 0.0), low))
    high = np.where(tie, np.maximum(high, 0.0), np.where(first < second, np.minimum(high, 0.0), high))
    return low, high
