"""Tests of differences between configurations, corrected for their number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from peftsweep.analysis.statistics.measured import Measured, measure
from peftsweep.analysis.statistics.trials import (
    ALPHA,
    CREATED,
    MAX_COMPARED,
    SEED,
    SUCCESS,
    TRIAL,
    Floats,
    Predictions,
    identify,
)
from peftsweep.analysis.table.columns import direction, evaluation
from peftsweep.study.record import Status

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


# ---- the untouched base ----------------------------------------------------------------------------


def with_bases(table: pd.DataFrame, column: str) -> tuple[pd.DataFrame, dict[int, int]]:
    """What ``measure`` needs of ``table``, with its untouched bases as configurations; the base of each configuration.

    Bases have the numbers -1, -2 ... There are several bases if quantisations or prompts differ. A base has
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
    if not numbers:
        return {}, False
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
            if first in known and second in known and (result := self.verdict(first, second)) in ("better", "worse"):
                ranks[second if result == "better" else first] += 1
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
    near = np.union1d(order[:MAX_COMPARED], place)
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
