"""The configurations of a task as tables: scores and costs, and where there are several tests, a matrix of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from peftsweep.analysis.answer.structure import Column, Table, number
from peftsweep.analysis.statistics import trials
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.study.scores import baseline

MAX_ROWS = 100  # configurations of a table
AVERAGE = "average"


def score_tables(task: Task) -> list[Table]:
    """What the configurations score and cost, the best first; and the matrix where there is one."""
    order, shown = best_first(task), task.scores
    costs = columns.costs(task.configurations)
    heads = [Column("configuration", "configuration"), Column("seeds", "seeds", "count")]
    heads += [Column(score, columns.score_name(score), "score") for score in shown]
    heads += [Column(cost.column, columns.factor_name(cost.column), cost.unit or "count") for cost in costs]  # type: ignore[arg-type]
    rows = [
        {"configuration": task.labels[n], "seeds": int(task.row(n, "n")["n"])}
        | {key: value for score in shown for key, value in score_cells(task, score, n).items()}
        | {cost.column: number(task.configurations.at[n, cost.column]) for cost in costs}
        for n in order[:MAX_ROWS]
    ]
    scores = Table("Scores and costs", heads, rows, left_out=max(0, len(order) - MAX_ROWS))
    return [scores, *filter(None, [matrix(task)])]


def best_first(task: Task) -> list[Any]:
    """The numbers of the configurations, the best by the first score first, and those without it last."""
    numbers = list(task.configurations.index)
    if not task.scores:
        return numbers
    ranked = list(task.compare(task.scores[0]).index)
    known = set(ranked)
    return ranked + [n for n in numbers if n not in known]


def score_cells(task: Task, score: str, configuration: Any) -> dict[str, float | None]:
    """A score and its interval, by the keys of a row."""
    row = task.row(configuration, score)
    return {score + end: number(row.get(score + end)) for end in ("", ".low", ".high")}


def shares(task: Task) -> list[str]:
    """The headline scores that are shares of test rows, of which an average over tests can be taken."""
    configs = task.configurations
    return [score for score in task.scores if trials.is_share(score, configs[score]) and configs[score].notna().any()]


def matrix(task: Task) -> Table | None:
    """Configurations by tests, with their average, and what the base, chance and unreadable answers come to.

    None where fewer than two tests give a share of rows. An average is of all tests, or missing.
    """
    tests = shares(task)
    if len(tests) < 2:
        return None
    values = task.configurations[tests].astype(float)
    averages = values.mean(axis=1, skipna=False)
    order = averages.sort_values(ascending=False, na_position="last", kind="stable").index
    rows = [_row(task.labels[n], dict(zip(tests, values.loc[n], strict=True))) for n in order[:MAX_ROWS]]
    best = order[0]
    for name, found in _references(task, tests, best).items():
        if any(value is not None for value in found.values()):
            rows.append(_row(name, found))
    heads = [Column("configuration", "configuration"), Column(AVERAGE, AVERAGE, "score")]
    metrics = {columns.evaluation(test)[1] for test in tests}
    same = f", {metrics.pop()}" if len(metrics) == 1 else ""
    heads += [
        Column(test, columns.evaluation(test)[0] if same else columns.score_name(test), "score") for test in tests
    ]
    note = "The average is over all tests; it is missing where one of them is."
    return Table(f"Scores by test{same.replace('_', ' ')}", heads, rows, note, left_out=max(0, len(order) - MAX_ROWS))


def _row(name: str, values: dict[str, Any]) -> dict[str, Any]:
    known = {test: number(value) for test, value in values.items()}
    whole = [value for value in known.values() if value is not None]
    return {"configuration": name, AVERAGE: float(np.mean(whole)) if len(whole) == len(known) else None, **known}


def _references(task: Task, tests: list[str], best: Any) -> dict[str, dict[str, float | None]]:
    """What each test's scores are held against: the best configuration's base, chance, and answers that can be read."""
    found: dict[str, dict[str, float | None]] = {}
    for test in tests:
        name, metric = columns.evaluation(test)
        facts = {key: value for key, value in task.facts(best, name).items() if not pd.isna(value)}
        valid = [key for key in facts if key.endswith("valid_fraction.value") and not key.startswith("base_")]
        beside = {
            "untouched base": facts.get(f"base_{metric}.value"),
            "always the most frequent answer": baseline(facts, metric, "majority"),
            "guessing": baseline(facts, metric, "random"),
            "answers that can be read": min((facts[key] for key in valid), default=None),
        }
        for row, value in beside.items():
            found.setdefault(row, {})[test] = number(value)
    return found
