"""What a study varied, and what each level of it does: to a score, to a cost, and for how many tries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.answer import columns
from peftsweep.answer.columns import METHOD, RANK, direction
from peftsweep.answer.stats import SEED, Measured, Predictions, holm, identify, measure, settings, verdict

MOST_LEVELS = 30  # of a factor whose levels are held against each other


@dataclass(frozen=True)
class Design:
    """What a study varied, and the level of each of these factors in each configuration, as text ("": has none)."""

    factors: list[str]
    levels: pd.DataFrame  # a row a configuration, a column a factor


def design(table: pd.DataFrame) -> Design:
    """The factors: choices first, then rank, then other settings, without those that follow from others."""
    numbers = identify(table)
    first = table[~numbers.duplicated()]
    keys = [c for c in settings(table) if table[c].nunique(dropna=False) > 1]
    text = first[keys].astype("string").fillna("")
    text.index = pd.Index(numbers[first.index], name="configuration")
    chosen = [c for c in keys if c.startswith("choices.")]
    found: list[str] = [c for c in chosen if not _follows(text, c, [o for o in chosen if o < c])]
    rest = [c for c in keys if c.startswith("config.")]
    for column in sorted(rest, key=lambda c: (c != RANK, text[c].nunique())):
        if not _follows(text, column, found):
            found.append(column)
    return Design(found, text[found])


def factors(table: pd.DataFrame) -> list[str]:
    """The names of the factors of ``design``."""
    return design(table).factors


def _follows(text: pd.DataFrame, column: str, others: Sequence[str]) -> bool:
    """Whether ``column`` is told by the choices among ``others``, or by them and one setting more."""
    chosen = [c for c in others if c.startswith("choices.")]
    for known in [chosen, *([*chosen, c] for c in others if c not in chosen)]:
        if known and text.groupby(known)[column].nunique().max() <= 1:
            return True
    return False


def effects(
    table: pd.DataFrame,
    column: str,
    predictions: Predictions | None = None,
    references: Mapping[str, str] | None = None,
    plan: Design | None = None,
) -> pd.DataFrame:
    """What each level of each factor does to ``column``, among configurations that are otherwise equal.

    A level is held against the factor's reference, the best level on average unless ``references`` names one, over
    the ``contexts`` (combinations of the other factors) in which both were measured. Columns: ``factor``, ``level``,
    ``reference``, ``contexts``, ``value`` and ``reference_value`` (means over these contexts), ``difference`` with
    ``low`` to ``high`` (relative to one where ``scale`` is ``ratio``), ``p``, ``p_adjusted`` for all pairs of levels
    of the factor, ``verdict`` of the level, ``agreeing`` contexts (whose own difference has the same sign) and
    ``chance``. The interval is of these contexts; it does not say that the effect is the same in others. Factors of
    more than 30 levels are passed over. ``plan`` is the table's ``design``, where it is known.
    """
    plan = plan or design(table)
    measured = measure(table, column, predictions)
    levels, given = plan.levels.loc[measured.numbers], references or {}
    rows = [row for factor in plan.factors for row in _effect(measured, levels, factor, given.get(factor))]
    names = ["factor", "level", "reference", "contexts", "value", "reference_value", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=[*names, "p", "p_adjusted", "verdict", "agreeing", "scale", "chance"])


def _cells(text: pd.DataFrame, factor: str) -> pd.DataFrame:
    """The places of configurations by level (rows, by size) and context (columns); empty with too many levels."""
    others = [c for c in text.columns if c != factor]
    frame = pd.DataFrame({"level": text[factor].to_numpy(), "place": np.arange(len(text))})
    frame["context"] = text.groupby(others, sort=False).ngroup().to_numpy() if others and len(text) else 0
    frame = frame[frame["level"] != ""].drop_duplicates(["level", "context"])
    if frame["level"].nunique() > MOST_LEVELS:
        return pd.DataFrame()
    cells = frame.set_index(["level", "context"])["place"].unstack()
    return cells.loc[sorted(cells.index, key=_number)]


def _number(level: str) -> tuple[int, float, str]:
    """By size where it is a number."""
    try:
        return 0, float(level), ""
    except ValueError:
        return 1, 0.0, level


def _effect(measured: Measured, text: pd.DataFrame, factor: str, named: str | None) -> list[dict[str, Any]]:
    cells = _cells(text, factor)
    if len(cells) < 2:
        return []
    sign = direction(measured.column) or 1
    there = cells.notna().to_numpy()
    places = cells.fillna(0).to_numpy(dtype=np.int64)
    means = np.where(there, measured.means[places], np.nan)
    complete = there.all(axis=0)
    of_levels = np.nanmean(means[:, complete] if complete.any() else means, axis=1)
    reference = list(cells.index).index(named) if named in cells.index else int(np.argmax(sign * of_levels))
    rows, weights = [], []
    for level in range(len(cells)):
        shared = there[[level, reference]].all(axis=0)
        if level == reference or not shared.any():
            continue
        weight = np.zeros(len(measured.means))
        weight[places[level, shared]] += 1 / shared.sum()
        weight[places[reference, shared]] -= 1 / shared.sum()
        weights.append(weight)
        gaps = means[level, shared] - means[reference, shared]
        (value, reference_value) = measured.back((means[level, shared].mean(), means[reference, shared].mean()))
        rows.append(
            {
                "factor": factor,
                "level": str(cells.index[level]),
                "reference": str(cells.index[reference]),
                "contexts": int(shared.sum()),
                "value": float(value),
                "reference_value": float(reference_value),
                "agreeing": int((np.sign(gaps) == np.sign(gaps.mean())).sum()),
            }
        )
    if not rows:
        return []
    contrasts = measured.contrasts(np.stack(weights))
    p = contrasts.p
    adjusted = holm(p, len(cells) * (len(cells) - 1) // 2)
    (low, high), (difference,) = measured.change(contrasts.interval), measured.change((contrasts.estimate,))
    for n, row in enumerate(rows):
        row |= {"difference": difference[n], "low": low[n], "high": high[n], "p": p[n], "p_adjusted": adjusted[n]}
        row |= {"verdict": verdict(sign * difference[n], adjusted[n]), "chance": measured.chance}
        row["scale"] = "ratio" if measured.ratio else "difference"
    return rows


def returns(
    table: pd.DataFrame,
    column: str,
    predictions: Predictions | None = None,
    factor: str = RANK,
    plan: Design | None = None,
) -> pd.DataFrame:
    """Diminishing returns: what each doubling of ``factor`` brought, a row a level, smallest first.

    Averaged over the ``contexts`` (combinations of the other factors) in which every level was measured, or over the
    one with the most levels. Columns: ``level``, ``value``; ``gain`` per doubling since the level before, with
    ``gain_low`` to ``gain_high``, relative to one for ratios, positive for the better; ``difference`` from the best
    level with ``low``, ``high``, ``p_adjusted`` for all pairs and ``verdict``. The first level that is ``best`` or a
    ``tie`` is the smallest that is not separable from the best one.
    """
    names = ["level", "value", "gain", "gain_low", "gain_high", "difference", "low", "high", "p_adjusted", "verdict"]
    plan = plan or design(table)
    if factor not in plan.factors:
        return pd.DataFrame(columns=[*names, "contexts"])
    measured = measure(table, column, predictions)
    cells = _cells(plan.levels.loc[measured.numbers], factor)
    complete = cells.loc[:, cells.notna().all()]
    if complete.empty:
        context = cells.notna().sum().idxmax() if cells.size else None
        complete = cells[[context]].dropna() if context is not None else cells
    if len(complete) < 2:
        return pd.DataFrame(columns=[*names, "contexts"])
    sign = direction(column) or 1
    levels = np.zeros((len(complete), len(measured.means)))
    for n, places in enumerate(complete.to_numpy(dtype=int)):
        levels[n, places] = 1 / len(places)
    size = np.array([float(level) for level in complete.index])
    doublings = np.diff(np.log2(size))[:, None]
    gains = measured.contrasts(sign * np.diff(levels, axis=0) / doublings)
    best = int(np.argmax(sign * (levels @ measured.means)))
    against = measured.contrasts(levels - levels[best])
    others = np.arange(len(size)) != best
    adjusted = np.full(len(size), np.nan)
    adjusted[others] = holm(against.p[others], len(size) * (len(size) - 1) // 2)
    (low, high), (difference,) = measured.change(against.interval), measured.change((against.estimate,))
    gained = [*measured.change((gains.estimate,)), *measured.change(gains.interval)]
    verdicts = [verdict(sign * d, a) for d, a in zip(difference, adjusted, strict=True)]
    verdicts[best] = "best"
    whole: dict[str, Any] = {"level": size, "value": measured.back((levels @ measured.means,))[0]}
    whole |= {name: np.append(np.nan, part) for name, part in zip(names[2:5], gained, strict=True)}
    whole |= {"difference": difference, "low": low, "high": high, "p_adjusted": adjusted}
    whole |= {"verdict": verdicts, "contexts": complete.shape[1], "scale": "ratio" if measured.ratio else "difference"}
    return pd.DataFrame(whole)


def budget(table: pd.DataFrame, by: str = METHOD) -> pd.DataFrame:
    """How much was tried of each method: ``configurations``, ``learning_rates``, ``ranks``, ``steps``, ``seeds``.

    The best of many tries is better than the best of few by luck alone, so a method that was given more of them
    has an advantage that no test here takes away. ``steps`` is the median, ``seeds`` that of each configuration.
    """
    if by not in table:
        return pd.DataFrame()
    trials = table.assign(configuration=identify(table))
    counted = {
        "configurations": ("configuration", "nunique"),
        "learning_rates": ("config.train.learning_rate", "nunique"),
        "ranks": (RANK, "nunique"),
        "steps": ("config.train.steps", "median"),
    }
    there = {name: how for name, how in counted.items() if how[0] in trials}
    found = trials.groupby(by).agg(**there)
    if SEED in trials:
        seeds = trials.groupby([by, "configuration"])[SEED].nunique()
        found["seeds"] = seeds.groupby(level=0).median()
    return pd.DataFrame(found)


def labels(table: pd.DataFrame, plan: Design | None = None) -> pd.Series[str]:
    """What each configuration is called: the name it was given, else its method and factors, ``lora, 4bit, r=8``."""
    plan = plan or design(table)
    first = table[~identify(table).duplicated()].set_axis(plan.levels.index)
    given = first["config.label"] if "config.label" in first else pd.Series(dtype="string")
    if len(given) and given.notna().all() and given.is_unique:
        return given.astype("string")
    method = [METHOD] if METHOD in first and METHOD not in plan.factors else []
    return columns.labels(first, [*method, *plan.factors]).astype("string")
