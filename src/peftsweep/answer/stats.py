"""Trials -> what can be said of them: intervals over seeds and test rows, comparisons, ties.

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

with Satterthwaite's degrees of freedom. These are the variance components of a design with crossed random effects
(Brennan, Generalizability Theory, 2001, ch. 3). A bootstrap of two or three seeds would understate their spread.

Rows that all agree are no certainty that other rows would. So right and wrong answers have intervals that are as wide
as the number of rows allows: exact ones of a share (Clopper and Pearson, Biometrika 26, 1934; with the effective
number of rows of Korn and Graubard, Survey Methodology 24, 1998, where seeds vary) and of a difference of two
(`paired_interval`), and every other contrast of them is given a variance with two rows more, one each way (Bonett
and Price, Journal of Educational and Behavioral Statistics 37, 2012). Of other scores whose rows all agree the
interval is not known.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special  # scipy.stats takes longer to load than a small study to collect

from peftsweep import naming
from peftsweep.answer import intervals
from peftsweep.answer.columns import MEASURED, NAME, direction, evaluation, named, scores
from peftsweep.answer.intervals import clopper_pearson, mcnemar, paired_interval
from peftsweep.naming import NO_SETTINGS, OF_SOME, SETTINGS
from peftsweep.record import Status

Floats = intervals.Floats
Predictions = Callable[[str, str], Sequence[dict[str, Any]]]

ALPHA = intervals.ALPHA
SUCCESS, CREATED, TRIAL, SEED = "run_info.status", "run_info.created_at", "run_info.trial", naming.SEED
PACKED, PERCENTILES = "run_info.packed_with", ("_p50", "_p95", "_p99")
TASK = (
    *("choices.model", "config.model.name_or_path", "choices.dataset", "config.dataset.path", "config.dataset.name"),
    *("config.dataset.test_path", "config.dataset.hub", "config.dataset.revision"),
)
TOLD = ("choices.model", "choices.dataset")  # by the name of a task
# The figure of a line of predictions that a metric is the mean of.
RIGHT = {"accuracy": "correct", "acc": "correct", "acc_norm": "correct_norm"}
COMPARED = (
    "value",
    "seeds",
    "difference",
    "low",
    "high",
    "p",
    "p_adjusted",
    "verdict",
    "near",
    "scale",
    "chance",
    "rank",
    "gain",
    "gain_low",
    "gain_high",
    "gain_p_adjusted",
    "gained",
)
MOST_COMPARED = 40  # configurations: the best ones, of each pair of which the rows are compared
MOST_READ = 400  # trials whose predictions are read


# ---- what can be compared --------------------------------------------------------------------------


def tasks(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The trials that can be compared: one table for each model, dataset and way of judging, by its name.

    Each has its columns ``configuration`` and ``name``, which tells the configuration from all others of ``table``.
    What a pack of trials took together is no trial's own: it is left out.
    """
    judged = [c for c in table.columns if c.startswith("config.eval.") and table[c].nunique(dropna=True) > 1]
    differing = [c for c in (*TASK, *judged) if c in table and table[c].nunique(dropna=False) > 1]
    shown = table[[c for c in (*TASK, *judged) if c in table]].astype("string").fillna("")
    same = shown.groupby(differing, sort=False).ngroup() if differing else pd.Series(0, index=table.index)
    if NAME not in table and len(table):
        table = table.assign(**{NAME: named(table)})
    parts = [table[same == number] for number in range(same.max() + 1)] if len(table) else []
    firsts = [shown.loc[part.index[0]] for part in parts]
    names = [_task_name(first) for first in firsts]
    if len(set(names)) < len(names):
        called = naming.Names({c: [first[c] for first in firsts] for c in differing})
        keys = [key for key in called.settings if key not in TOLD]
        own = [", ".join(filter(None, (called.setting(key, first[key]) for key in keys))) for first in firsts]
        names = naming.numbered([f"{name} ({what})" if what else name for name, what in zip(names, own, strict=True)])
    return {name: _own_costs(_numbered(part)) for name, part in zip(names, parts, strict=True)}


def _task_name(first: pd.Series[str]) -> str:
    model = first.get("choices.model") or first.get("config.model.name_or_path") or "model"
    return f"{model} on {first.get('choices.dataset') or first.get('config.dataset.name') or 'dataset'}"


def _numbered(table: pd.DataFrame) -> pd.DataFrame:
    table = table.drop(columns="configuration", errors="ignore")
    return table.assign(configuration=identify(table))


def packed(table: pd.DataFrame) -> pd.Series[bool]:
    """Which trials were trained in a pack with others."""
    if PACKED not in table:
        return pd.Series(False, index=table.index)
    return table[PACKED].notna() & table[PACKED].ne("[]").fillna(False).astype(bool)


def _own_costs(table: pd.DataFrame) -> pd.DataFrame:
    if not (shared := packed(table)).any():
        return table
    costs = [c for c in table.columns if c.startswith("memory.") and not c.startswith("memory.predicted.")]
    ends = ("seconds", "per_second", *PERCENTILES)
    costs += [c for c in table.columns if c.startswith("train_info.") and c.endswith(ends)]
    return table.assign(**{c: table[c].mask(shared) for c in costs})


# ---- configurations --------------------------------------------------------------------------------


def settings(table: pd.DataFrame) -> list[str]:
    """The columns that make a configuration: all choices and settings but the seed and what changes no number."""
    columns = [c for c in table.columns if c.startswith(SETTINGS) and not c.startswith(NO_SETTINGS)]
    # A trial with one evaluation more is the same configuration, unless the two disagree on one they share.
    return [c for c in columns if not c.startswith(OF_SOME) or table[c].nunique(dropna=True) > 1]


def identify(table: pd.DataFrame) -> pd.Series[int]:
    """The number of each trial's configuration, counted from 0 in the order of their first trials.

    A table may carry it as its column ``configuration``, which is then taken as it is.
    """
    if "configuration" in table:
        return table["configuration"]
    keys = table[[c for c in settings(table) if table[c].nunique(dropna=False) > 1]]
    if keys.empty:
        return pd.Series(0, index=table.index)
    return keys.astype("string").fillna("").groupby(list(keys.columns), sort=False).ngroup()


def _one_a_seed(table: pd.DataFrame, numbers: pd.Series[int]) -> pd.DataFrame:
    """The trials without repetitions: of those with the same configuration and seed, what the newest good one says.

    A repeated seed is no second draw: it gives the same numbers again.
    """
    table = table.drop(columns="configuration", errors="ignore")
    columns = [c for c in (SUCCESS, CREATED) if c in table]
    order = table[columns].assign(good=table[SUCCESS].eq(Status.success.name)).sort_values(["good", *columns[1:]]).index
    seed = table[SEED] if SEED in table else pd.Series(0, index=table.index)
    keys = [numbers.rename("configuration"), seed.rename("seed")]
    if not pd.concat(keys, axis=1).duplicated().any():
        return table.assign(configuration=numbers)
    kept = table.loc[order].groupby([key.loc[order] for key in keys], sort=False, dropna=False).last()
    return kept.reset_index("configuration").reset_index(drop=True).sort_values("configuration", kind="stable")


def configurations(table: pd.DataFrame, predictions: Predictions | None = None) -> pd.DataFrame:
    """One row a configuration, in the order of ``identify``: its settings, how its trials ended, what they measured.

    ``n`` is the number of successful seeds; ``success``, ``failed``, ``oom``, ``refused``, ``stopped`` and
    ``cancelled`` count trials; ``trials`` and ``seeds`` are lists of the successful ones. A measured column holds the
    mean over the seeds, with ``<column>.std``, and a 95% interval from ``<column>.low`` to ``<column>.high``. What
    the interval is of says ``<column>.interval``:

    - ``seeds``: Student's t over seeds; what other seeds would give on these test rows, or for a cost on this machine.
      That of a score takes the spread between seeds as `Measured` does, so that two close seeds are not certainty;
    - ``rows``: one seed; what this one trained model would score on other test rows;
    - ``seeds and rows``: both, for scores whose ``predictions`` are given (`Measured.intervals`), of the best 40;
    - missing: one seed of a cost, whose spread is not known.
    """
    numbers = identify(table)
    trials = _one_a_seed(table, numbers)
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
            best = np.argsort(-(direction(column) or 1) * rough.means, kind="stable")[:MOST_COMPARED]
            intervals.append(measure(table, column, predictions, rough.numbers[best]).intervals())
        for part in ("low", "high", "interval"):
            for found_interval in intervals:
                whole.loc[found_interval.index, f"{column}.{part}"] = found_interval[part]
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


def is_share(column: str, values: pd.Series[float]) -> bool:
    """Whether a column is a share of test rows, such as an accuracy."""
    return column.endswith(".value") and direction(column) >= 0 and bool(values.dropna().between(0, 1).all())


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
    exact = clopper_pearson(_floats(value * n), _floats(n))
    return low.where(~counted, exact[0]), high.where(~counted, exact[1])


def binomial(column: str, value: pd.Series[float], stderr: pd.Series[float], n: pd.Series[float]) -> pd.Series[bool]:
    """Of which scores the rows are right or wrong, as far as value, standard error and number of rows can tell."""
    alike = np.isclose(stderr.fillna(0.0) ** 2 * (n - 1), value * (1 - value))
    return pd.Series(alike & is_share(column, value) & (n > 0), index=value.index)


def is_ratio(column: str, values: Iterable[float]) -> bool:
    """Whether a column is compared by ratios, which perplexities and costs are, and not by differences."""
    cost = not column.endswith(".value") and direction(column) != 0 and not column.endswith(("loss", "fraction"))
    known = [value for value in values if not pd.isna(value)]
    return ("perplexity" in column.rpartition(".value")[0] or cost) and all(value > 0 for value in known)


# ---- one measured column, and contrasts of configurations ------------------------------------------


@dataclass(frozen=True)
class Contrasts:
    """Estimates with their uncertainty, one a contrast; of logarithms where the column is compared by ratios."""

    estimate: Floats
    stderr: Floats  # missing where nothing tells it
    df: Floats
    exact: Floats  # [3, c]: p and the ends of the interval where they follow from counts of rows, else missing

    @property
    def p(self) -> Floats:
        """Two-sided, against no difference. Of a cost without any spread (bytes on a disk) a difference is certain."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(self.estimate == 0, 0.0, np.abs(self.estimate) / self.stderr)
        found: Floats = np.where(np.isnan(self.stderr) & (self.estimate != 0), np.nan, 2 * special.stdtr(self.df, -t))
        return np.where(np.isnan(self.exact[0]), found, self.exact[0])

    @property
    def interval(self) -> tuple[Floats, Floats]:
        """The ends of the 95% interval of each."""
        half = special.stdtrit(self.df, 1 - ALPHA / 2) * self.stderr
        low, high = np.where(np.isnan(self.exact[1:]), [self.estimate - half, self.estimate + half], self.exact[1:])
        return low, high


@dataclass(frozen=True)
class Measured:
    """One column of k configurations; all figures are of its logarithm where ``ratio``."""

    column: str
    ratio: bool
    numbers: NDArray[np.int64]  # [k] of identify
    means: Floats  # [k] over seeds
    seeds: NDArray[np.int64]  # [k] how many
    between: Floats  # [k] variance between seeds' scores; missing with one seed
    answered: Floats  # [k] the part of it that comes from seeds answering single rows differently; 0 without rows
    rows: Floats | None  # [k, rows] the score of each test row, averaged over seeds; None where not known
    stderrs: Floats  # [k] of one trial's score over its rows; missing for costs

    @property
    def chance(self) -> str | None:
        """What the uncertainty covers: seeds, rows or both; None where there is only one seed of a cost."""
        seeds, rows = bool((self.seeds > 1).any()), self.rows is not None or not (self.seeds > 1).any()
        known = [name for name, there in (("seeds", seeds), ("rows", rows and not self._no_rows)) if there]
        return " and ".join(known) or None

    @property
    def _no_rows(self) -> bool:
        return self.rows is None and bool(np.isnan(self.stderrs).all())

    @property
    def shares(self) -> bool:
        """Whether the score is a share of rows, whose scores are known: 1 for right, 0 for wrong, means over seeds."""
        return self.rows is not None and not self.ratio and self.rows.min() >= 0 and self.rows.max() <= 1

    @property
    def one_model_each(self) -> bool:
        """Whether each configuration was trained once and each row is right or wrong, so that rows can be counted."""
        return self.shares and not (self.seeds > 1).any() and set(np.unique(cast(Floats, self.rows))) <= {0.0, 1.0}

    def contrasts(self, weights: Floats, *, rows_of_their_own: bool = False) -> Contrasts:
        """The contrasts ``weights`` [c, k] of the configurations' means.

        Those of two trained models whose rows are right or wrong are exact, all others are by Student's t.
        ``rows_of_their_own`` counts the variance of each score over its rows where rows cannot be paired.
        """
        alone, whole, seed_freedom = self._of_seeds()
        if self.rows is not None:
            by_rows = self._by_rows(weights)
        elif rows_of_their_own or not (self.seeds > 1).any():
            by_rows = weights**2 @ self.stderrs**2
        else:
            by_rows = np.zeros(len(weights))
        by_seeds, spread = weights**2 @ alone, weights**4 @ (whole**2 / seed_freedom)
        found = self._with_rows(weights @ self.means, by_seeds, spread, by_rows)
        unknown = self.column.endswith(".value") & (found.stderr == 0) & weights.any(axis=1)  # a score always has some
        found = dataclasses.replace(found, stderr=np.where(unknown, np.nan, found.stderr))
        return dataclasses.replace(found, exact=self._counted(weights)) if self.one_model_each else found

    def _by_rows(self, weights: Floats) -> Floats:
        """The variance of contrasts [c] over test rows; of shares with two rows more, as far apart as rows can be."""
        apart = weights @ cast(Floats, self.rows)
        if self.shares:
            ends = np.minimum(weights, 0).sum(axis=1), np.maximum(weights, 0).sum(axis=1)
            apart = np.column_stack([apart, *ends])
        variances: Floats = apart.var(axis=1, ddof=1) / apart.shape[1]
        return variances

    def _counted(self, weights: Floats) -> Floats:
        """p and interval [3, c] of differences of two, from counts of rows; missing for other contrasts."""
        apart = weights @ cast(Floats, self.rows)
        size = weights.max(axis=1, initial=0.0)
        first, second = (apart > 0).sum(axis=1), (apart < 0).sum(axis=1)
        low, high = paired_interval(first, second, apart.shape[1])
        two = ((weights != 0).sum(axis=1) == 2) & (weights.sum(axis=1) == 0)
        return np.where(two, [mcnemar(first, second), size * low, size * high], np.nan)

    def _with_rows(self, estimate: Floats, by_seeds: Floats, spread: Floats, by_rows: Floats) -> Contrasts:
        """The contrasts with these parts of their variance, by Satterthwaite; ``spread`` is that of ``by_seeds``."""
        row_freedom = math.inf if self.rows is None else float(self.rows.shape[1] - 1)
        total, spread = by_seeds + by_rows, spread + by_rows**2 / row_freedom
        with np.errstate(divide="ignore", invalid="ignore"):
            df = np.where(spread > 0, np.maximum(total**2 / spread, 1), math.inf)
        return Contrasts(estimate, np.sqrt(total), df, np.full((3, len(estimate)), np.nan))

    def _of_seeds(self) -> tuple[Floats, Floats, Floats]:
        """The variance of each configuration's mean by its seeds [k], the same with what the rows explain, and its df.

        Two or three seeds are often close together by chance, and among many pairs some are. So each configuration
        is taken to vary at least as the study's do on average, which has more degrees of freedom; one that varies more
        has fewer, down to its own.
        """
        several, own = (self.seeds > 1) & (self.numbers >= 0), np.maximum(self.seeds - 1, 0)
        if not several.any():
            return np.zeros(len(self.seeds)), np.zeros(len(self.seeds)), np.ones(len(self.seeds))
        own = np.where(self.numbers >= 0, own, 0)
        beyond = self.between - self.answered
        pooled, pooled_beyond = (np.average(v[several], weights=own[several]) for v in (self.between, beyond))
        total = np.fmax(self.between, pooled)
        alone = np.fmax(beyond, max(pooled_beyond, 0.0))
        share = np.divide(pooled, total, out=np.ones(len(total)), where=total > 0)
        df = np.clip(own.sum() * share**2, np.maximum(own, 1), own.sum())
        drawn = (self.numbers >= 0) | (self.seeds > 1)  # a base without a new head has no seed
        return drawn * alone / self.seeds, drawn * total / self.seeds, df

    def pairs(
        self, first: NDArray[np.int64], second: NDArray[np.int64], *, rows_of_their_own: bool = False
    ) -> tuple[Contrasts, Floats]:
        """The differences first - second of the configurations at these places, and their p-values."""
        weights = np.zeros((len(first), len(self.means)))
        weights[np.arange(len(first)), first] += 1
        weights[np.arange(len(first)), second] -= 1
        found = self.contrasts(weights, rows_of_their_own=rows_of_their_own)
        return found, found.p

    def intervals(self) -> pd.DataFrame:
        """The 95% interval of each configuration's own value over seeds and rows, as far as they are known."""
        if self.rows is None and not (self.seeds > 1).any():
            return pd.DataFrame(columns=["low", "high", "interval"])
        by_rows = np.zeros(len(self.means)) if self.rows is None else self.rows.var(axis=1, ddof=1) / self.rows.shape[1]
        alone, whole, seed_freedom = self._of_seeds()
        spread = self._with_rows(self.means, alone, whole**2 / seed_freedom, by_rows)
        low, high = self.back(spread.interval)
        if self.shares:
            low, high = self._share_intervals(spread)
        elif is_share(self.column, pd.Series(self.back((self.means,))[0])):
            low, high = low.clip(0, 1), high.clip(0, 1)
        found = pd.DataFrame({"low": low, "high": high, "interval": self.chance}, index=self.numbers)
        several = self.seeds > 1 if self.rows is None else np.ones(len(found), dtype=bool)
        return found[several & ((spread.stderr > 0) | self.shares)]

    def _share_intervals(self, spread: Contrasts) -> tuple[Floats, Floats]:
        """Those of shares, from as many rows as would vary so, of one trained model each (Korn and Graubard, 1998)."""
        rows = cast(Floats, self.rows).shape[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            effective = 1 + self.means * (1 - self.means) / spread.stderr**2
        quantiles = special.stdtrit(rows - 1, 1 - ALPHA / 2) / special.stdtrit(spread.df, 1 - ALPHA / 2)
        n = np.where(spread.stderr > 0, effective * quantiles**2, rows)
        return clopper_pearson(self.means * n, n)

    def back(self, values: tuple[Floats, ...]) -> tuple[Floats, ...]:
        """``values`` in the column's own units."""
        return tuple(np.exp(value) if self.ratio else value for value in values)

    def change(self, values: tuple[Floats, ...]) -> tuple[Floats, ...]:
        """Differences as a person reads them: relative to one (0.08: 8% more) where compared by ratios."""
        return tuple(np.expm1(value) if self.ratio else value for value in values)

    def draws(self, count: int, generator: np.random.Generator) -> Floats:
        """``count`` values of each configuration [count, k] that seeds and rows could have given.

        Rows are reweighted at random, for all configurations alike (Rubin's Bayesian bootstrap); seeds follow a t.
        Of shares each configuration has two rows more that the others lack, a right and a wrong one of half a weight:
        what was the same in all rows is not so in all draws.
        """
        size = (count, len(self.means))
        found = np.broadcast_to(self.means, size).copy()
        if self.rows is not None:
            weights = generator.standard_exponential((count, self.rows.shape[1]))
            found = weights / weights.sum(axis=1, keepdims=True) @ self.rows.T
            if self.shares:
                own = generator.standard_exponential((2, *size))
                found += (own[0] - own[1]) / math.sqrt(2) / (self.rows.shape[1] + 2)
        elif not (self.seeds > 1).any():
            found += generator.standard_normal(size) * np.nan_to_num(self.stderrs)
        variances, _, freedoms = self._of_seeds()
        drawn: Floats = found + generator.standard_t(freedoms, size) * np.sqrt(variances)
        return drawn

    def take(self, places: NDArray[np.int64]) -> Measured:
        """The configurations at ``places`` alone."""
        parts: dict[str, Any] = {n: v[places] for n, v in vars(self).items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(self, **parts)


def measure(
    table: pd.DataFrame, column: str, predictions: Predictions | None = None, only: NDArray[np.int64] | None = None
) -> Measured:
    """``column`` of every configuration, or of ``only`` those, in which a successful trial has it."""
    numbers, stem = identify(table), column.removesuffix("value")
    table = table[[c for c in (SUCCESS, CREATED, TRIAL, SEED, column, f"{stem}stderr", f"{stem}n") if c in table]]
    there = table[SUCCESS].eq(Status.success.name) & table[column].notna()
    if only is not None:
        there &= numbers.isin(only)
    trials = _one_a_seed(table[there], numbers[there])
    values = trials[column].astype("float64")
    ratio = is_ratio(column, values)
    stderr = trials[f"{stem}stderr"].astype("float64") if f"{stem}stderr" in trials else values * np.nan
    if f"{stem}n" in trials:  # right and wrong answers: with a right and a wrong one more
        n = trials[f"{stem}n"].astype("float64")
        share = (values * n + 1) / (n + 2)
        stderr = stderr.mask(binomial(column, values, stderr, n), (share * (1 - share) / (n + 1)) ** 0.5)
    if ratio:
        values, stderr = values.transform("log"), stderr / values
    groups = values.groupby(trials["configuration"])
    seeds = groups.count()
    place_of = {n: place for place, n in enumerate(seeds.index)}
    places = np.asarray(trials["configuration"].map(place_of), dtype=np.int64)
    counts = np.asarray(seeds, dtype=np.int64)
    between = _floats(groups.var())
    by_row = _by_row(trials, column, _floats(values), predictions) if predictions else None
    rows, answered = None, np.zeros(len(counts))
    if by_row is not None:
        rows = _sums(by_row, places, len(seeds)) / counts[:, None]
        answered = _interaction(by_row, rows, places, counts)
    return Measured(
        column,
        ratio,
        seeds.index.to_numpy(dtype=np.int64),
        _floats(groups.mean()),
        counts,
        between,
        answered,
        rows,
        _floats(stderr.groupby(trials["configuration"]).mean()),
    )


def _floats(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _sums(values: Floats, places: NDArray[np.int64], count: int) -> Floats:
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, places, values)
    return sums


def _interaction(by_row: Floats, rows: Floats, places: NDArray[np.int64], seeds: NDArray[np.int64]) -> Floats:
    """The part of the variance between seeds' means [k] that comes from seeds answering single rows differently."""
    apart = by_row - by_row.mean(axis=1, keepdims=True) - rows[places] + rows.mean(axis=1)[places, None]
    squares = _sums(apart**2, places, len(rows)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = squares / ((seeds - 1) * (rows.shape[1] - 1)) / rows.shape[1]
    return found


def _by_row(trials: pd.DataFrame, column: str, values: Floats, predictions: Predictions) -> Floats | None:
    """Each trial's score of each test row [trials, rows]; None unless all were judged on the same rows."""
    name, metric = evaluation(column)
    if (trials["configuration"] >= 0).sum() > MOST_READ or not column.endswith(".value"):
        return None
    found: list[Floats] = []
    asked: list[Any] = []
    for trial, value in zip(trials[TRIAL], values, strict=True):
        lines = predictions(trial, name)
        row = row_scores(lines, metric)
        asked = asked or _asked(lines)
        # What the rows come to must be what the record says: a file may be of another run, or of other rows.
        if row is None or len(row) < 2 or asked != _asked(lines) or abs(row.mean() - value) > 1e-6 * max(1, abs(value)):
            return None
        found.append(row)
    return np.stack(found) if found else None


def _asked(lines: Sequence[dict[str, Any]]) -> list[Any]:
    return [(line.get("prompt"), line.get("answer")) for line in lines]


def row_scores(lines: Sequence[dict[str, Any]], metric: str) -> Floats | None:
    """What each line of predictions adds to ``metric``, so that their mean is it; None where lines do not tell.

    That of a perplexity is its logarithm, the mean loss a token. It is a ratio of sums over rows, so a row's part is
    by linearisation: the loss plus how far the row's own loss lies above what its tokens make expected.
    """
    if not lines:
        return None
    if metric in ("perplexity", "loss") and "log_likelihood" in lines[0]:
        tokens = np.array([line["tokens"] for line in lines], dtype=float)
        losses = -np.array([line["log_likelihood"] for line in lines], dtype=float)
        loss = losses.sum() / tokens.sum()
        found: Floats = loss + (losses - loss * tokens) / tokens.mean()
        return found
    if metric == "label_acc" and "label_prediction" in lines[0]:
        return np.array([line["label_prediction"] == line["label"] for line in lines], dtype=float)
    key = RIGHT.get(metric, "")
    return np.array([line[key] for line in lines], dtype=float) if key in lines[0] else None


# ---- the untouched base ----------------------------------------------------------------------------


def with_bases(table: pd.DataFrame, column: str) -> tuple[pd.DataFrame, dict[int, int]]:
    """What ``measure`` needs of ``table``, with its untouched bases as configurations; the base of each configuration.

    Bases have the numbers -1, -2 ... There are several where models are stored or asked in several ways. A base has
    no seed, unless a new head was drawn from it; its name as a trial is the file of its answers, as far as that
    is known (records of earlier versions lack it).
    """
    name, metric = evaluation(column)
    own, of_base = column.removesuffix("value"), f"eval_info.{name}.base_{metric}."
    kept = [c for c in (SUCCESS, CREATED, TRIAL, SEED, column, f"{own}stderr", f"{own}n") if c in table]
    trials = table[kept].assign(configuration=identify(table))
    if f"{of_base}value" not in table:
        return trials, {}
    there = trials[SUCCESS].eq(Status.success.name) & trials[column].notna() & table[f"{of_base}value"].notna()
    scores = table.loc[there.to_numpy(dtype=bool), [c for c in table.columns if c.startswith(of_base)]]
    figures = scores.astype("string").fillna("")
    same = pd.Series(["|".join(row) for row in figures.to_numpy()], figures.index)  # these are of the same base
    files = (
        table.loc[there, f"eval_info.{name}.base_predictions"]
        if f"eval_info.{name}.base_predictions" in table
        else None
    )
    known = same if files is None else files.fillna(files.groupby(same).transform("first")).fillna(same)
    groups: list[set[str]] = []
    for _, of_one in known.groupby(trials["configuration"]):
        whole = set(of_one).union(*(group for group in groups if not group.isdisjoint(of_one)))
        groups = [*(group for group in groups if group.isdisjoint(whole)), whole]
    numbers = {base: -1 - place for place, group in enumerate(groups) for base in group}
    bases = trials[there].assign(**{TRIAL: known, "configuration": known.map(numbers)})
    for part in ("value", "stderr", "n"):
        if f"{own}{part}" in bases:
            bases[f"{own}{part}"] = scores.get(f"{of_base}{part}")
    if SEED in bases:
        alone = known.map({base: len(group) == 1 for group in groups for base in group})
        bases[SEED] = bases[SEED].mask(alone.astype(bool))
    of = dict(zip(trials.loc[there, "configuration"].tolist(), bases["configuration"].tolist(), strict=True))
    return pd.concat([trials, bases.drop_duplicates(TRIAL)], ignore_index=True), of


def _gains(
    table: pd.DataFrame, column: str, predictions: Predictions | None, numbers: Sequence[int]
) -> tuple[dict[int, Between], bool]:
    """What these configurations gain over their untouched bases, not adjusted yet; and whether row by row."""
    joined, base_of = with_bases(table, column)
    there = [number for number in numbers if number in base_of]
    if not there:
        return {}, False
    measured = measure(joined, column, predictions, np.array([*there, *{base_of[number] for number in there}]))
    first, second = (np.searchsorted(measured.numbers, some) for some in (there, [base_of[n] for n in there]))
    paired = measured.rows is not None
    return dict(zip(there, _tested(measured, first, second, rows_of_their_own=not paired), strict=True)), paired


# ---- comparisons -----------------------------------------------------------------------------------


def holm(p: Floats, family: int | None = None) -> Floats:
    """p-values adjusted by Holm's step-down method for ``family`` tests, of which ``p`` may be some.

    Where ``p`` holds only some of them the result is never smaller than that of the whole family, as the others are
    taken for larger ones. A missing p stays missing.
    """
    count = family or len(p)
    order = np.argsort(p)
    steps = np.minimum(1, p[order] * (count - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(steps)
    return adjusted


@dataclass(frozen=True)
class Between:
    """One configuration against another: the first less the second, of logarithms where compared by ratios."""

    estimate: float
    low: float
    high: float
    p: float
    p_adjusted: float

    def turned(self) -> Between:
        """The second against the first."""
        return Between(-self.estimate, -self.high, -self.low, self.p, self.p_adjusted)


UNKNOWN = Between(math.nan, math.nan, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Tested:
    """Pairs of configurations in one column: each is tested once, and all are adjusted together, by Holm's method.

    All that a report says of two configurations (ranks, ties, sentences, cells of a table) is read from here, so that
    no two parts of it can disagree. The family is all pairs, as which configuration is best was read from the same
    data. Of more than 40 configurations each pair of the best 40 is tested, and the others against ``against``.
    """

    measured: Measured  # all configurations
    exact: Measured  # the best 40, row by row where that is known
    against: int  # the configuration that all others are tested against: the best one unless another was named
    family: int  # how many pairs there are
    pairs: dict[tuple[int, int], Between]  # by the numbers of two configurations
    gains: dict[int, Between]  # of each configuration over its untouched base, which are pairs of the family too
    gains_paired: bool  # whether the base's rows are known, of the best 40

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return direction(self.measured.column) or 1

    def between(self, first: int, second: int) -> Between:
        """What is known of ``first`` less ``second``, numbers of ``identify``."""
        if (first, second) in self.pairs:
            return self.pairs[first, second]
        if (second, first) in self.pairs:
            return self.pairs[second, first].turned()
        places = np.searchsorted(self.measured.numbers, [first, second])
        (found,) = _tested(self.measured, places[:1], places[1:])
        return dataclasses.replace(found, p_adjusted=min(1.0, found.p * self.family))  # Bonferroni: at least Holm's

    def gain(self, number: int) -> Between:
        """What is known of a configuration less its untouched base."""
        return self.gains.get(number, UNKNOWN)

    def verdict(self, first: int, second: int) -> str:
        """Whether ``first`` is ``better`` or ``worse`` than ``second``, a ``tie``, or ``unknown``."""
        found = self.between(first, second)
        return verdict(self.sign * found.estimate, found.p_adjusted)

    def ranks(self) -> dict[int, int]:
        """One more than the number of configurations that are better for certain, of each of the best 40."""
        known = set(self.exact.numbers.tolist())
        ranks = dict.fromkeys(self.exact.numbers.tolist(), 1)
        for first, second in self.pairs:
            if first in known and second in known and (said := self.verdict(first, second)) in ("better", "worse"):
                ranks[second if said == "better" else first] += 1
        return ranks


def tested(
    table: pd.DataFrame, column: str, predictions: Predictions | None = None, reference: int | None = None
) -> Tested | None:
    """Every pair of configurations that have ``column``, tested and adjusted; None where none has it."""
    measured = measure(table, column, predictions)
    k, sign = len(measured.means), direction(column) or 1
    if not k:
        return None
    order = np.argsort(-sign * measured.means, kind="stable")
    place = int(order[0]) if reference is None else int(np.flatnonzero(measured.numbers == reference)[0])
    near = np.union1d(order[:MOST_COMPARED], place)
    unread = predictions is not None and measured.rows is None and len(near) < k  # the rows of so many were too many
    exact = measure(table, column, predictions, measured.numbers[near]) if unread else measured.take(near)
    rest = np.setdiff1d(order, near)
    first, second = np.triu_indices(len(near), 1)
    names = [*zip(exact.numbers[first].tolist(), exact.numbers[second].tolist(), strict=True)]
    names += [(number, int(measured.numbers[place])) for number in measured.numbers[rest].tolist()]
    found = _tested(exact, first, second)
    for some in np.array_split(rest, math.ceil(len(rest) / 200)) if len(rest) else []:
        found += _tested(measured, some, np.full(len(some), place))
    gains, gains_paired = _gains(table, column, predictions, exact.numbers.tolist())
    gains |= _gains(table, column, None, measured.numbers[rest].tolist())[0]
    family = max(1, k * (k - 1) // 2 + len(gains))
    every = [*found, *gains.values()]
    adjusted = holm(np.array([pair.p for pair in every]), family)
    whole = [dataclasses.replace(pair, p_adjusted=float(a)) for pair, a in zip(every, adjusted, strict=True)]
    pairs, gains = dict(zip(names, whole, strict=False)), dict(zip(gains, whole[len(found) :], strict=True))
    return Tested(measured, exact, int(measured.numbers[place]), family, pairs, gains, gains_paired)


def _tested(
    measured: Measured, first: NDArray[np.int64], second: NDArray[np.int64], *, rows_of_their_own: bool = False
) -> list[Between]:
    """The differences of the configurations at these places, not adjusted yet."""
    if not len(first):
        return []
    contrasts, p = measured.pairs(first, second, rows_of_their_own=rows_of_their_own)
    low, high = contrasts.interval
    parts = zip(contrasts.estimate.tolist(), low.tolist(), high.tolist(), p.tolist(), strict=True)
    return [Between(*part, p_adjusted=math.nan) for part in parts]


def compare(
    table: pd.DataFrame,
    column: str,
    predictions: Predictions | None = None,
    reference: int | None = None,
    known: Tested | None = None,
) -> pd.DataFrame:
    """Every configuration against the best one, or against ``reference``; the best first, by number of ``identify``.

    Columns: ``value`` and ``seeds``; ``difference`` from the reference with its 95% interval ``low`` to ``high``,
    relative to one (0.08: 8% more) where ``scale`` is ``ratio``; ``p``, and ``p_adjusted`` by Holm's method
    for all pairs of configurations; ``rank``: one more than the number of configurations that are better for
    certain (p_adjusted < 0.05), known of the best 40; ``verdict``: ``best``, ``tie`` where no configuration is better
    for certain, else ``worse``, and ``unknown`` where nothing tells the spread; against a ``reference`` that was
    given, ``better``, ``worse`` or ``tie`` with it; ``near``: within one standard error of the reference's own value,
    which a choice by other criteria may count as equal (the rule of Breiman et al., Classification and Regression
    Trees, 1984), where a tie may be no more than a lack of trials; ``chance``: what p covers, seeds, rows or both;
    ``gain`` over the configuration's own untouched base with ``gain_low``, ``gain_high`` and ``gain_p_adjusted``, of
    the same family, and ``gained``: ``better``, ``worse``, ``tie`` or ``unknown``.
    ``attrs["paired"]`` says whether the best were compared row by row, ``attrs["gains_paired"]`` whether they were with
    their base, ``attrs["family"]`` for how many pairs p is adjusted. ``known`` is what ``tested`` gave, if it was
    called already.
    """
    found = known or tested(table, column, predictions, reference)
    if found is None:
        return pd.DataFrame(columns=COMPARED)
    measured, sign, best = found.measured, found.sign, found.against
    place = int(np.flatnonzero(found.exact.numbers == best)[0])
    own = found.exact.contrasts(np.eye(1, len(found.exact.means), place)).stderr[0]
    numbers, ranks = measured.numbers.tolist(), found.ranks()
    pairs = [Between(0.0, 0.0, 0.0, math.nan, math.nan) if n == best else found.between(n, best) for n in numbers]
    estimates, low, high = (np.array([getattr(pair, part) for pair in pairs]) for part in ("estimate", "low", "high"))
    (difference, low, high) = measured.change((estimates, low, high))
    whole = pd.DataFrame(
        {
            "value": measured.back((measured.means,))[0],
            "seeds": measured.seeds,
            "difference": difference,
            "low": low,
            "high": high,
            "p": [pair.p for pair in pairs],
            "p_adjusted": [pair.p_adjusted for pair in pairs],
            "verdict": [verdict(sign * pair.estimate, pair.p_adjusted) for pair in pairs],
            "near": (np.array(numbers) == best) | (sign * estimates >= -own),
            "scale": "ratio" if measured.ratio else "difference",
            "chance": found.exact.chance,
            "rank": pd.array([ranks.get(n, pd.NA) for n in numbers], dtype="Int64"),
            **_gained(found, numbers),
        },
        index=pd.Index(measured.numbers, name="configuration"),
    )
    if reference is None:
        known_ones = whole["verdict"].ne("unknown")
        whole.loc[whole["rank"].eq(1) & known_ones, "verdict"] = "tie"
        whole.loc[whole["rank"].gt(1) & known_ones, "verdict"] = "worse"
    whole.loc[best, "verdict"] = "best" if reference is None else "reference"
    ordered = whole.iloc[np.argsort(-sign * whole["value"].to_numpy(), kind="stable")]
    ordered.attrs |= {"paired": found.exact.rows is not None, "gains_paired": found.gains_paired}
    ordered.attrs["family"] = found.family
    return ordered


def _gained(found: Tested, numbers: Sequence[int]) -> dict[str, Any]:
    """The columns about the untouched base."""
    gains = [found.gain(number) for number in numbers]
    parts = {name: np.array([getattr(gain, name) for gain in gains]) for name in ("estimate", "low", "high")}
    changes = zip(("gain", "gain_low", "gain_high"), found.measured.change(tuple(parts.values())), strict=True)
    p = [gain.p_adjusted for gain in gains]
    verdicts = [verdict(found.sign * gain.estimate, gain.p_adjusted) for gain in gains]
    return {**dict(changes), "gain_p_adjusted": p, "gained": verdicts}


def verdict(gain: float, p: float) -> str:
    """``better``, ``worse`` or ``tie`` by an adjusted p; ``unknown`` where there is none."""
    if math.isnan(p):
        return "unknown"
    return "tie" if p >= ALPHA else "better" if gain > 0 else "worse"
