"""What a study varied, what each level of a factor does to a score or a cost, and how much was tried of each method."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from peftsweep.analysis.statistics.comparisons import Tested, holm, tested, verdict
from peftsweep.analysis.statistics.measured import Measured
from peftsweep.analysis.statistics.trials import SEED, SUCCESS, Predictions, identify
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import METHOD, NAME, RANK, TARGETS
from peftsweep.analysis.table.naming import FRACTION, Names, telling
from peftsweep.study.record import Status

GROUP, VARYING = "group", "varying"
MAX_LEVELS = 30  # of a factor; levels of one with more are not compared pair by pair
NUMBERS = ("value", "reference_value", "difference", "low", "high", "p", "p_adjusted")
EFFECTS = (
    "factor",
    "level",
    "reference",
    "contexts",
    "within",
    "agreeing",
    "better_in",
    "worse_in",
    *NUMBERS,
    "verdict",
    "scale",
    "chance",
    "moved",
)
RETURNS = ("level", "value", "gain", "gain_low", "gain_high", "difference", "low", "high", "p_adjusted", "verdict")
STEP = ("step", "step_low", "step_high", "step_p")
# Where a trial ran, which decides what it costs.
PLACE = (
    *("config.device", "meta_info.torch.gpus", "meta_info.system.processor", "run_info.host"),
    *(columns.AT_ONCE, *map(columns.VERSION.format, columns.VERSIONS)),
)


@dataclass(frozen=True)
class Moved:
    """A setting that differs between two levels of a factor beside it, with its values: of both, or ``varying``."""

    key: str
    value: str  # with the level
    reference_value: str


@dataclass(frozen=True)
class Design:
    """What a study varied, and the level of each of these factors in each configuration, as text ("": has none)."""

    factors: list[str]
    levels: pd.DataFrame  # a row a configuration, a column a factor
    settings: pd.DataFrame  # the same of every setting that varies, the seeds and the place, factors or not
    names: Names

    def moved(
        self, first: Sequence[int], second: Sequence[int], factors: Iterable[str], *, place: bool = False
    ) -> list[Moved]:
        """What else differs between configurations ``first`` and those beside them in ``second``.

        That is every setting but ``factors`` and what these consist of; with ``place``, also where they ran.
        """
        keys, texts = self.settings.columns, self._texts
        one, other = (texts[self.settings.index.get_indexer(pd.Index(numbers))] for numbers in (first, second))
        found = []
        for column in np.flatnonzero((one != other).any(axis=0)).tolist():
            key, here, there = str(keys[column]), one[:, column].tolist(), other[:, column].tolist()
            if key == SEED:  # which cell lost a seed matters less than whether a level was given others
                here, there = [_together(here)], [_together(there)]
                if here == there:
                    continue
            if key in factors or (key in PLACE and not place) or any(_part_of(key, f, here, there) for f in factors):
                continue
            values = ((texts[0] or "none") if len(set(texts)) == 1 else VARYING for texts in (here, there))
            found.append(Moved(key, *values))
        return found

    @cached_property
    def _texts(self) -> NDArray[np.object_]:
        return self.settings.to_numpy(dtype=object)

    def moving(self, factor: str) -> list[str]:
        """The settings that differ where configurations differ in ``factor`` alone, of the factors."""
        others = [other for other in self.factors if other != factor]
        groups = self.levels.groupby(others, sort=False).ngroup() if others else 0
        varied = self.settings.assign(**{GROUP: groups}).groupby(GROUP).nunique().max() > 1
        keys = [str(key) for key in varied.index[varied] if key not in (factor, *PLACE)]
        return [key for key in keys if not _part_of(key, factor, self.settings[key].tolist(), ())]


def _together(seeds: Iterable[str]) -> str:
    """The seeds of several configurations, joined by +."""
    return "+".join(sorted({seed for text in seeds for seed in text.split("+") if seed}, key=columns.sortable))


def _part_of(key: str, factor: str, first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether a setting is what the option of a group consists of, not something that was changed beside it.

    A group's options have settings of their own, which others lack. Of those that two methods share, numbers and
    modules are sizes that a person chooses; flags and words (``use_dora``, ``init_lora_weights``) make the method.
    """
    group = factor.removeprefix("choices.")
    if group == factor or not key.startswith((f"config.{group}.", f"config.{group}_")):
        return factor == TARGETS and key == "config.method.target_modules"
    if factor == TARGETS or key.endswith("._target_") or not all((*first, *second)):
        return True
    sizes = all(text.isdecimal() or FRACTION.fullmatch(text) for text in (*first, *second))
    return factor == METHOD and not sizes and not key.endswith("target_modules")


def design(table: pd.DataFrame) -> Design:
    """The factors: choices first, then rank, then other settings, without those that follow from others."""
    numbers = identify(table)
    names = columns.names(table, labelled=False)
    good = table[table[SUCCESS] == Status.success.name] if SUCCESS in table else table
    first = table[~numbers.duplicated()]
    index = pd.Index(numbers[first.index], name="configuration")
    ours = columns.setting_columns(first)
    text = first[ours].astype("string").fillna("").set_axis(index)
    found = telling({key: text[key].tolist() for key in ours})
    if SEED in table:
        seeds = good[SEED].astype("string").groupby(numbers[good.index]).agg(_together)
        text[SEED] = seeds.reindex(index)
    for key in PLACE:
        if key in table and table[key].nunique() > 1:
            ran = good[key].astype("string").groupby(numbers[good.index]).agg(lambda own: "+".join(sorted(set(own))))
            text[key] = ran.reindex(index)
    return Design(found, text[found], text.fillna(""), names)


def factors(table: pd.DataFrame) -> list[str]:
    """The names of the factors of ``design``."""
    return design(table).factors


def effects(
    table: pd.DataFrame,
    column: str,
    predictions: Predictions | None = None,
    references: Mapping[str, str] | None = None,
    plan: Design | None = None,
    known: Tested | None = None,
) -> pd.DataFrame:
    """What each level of each factor does to ``column``, among configurations that are otherwise equal.

    A level is held against the factor's reference, which the fewest levels beat unless ``references`` names one, over
    the ``contexts`` (combinations of the other factors) in which both were measured. Columns: ``factor``, ``level``,
    ``reference``, ``contexts``, ``within`` (the levels of the other factors, where there is one context), ``value``
    and ``reference_value`` (means over these contexts), ``better_in`` and ``worse_in`` (contexts in which the two
    configurations are shown to differ so, of several), ``difference`` with ``low`` to ``high`` (relative to one where
    ``scale`` is ``ratio``), ``p``, ``p_adjusted``, ``verdict`` of the level, ``agreeing`` contexts (whose own
    difference has the same sign), ``chance``, and ``moved``, the settings that differ beside the factor.

    In one context two levels are two configurations, and `Tested` has their comparison; averages over
    several are adjusted for all pairs of levels of all factors. The interval is of these contexts; it does not say that
    the effect is the same in others. Factors of more than 30 levels are passed over. ``plan`` and ``known`` are the
    table's ``design`` and ``tested``, where they are known.
    """
    plan = plan or design(table)
    known = known or tested(table, column, predictions)
    given = references or {}
    rows = [row for factor in plan.factors for row in _effect(known, plan, factor, given.get(factor))] if known else []
    return pd.DataFrame(rows, columns=list(EFFECTS))


def _cells(text: pd.DataFrame, factor: str) -> pd.DataFrame:
    """The places of configurations by level (rows, by size) and context (columns); empty with too many levels."""
    others = [c for c in text.columns if c != factor]
    contexts = zip(*(text[c].tolist() for c in others), strict=True) if others else itertools.repeat(())
    cells: dict[str, dict[Any, int]] = {}
    for place, (level, context) in enumerate(zip(text[factor].tolist(), contexts, strict=False)):
        if level:
            cells.setdefault(level, {}).setdefault(context, place)
    if len(cells) > MAX_LEVELS:
        return pd.DataFrame()
    every = {context: n for n, context in enumerate(dict.fromkeys(c for of_level in cells.values() for c in of_level))}
    levels = sorted(cells, key=columns.sortable)
    found = np.full((len(levels), len(every)), np.nan)
    for row, level in zip(found, levels, strict=True):
        row[[every[context] for context in cells[level]]] = list(cells[level].values())
    return pd.DataFrame(found, index=levels)


@dataclass(frozen=True)
class _Levels:
    """Two levels of a factor, and the places of their configurations, context by context."""

    first: int
    second: int
    places: NDArray[np.int64]  # [2, contexts]


def _level_pairs(cells: pd.DataFrame) -> list[_Levels]:
    """Every two levels that share a context."""
    there, places = cells.notna().to_numpy(), cells.fillna(0).to_numpy(dtype=np.int64)
    found = []
    for first, second in zip(*np.triu_indices(len(cells), 1), strict=True):
        shared = there[[first, second]].all(axis=0)
        if shared.any():
            found.append(_Levels(int(first), int(second), places[[first, second]][:, shared]))
    return found


def _family(plan: Design, measured: Measured) -> int:
    """The number of pairs of levels of all factors: else a study of many factors would show some effect by chance."""
    levels = plan.levels.loc[measured.numbers]
    counts = [levels.loc[levels[factor] != "", factor].nunique() for factor in levels.columns]
    return sum(count * (count - 1) // 2 for count in counts if count <= MAX_LEVELS)


def _compared_levels(known: Tested, pairs: Sequence[_Levels], family: int) -> list[dict[str, float]]:
    """Estimate, interval and p of each pair of levels, first less second.

    Two levels in one context are two configurations, whose difference has been tested. Averages over several contexts
    are a question of their own, in which the ``family`` pairs of levels of all factors are adjusted together.
    """
    measured = known.measured
    weights = np.zeros((len(pairs), len(measured.means)))
    for row, pair in zip(weights, pairs, strict=True):
        row[pair.places[0]] += 1 / pair.places.shape[1]
        row[pair.places[1]] -= 1 / pair.places.shape[1]
    contrasts = measured.contrasts(weights)
    several = np.array([pair.places.shape[1] > 1 for pair in pairs], dtype=bool)
    adjusted = np.full(len(pairs), np.nan)
    adjusted[several] = holm(contrasts.p[several], family)
    parts = zip(contrasts.estimate, *contrasts.interval, contrasts.p, adjusted, strict=True)
    found = [dict(zip(("estimate", "low", "high", "p", "p_adjusted"), map(float, part), strict=True)) for part in parts]
    for n, pair in enumerate(pairs):
        if not several[n]:
            first, second = (int(measured.numbers[place]) for place in pair.places[:, 0])
            found[n] = vars(known.between(first, second))
    return found


def _turned(found: Mapping[str, float]) -> dict[str, float]:
    """The second level less the first."""
    return {**found, "estimate": -found["estimate"], "low": -found["high"], "high": -found["low"]}


def _reference(pairs: Sequence[_Levels], found: Sequence[Mapping[str, float]], count: int, sign: int) -> int:
    """The level that the fewest others have a better figure than; of several such the one held against the most."""
    beaten, held = [0] * count, [0] * count
    for pair, test in zip(pairs, found, strict=True):
        held[pair.first] += 1
        held[pair.second] += 1
        if test["estimate"]:
            beaten[pair.second if sign * test["estimate"] > 0 else pair.first] += 1
    return min(range(count), key=lambda level: (not held[level], beaten[level], -held[level], level))


def _effect(known: Tested, plan: Design, factor: str, named: str | None) -> list[dict[str, Any]]:
    measured, sign = known.measured, known.sign
    cells = _cells(plan.levels.loc[measured.numbers], factor)
    if len(cells) < 2:
        return []
    pairs = _level_pairs(cells)
    found = _compared_levels(known, pairs, _family(plan, measured))
    levels = [str(level) for level in cells.index]
    reference = levels.index(named) if named in levels else _reference(pairs, found, len(cells), sign)
    rows = []
    for pair, test in zip(pairs, found, strict=True):
        if reference not in (pair.first, pair.second):
            continue
        turn = pair.first == reference
        places, test = (pair.places[::-1], _turned(test)) if turn else (pair.places, test)
        names = {"factor": factor, "level": levels[pair.second if turn else pair.first], "reference": levels[reference]}
        more: dict[str, Any] = {"moved": _moved(plan, measured, places, factor), **_shown_in(known, places)}
        more["within"] = _within(plan, measured, places, factor)
        rows.append(names | _figures(measured, places, test, sign) | more)
    return rows


def _shown_in(known: Tested, places: NDArray[np.int64]) -> dict[str, int]:
    """In how many of several contexts the first level's configuration is shown to be better, and worse.

    Pairs that are not tested, most of those beyond the best 40, are passed over: testing each would take long.
    """
    pairs = known.measured.numbers[places].T.tolist() if places.shape[1] > 1 else []
    verdicts = [known.verdict(a, b) for a, b in pairs if (a, b) in known.pairs or (b, a) in known.pairs]
    return {"better_in": verdicts.count("better"), "worse_in": verdicts.count("worse")}


def _figures(measured: Measured, places: NDArray[np.int64], test: Mapping[str, float], sign: int) -> dict[str, Any]:
    """The figures of two levels, at ``places`` [2, contexts]: of the level, and of the one it is compared with."""
    means = measured.means[places]
    (value, reference_value) = measured.back((means[0].mean(), means[1].mean()))
    (difference, low, high) = measured.change(tuple(np.array(test[part]) for part in ("estimate", "low", "high")))
    gaps = means[0] - means[1]
    return {
        "contexts": places.shape[1],
        "agreeing": int((np.sign(gaps) == np.sign(gaps.mean())).sum()),
        "value": float(value),
        "reference_value": float(reference_value),
        "difference": float(difference),
        "low": float(low),
        "high": float(high),
        "p": test["p"],
        "p_adjusted": test["p_adjusted"],
        "verdict": verdict(sign * test["estimate"], test["p_adjusted"]),
        "scale": "ratio" if measured.ratio else "difference",
        "chance": measured.chance,
    }


def _moved(plan: Design, measured: Measured, places: NDArray[np.int64], factor: str) -> list[Moved]:
    cost = not measured.column.startswith("eval_info.")
    first, second = measured.numbers[places].tolist()
    return plan.moved(first, second, [factor], place=cost)


def _within(plan: Design, measured: Measured, places: NDArray[np.int64], factor: str) -> dict[str, str]:
    """The levels of the other factors in the one context of two levels; empty where there are several contexts."""
    if places.shape[1] > 1:
        return {}
    own = plan.levels.loc[measured.numbers[places[0, 0]]]
    return {other: own[other] for other in plan.factors if other != factor and own[other]}


def returns(
    table: pd.DataFrame,
    column: str,
    plan: Design | None = None,
    known: Tested | None = None,
) -> pd.DataFrame:
    """Diminishing returns: what each doubling of the rank brought, a row a level, smallest first.

    Averaged over the ``contexts`` (combinations of the other factors) in which every level was measured, or over the
    one with the most levels. Columns: ``level``, ``value``; ``gain`` per doubling since the level before, with
    ``gain_low`` to ``gain_high``, relative to one for ratios, positive for the better; ``difference`` from the best
    level with ``low``, ``high``, ``p_adjusted`` and ``verdict``, as `effects` has them. The first level that is
    ``best`` or a ``tie`` is the smallest that is not shown to be worse than the best one. ``step``, ``step_low``,
    ``step_high`` and ``step_p`` (adjusted) compare a level with the one before it. ``moved`` are the settings that
    differ from the best level's beside the factor; ``better_in`` and ``worse_in`` are as `effects` has them.
    """
    names = [*RETURNS, *STEP, "better_in", "worse_in", "contexts", "within", "scale", "moved"]
    plan = plan or design(table)
    known = known or tested(table, column)
    cells = _cells(plan.levels.loc[known.measured.numbers], RANK) if known and RANK in plan.factors else None
    if known is None or cells is None or not cells.size:
        return pd.DataFrame(columns=names)
    complete = cells.loc[:, cells.notna().all()]
    if complete.empty:
        complete = cells[[cells.notna().sum().idxmax()]].dropna()
    if len(complete) < 2:
        return pd.DataFrame(columns=names)
    measured, sign = known.measured, known.sign
    places = complete.to_numpy(dtype=np.int64)
    levels = np.zeros((len(complete), len(measured.means)))
    for row, of_level in zip(levels, places, strict=True):
        row[of_level] = 1 / len(of_level)
    size = np.array([float(level) for level in complete.index])
    gains = measured.contrasts(sign * np.diff(levels, axis=0) / np.diff(np.log2(size))[:, None])
    pairs = _level_pairs(complete)
    found = _compared_levels(known, pairs, _family(plan, measured))
    best = int(np.argmax(sign * (levels @ measured.means)))
    against = {pair.second: _turned(test) for pair, test in zip(pairs, found, strict=True) if pair.first == best}
    against |= {pair.first: test for pair, test in zip(pairs, found, strict=True) if pair.second == best}
    whole = pd.DataFrame({"level": size, "value": measured.back((levels @ measured.means,))[0]})
    gained = [*measured.change((gains.estimate,)), *measured.change(gains.interval)]
    for name, part in zip(RETURNS[2:5], gained, strict=True):
        whole[name] = np.append(np.nan, part)
    since = {
        pair.second: _turned(test) for pair, test in zip(pairs, found, strict=True) if pair.second == pair.first + 1
    }
    alone = {"estimate": 0.0, "low": 0.0, "high": 0.0, "p": np.nan, "p_adjusted": np.nan}
    rows = []
    for level in range(len(complete)):
        both = places[[level, best]]
        moved = _moved(plan, measured, both, RANK) if level != best else []
        step = _figures(measured, places[[level, max(0, level - 1)]], since.get(level, alone), sign)
        steps: dict[str, Any] = {
            name: step[part] for name, part in zip(STEP, ("difference", "low", "high", "p_adjusted"), strict=True)
        }
        steps |= {"moved": moved, "within": _within(plan, measured, places, RANK)}
        steps |= _shown_in(known, both)
        rows.append(_figures(measured, both, against.get(level, alone), sign) | steps)
    more = [*STEP, "better_in", "worse_in", "within", "difference", "low", "high", "p_adjusted", "verdict"]
    more += ["contexts", "scale", "moved"]
    whole = whole.join(pd.DataFrame(rows)[more])
    whole.loc[best, "verdict"] = "best"
    return whole


def budget(table: pd.DataFrame) -> pd.DataFrame:
    """How much was tried of each method: ``configurations``, ``learning_rates``, ``ranks``, ``steps``, ``seeds``.

    The best of many tries is better than the best of few by luck alone, so a method that was given more of them
    has an advantage that no test here takes away. ``steps`` is the median, ``seeds`` that of each configuration.
    """
    if METHOD not in table:
        return pd.DataFrame()
    trials = table.assign(configuration=identify(table))
    counted = {
        "configurations": ("configuration", "nunique"),
        "learning_rates": ("config.train.learning_rate", "nunique"),
        "ranks": (RANK, "nunique"),
        "steps": ("config.train.steps", "median"),
    }
    there = {name: how for name, how in counted.items() if how[0] in trials}
    found = trials.groupby(METHOD).agg(**there)
    if SEED in trials:
        seeds = trials.groupby([METHOD, "configuration"])[SEED].nunique()
        found["seeds"] = seeds.groupby(level=0).median()
    return pd.DataFrame(found)


def labels(table: pd.DataFrame) -> pd.Series[str]:
    """What each configuration is called, by its number: the name it was given, or what tells it from the others."""
    first = table[~identify(table).duplicated()]
    names = first[NAME] if NAME in first else columns.named(table).loc[first.index]
    index = pd.Index(identify(table)[first.index], name="configuration")
    return names.astype("string").set_axis(index)
