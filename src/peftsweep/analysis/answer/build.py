"""A study's tables -> its answer: the sections in the order in which a reader needs them."""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import peftsweep
from peftsweep.analysis.answer import decided, failures, kept, measurements, render, tables, warned
from peftsweep.analysis.answer.structure import (
    CHOICES,
    COSTS,
    SCHEMA_VERSION,
    SURE,
    USE,
    Answer,
    Base,
    Certainty,
    Choice,
    Choices,
    Comparison,
    CostFact,
    Costs,
    Judged,
    Need,
    Score,
    Section,
    Use,
    number,
)
from peftsweep.analysis.statistics import trials
from peftsweep.analysis.statistics.task import Task
from peftsweep.analysis.table import columns
from peftsweep.analysis.table.columns import PREDICTED
from peftsweep.analysis.text import findings, recommendations, searches, words
from peftsweep.analysis.text.searches import Search
from peftsweep.study import record, store
from peftsweep.study.reading import read_yaml, usable
from peftsweep.study.scores import baseline

COVERS = {
    "seeds and rows": "other seeds and other test rows",
    "rows": "other test rows, but not other seeds",
    "seeds": "other seeds on the same test rows",
}


def answer(
    folder: Path,
    table: pd.DataFrame,
    tasks: Sequence[Task],
    steps: pd.DataFrame,
    quality_loss: float = recommendations.QUALITY_LOSS,
) -> Answer:
    """The answer of the study in ``folder``: ``table`` has a row a trial, ``steps`` a row a logged step."""
    statuses = Counter(table[trials.SUCCESS]) if len(table) else Counter[str]()
    if len(table) and columns.CALLED not in table:
        table = table.assign(**{columns.CALLED: columns.named_trials(table)})
    found, several = searches.decisions(folder), len(tasks) > 1
    of_tasks = [part for task in tasks for part in _task_sections(folder, task, several, quality_loss, found)]
    task_names = {part.name for part in of_tasks}
    after = [decided.section(one) for one in found if one.name not in task_names]
    after += [part for part in (kept.section(table), failures.section(table)) if part]
    after += warned.section(tasks)
    after += [part for task in tasks for part in _tables(task, steps, several)]
    return Answer(
        SCHEMA_VERSION,
        peftsweep.__version__,
        record.now(),
        folder.name,
        folder.as_posix(),
        {str(status): int(count) for status, count in statuses.items()},
        sum(len(task.configurations) for task in tasks),
        [*of_tasks, *after],
    )


def _task_sections(
    folder: Path, task: Task, several: bool, quality_loss: float, found: Sequence[Search]
) -> Iterator[Section]:
    """What to use, what a search decided, how sure that is, what each choice was worth and what it costs."""
    name, mine = task.name if several else "", decided.task_searches(found, task, alone=not several)
    advice = decided.advice(task, findings.advice(task), mine)
    use = _use(folder, task, advice, quality_loss)
    yield Section(USE, "What to use", list(_use_sentences(use, advice)), use, task=name)
    yield from (decided.section(one, name) for one in mine)
    if not len(task.configurations):
        return
    sure, worth = list(findings.certainty(task)), list(findings.choices(task))
    placebo = next((one.decision.placebo for one in mine if one.decision.placebo), None)
    sure += [decided.luck(placebo)] if placebo else []
    if sure:
        judged = [_judged(task, score) for score in task.scores]
        yield Section(SURE, "How sure that is", sure, Certainty(task.seeds, judged, placebo), task=name)
    if worth:
        made = [choice for factor in task.factors if (choice := _choice(task, factor)) is not None]
        yield Section(CHOICES, "What each choice was worth", worth, Choices(made), task=name)
    costs = _costs(task, advice.chosen)
    if costs.costs:
        yield Section(COSTS, "What it costs", list(_cost_sentences(task, costs)), costs, task=name)


def _tables(task: Task, steps: pd.DataFrame, several: bool) -> Iterator[Section]:
    """The table of the configurations, and a section for everything else that was measured."""
    name = task.name if several else ""
    if len(task.configurations):
        yield Section("table", "The configurations", [], tables=tables.score_tables(task), task=name)
        yield from measurements.sections(task, steps, name)


# ---- what to use -------------------------------------------------------------------------------------


def _use(folder: Path, task: Task, advice: findings.Advice, quality_loss: float) -> Use:
    needs = [
        Need(need, task.labels[n], why)
        for score in task.scores[:1]
        if len(task.compare(score)) > 1 and advice.verdict != "none" and not findings.no_gain(task, score)
        for need, n, why in recommendations.uses(task, score, quality_loss)
    ]
    if advice.chosen is None:
        nothing: Any = (None, None, None, [], needs, advice.decided_by)
        return Use(advice.verdict, None, {}, None, render.plain(advice.why), *nothing)  # type: ignore[arg-type]
    rows = task.table[task.table["configuration"] == advice.chosen]
    trained = rows[rows[trials.SUCCESS] == "success"]
    if task.scores and (scored := np.isfinite(trained[task.scores[0]].astype("float64"))).any():
        trained = trained[scored]  # a seed that diverged is not the configuration that is advised
    good = (trained if len(trained) else rows).sort_values([c for c in (trials.SEED, trials.CREATED) if c in rows])
    names = [str(name) for name in good[trials.TRIAL]]
    place = folder / names[0]
    saved = place / store.ADAPTER
    return Use(
        advice.verdict,  # type: ignore[arg-type]
        task.labels[advice.chosen],
        _settings(task, good.iloc[0]),
        score_of(task, task.scores[0], advice.chosen) if task.scores else None,
        render.plain(advice.why),
        command(place),
        place.as_posix() if place.is_dir() else None,
        saved.as_posix() if saved.is_dir() and any(saved.iterdir()) else None,
        names,
        needs,
        advice.decided_by,  # type: ignore[arg-type]
    )


def _settings(task: Task, row: pd.Series[Any]) -> dict[str, Any]:
    """What makes the configuration: its choices, and the settings that vary in the study."""
    keys = [c for c in row.index if str(c).startswith("choices.")]
    keys += [c for c in (columns.RANK, *task.design.settings.columns) if c in row.index and c not in keys]
    return {key: row[key].item() if hasattr(row[key], "item") else row[key] for key in keys if words.known(row[key])}


def _use_sentences(use: Use, advice: findings.Advice) -> Iterator[str]:
    yield advice.sentence
    if use.command:
        yield f"Train it with: {words.code(use.command, exact=True)}"
    if use.folder:
        what = "Its trained adapter is in" if use.adapter else "Its trial is in"
        others = len(use.trials) - 1
        seeds = f" (the first of {len(use.trials)} seeds)" if others else ""
        yield f"{what} {words.code(use.adapter or use.folder)}{seeds}."


def command(trial: Path) -> str | None:
    """The command that runs a trial again, from the overrides that Hydra kept; None where there are none.

    What changes no number of the trial is left out: whether done ones are run again, and how a search chose. Of a
    search the steps between two validations stay, as the rows of a validation are not trained on.
    """
    file = trial / ".hydra" / "overrides.yaml"
    found = usable(lambda: read_yaml(file, [str])) if os.path.lexists(file) else None
    if found is None:
        return None
    every = "train.eval_every="
    has_key = any(word.startswith(every) for word in found)
    words = found if has_key else [word.replace("halving.min_steps=", every, 1) for word in found]
    if any(word.startswith(every) for word in words):  # else rungs of rows may say how often
        words = [word for word in words if not word.startswith("halving.")]
    return "peftsweep " + " ".join(_quoted(word) for word in words if not word.startswith("force="))


def _quoted(word: str) -> str:
    """A word for a shell, in one line whatever it holds."""
    if word.isprintable():
        return shlex.quote(word)
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", "'": "\\'"}
    return "$'" + "".join(known.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in word) + "'"


# ---- how sure ----------------------------------------------------------------------------------------


def score_of(task: Task, score: str, configuration: Any) -> Score:
    """A configuration's score with its interval."""
    row, (evaluation, metric) = task.row(configuration, score), columns.evaluation(score)
    value, low, high = (number(row.get(score + end)) for end in ("", ".low", ".high"))
    return Score(columns.score_name(score), evaluation, metric, value, low, high, columns.better(score))


def _judged(task: Task, score: str) -> Judged:
    compared, (name, metric) = task.compare(score), columns.evaluation(score)
    best, first = compared.index[0], compared.iloc[0]
    facts = {key: value for key, value in task.facts(best, name).items() if words.known(value)}
    chance = first["chance"]
    rows = facts.get(f"{metric}.n")
    return Judged(
        score_of(task, score, best),
        task.labels[best],
        [task.labels[n] for n in task.tied(score) if n != best],
        int(compared["verdict"].eq("worse").sum()),
        COVERS.get(chance) if isinstance(chance, str) else None,
        None if rows is None else round(rows),
        _base(task, score, first),
        number(baseline(facts, metric, "majority")),
        number(baseline(facts, metric, "random")),
    )


def _base(task: Task, score: str, first: pd.Series[Any]) -> Base | None:
    value = number(task.row(first.name, columns.base_of(score)).get(columns.base_of(score)))
    if value is None:
        return None
    gain, low, high, p = (number(first[key]) for key in ("gain", "gain_low", "gain_high", "gain_p_adjusted"))
    return Base(value, gain, low, high, p, first["scale"] if gain is not None else None)


# ---- what each choice was worth ----------------------------------------------------------------------


def _choice(task: Task, factor: str) -> Choice | None:
    score = task.scores[0]
    found = task.effects(score, factor)
    if found.empty:
        return None
    names, rows = task.names, found.to_dict("records")
    levels = sorted({*found["level"], *found["reference"]}, key=columns.sortable)
    return Choice(
        columns.factor_name(factor),
        factor,
        columns.score_name(score),
        columns.better(score),
        rows[0]["scale"],
        [columns.level_name(factor, level, names) for level in levels],
        [_comparison(task, factor, row) for row in rows],
    )


COMPARED = ("value", "reference_value", "difference", "low", "high", "p_adjusted")


def _comparison(task: Task, factor: str, row: Mapping[Any, Any]) -> Comparison:
    level, reference = (columns.level_name(factor, row[key], task.names) for key in ("level", "reference"))
    value, against, difference, low, high, p = (number(row[key]) for key in COMPARED)
    moved = list(dict.fromkeys(task.names.key(one.key) for one in row["moved"]))
    over = int(row["contexts"])
    return Comparison(level, reference, value, against, difference, low, high, p, row["verdict"], over, moved)


# ---- what it costs -----------------------------------------------------------------------------------


def _costs(task: Task, chosen: Any) -> Costs:
    configs, found = task.configurations, []
    for cost in columns.costs(configs):
        values = configs[cost.column].dropna().astype(float)
        mine = number(configs.loc[chosen, cost.column]) if chosen is not None else None
        unit: Any = cost.unit or "count"
        source: Any = "predicted" if cost.column == PREDICTED else "measured"
        ends = float(values.min()), float(values.max())
        found.append(CostFact(columns.factor_name(cost.column), cost.column, unit, mine, *ends, source))
    return Costs(None if chosen is None else task.labels[chosen], found)


def _cost_sentences(task: Task, costs: Costs) -> Iterator[str]:
    mine = [f"{one.name} {words.cost(one.column, one.value)}" for one in costs.costs if one.value is not None]
    if costs.configuration and mine:
        yield f"{words.code(costs.configuration)}: {', '.join(mine)}."
    ends = [(one.name, *(words.cost(one.column, v) for v in (one.lowest, one.highest))) for one in costs.costs]
    if ranges := [f"{name} {low} to {high}" for name, low, high in ends if low != high]:
        yield f"All {words.plural('configuration', len(task.configurations))}: {', '.join(ranges)}."
    timed = [one for one in costs.costs if one.unit == "seconds" and one.lowest != one.highest]
    if timed and task.several_places:
        yield (
            f"**Seconds of several devices or conditions** ({task.several_places}): a difference may be theirs, and "
            "only configurations that ran under the same are compared by their speed."
        )
    if columns.measured(task.table, columns.PREDICTION_ERROR):
        median = float(task.table[columns.PREDICTION_ERROR].dropna().astype(float).median())
        if math.isfinite(median):
            yield f"Predicted training memory differs from the measured by {median:+.0%} (median)."
