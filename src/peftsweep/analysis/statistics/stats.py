"""Statistics of trials: intervals over seeds and test rows, comparisons, ties.

Everything here is a pure function of the table of trials, a row a trial with the dotted columns of results.parquet,
and of ``predictions``, a function (trial, eval) -> the lines of its predictions. A *configuration* is what
trials that differ only in their seed have in common; it goes by its number in ``identify``.

A score has two sources of chance: the seed of the training, and the test rows that happened to be drawn. Seeds are
crossed with rows, as every trial is judged on the same ones. So the variance of a contrast of configurations (the
difference of two, the effect of a factor, the gain per doubling of a rank) is the sum of

- the variance over rows of the contrast of each row's score, averaged over seeds, divided by the number of rows.
  What all configurations find hard or easy cancels here, which is what pairing on rows gains;
- the variance between seeds of each configuration, less what the rows already explain of it, divided by its seeds
  (see `Measured` for how two or three seeds are kept from looking too much alike),

with Satterthwaite's degrees of freedom. As the variances between seeds share the study's average, they are not taken
to be independent: their standard errors add up, and not the squares of these. So two configurations of equal spread
are compared as by the t test with a pooled variance, and if one spreads far more than the other, by about the degrees
of freedom of its own seeds. These are the variance components of a design with crossed random effects
(Brennan, Generalizability Theory, 2001, ch. 3). A bootstrap of two or three seeds would understate their spread.

Rows that all agree are no certainty that other rows would. So right and wrong answers have intervals that are as wide
as the number of rows allows: exact ones of a share (Clopper and Pearson, Biometrika 26, 1934; with the effective
number of rows of Korn and Graubard, Survey Methodology 24, 1998, where seeds vary) and of a difference of two
(`paired_interval`), and every other contrast of them is given a variance with two rows more, one each way (Bonett
and Price, Journal of Educational and Behavioral Statistics 37, 2012). Of other scores whose rows all agree the
interval is not known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import special  # scipy.stats takes longer to load than a small study to collect

from peftsweep.analysis.statistics.intervals import clopper_pearson
from peftsweep.analysis.statistics.measured import measure
from peftsweep.analysis.statistics.trials import (
    ALPHA,
    MAX_COMPARED,
    SEED,
    SUCCESS,
    TRIAL,
    Predictions,
    as_floats,
    binomial,
    identify,
    is_ratio,
    is_share,
    one_a_seed,
)
from peftsweep.analysis.table.columns import MEASURED, direction, scores, settings
from peftsweep.study.record import Status


def configurations(table: pd.DataFrame, predictions: Predictions | None = None) -> pd.DataFrame:
    """One row a configuration, in the order of ``identify``: its settings, how its trials ended, what they measured.

    ``n`` is the number of successful seeds; ``success``, ``failed``, ``oom``, ``refused``, ``stopped`` and
    ``cancelled`` count trials; ``trials`` and ``seeds`` are lists of the successful ones. A measured column holds the
    mean over the seeds (of perplexities the geometric mean, as they are compared by ratios), with ``<column>.std``, and
    a 95% interval from ``<column>.low`` to ``<column>.high``. What the interval is of says ``<column>.interval``:

    - ``seeds``: Student's t over seeds; what other seeds would give on these test rows, or for a cost on this machine.
      That of a score takes the spread between seeds as `Measured` does, so that two close seeds are not certainty;
    - ``rows``: one seed; what this one trained model would score on other test rows;
    - ``seeds and rows``: both, for scores whose ``predictions`` are given (`Measured.intervals`), of the best 40;
    - missing: one seed of a cost, whose spread is not known.
    """
    numbers = identify(table)
    trials = one_a_seed(table, numbers)
    good = trials[trials[SUCCESS] == Status.success.name]
    groups = trials.groupby("configuration", sort=True)
    found = groups[[c for c in settings(table) if c in trials]].first()
    counts = pd.crosstab(trials["configuration"], trials[SUCCESS])
    statuses = counts.reindex(columns=[s.name for s in Status], fill_value=0).astype(int)
    columns: dict[str, Any] = {"n": statuses["success"], "trials": _lists(good, TRIAL, found.index)}
    if SEED in good:
        columns["seeds"] = _lists(good, SEED, found.index)
    measured = _summary(good, list(found.index))
    whole = pd.concat([found, pd.DataFrame(columns), statuses, measured], axis=1)
    for column in scores(table):
        rough = measure(table, column)
        intervals = [rough.intervals()]
        if predictions is not None:
            best = np.argsort(-(direction(column) or 1) * rough.means, kind="stable")[:MAX_COMPARED]
            intervals.append(measure(table, column, predictions, rough.numbers[best]).intervals())
        for part in ("low", "high", "interval"):
            name = f"{column}.{part}"
            ends = whole[name].copy() if name in whole else pd.Series(np.nan, whole.index, dtype=object)
            for found_interval in (one for one in intervals if len(one)):
                ends.loc[found_interval.index] = found_interval[part]
            whole[name] = ends  # in the wide table each assignment by rows takes long
    return whole


def _lists(good: pd.DataFrame, column: str, order: pd.Index[Any]) -> pd.Series[Any]:
    """The values of ``column`` of each configuration as a list."""
    lists: dict[int, list[Any]] = {n: [] for n in order}
    for number, value in zip(good["configuration"].tolist(), good[column].tolist(), strict=True):
        lists[number].append(value)
    return pd.Series(list(lists.values()), index=order, dtype=object)


def _summary(good: pd.DataFrame, order: list[int]) -> pd.DataFrame:
    """Mean, standard deviation and interval of every measured column, a row a configuration."""
    numeric = good.select_dtypes(["number", "bool", "boolean"]).columns
    names = [c for c in numeric if c.startswith(MEASURED)]
    values = good[names].astype("float64")
    groups = values.groupby(good["configuration"])
    mean, std, n = (getattr(groups, how)().reindex(order) for how in ("mean", "std", "count"))
    half = std / np.sqrt(n) * special.stdtrit(np.maximum(n - 1, 1), 1 - ALPHA / 2)
    low, high = mean - half, mean + half
    for column in (c for c in names if c.endswith(".value") and is_ratio(c, values[c])):
        logs = np.log(values[column]).groupby(good["configuration"]).mean().reindex(order)
        mean[column] = mean[column].where(~(std[column] > 0), np.exp(logs))  # as they are compared
    kind = (n > 1).astype(object).replace({True: "seeds", False: None})
    known = set(names)
    for column in (c for c in names if c.endswith(".value") and c.removesuffix("value") + "n" in known):
        stem = column.removesuffix("value")
        stderr = mean[f"{stem}stderr"] if f"{stem}stderr" in known else mean[column] * np.nan
        bounds = row_interval(column, mean[column], stderr, mean[f"{stem}n"])
        alone = (n[column] == 1) | (std[column] == 0)  # or seeds that all agree, which tell nothing of others
        low[column], high[column] = (b.where(alone, o[column]) for b, o in zip(bounds, (low, high), strict=True))
        kind[column] = kind[column].where(~alone, bounds[0].notna().map({True: "rows", False: None}))
    for column in (c for c in names if is_share(c, values[c])):
        low[column], high[column] = low[column].clip(lower=0), high[column].clip(upper=1)
    parts = {"": mean, ".std": std, ".low": low, ".high": high, ".interval": kind.astype("string")}
    joined = pd.concat([part.add_suffix(suffix) for suffix, part in parts.items()], axis=1)
    ordered: pd.DataFrame = joined[[name + suffix for name in names for suffix in parts]]
    return ordered


def row_interval(
    column: str, value: pd.Series[float], stderr: pd.Series[float], n: pd.Series[float]
) -> tuple[pd.Series[float], pd.Series[float]]:
    """A 95% interval over the test rows from a score's standard error and its number of rows.

    That of right and wrong answers is exact, that of a perplexity symmetric in its logarithm. It is missing where the
    rows tell no spread: all other scores of one row, or of rows that all agree.
    """
    quantile = pd.Series(special.stdtrit(np.maximum(n - 1, 1), 1 - ALPHA / 2), index=value.index)
    stderr = stderr.where(stderr > 0)
    low, high = value - quantile * stderr, value + quantile * stderr
    if is_ratio(column, value):
        factor = np.exp(quantile * stderr / value)
        return value / factor, value * factor
    counted = binomial(column, value, stderr, n)
    exact = clopper_pearson(as_floats(value * n), as_floats(n))
    return low.where(~counted, exact[0]), high.where(~counted, exact[1])
