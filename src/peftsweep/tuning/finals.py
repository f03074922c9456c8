"""Finalists on the test rows: when a difference between them is shown, and the ranks of a league.

A tuning looks at the same comparison after every seed, and stops as soon as it is decided. With a 95% interval at each
look, one of them would be wrong in far more than 5% of tunings. So the error of 5% is spent over the looks (Lan and
DeMets, Biometrika 70, 1983): look k has ALPHA / (k (k + 1)), and these add up to at most ALPHA for any number of looks.
By Boole's inequality all intervals of a tuning hold together in at least 95% of tunings, whatever it does between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import special  # scipy.stats takes longer to load than a small study to collect

from peftsweep.analysis.statistics.comparisons import Tested, compare, tested
from peftsweep.analysis.statistics.measured import Measured, measure
from peftsweep.analysis.statistics.trials import ALPHA, CREATED, SEED, SUCCESS, TRIAL, is_ratio
from peftsweep.analysis.table.columns import direction, evaluation
from peftsweep.study.record import Status

POWER = 0.8  # probability with which a league shows the difference league.difference, if that is the true one
MAX_SEEDS = 1000  # the most seeds that a league proposes
CONTESTANT = "choices.method"  # the column of a table of finals that holds the contestant
BETTER, WORSE, TIE, OPEN = "better", "worse", "tie", "open"


@dataclass(frozen=True)
class BaseScore:
    """The score of the untouched base on the same test rows."""

    answers: str  # the file of its answers in the study, which differs between bases
    value: float
    stderr: float | None
    n: int | None
    lines: Sequence[dict[str, Any]]  # of its answers, a line a test row


@dataclass(frozen=True)
class Judged:
    """The scores of one trial on its test rows."""

    trial: str
    value: float
    stderr: float | None
    n: int | None
    lines: Sequence[dict[str, Any]]  # of its predictions, a line a test row
    base: BaseScore | None = None  # if that is known


Finals = Mapping[str, Mapping[int, Judged]]  # contestant -> seed -> score


def table(column: str, finals: Finals) -> pd.DataFrame:
    """The finals as a table for the statistics: a row for each trial, which differ in contestant and seed alone."""
    stem = column.removesuffix("value")
    rows = [
        {TRIAL: one.trial, SUCCESS: Status.success.name, CREATED: "", CONTESTANT: contestant, SEED: seed}
        | {column: one.value, f"{stem}stderr": one.stderr, f"{stem}n": one.n}
        for contestant, judged in finals.items()
        for seed, one in judged.items()
    ]
    return pd.DataFrame(rows)


def mean(column: str, judged: Mapping[int, Judged]) -> float:
    """The mean of a finalist over its seeds, as the comparisons take it: of perplexities the geometric mean."""
    values = [one.value for one in judged.values()]
    if is_ratio(column, values):
        return math.exp(sum(map(math.log, values)) / len(values))
    return sum(values) / len(values)


def _lines(finals: Finals) -> dict[str, Sequence[dict[str, Any]]]:
    return {one.trial: one.lines for judged in finals.values() for one in judged.values()}


# ---- against the untouched base --------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """The gain of a finalist over the untouched base; a ratio where ``scale`` is ``ratio``."""

    value: float  # of the base
    gain: float
    low: float
    high: float
    p: float  # adjusted for all pairs of finalists and bases, by Holm's method
    scale: str
    verdict: str  # better, worse, tie, or unknown without an estimate of the noise


def gain(column: str, finals: Finals, finalist: str) -> Gain | None:
    """The gain of ``finalist``, tested as in a report; None where no score of its base is known."""
    own = [one for judged in finals.values() for one in judged.values()]
    base = next((one.base for one in finals[finalist].values() if one.base), None)
    if base is None:
        return None
    name, metric = evaluation(column)
    stem = f"eval_info.{name}.base_{metric}."
    rows = table(column, finals)
    rows[f"eval_info.{name}.base_predictions"] = [one.base.answers or None if one.base else None for one in own]
    for part in ("value", "stderr", "n"):
        rows[stem + part] = pd.array([getattr(one.base, part, None) for one in own], dtype="Float64")
    lines = _lines(finals) | {one.base.answers: one.base.lines for one in own if one.base}
    compared = compare(rows, column, lambda trial, _: list(lines.get(trial, ())))
    found = compared.to_dict("index")[list(finals).index(finalist)]
    value, low, high, p = (float(found[key]) for key in ("gain", "gain_low", "gain_high", "gain_p_adjusted"))
    return Gain(base.value, value, low, high, p, found["scale"], found["gained"])


# ---- sequential looks ------------------------------------------------------------------------------


def spent_at(look: int) -> float:
    """The share of ALPHA of look number ``look``, counted from 1."""
    return ALPHA / (look * (look + 1))


@dataclass(frozen=True)
class Look:
    """The comparison of two finalists at look ``number``, with an interval that holds at all looks together.

    Estimate and interval say how much better the first is: a difference, or for perplexities the logarithm of a ratio.
    """

    number: int
    estimate: float
    low: float
    high: float
    verdict: str  # of the first: better, worse, tie, or open
    by_rows: float  # half the width that the interval would keep with any number of seeds


def look(column: str, finals: Finals, first: str, second: str, number: int, tie: float, rivals: int = 1) -> Look:
    """Compare two finalists at look ``number``; the error of 5% covers ``rivals`` such comparisons together."""
    lines = _lines(finals)
    found = measure(table(column, finals), column, lambda trial, _: lines[trial])
    places = {name: place for place, name in enumerate(finals)}
    weights = np.zeros((1, len(places)))
    weights[0, places[first]], weights[0, places[second]] = 1.0, -1.0
    weights *= direction(column) or 1
    contrast, level = found.contrasts(weights), spent_at(number) / rivals
    estimate, stderr, df = (float(part[0]) for part in (contrast.estimate, contrast.stderr, contrast.df))
    half = float(special.stdtrit(df, 1 - level / 2)) * stderr
    by_rows = float(special.ndtri(1 - level / 2)) * math.sqrt(_variance_of_rows(found, weights))
    verdict = _verdict(estimate - half, estimate + half, math.log1p(tie) if found.ratio else tie)
    return Look(number, estimate, estimate - half, estimate + half, verdict, by_rows)


def _verdict(low: float, high: float, tie: float) -> str:
    if low > 0:
        return BETTER
    if high < 0:
        return WORSE
    return TIE if -tie <= low and high <= tie else OPEN


def _variance_of_rows(found: Measured, weights: Any) -> float:
    """The part of a contrast's variance that more seeds do not reduce; 0 where the rows are not known.

    It is the variance over test rows minus the part that comes from different answers of the seeds to the same row.
    """
    if found.rows is None:
        return 0.0
    apart = weights[0] @ found.rows
    by_seeds = float(weights[0] ** 2 @ (np.nan_to_num(found.answered) / found.seeds))
    return max(float(apart.var(ddof=1)) / len(apart) - by_seeds, 0.0)


def undecidable(one: Look, tie: float) -> bool:
    """Whether more seeds cannot decide the comparison, because the noise of the test rows alone is too large."""
    return one.verdict == OPEN and one.by_rows > max(tie, abs(one.estimate))


# ---- a league --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """A contestant of a league."""

    contestant: str
    value: float
    rank: int  # one more than the number of contestants that are better for certain
    seeds: int


@dataclass(frozen=True)
class League:
    """The result of the finals of a league."""

    standings: list[Standing]  # the best first
    placebo: str  # the verdict on the placebo against the method that it copies
    placebo_better: bool  # whether one of these two is called better, which only chance can cause
    wins: int  # the pairs of finals in which the placebo had the better score
    pairs: int  # all pairs of a final of the placebo and one of the method
    seeds: int | None  # that show league.difference; None where no number is enough on these test rows


def league(column: str, finals: Finals, method: str, placebo: str, difference: float) -> League:
    """Rank the contestants: each pair tested once, all adjusted together by Holm's method."""
    lines = _lines(finals)
    found = tested(table(column, finals), column, lambda trial, _: lines[trial])
    assert found is not None
    names, sign = list(finals), found.sign
    ranks, means = found.ranks(), found.measured.back((found.measured.means,))[0]
    standings = [
        Standing(names[number], float(means[place]), ranks.get(number, len(names)), int(found.measured.seeds[place]))
        for place, number in enumerate(found.measured.numbers.tolist())
    ]
    pairs = [sign * (own.value - other.value) for own in finals[placebo].values() for other in finals[method].values()]
    found_verdict = found.verdict(names.index(placebo), names.index(method))
    return League(
        sorted(standings, key=lambda one: -sign * one.value),
        found_verdict,
        found_verdict in (BETTER, WORSE),
        sum(pair > 0 for pair in pairs),
        len(pairs),
        seeds_needed(found, difference),
    )


def seeds_needed(found: Tested, difference: float) -> int | None:
    """Seeds of each contestant with which a true ``difference`` is found in 80% of leagues.

    From the variance between seeds and that over test rows as this league has measured them, averaged over its pairs,
    at the level of the smallest p of Holm's method, by Student's t with the degrees of freedom of all seeds together.
    As in the test itself a contestant is taken to vary at least as all do on average. None where the test rows alone
    leave more doubt than that, or nothing has varied yet, so that how much it may is not known.
    """
    measured = found.exact
    wanted = math.log1p(difference) if measured.ratio else difference
    several = measured.seeds > 1
    varied = measured.between[several]
    between = float(np.maximum(varied, varied.mean()).mean()) if several.any() else 0.0
    count = len(measured.means)
    pairs = [np.eye(count)[[a]] - np.eye(count)[[b]] for a in range(count) for b in range(a)]
    rows = float(np.mean([_variance_of_rows(measured, pair) for pair in pairs])) if pairs else 0.0
    if not between and not rows:
        return None
    for seeds in range(2, MAX_SEEDS + 1):
        quantile = special.stdtrit(count * (seeds - 1), 1 - ALPHA / found.family / 2) + special.ndtri(POWER)
        if quantile**2 * (2 * between / seeds + rows) <= wanted**2:
            return seeds
    return None
