"""What each factor of a study does, as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from peftsweep.analysis.statistics import effects, rungs, trials
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.text import factor_findings, findings, words
from peftsweep.analysis.text.words import ADAPTER, PARAMETERS, SECONDS, SPEED

APPROXIMATE = "≈ marks a difference that may be chance."
MAX_NAMED = 12  # methods; with more, their budgets are given as ranges


def standing_cell(row: pd.Series[Any]) -> str:
    """The cell of a ranking: ``worse than another`` is worse than one that ties with the best, not than the best."""
    other = row["verdict"] == "worse" and row["p_adjusted"] >= trials.ALPHA
    return "worse than another" if other else {"best": "**best**", "unknown": "?"}.get(row["verdict"], row["verdict"])


def factor_section(task: Task, factor: str, mark: str, figures: Sequence[str]) -> Iterator[str]:
    """The section of one factor in RESULTS.md; empty where nothing is known."""
    name, lines = columns.factor_name(factor), [*_told(task, factor), "", *figures]
    if any(lines):
        yield f"## {name[0].upper()}{name[1:]}{mark}"
        yield ""
        yield from lines


def _told(task: Task, factor: str) -> Iterator[str]:
    """Tables and sentences of a factor."""
    measured = [column for column in (task.memory, SECONDS, ADAPTER) if column and column in task.table]
    quality = {score: task.effects(score, factor) for score in task.scores}
    of_first = quality.values() if quality else (task.effects(column, factor) for column in measured)
    first = next((found for found in of_first if len(found)), None)
    if first is not None:
        reference = str(first["reference"].iloc[0])
        costs = {column: task.effects(column, factor, reference) for column in measured}
        yield from words.table(_levels(task, factor, reference, quality, costs))
        if len(task.factors) > 1:
            contexts = sorted(set(first["contexts"]))
            over = f"{contexts[0]} to {contexts[-1]}" if len(contexts) > 1 else str(contexts[0])
            averaged = f"Averaged over the {over} settings of the other factors that have both levels."
            yield f"{averaged if contexts[-1] > 1 else 'In the one setting that has both levels.'} {APPROXIMATE}"
            yield ""
        if not quality and (moving := task.design.moving(factor)):
            yield f"- Together with the {columns.factor_name(factor)} changed {', '.join(map(task.names.key, moving))}."
        yield from (
            f"- {line}" for score in task.scores for line in factor_findings.score_findings(task, factor, score)
        )
        yield from (f"- {line}" for line in factor_findings.cost_findings(task, factor, costs))
    elif task.design.levels[factor].nunique() > effects.MAX_LEVELS:
        yield from _trend(task, factor)
    elif task.scores:
        yield from _best_of_each(task, factor)
    yield from _budget(task, factor)


def _levels(
    task: Task,
    factor: str,
    reference: str,
    quality: Mapping[str, pd.DataFrame],
    costs: Mapping[str, pd.DataFrame],
) -> list[dict[str, str]]:
    """A row a level: its scores and costs, and how they differ from the reference's."""
    tables = [*quality.values(), *costs.values()]
    levels = {level: None for found in tables for level in [*found["reference"], *found["level"]]}
    counts = {int(count) for found in tables for count in found["contexts"]}
    rows = []
    for level in sorted(levels, key=columns.sortable):
        row = {columns.factor_name(factor): columns.level_name(factor, level, task.names)}
        for score, found in quality.items():
            row |= _score_cells(task, factor, score, found, level, several=counts != {1})
        for column, found in costs.items():
            row[columns.factor_name(column)] = _cost_cell(column, found, level, reference, several=counts != {1})
        rows.append(row)
    return rows


def _score_cells(
    task: Task, factor: str, score: str, found: pd.DataFrame, level: str, *, several: bool
) -> dict[str, str]:
    """A level's score and how it differs from the reference's, both over the settings that have the two."""
    if found.empty:
        return {}
    title, first = columns.score_name(score), found.iloc[0]
    against = f"{title} against {columns.level_name(factor, first['reference'], task.names)}"
    if level == first["reference"]:
        one = found["reference_value"].round(12).nunique() == 1  # else each level is held against other settings
        return {title: words.number(first["reference_value"]) if one else "", against: ""}
    mine = found[found["level"] == level]
    if mine.empty:
        return {title: "", against: ""}
    row = mine.iloc[0]
    difference = words.difference(row)
    if found["reference_value"].round(12).nunique() > 1:
        difference += f", from {words.number(row['reference_value'])}"
    return {title: words.number(row["value"]), against: difference + _settings(row, several)}


def _cost_cell(column: str, found: pd.DataFrame, level: str, reference: str, *, several: bool) -> str:
    mine = found[found["level"] == level]
    if mine.empty:
        return "=" if level == reference else ""
    return words.change(column, mine.iloc[0]) + _settings(mine.iloc[0], several)


def _settings(row: pd.Series[Any], several: bool) -> str:
    """Over how many settings a cell is averaged, where that is not one everywhere."""
    return f" ({words.plural('setting', row['contexts'])})" if several else ""


def _best_of_each(task: Task, factor: str) -> Iterator[str]:
    """Where levels share no other setting: the best configuration of each."""
    several = False
    for score in task.scores:
        compared = task.compare(score)
        level = task.configurations.loc[compared.index, factor].astype("string").fillna("")
        if level[level != ""].nunique() < 2:
            continue
        several = True
        rows = []
        for number in level[level != ""].drop_duplicates().index:
            row = compared.loc[number]
            rows.append(
                {
                    columns.factor_name(factor): columns.level_name(factor, level[number], task.names),
                    "best configuration": task.labels[number],
                    columns.score_name(score): findings.value_of(task, score, number),
                    "against the best": words.difference(row) if row["verdict"] != "best" else "",
                    "": standing_cell(row),
                    **cost_cells(task, number),
                }
            )
        yield from words.table(rows)
    if several:
        yield "The levels share no setting of the other factors, so this compares the best configuration of each."
        yield ""


def _trend(task: Task, factor: str) -> Iterator[str]:
    """A factor of many values: whether scores rise with it."""
    levels = pd.to_numeric(task.design.levels[factor], errors="coerce").astype("float64")
    yield f"{task.design.levels[factor].nunique()} values."
    yield ""
    for score in task.scores:
        found = rungs.rank_correlation(levels.tolist(), task.configurations[score].reindex(levels.index).tolist())
        if words.known(found.low):
            yield (
                f"- {columns.score_name(score)}: Spearman's correlation with it is {found.rho:.2f} "
                f"[{found.low:.2f}, {found.high:.2f}] over {found.n} configurations, whatever else differs."
            )


def _budget(task: Task, factor: str) -> Iterator[str]:
    if factor != columns.METHOD:
        return
    found = effects.budget(task.table)
    unequal = [c for c in found.columns if found[c][found[c] > 0].nunique() > 1]
    if unequal:
        each = len(found) <= MAX_NAMED
        text = "; ".join(
            f"{column.replace('_', ' ')}: "
            + ", ".join(f"{method} {value:g}" for method, value in found[column].items() if each)
            + ("" if each else f"{found[column].min():g} to {found[column].max():g}")
            for column in unequal[:3]
        )
        yield ""
        yield f"**Unequal budgets**: the methods were not given the same tries ({text})."
        yield "More tries find a better best by luck alone."


def cost_cells(task: Task, number: Any) -> dict[str, str]:
    """The costs that are known of configuration ``number``, in words, by their headings in the table."""
    memory = {task.memory: columns.factor_name(task.memory)} if task.memory else {}
    shown = {PARAMETERS: "trainable", ADAPTER: "adapter"} | memory | {SECONDS: "train", SPEED: "tokens/s"}
    row = task.row(number, tuple(shown))
    return {name: words.cost(c, row[c]) for c, name in shown.items() if c in row and words.known(row[c])}
