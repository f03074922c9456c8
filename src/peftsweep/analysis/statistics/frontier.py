"""Several metrics at once: the configurations that no other one beats, and how much of that is chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from peftsweep.analysis.statistics.measured import Measured, measure
from peftsweep.analysis.statistics.trials import Floats, Predictions, as_floats
from peftsweep.analysis.table.columns import direction

DRAWS = 400
PAIRS = 2_000_000  # of rows in all draws, which are compared at once; of more, each draw takes its own way


def front(values: Floats) -> NDArray[np.bool_]:
    """Whether each row of ``values`` [k, metrics] is on the Pareto front; smaller values are better.

    It is where no other row is at least as good in all metrics and better in one.
    """
    left = np.lexsort(values.T[::-1])  # whoever dominates another comes before it
    found = np.zeros(len(values), dtype=bool)
    while len(left):
        best, found[left[0]] = values[left[0]], True
        rest = values[left]
        left = left[(rest < best).any(axis=1) | ((rest == best).all(axis=1) & (left != left[0]))]
    return found


def _times_on_front(drawn: Floats) -> Floats:
    """In how many of the draws ``drawn`` [draws, k, metrics] each row is on the front; smaller values are better."""
    draws, rows, metrics = drawn.shape
    if draws * rows**2 > PAIRS or not np.isfinite(drawn).all():
        return as_floats(np.sum([front(one) for one in drawn], axis=0))
    no_worse, better = np.ones((draws, rows, rows), dtype=bool), np.zeros((draws, rows, rows), dtype=bool)
    for metric in range(metrics):  # each row against each other one, in all draws at once
        mine, other = drawn[:, :, None, metric], drawn[:, None, :, metric]
        no_worse &= mine <= other
        better |= mine < other
    return as_floats((~(no_worse & better).any(axis=1)).sum(axis=0))


def pareto(
    table: pd.DataFrame,
    configurations: pd.DataFrame,
    columns: Sequence[str],
    predictions: Predictions | None = None,
    known: Mapping[str, Measured] | None = None,
) -> pd.DataFrame:
    """The front of several metrics, a row a configuration that has them all.

    Its figures are those of ``configurations``, so that they are the same in every table and plot. ``front`` says
    whether no other configuration is better in one of ``columns`` and at least as good in all; ``share`` is the part of
    400 redraws of seeds and test rows (`Measured.draws`) in which it is so, of fewer where there are more than 500
    configurations. A cost with one seed does not vary in them. It is missing where of a configuration it is not known
    how much its figure of the first column varies. ``attrs["chance"]`` says what the redraws of the first column
    cover. ``known`` are columns of the table that ``measure`` was called for already.

    Raises:
        ValueError: of one of them it is not known whether more or less is better.
    """
    if unknown := [c for c in columns if not direction(c)]:
        raise ValueError(f"{unknown[0]}: not known whether more or less is better")
    known = known or {}
    measured = [known[c] if c in known else measure(table, c, predictions) for c in columns]
    shared = sorted(set.intersection(*(set(m.numbers.tolist()) for m in measured))) if measured else []
    draws = min(DRAWS, max(50, 200_000 // max(1, len(shared))))
    generator = np.random.default_rng(0)
    drawn = []
    for m in measured:
        places = np.array([int(np.flatnonzero(m.numbers == n)[0]) for n in shared], dtype=int)
        drawn.append(-direction(m.column) * m.draws(draws, generator)[:, places])
    if not shared:
        return pd.DataFrame(columns=[*columns, "front", "share"])
    values = configurations.loc[shared, list(columns)].astype("float64")
    times = _times_on_front(np.stack(drawn, axis=2))
    alike = np.isin(measured[0].numbers, shared)
    share = times / draws if measured[0].varies[alike].all() else np.full(len(shared), np.nan)
    whole = values.assign(front=front(as_floats(-values * [direction(c) for c in columns])), share=share)
    whole.attrs["chance"] = measured[0].chance
    return whole
