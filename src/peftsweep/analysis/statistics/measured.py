"""The mean of a configuration over seeds and test rows, its variance, and contrasts of several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special  # scipy.stats takes longer to load than a small study to collect

from peftsweep.analysis.statistics.intervals import clopper_pearson, mcnemar, paired_interval
from peftsweep.analysis.statistics.trials import (
    ALPHA,
    CORRECT_COLUMNS,
    CREATED,
    MAX_READ,
    SEED,
    SUCCESS,
    TRIAL,
    Floats,
    Predictions,
    as_floats,
    binomial,
    identify,
    is_ratio,
    is_share,
    one_a_seed,
)
from peftsweep.analysis.table.columns import evaluation
from peftsweep.study.record import Status
from peftsweep.study.scores import OF_100

# ---- one measured column, and contrasts of configurations ------------------------------------------


@dataclass(frozen=True)
class Contrasts:
    """Estimates with their uncertainty, one a contrast; of logarithms where the column is compared by ratios."""

    estimate: Floats
    stderr: Floats  # missing where nothing tells it
    df: Floats
    exact: Floats  # [3, c]: p and the ends of the interval where they follow from counts of rows, else missing
    limits: tuple[Floats, Floats] | None = None  # what no contrast can lie below or above
    centre: Floats | None = None  # of p and the interval, where that is not the estimate

    @property
    def _centre(self) -> Floats:
        return self.estimate if self.centre is None else self.centre

    @property
    def p(self) -> Floats:
        """Two-sided, against no difference. Of a cost without any spread (bytes on a disk) a difference is certain."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(self.estimate == 0, 0.0, np.abs(self._centre) / self.stderr)
        found: Floats = np.where(np.isnan(self.stderr) & (self.estimate != 0), np.nan, 2 * special.stdtr(self.df, -t))
        return np.where(np.isnan(self.exact[0]), found, self.exact[0])

    @property
    def interval(self) -> tuple[Floats, Floats]:
        """The ends of the 95% interval of each."""
        half = special.stdtrit(self.df, 1 - ALPHA / 2) * self.stderr
        low, high = np.where(np.isnan(self.exact[1:]), [self._centre - half, self._centre + half], self.exact[1:])
        if self.limits is None:
            return low, high
        return np.maximum(low, self.limits[0]), np.minimum(high, self.limits[1])


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
    unlike_rows: bool = False  # whether it is known that not all were judged on the same rows
    shrunk: Floats | None = None  # [k] means, those of right and wrong answers with a right and a wrong one more

    @property
    def chance(self) -> str | None:
        """What the uncertainty covers: seeds, rows or both; None where there is only one seed of a cost."""
        seeds = bool((self.seeds > 1).any())
        rows = self.rows is not None or self.unlike_rows or not seeds
        known = [name for name, there in (("seeds", seeds), ("rows", rows and not self._no_rows)) if there]
        return " and ".join(known) or None

    @property
    def _no_rows(self) -> bool:
        return self.rows is None and bool(np.isnan(self.stderrs).all())

    @property
    def shares(self) -> bool:
        """Whether the score is a share of rows, whose scores are known: 1 for right, 0 for wrong, means over seeds."""
        if evaluation(self.column)[1] in OF_100:
            return False
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
        squares = weights**2
        if self.rows is not None:
            by_rows = self._by_rows(weights)
        elif rows_of_their_own or self.unlike_rows or not (self.seeds > 1).any():
            by_rows = self._by_stderrs(squares)
        else:
            by_rows = np.zeros(len(weights))
        # The configurations' variances share their average, so errors of theirs add up and do not cancel.
        by_seeds, spread = squares @ alone, (squares @ (whole / np.sqrt(seed_freedom))) ** 2
        found = self._with_rows(weights @ self.means, by_seeds, spread, by_rows)
        unknown = self.column.endswith(".value") & (found.stderr == 0) & weights.any(axis=1)  # a score always has some
        found = dataclasses.replace(found, stderr=np.where(unknown, np.nan, found.stderr))
        if self.rows is None and self.shrunk is not None:
            found = dataclasses.replace(found, centre=weights @ self.shrunk)
        if is_share(self.column, pd.Series(self.means)) and not self.ratio:
            limits = np.minimum(weights, 0).sum(axis=1), np.maximum(weights, 0).sum(axis=1)
            found = dataclasses.replace(found, limits=limits)
        return dataclasses.replace(found, exact=self._counted(weights)) if self.one_model_each else found

    def _by_stderrs(self, squares: Floats) -> Floats:
        """The variance of contrasts over rows of their own; missing for those with a configuration that has none.

        A missing standard error makes nothing of the contrasts that have no part of its configuration.
        """
        variances = self.stderrs**2
        missing = ~np.isfinite(variances)
        found: Floats = squares @ np.where(missing, 0.0, variances)
        return np.where((squares[:, missing] > 0).any(axis=1), np.nan, found)

    @property
    def varies(self) -> NDArray[np.bool_]:
        """Whether it is known how much the score of each configuration varies with seeds or rows, [k]."""
        if self.rows is not None or ((self.seeds > 1).any() and not self.unlike_rows):
            return np.ones(len(self.means), dtype=bool)
        return np.isfinite(self.stderrs)

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
        """The contrasts with these parts of their variance; ``spread`` is half the sampling variance of ``by_seeds``.

        The degrees of freedom are Satterthwaite's, at least 1.
        """
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
        by_rows = self.stderrs**2 if self.unlike_rows else np.zeros(len(self.means))
        if self.rows is not None:
            by_rows = self.rows.var(axis=1, ddof=1) / self.rows.shape[1]
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
        """Those of shares, from as many rows as would vary so, of one trained model each (Korn and Graubard, 1998).

        Where the standard error is more than p (1 - p), as that of a share of 0 whose seeds are taken to vary as others
        do, that leaves next to no row and an interval from 0 to 1. Then each end is the nearer one of these and of
        Student's interval with two rows more, but no nearer than that of the exact one of the rows alone.
        """
        rows = cast(Floats, self.rows).shape[1]
        varies = self.means * (1 - self.means)
        with np.errstate(divide="ignore", invalid="ignore"):
            effective = 1 + varies / spread.stderr**2
        quantiles = special.stdtrit(rows - 1, 1 - ALPHA / 2) / special.stdtrit(spread.df, 1 - ALPHA / 2)
        n = np.where(spread.stderr > 0, effective * quantiles**2, rows)
        low, high = clopper_pearson(self.means * n, n)
        least_low, least_high = clopper_pearson(self.means * rows, np.full(len(self.means), float(rows)))
        students = self.contrasts(np.eye(len(self.means))).interval
        wide = spread.stderr > varies
        low = np.where(wide, np.minimum(least_low, np.maximum(low, students[0])), low)
        return low, np.where(wide, np.maximum(least_high, np.minimum(high, students[1])), high)

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
        elif self.unlike_rows or not (self.seeds > 1).any():
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
    there = table[SUCCESS].eq(Status.success.name).to_numpy(dtype=bool, na_value=False)
    there = there & np.isfinite(table[column].to_numpy(dtype=np.float64, na_value=np.nan))
    if only is not None:
        there = there & np.isin(numbers.to_numpy(dtype=np.int64), only)
    if not there.all():  # else nothing need be copied
        table, numbers = table[there], numbers[there]
    trials = one_a_seed(table, numbers)
    values = trials[column].astype("float64")
    ratio = is_ratio(column, values)
    stderr = trials[f"{stem}stderr"].astype("float64") if f"{stem}stderr" in trials else values * np.nan
    centres = values
    if f"{stem}n" in trials:  # right and wrong answers: with a right and a wrong one more
        n = trials[f"{stem}n"].astype("float64")
        share, counts_rows = (values * n + 1) / (n + 2), binomial(column, values, stderr, n)
        stderr = stderr.mask(counts_rows, (share * (1 - share) / (n + 1)) ** 0.5)
        centres = values.mask(counts_rows, share)
    if ratio:
        values, stderr = values.transform("log"), stderr / values
    groups = values.groupby(trials["configuration"])
    seeds = groups.count()
    places = np.searchsorted(seeds.index.to_numpy(dtype=np.int64), trials["configuration"].to_numpy(dtype=np.int64))
    counts = np.asarray(seeds, dtype=np.int64)
    between = as_floats(groups.var())
    counted = f"{stem}n" in trials and trials[f"{stem}n"].nunique() > 1
    by_row, others = _by_row(trials, column, as_floats(values), predictions) if predictions else (None, False)
    rows, answered = None, np.zeros(len(counts))
    if by_row is not None:
        rows = _sums(by_row, places, len(seeds)) / counts[:, None]
        answered = _interaction(by_row, rows, places, counts)
    return Measured(
        column,
        ratio,
        seeds.index.to_numpy(dtype=np.int64),
        as_floats(groups.mean()),
        counts,
        between,
        answered,
        rows,
        as_floats(stderr.groupby(trials["configuration"]).mean()),
        counted or others,
        None if ratio or (seeds > 1).any() else as_floats(centres.groupby(trials["configuration"]).mean()),
    )


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


def _by_row(trials: pd.DataFrame, column: str, values: Floats, predictions: Predictions) -> tuple[Floats | None, bool]:
    """Each trial's score of each test row [trials, rows], None unless all were judged on the same rows.

    And whether it was seen that they were not.
    """
    name, metric = evaluation(column)
    if (trials["configuration"] >= 0).sum() > MAX_READ or not column.endswith(".value"):
        return None, False
    found: list[Floats] = []
    prompts: list[Any] = []
    for trial, value in zip(trials[TRIAL], values, strict=True):
        lines = predictions(trial, name)
        row = row_scores(lines, metric)
        prompts = prompts or _prompts(lines)
        # What the rows come to must be what the record says: a file may be of another run. A NaN is never close.
        if row is None or len(row) < 2 or not abs(row.mean() - value) <= 1e-6 * max(1, abs(value)):
            return None, False
        if prompts != _prompts(lines):
            return None, True
        found.append(row)
    return (np.stack(found), False) if found else (None, False)


def _prompts(lines: Sequence[dict[str, Any]]) -> list[Any]:
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
    key = CORRECT_COLUMNS.get(metric, "")
    return np.array([line[key] for line in lines], dtype=float) if key in lines[0] else None
