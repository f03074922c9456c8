"""The course of a training: how well what is seen early foretells the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

from peftsweep.analysis.statistics.trials import ALPHA
from peftsweep.study.scores import is_minimized


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with its 95% interval, missing below four points, and the number of points."""

    rho: float
    low: float
    high: float
    n: int


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Correlation:
    """Spearman's rank correlation of two series of equal length; pairs with a missing value are left out.

    The interval is by Fisher's z with the standard error of Bonett and Wright (Psychometrika 65, 2000).
    """
    pairs = np.array([first, second], dtype=float)
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    n = pairs.shape[1]
    if n < 2 or (pairs == pairs[:, :1]).all(axis=1).any():
        return Correlation(math.nan, math.nan, math.nan, n)
    rho = float(np.corrcoef([pd.Series(values).rank() for values in pairs])[0, 1])
    if n < 4:
        return Correlation(rho, math.nan, math.nan, n)
    half = special.ndtri(1 - ALPHA / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    centre = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    return Correlation(rho, math.tanh(centre - half), math.tanh(centre + half), n)


def rungs(steps: pd.DataFrame, metric: str = "validation_loss") -> pd.DataFrame:
    """How well ``metric`` at each validated step foretells that at the last one, over trials that have both.

    Columns: ``step``, ``rho``, ``low``, ``high``, ``n``, and ``place``: where the trial that ends best stood at that
    step, 1 being first. Successive halving that keeps fewer than this many there would have lost it.
    """
    names = ["step", "rho", "low", "high", "n", "place"]
    if metric not in steps or steps[metric].notna().sum() == 0:
        return pd.DataFrame(columns=names)
    seen = steps[steps[metric].notna()]
    by_step = seen.pivot_table(index="trial", columns="step", values=metric, aggfunc="last").astype(float)
    last = by_step.columns.max()
    sign = -1.0 if is_minimized(metric) else 1.0
    rows = []
    for step in by_step.columns[:-1]:
        both = by_step[[step, last]].dropna()
        found = rank_correlation(both[step].tolist(), both[last].tolist())
        place = (
            (sign * both[step]).rank(ascending=False, method="min").get((sign * both[last]).idxmax())
            if len(both)
            else None
        )
        rows.append([int(step), found.rho, found.low, found.high, found.n, place])
    return pd.DataFrame(rows, columns=names)
