"""The trials of a table: which of them are one configuration, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peftsweep.analysis.statistics import intervals
from peftsweep.analysis.table import naming
from peftsweep.analysis.table.columns import NAME, direction, evaluation, named, setting_columns
from peftsweep.study.record import Status
from peftsweep.study.scores import OF_100, TEXT_PARTS

Floats = intervals.Floats
Predictions = Callable[[str, str], Sequence[dict[str, Any]]]

ALPHA = intervals.ALPHA
SUCCESS, CREATED, TRIAL, SEED = "run_info.status", "run_info.created_at", "run_info.trial", naming.SEED
PACKED, PERCENTILES = "run_info.packed_with", ("_p50", "_p95", "_p99")
TASK = (
    *("choices.model", "config.model.name_or_path", "choices.dataset", "config.dataset.path", "config.dataset.name"),
    *("config.dataset.test_path", "config.dataset.hub", "config.dataset.revision"),
)
TASK_COLUMNS = ("choices.model", "choices.dataset")  # by the name of a task
# The figure of a line of predictions that a metric is the mean of.
CORRECT_COLUMNS = {"accuracy": "correct", "acc": "correct", "acc_norm": "correct_norm"} | TEXT_PARTS
MAX_COMPARED = 40  # the best configurations, whose pairs are compared row by row
MAX_READ = 400  # trials; of a larger study no predictions are read


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
        keys = [key for key in called.settings if key not in TASK_COLUMNS]
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


def identify(table: pd.DataFrame) -> pd.Series[int]:
    """The number of each trial's configuration, counted from 0 in the order of their first trials.

    A table may carry it as its column ``configuration``, which is then taken as it is.
    """
    if "configuration" in table:
        return table["configuration"]
    keys = table[setting_columns(table)]
    if keys.empty:
        return pd.Series(0, index=table.index)
    return keys.astype("string").fillna("").groupby(list(keys.columns), sort=False).ngroup()


def one_a_seed(table: pd.DataFrame, numbers: pd.Series[int]) -> pd.DataFrame:
    """The trials without repetitions: of those with the same configuration and seed, what the newest good one says.

    A repeated seed is no second draw: it gives the same numbers again.
    """
    if "configuration" in table:
        table = table.drop(columns="configuration")
    seed = table[SEED] if SEED in table else pd.Series(0, index=table.index)
    codes = pd.factorize(seed)[0] + 1  # of a missing seed 0
    pairs = numbers.to_numpy(dtype=np.int64) * (codes.max(initial=0) + 1) + codes
    if len(np.unique(pairs)) == len(pairs):
        return table.assign(configuration=numbers)
    keys = [numbers.rename("configuration"), seed.rename("seed")]
    columns = [c for c in (SUCCESS, CREATED) if c in table]
    order = table[columns].assign(good=table[SUCCESS].eq(Status.success.name)).sort_values(["good", *columns[1:]]).index
    kept = table.loc[order].groupby([key.loc[order] for key in keys], sort=False, dropna=False).last().copy()
    return kept.reset_index("configuration").reset_index(drop=True).sort_values("configuration", kind="stable")


def is_share(column: str, values: pd.Series[float]) -> bool:
    """Whether a column is a share of test rows, such as an accuracy."""
    if not column.endswith(".value") or direction(column) < 0 or evaluation(column)[1] in OF_100:
        return False
    numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
    return bool(((numbers >= 0) & (numbers <= 1) | np.isnan(numbers)).all())


def binomial(column: str, value: pd.Series[float], stderr: pd.Series[float], n: pd.Series[float]) -> pd.Series[bool]:
    """Which scores are shares of right rows, as far as value, standard error and number of rows can tell."""
    alike = np.isclose(stderr.fillna(0.0) ** 2 * (n - 1), value * (1 - value))
    return pd.Series(alike & is_share(column, value) & (n > 0), index=value.index)


def is_ratio(column: str, values: Iterable[float]) -> bool:
    """Whether a column is compared by ratios, which perplexities and costs are, and not by differences."""
    cost = not column.endswith(".value") and direction(column) != 0 and not column.endswith(("loss", "fraction"))
    known = [value for value in values if not pd.isna(value)]
    return ("perplexity" in column.rpartition(".value")[0] or cost) and all(value > 0 for value in known)


def as_floats(values: Any) -> Floats:
    """``values`` as a float64 array of the same shape."""
    return np.asarray(values, dtype=np.float64)
